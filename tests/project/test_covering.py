"""Coverings have every combination that they promise, in few rows."""

from __future__ import annotations

import itertools

import pytest
from covering import covering

CHOICES = [[*"abcdefgh"], [0, 1], [None, "x", "y"], [True, False]]


@pytest.mark.parametrize(("strength", "most"), [(1, 8), (2, 30), (3, 65), (4, 96)])
def test_all_combinations_meet(strength, most):
    rows = covering(*CHOICES, strength=strength)
    assert max(map(len, CHOICES)) <= len(rows) <= most and len(set(rows)) == len(rows)
    assert rows == covering(*CHOICES, strength=strength)
    for at in itertools.combinations(range(len(CHOICES)), strength):
        met = {tuple(row[i] for i in at) for row in rows}
        assert met == {*itertools.product(*(CHOICES[i] for i in at))}


def test_one_parameter_is_its_values():
    assert covering([3, 1, 2], strength=1) == [(3,), (1,), (2,)]
