"""A part of a graph that runs chunk by chunk along positions: see `passes.chunks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxcurv.ir.placement import Shard
from fxcurv.ir.precision import wide

# A chunk has LEAST positions, counted over all samples, or more while its widest value stays within ROOM bytes.
LEAST, ROOM = 32, 4 << 20


@dataclass(frozen=True, eq=False)
class Chunked:
    """A node's target: runs `part` chunk by chunk, on slices of the arguments along an axis of positions.

    Attributes:
        part: (number of positions, *totals, *arguments) -> values; some of its sizes are computed from that number.
        count: how many positions there are.
        given: for each argument, where its positions are; None if every chunk reads all of it.
        made: for each value, where its positions are; None for a sum over positions.
        own: for each value, whether the part itself adds to the total, which it is given (None for the first chunk).
        entries: the number of entries per position and sample, in the first argument that has positions.
        bytes: the number of bytes per position and sample, in the widest value.
    """

    part: fx.GraphModule
    count: int
    given: tuple[Shard | None, ...]
    made: tuple[Shard | None, ...]
    own: tuple[bool, ...]
    entries: int
    bytes: int
    __name__: ClassVar[str] = "chunked"
    __qualname__: ClassVar[str] = "chunked"

    def size(self, args: Sequence[Any]) -> int:
        """How many positions a chunk has, the last one perhaps fewer."""
        first = next(a for a, place in zip(args, self.given, strict=True) if place)
        samples = max(1, first.numel() // (self.entries * self.count))
        most = max(1, LEAST // samples, ROOM // (samples * self.bytes))
        chunks = -(-self.count // most)
        return -(-self.count // chunks)

    def __call__(self, *args: Any, begun: dict[int, Tensor] | None = None) -> list[Tensor]:
        """The values of all positions.

        Args:
            begun: totals to add to, by the value's number, of values that the part adds up itself.
        """
        size, totals = self.size(args), [(begun or {}).get(k) for k in range(len(self.made))]
        pieces: list[list[Tensor]] = [[] for _ in self.made]
        for start in range(0, self.count, size):
            here = min(size, self.count - start)
            given = [
                a if p is None else self._positions_of(a, p, start, here) for a, p in zip(args, self.given, strict=True)
            ]
            values = list(self.part(here, *(t for t, own in zip(totals, self.own, strict=True) if own), *given))
            dtypes = [v.dtype for v in values]
            for k, place in enumerate(self.made):
                value = values.pop(0)  # so that a term dies when it is added
                if place is not None:
                    pieces[k].append(value)
                elif (known := totals[k]) is None or self.own[k]:
                    totals[k] = value if self.own[k] else value.to(wide(value.dtype), copy=True)
                else:
                    known.add_(value)
        ends = [self._join(p, made) if t is None else t for t, p, made in zip(totals, pieces, self.made, strict=True)]
        return [end.to(dtype) for end, dtype in zip(ends, dtypes, strict=True)]

    def _positions_of(self, t: Tensor, place: Shard, start: int, size: int) -> Tensor:
        """Some positions of an argument, contiguous: not every kernel heeds the strides of a slice."""
        outer = t.shape[place.dim] // (self.count * place.inner)
        if outer == 1:
            return t.narrow(place.dim, start * place.inner, size * place.inner).contiguous()
        apart = t.unflatten(place.dim, (outer, self.count * place.inner))
        some = apart.narrow(place.dim + 1, start * place.inner, size * place.inner)
        return some.flatten(place.dim, place.dim + 1).contiguous()

    def _join(self, values: list[Tensor], place: Any) -> Tensor:
        if len(values) == 1:
            return values[0]
        outer = sum(v.shape[place.dim] for v in values) // (self.count * place.inner)
        if outer == 1:
            return torch.cat(values, place.dim)
        apart = torch.cat([v.unflatten(place.dim, (outer, -1)) for v in values], place.dim + 1)
        return apart.flatten(place.dim, place.dim + 1)
