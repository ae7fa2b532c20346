"""Factors of the per-sample cotangents of a parameter, which every quantity contracts.

    P[v, n, *param] = J_n^T s_{v,n}        v: column, n: sample

An op's rule returns P in a factored form. A factor is a dataclass whose tensor fields are nodes in the compiler and
tensors inside a traced function; `g` always carries the columns on its first axis. `a` and `g` of `Dense` are views
where they can be: a convolution's input is unfolded only when a candidate asks for it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, dataclass_transform

import torch
from torch import Tensor

from fxcurv.ir.emit import declare
from fxcurv.ir.lengths import said
from fxcurv.ir.placement import Shard, samples_first, shifted
from fxcurv.ir.private import pytree
from fxcurv.kernels.patches import channels_last, windows


@dataclass(frozen=True)
class Arrange:
    """Maps a core [K, O, I] to the parameter: reshape to `sizes`, permute by `order`, reshape to `shape`."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, core: Tensor) -> Tensor:
        """[*lead, K, O, I] -> [*lead, *shape]."""
        lead = core.shape[:-3]
        k = len(lead)
        if self.order == tuple(range(len(self.order))):
            return core.reshape(*lead, *self.shape)
        t = core.reshape(*lead, *self.sizes)
        return t.permute(*range(k), *(k + d for d in self.order)).reshape(*lead, *self.shape).contiguous()


class Factor:
    """One use of a parameter. Subclasses list their tensor fields; everything else is static."""

    tensors: ClassVar[tuple[str, ...]] = ("g",)
    g: Any

    def shape(self) -> tuple[Any, ...]:
        """The shape of P, (V, N, *param)."""
        raise NotImplementedError

    def materialise(self) -> Tensor:
        """P, [V, N, *param]."""
        raise NotImplementedError

    def summed(self, weights: Tensor | None = None) -> Tensor:
        """sum_{v,n} weights[v, n] P[v, n], [*param]. Weights broadcast to [V, N]."""
        return summed(weighted(self.materialise(), weights), 0).sum(0)

    def size(self) -> Tensor:
        """The magnitude of P along the axes of `g`; of size one along axes that P sums over."""
        raise NotImplementedError

    def dense(self) -> Factor:
        """The same use with nothing left to unfold."""
        return self

    def lean(self) -> Factor:
        """`dense()`, with the inputs in the order that is cheapest to write."""
        return self.dense()

    def samples(self, index: Tensor) -> Factor:
        """The same use on the samples in `index` only (called on `dense()`)."""
        return dataclasses.replace(self, g=self.g.index_select(1, index))  # type: ignore[type-var]

    def places(self) -> tuple[Shard, ...]:
        """Where the samples are on each of `tensors`."""
        return (Shard(1),)

    def with_g(self, g: Any) -> Factor:
        return dataclasses.replace(self, g=g)  # type: ignore[type-var]


@dataclass_transform(frozen_default=True)
def factor(cls):
    """Class decorator: a frozen dataclass that is a pytree of its `tensors`."""
    cls = dataclass(frozen=True)(cls)
    static = [f.name for f in dataclasses.fields(cls) if f.name not in cls.tensors]

    def flatten(obj):
        return [getattr(obj, t) for t in cls.tensors], tuple(getattr(obj, s) for s in static)

    def unflatten(values, context):
        return cls(**dict(zip(cls.tensors, values, strict=True)), **dict(zip(static, context, strict=True)))

    pytree.register_pytree_node(cls, flatten, unflatten)
    return cls


def weighted(t: Tensor, weights: Tensor | None) -> Tensor:
    """`t` [V, N, ...] times weights that broadcast to [V, N]."""
    return t if weights is None else t * weights.reshape(*weights.shape, *[1] * (t.ndim - weights.ndim))


@factor
class Explicit(Factor):
    """The general case: `g` is P itself, [V, N, *param]."""

    g: Any

    def shape(self) -> tuple[Any, ...]:
        return tuple(self.g.shape)

    def materialise(self) -> Tensor:
        return self.g

    def size(self) -> Tensor:
        return self.g.abs()


