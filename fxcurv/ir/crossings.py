"""Sums over ranks that autograd follows, for `create_graph=True` under `mesh=`.

A sum over ranks has derivative one in each rank's term. The cotangent of a value that all ranks have, and that each
reads for its own samples, is the sum of all ranks' cotangents. So each of the two is the other's backward (f and g of
Shoeybi et al. 2019, "Megatron-LM: Training multi-billion parameter language models using model parallelism").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxcurv.ir.ranks import all_reduce, packed, unpacked


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: str) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return _Add.apply(g, ctx.group), None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: str) -> Tensor:
        ctx.group = group
        return all_reduce(t.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return _Read.apply(g, ctx.group), None


@dataclass(frozen=True)
class Read:
    """A value that all ranks have, as a rank reads it for its own samples."""

    group: str
    __name__: ClassVar[str] = "read_by_each"
    __qualname__: ClassVar[str] = "crossings"
    over_ranks: ClassVar[str] = "read"

    def __call__(self, t: Tensor) -> Tensor:
        return _Read.apply(t, self.group)

    def alone(self) -> Callable:
        return _itself


@dataclass(frozen=True)
class Sum:
    """Terms -> their sums over the ranks of a group; `triangles`: which of them are symmetric matrices."""

    triangles: tuple[bool, ...]
    group: str
    __name__: ClassVar[str] = "sums"
    __qualname__: ClassVar[str] = "crossings"
    over_ranks: ClassVar[str] = "sum"

    def __call__(self, terms: Sequence[Tensor]) -> list[Tensor]:
        sums = unpacked(self.triangles, _Add.apply(torch.cat(packed(self.triangles, terms)), self.group), terms)
        # a term without a gradient may travel beside one that has
        return [s if t.requires_grad else s.detach() for s, t in zip(sums, terms, strict=True)]

    def alone(self) -> Callable:
        return list


@dataclass(frozen=True)
class Rows:
    """This rank's samples along a dimension -> those of all ranks, in order.

    It is the sum over ranks of tensors that are zero except for the rank's own samples. Called with the samples, the
    number of samples on all ranks, and the number of the first one here.
    """

    dim: int
    group: str
    __name__: ClassVar[str] = "rows_of_all"
    __qualname__: ClassVar[str] = "crossings"
    over_ranks: ClassVar[str] = "rows"

    def __call__(self, t: Tensor, total: int, first: Tensor) -> Tensor:
        out = self._zeros(t, total)
        out.narrow(self.dim, int(first), t.shape[self.dim]).copy_(t)
        return _Add.apply(out, self.group)

    def nothing(self, t: Tensor, total: int) -> Tensor:
        """The same collective, for a rank without samples."""
        return all_reduce(self._zeros(t, total), self.group)

    def _zeros(self, t: Tensor, total: int) -> Tensor:
        shape = [total if d == self.dim else int(size) for d, size in enumerate(t.shape)]
        return torch.zeros(shape, dtype=t.dtype, device=t.device)

    def value(self, t: Tensor, total: Any, first: Tensor) -> Tensor:
        """A fake value, whose sizes count the samples of one process."""
        return torch.empty_like(t)

    def alone(self) -> Callable:
        return _itself


@dataclass(frozen=True)
class Untraced:
    """A function that runs untraced: a trace would take the samples of this rank and of all ranks for one size."""

    fn: Callable
    static: tuple
    __name__: ClassVar[str] = "untraced"
    __qualname__: ClassVar[str] = "crossings"

    def __call__(self, *values: Any) -> Any:
        return self.fn(*values, *self.static)

    value = __call__


def _itself(t: Tensor, *_: Any) -> Tensor:
    return t
