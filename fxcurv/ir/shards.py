"""Parameters of which every rank holds a shard: how graphs gather them, and scatter a sum over ranks into shards.

A parameter is cut along one dimension as by `torch.chunk`: all pieces but the last ones have `rows` rows; for a
collective, every piece is filled up to that. Targets of nodes are objects here, which hold the static arguments, like
those of `contract` nodes; `alone` is what one process computes in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fxcurv.ir.private import group_named
from fxcurv.ir.ranks import packed, unpacked


@dataclass(frozen=True)
class Cut:
    """How a parameter is cut: its shape, the dimension, the number of pieces, and which of them is this rank's."""

    shape: tuple[int, ...]
    dim: int
    size: int
    rank: int

    @property
    def rows(self) -> int:
        """The length of a piece along the dimension, except for the last ones."""
        return -(-self.shape[self.dim] // self.size)

    @property
    def own(self) -> int:
        """The length of this rank's piece along the dimension."""
        return min(max(self.shape[self.dim] - self.rank * self.rows, 0), self.rows)

    @property
    def numel(self) -> int:
        """The number of entries of a piece that is filled up."""
        return self.rows * math.prod(self.shape) // max(self.shape[self.dim], 1)

    def local(self) -> tuple[int, ...]:
        """The shape of this rank's piece."""
        return (*self.shape[: self.dim], self.own, *self.shape[self.dim + 1 :])

    def filled(self, t: Tensor, rows: int) -> Tensor:
        """`t` filled up with zeros to `rows` rows, flat."""
        t = t.movedim(self.dim, 0)
        missing = rows - t.shape[0]
        return torch.cat([t, t.new_zeros(missing, *t.shape[1:])]).reshape(-1) if missing else t.reshape(-1)

    def of(self, t: Tensor) -> Tensor:
        """This rank's piece of `t`, in memory of its own."""
        return t.narrow(self.dim, min(self.rank * self.rows, t.shape[self.dim]), self.own).clone()

    def back(self, flat: Tensor, rows: int) -> Tensor:
        """The first `rows` rows of a flat tensor from `filled`, in the parameter's layout."""
        rest = (*self.shape[: self.dim], *self.shape[self.dim + 1 :])
        t = flat.reshape(flat.numel() // max(math.prod(rest), 1), *rest)[:rows]
        return t.movedim(0, self.dim).contiguous()


@dataclass(frozen=True)
class Dtypes:
    """The dtypes that a mixed precision policy gives parameters.

    Attributes:
        own: the parameters' dtype; `computed`: the one in which they are gathered and the graph computes with them.
        reduced: the one in which terms of their results are added up over ranks, None for the terms' own.
    """

    own: torch.dtype
    computed: torch.dtype
    reduced: torch.dtype | None = None

    def result(self, computed: torch.dtype) -> torch.dtype:
        """The dtype of a result whose terms are of this one: the parameters' own, unless that is coarser."""
        return self.own if torch.finfo(self.own).eps <= torch.finfo(computed).eps else computed

    @property
    def mixed(self) -> bool:
        """Whether anything is of another dtype than the parameters."""
        return self.computed != self.own or self.reduced not in (None, self.own)

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype with the largest rounding error."""
        return max((self.own, self.computed, self.reduced or self.own), key=lambda dtype: torch.finfo(dtype).eps)


@dataclass(frozen=True)
class Bucket:
    """Parameters that are sent together: those of one module that `fully_shard` was called with, of one dtype.

    Attributes:
        names: the names of the parameters; `cuts`: how each is cut.
        group: the name of the process group whose ranks hold a shard each.
        replicas: the name of the group whose ranks hold the same shard, "" if there is none.
        dtypes: the dtypes of the parameters.
        again: whether they are gathered anew for the backward pass (`reshard_after_forward`).
        between: (name, size, this rank's number) of the group whose ranks each hold a larger piece from the forward
            pass on, which the backward pass gathers (`reshard_after_forward=<number of ranks>`).
    """

    names: tuple[str, ...]
    cuts: tuple[Cut, ...]
    group: str
    replicas: str
    dtypes: Dtypes
    again: bool = True
    between: tuple[str, int, int] | None = None

    def only(self, names: Container[str]) -> Bucket:
        """The bucket with only the parameters `names`."""
        kept = [(n, c) for n, c in zip(self.names, self.cuts, strict=True) if n in names]
        return replace(self, names=tuple(n for n, _ in kept), cuts=tuple(c for _, c in kept))

    def held(self) -> Bucket:
        """The bucket of the pieces that are held between the passes."""
        assert self.between is not None
        group, size, rank = self.between
        return replace(self, cuts=tuple(Cut(c.shape, c.dim, size, rank) for c in self.cuts), group=group, replicas="")


class _Named:
    """Base of targets that a graph shows by their `__name__`."""

    __qualname__: ClassVar[str] = "shards"


@dataclass(frozen=True)
class Begin(_Named):
    """This rank's shards -> all ranks', [size, sum of the pieces]; begins the collective, which `End` waits for."""

    bucket: Bucket
    __name__: ClassVar[str] = "begin_gather"
    over_ranks: ClassVar[str] = "gather"

    def __call__(self, shards: Sequence[Tensor]) -> Any:
        cuts = self.bucket.cuts
        flat = [c.filled(t, c.rows).to(self.bucket.dtypes.computed) for c, t in zip(cuts, shards, strict=True)]
        mine = torch.cat(flat) if len(flat) > 1 else flat[0].contiguous()
        return torch.ops._c10d_functional.all_gather_into_tensor(mine, cuts[0].size, self.bucket.group)

    def alone(self) -> Callable:
        return list


@dataclass(frozen=True)
class End(_Named):
    """The result of `Begin`, waited for -> the parameters."""

    bucket: Bucket
    __name__: ClassVar[str] = "end_gather"
    over_ranks: ClassVar[str] = "wait"

    def __call__(self, flat: Tensor) -> list[Tensor]:
        cuts = self.bucket.cuts
        flat = torch.ops._c10d_functional.wait_tensor(flat).view(cuts[0].size, -1)
        parts = flat.split([c.numel for c in cuts], 1)
        return [c.back(p, c.shape[c.dim]) for c, p in zip(cuts, parts, strict=True)]

    def alone(self) -> Callable:
        return list


@dataclass(frozen=True)
class Hold(_Named):
    """Parameters -> this rank's piece of each, which is held until they are gathered again."""

    bucket: Bucket
    __name__: ClassVar[str] = "hold"
    over_ranks: ClassVar[str] = "hold"

    def __call__(self, whole: Sequence[Tensor]) -> list[Tensor]:
        return [c.of(t) for c, t in zip(self.bucket.cuts, whole, strict=True)]

    def alone(self) -> Callable:
        return list


@dataclass(frozen=True)
class Scatter(_Named):
    """Terms -> this rank's shards of their sums over a group, flat; begins the collective, which `Scattered` waits for.

    Attributes:
        dtype: the dtype in which they are sent, None for their own.
    """

    cuts: tuple[Cut, ...]
    group: str
    dtype: torch.dtype | None = None
    __name__: ClassVar[str] = "begin_scatter"
    over_ranks: ClassVar[str] = "scatter"

    def __call__(self, terms: Sequence[Tensor]) -> Any:
        size = self.cuts[0].size
        pieces = [c.filled(t, c.rows * size).view(size, -1) for c, t in zip(self.cuts, terms, strict=True)]
        joined = torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]
        joined = joined.reshape(-1).to(self.dtype or joined.dtype)
        return torch.ops._c10d_functional.reduce_scatter_tensor(joined, "sum", size, self.group)

    def alone(self) -> Callable:
        return list


@dataclass(frozen=True)
class Scattered(_Named):
    """The result of `Scatter`, waited for -> the shards, added up over the replicas.

    Attributes:
        dtype: the dtype of the shards.
    """

    cuts: tuple[Cut, ...]
    replicas: str
    dtype: torch.dtype
    __name__: ClassVar[str] = "end_scatter"

    @property
    def over_ranks(self) -> str:
        """The answer of `rules.traits.over_ranks`."""
        return "replicas" if self.replicas else "wait"

    def __call__(self, flat: Tensor) -> list[Tensor]:
        ops = torch.ops._c10d_functional
        own = ops.wait_tensor(flat)
        if self.replicas:
            own = ops.wait_tensor(ops.all_reduce(own, "sum", self.replicas))
        own = own.to(self.dtype)
        parts = own.split([c.numel for c in self.cuts])
        return [c.back(p, c.own) for c, p in zip(self.cuts, parts, strict=True)]

    def alone(self) -> Callable:
        return list


@dataclass(frozen=True)
class OnItsWay:
    """A tensor that a collective is writing, and the handle to wait for it."""

    tensor: Tensor
    work: Any

    def wait(self) -> Tensor:
        """Wait, and return the tensor."""
        self.work.wait()
        return self.tensor


@dataclass(frozen=True)
class Reduce(_Named):
    """Terms -> their sums over a group, flat, on one of its ranks; begins the collective, which `Reduced` waits for.

    Attributes:
        triangles: which terms are symmetric matrices.
        owner: the rank that has the sums.
    """

    triangles: tuple[bool, ...]
    owner: int
    group: str
    __name__: ClassVar[str] = "begin_reduce"
    over_ranks: ClassVar[str] = "reduce"

    def __call__(self, terms: Sequence[Tensor]) -> Any:
        joined = torch.cat(packed(self.triangles, terms))
        return OnItsWay(joined, dist.reduce(joined, group=group_named(self.group), group_dst=self.owner, async_op=True))

    def alone(self) -> Callable:
        return list


@dataclass(frozen=True)
class Reduced(_Named):
    """The result of `Reduce`, waited for, and the terms' shapes -> the sums.

    On ranks other than the owner these are tensors without values, on the "meta" device.

    Attributes:
        here: whether the owner is this rank.
    """

    triangles: tuple[bool, ...]
    here: bool
    __name__: ClassVar[str] = "end_reduce"
    over_ranks: ClassVar[str] = "wait"

    def __call__(self, begun: OnItsWay, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        joined = begun.wait()
        like = [joined.new_empty(shape, device="meta") for shape in shapes]
        return unpacked(self.triangles, joined, like) if self.here else like

    def alone(self) -> Callable:
        return _first


def _first(terms: Sequence[Tensor], _: Any) -> list[Tensor]:
    return list(terms)