@factor
class Dense(Factor):
    """P[v, n, k, o, i] = sum_s g[v, n, s, k, o] a[n, s, k, i], arranged as the parameter.

    a: [N, S, K, I], g: [V, N, S, K, O]; S: shared positions, K: groups.
    """

    a: Any
    g: Any
    arrange: Arrange
    tensors: ClassVar[tuple[str, ...]] = ("a", "g")

    def shape(self) -> tuple[Any, ...]:
        return (*self.g.shape[:2], *self.arrange.shape)

    def places(self) -> tuple[Shard, ...]:
        return (Shard(0), Shard(1))

    def size(self) -> Tensor:
        return (self.g.abs() * self.a.abs().sum(-1, keepdim=True)).sum(2, keepdim=True)

    def core(self) -> Tensor:
        """[V, N, K, O, I]."""
        v, n, s, k, o = self.g.shape
        if s == 1 and v == 1:
            return (self.g.squeeze(2).squeeze(0).unsqueeze(-1) * self.a.squeeze(1).unsqueeze(-2)).unsqueeze(0)
        if s == 1:
            return self.g.squeeze(2).unsqueeze(-1) * self.a.squeeze(1).unsqueeze(-2)
        if k > 1:
            return torch.einsum("vnsko,nski->vnkoi", self.g, self.a)
        if v == 1:
            return torch.bmm(self.g.squeeze(3).squeeze(0).mT, self.a.squeeze(2)).unsqueeze(0).unsqueeze(2)
        left = self.g.squeeze(3).permute(1, 0, 3, 2).reshape(n, v * o, s)
        out = torch.bmm(left, self.a.squeeze(2))
        return out.unflatten(1, (v, o)).movedim(1, 0).unsqueeze(2)

    def materialise(self) -> Tensor:
        return self.arrange(self.core())

    def summed(self, weights: Tensor | None = None) -> Tensor:
        g = weighted(self.g, weights)
        g = g.squeeze(0) if g.shape[0] == 1 else g.sum(0)
        if g.shape[2] == 1:
            core = torch.mm(g.flatten(0, 2).t(), self.a.flatten(0, 2)).unsqueeze(0)
        else:
            core = torch.einsum("nsko,nski->koi", g, self.a)
        return self.arrange(core)

    def samples(self, index: Tensor) -> Factor:
        return dataclasses.replace(self, a=self.a.index_select(0, index), g=self.g.index_select(1, index))


