"""Few rows of parameters in which all pairs of their values meet, instead of the full product."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any


def covering(*choices: Sequence[Any], strength: int = 2) -> list[tuple]:
    """Rows of one value of each parameter: any `strength` values of different parameters meet in one of them.

    The next combination that no row has begins a row; the other values are those that bring most new combinations, of these
    the least used. Equal arguments give equal rows.
    """
    places = [*itertools.combinations(range(len(choices)), strength)]
    left = {(at, of): None for at in places for of in itertools.product(*(range(len(choices[i])) for i in at))}
    used: Counter[tuple[int, int]] = Counter()
    rows = []

    def brought(row: dict[int, int], i: int, value: int) -> list[tuple]:
        """The combinations of a row's values with another one that no row has."""
        wider = {**row, i: value}
        found = [(at, tuple(wider[k] for k in at)) for at in places if i in at and all(k in wider for k in at)]
        return [combination for combination in found if combination in left]

    while left:
        row = dict(zip(*next(iter(left)), strict=True))
        for i in sorted(set(range(len(choices))) - set(row)):
            row[i] = max(range(len(choices[i])), key=lambda v, i=i, row=row: (len(brought(row, i, v)), -used[i, v]))
        for i, value in row.items():
            for combination in brought(row, i, value):
                left.pop(combination, None)
            used[i, value] += 1
        rows.append(tuple(of[row[i]] for i, of in enumerate(choices)))
    return rows
