"""Sums over ranks that autograd follows, for `create_graph=True` under `mesh=`.

A sum over ranks has the derivative one in each rank's term. A value that all ranks have, and that each reads for its own samples,
has as its derivative the sum over ranks of theirs. Each is the other's backward (f and g of Shoeybi et al. 2019, "Megatron-LM:
Training multi-billion parameter language models using model parallelism").
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
    """A value that all ranks have, where a rank reads it for what is its own."""

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


def _itself(t: Tensor) -> Tensor:
    return t