@factor
class Conv(Factor):
    """A convolution's weight, its input not yet unfolded.

    a: [B, C, *spatial], g: [V, B, O, *out]; `place`: where the samples are in dimension 0 of `a`. For a transposed
    convolution the roles of input and output cotangent are swapped in the unfolding.
    """

    a: Any
    g: Any
    place: Shard
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]
    weight_shape: tuple[int, ...]
    tensors: ClassVar[tuple[str, ...]] = ("a", "g")

    def shape(self) -> tuple[Any, ...]:
        return (self.g.shape[0], self.a.shape[0] // said(self.place.outer * self.place.inner), *self.weight_shape)

    def places(self) -> tuple[Shard, ...]:
        return (self.place, shifted(self.place))

    def size(self) -> Tensor:
        return self.g.abs().sum(tuple(range(3, self.g.ndim)), keepdim=True)

    def dense(self) -> Dense:
        return self._dense_transposed() if self.transposed else self._dense()

    def lean(self) -> Dense:
        if self.transposed or self.groups > 1 or self.place != Shard(0) or not channels_last(self.a):
            return self.dense()
        out, dims = self.g.shape[3:], len(self.kernel)
        patches = windows(self.a, out, self.kernel, self.stride, self.padding, self.dilation)
        a = patches.permute(0, *range(2, 2 + 2 * dims), 1).reshape(self.a.shape[0], prod(out), 1, -1)
        sizes = (self.weight_shape[0], *self.kernel, self.weight_shape[1])
        order = (0, 1 + dims, *range(1, 1 + dims))
        return Dense(a, positions(self.g.flatten(3), self.place, 1, 1), Arrange(sizes, order, self.weight_shape))

    def _dense(self) -> Dense:
        out = self.g.shape[3:]
        cols = unfold(self.a, out, self.kernel, self.stride, self.padding, self.dilation)
        a = positions(cols, self.place, 0, self.groups)
        g = positions(self.g.flatten(3), self.place, 1, self.groups)
        return Dense(a, g, Arrange(self.weight_shape, tuple(range(len(self.weight_shape))), self.weight_shape))

    def _dense_transposed(self) -> Dense:
        spatial = self.a.shape[2:]
        v, b = self.g.shape[:2]
        cols = unfold(self.g.flatten(0, 1), spatial, self.kernel, self.stride, self.padding, self.dilation)
        g = positions(cols.unflatten(0, (v, b)), self.place, 1, self.groups)
        a = positions(self.a.flatten(2), self.place, 0, self.groups)
        inputs, outputs = self.weight_shape[0] // self.groups, self.weight_shape[1]
        sizes = (self.groups, outputs, prod(self.kernel), inputs)
        return Dense(a, g, Arrange(sizes, (0, 3, 1, 2), self.weight_shape))

    def materialise(self) -> Tensor:
        return self.dense().materialise()

    def summed(self, weights: Tensor | None = None) -> Tensor:
        if weights is not None and self.place != Shard(0):
            return self.dense().summed(weights)
        g = weighted(self.g, weights)
        g = g.squeeze(0) if g.shape[0] == 1 else g.sum(0)
        return torch.ops.aten.convolution_backward(
            g, self.a, g.new_empty(()).expand(self.weight_shape), None, list(self.stride), list(self.padding),
            list(self.dilation), self.transposed, list(self.output_padding), self.groups, [False, True, False],
        )[1].contiguous()  # fmt: skip

    def samples(self, index: Tensor) -> Factor:
        return self.dense().samples(index)


@factor
class Gather(Factor):
    """An embedding: P[v, n, r] = sum over positions s with index[n, s] = r of g[v, n, s].

    index: [N, S], g: [V, N, S, D].
    """

    index: Any
    g: Any
    rows: int
    padding: int
    tensors: ClassVar[tuple[str, ...]] = ("index", "g")

    def shape(self) -> tuple[Any, ...]:
        return (self.g.shape[0], self.index.shape[0], self.rows, self.g.shape[3])

    def places(self) -> tuple[Shard, ...]:
        return (Shard(0), Shard(1))

    def size(self) -> Tensor:
        return self.g.abs().sum(2, keepdim=True)

    def masked(self) -> Tensor:
        """`g` without the positions of the padding index, which get no gradient."""
        if self.padding < 0:
            return self.g
        return self.g * (self.index != self.padding).unsqueeze(-1)

    def materialise(self) -> Tensor:
        n = self.index.shape[0]
        slots = torch.arange(n, device=self.index.device).unsqueeze(1) * self.rows + self.index
        g = self.masked().flatten(1, 2)
        out = g.new_zeros(g.shape[0], n * self.rows, g.shape[2]).index_add(1, slots.flatten(), g)
        return out.unflatten(1, (n, self.rows))

    def summed(self, weights: Tensor | None = None) -> Tensor:
        g = weighted(self.masked(), weights).sum(0).flatten(0, 1)
        return g.new_zeros(self.rows, g.shape[1]).index_add(0, self.index.flatten(), g)

    def per_row(self) -> tuple[Tensor, Tensor]:
        """(h, share): h[v, n, s] sums g over the sample's positions with the index of s; share is 1 / their number."""
        same = (self.index.unsqueeze(1) == self.index.unsqueeze(2)).to(self.g.dtype)
        return torch.matmul(same, self.masked()), 1 / same.sum(2)

    def samples(self, index: Tensor) -> Factor:
        return dataclasses.replace(self, index=self.index.index_select(0, index), g=self.g.index_select(1, index))


def unfold(x: Tensor, out, kernel, stride, padding, dilation) -> Tensor:
    """[B, C, *spatial] -> [B, C * prod(kernel), prod(out)]."""
    dims = len(kernel)
    if all(k == s == 1 for k, s in zip(kernel, stride, strict=True)) and x.shape[2:] == torch.Size(out):
        return x.flatten(2)  # a 1 x 1 convolution
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    if channels_last(x) and x.shape[1] > 4:
        x = x.contiguous()  # the copy is small, and patches are then copied row by row
    patches = windows(x, out, kernel, stride, padding, dilation).permute(order)
    return patches.reshape(x.shape[0], x.shape[1] * prod(kernel), prod(out))


def positions(t: Tensor, place: Shard, lead: int, groups: int) -> Tensor:
    """[*lead, B, groups * C, S] with samples inside B -> [*lead, N, S', groups, C] (S' takes what B holds besides)."""
    if place == Shard(0) and groups == 1:  # the usual case in few nodes
        return t.transpose(lead + 1, lead + 2).unsqueeze(lead + 2)
    t = samples_first(t, place, lead) if place != Shard(0) else t.unsqueeze(lead + 1)
    t = t.unflatten(lead + 2, (groups, -1))
    axes = list(range(lead + 1))
    rest, group, channel, position = range(lead + 1, lead + 5)
    return t.permute(*axes, rest, position, group, channel).flatten(lead + 1, lead + 2)


def materialised(factor: Factor) -> Tensor:
    """P itself."""
    return factor.materialise()


def summed(t: Tensor, d: int) -> Tensor:
    """The sum over an axis, a view where its size is one."""
    return t.squeeze(d) if is_one(t.shape[d]) else t.sum(d)


def is_one(s: Any) -> bool:
    """Whether a size is one for all batches."""
    return isinstance(s, int) and s == 1


def declare_factor(factor: Factor, sources: Any) -> None:
    """Declare where the samples are on the tensors of an emitted factor (see `ir.emit.declare`)."""
    for name, where in zip(factor.tensors, factor.places(), strict=True):
        declare(getattr(factor, name), where, sources)
