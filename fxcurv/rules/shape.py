"""Ops that move, select, join or add elements: views, permutations, slices, concatenation, padding, sums."""

from __future__ import annotations

from math import prod

import torch

from fxcurv.contractions.factors import Explicit, Factor
from fxcurv.ir import placement
from fxcurv.ir.graph import invoke
from fxcurv.ir.placement import MIXED, REPLICATE, Shard, samples_first
from fxcurv.rules.base import Rule, register, rewrite
from fxcurv.rules.call import Call
from fxcurv.rules.pointwise import unbroadcast

aten = torch.ops.aten


class Movement(Rule):
    """A linear op: every element of the output is an element of the input or a constant."""

    name = "shape"
    index_map = True

    def linear(self, active):
        return True


@register(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints, aten.unflatten.int,
)  # fmt: skip
class View(Movement):
    """Any row-major reshape."""

    in_order = True

    def restrided(self, view, args, shape):
        return view.view(shape)

    def place(self, sites, args, shape, n):
        return placement.view(sites[0], shape, n)

    def transpose(self, call: Call, wrt, g):
        return [g.reshape(g.shape[0], *call.args[0].shape)]


@register(
    aten.clone.default, aten.alias.default, aten.contiguous.default, aten._to_copy.default, aten.to.dtype,
    aten.lift_fresh_copy.default, aten.to.device, aten.to.dtype_layout,
)  # fmt: skip
class Copy(Movement):
    """A copy, perhaps in another dtype or on another device."""

    in_order = True

    def restrided(self, view, args, shape):
        return view

    def place(self, sites, args, shape, n):
        return sites[0].place if sites[0] else None  # a number becomes a tensor

    def transpose(self, call: Call, wrt, g):
        return [g.to(call.args[0].dtype)]


def _order(op, args, ndim):
    if op is aten.permute.default:
        return [d % ndim for d in args[1]]
    if ndim == 0:
        return []
    order = list(range(ndim))
    a, b = (0, 1) if op is aten.t.default else (args[1] % ndim, args[2] % ndim)
    if ndim > 1:
        order[a], order[b] = order[b], order[a]
    return order


class Selection(Movement):
    """Views that are no reshapes: argument 0 with other strides and perhaps another offset."""

    def __init__(self, op):
        self.op = op

    def restrided(self, view, args, shape):
        return invoke(self.op, (view, *args[1:]))


class Permute(Selection):
    """y = x.permute(order); an instance per op, because each op spells the order differently."""

    def place(self, sites, args, shape, n):
        return placement.permute(sites[0].place, tuple(_order(self.op, args, len(shape))))

    def transpose(self, call: Call, wrt, g):
        order = _order(self.op, call.args, g.ndim - 1)
        inverse = [order.index(d) for d in range(len(order))]
        return [g.permute(0, *(d + 1 for d in inverse))]


for _op in (aten.permute.default, aten.transpose.int, aten.t.default):
    register(_op, rule=Permute(_op))


@register(aten.roll.default)
class Roll(Movement):
    """y = x.roll(shifts, dims), without dims of all entries in a row; `torch.vmap` rolls what has no dimension over the rows."""

    def transpose(self, call: Call, wrt, g):
        x, shifts, dims = call.args
        back = [-s for s in shifts]
        if dims:
            return [g.roll(back, [d % x.ndim + 1 for d in dims])]
        return [g.reshape(g.shape[0], x.numel()).roll(back, 1).reshape(g.shape)]


@register(aten.expand.default)
class Expand(Rule):
    """Broadcasting to a shape; a new axis with the size of the batch is a sample axis."""

    name = "shape"

    def linear(self, active):
        return True

    def place(self, sites, args, shape, n):
        (site,) = [s for s in sites if s]
        lead = len(shape) - len(site.shape)
        if isinstance(site.place, Shard):
            return Shard(site.place.dim + lead, site.place.outer, site.place.inner)
        new = [d for d, size in enumerate(shape) if size == n and (d < lead or site.shape[d - lead] != n)]
        return Shard(new[0]) if len(new) == 1 and site.place == REPLICATE else site.place

    def transpose(self, call: Call, wrt, g):
        return [unbroadcast(g, call.args[0].shape)]

    def factors(self, call: Call, position: int, g) -> Factor:
        p = samples_first(g, call.place, lead=1)
        return Explicit(unbroadcast(p, call.args[0].shape, lead=2))


class Slice(Selection):
    """y = x[..., start:end:step]."""

    def place(self, sites, args, shape, n):
        (x, *_), (_, dim, *cut) = sites, args
        dim %= len(shape)
        if not isinstance(x.place, Shard) or x.place.dim != dim or shape[dim] == x.shape[dim]:
            return x.place
        start, end, step = slice(*cut).indices(x.shape[dim])
        block = n * x.place.inner  # the entries of all samples for one outer index
        if type(x.place) is Shard and step == 1 and start < end and start % block == end % block == 0:
            return Shard(dim, (end - start) // block, x.place.inner)
        return MIXED

    def transpose(self, call: Call, wrt, g):
        x, dim, start, end, step = call.args
        shape, dim = [g.shape[0], *x.shape], dim % x.ndim + 1
        start, end = start or 0, shape[dim] if end is None else end
        return [aten.slice_backward.default(g, shape, dim, start, end, step)]


class Select(Selection):
    """y = x[..., i]."""

    def place(self, sites, args, shape, n):
        x = sites[0]
        dim = args[1] % len(x.shape)
        if not isinstance(x.place, Shard):
            return x.place
        if x.place.dim == dim:
            return MIXED
        return Shard(x.place.dim - (dim < x.place.dim), x.place.outer, x.place.inner)

    def transpose(self, call: Call, wrt, g):
        x, dim, index = call.args
        return [aten.select_backward.default(g, [g.shape[0], *x.shape], dim % x.ndim + 1, index)]


register(aten.slice.Tensor, rule=Slice(aten.slice.Tensor))
register(aten.select.int, rule=Select(aten.select.int))


@register(aten.cat.default)
class Cat(Movement):
    """Concatenation; along the sample axis, a sample's slice consists of its slices of all arguments."""

    def place(self, sites, args, shape, n):
        dim = args[1] % len(shape)
        sites = [s for s in sites if s and s.shape != (0,)]
        places = [s.place for s in sites]
        if len(sites) == 1:
            return places[0]
        if places and all(type(p) is Shard and (p.dim, p.inner) == (dim, places[0].inner) for p in places):
            return Shard(dim, sum(p.outer for p in places), places[0].inner)
        place = placement.merge(places)
        return MIXED if isinstance(place, Shard) and place.dim == dim else place

    def transpose(self, call: Call, wrt, g):
        xs, dim = call.args
        ndim = g.ndim - 1
        dim %= ndim  # `cat` ignores an empty vector beside values with more axes, such as an empty cache
        pieces = torch.split(g, [x.shape[dim] if x.ndim == ndim else 0 for x in xs], dim + 1)
        return [pieces[i].reshape(g.shape[0], *xs[i].shape) for i in wrt]


@register(aten.constant_pad_nd.default)
class Pad(Movement):
    """Padding of the last axes with a constant; negative widths crop."""

    def place(self, sites, args, shape, n):
        x, k = sites[0], len(args[1]) // 2
        along = len(shape) - 1 - x.place.dim if isinstance(x.place, Shard) else k  # counted from the last axis
        return MIXED if along < k and any(args[1][2 * along : 2 * along + 2]) else x.place

    def mixed_axes(self, args):
        return len(args[1]) // 2

    def transpose(self, call: Call, wrt, g):
        widths = call.args[1]
        for k in range(len(widths) // 2):
            low, high = (max(w, 0) for w in widths[2 * k : 2 * k + 2])
            g = g.narrow(-1 - k, low, g.shape[-1 - k] - low - high) if low or high else g
        cropped = [-min(w, 0) for w in widths]
        return [aten.constant_pad_nd.default(g, cropped, 0) if any(cropped) else g]


def _dims(args):
    return tuple(args[1] or ()) if len(args) > 1 else ()


class Sum(Rule):
    """Sum or mean over axes."""

    name = "reduction"

    def __init__(self, mean: bool):
        self.mean = mean

    def linear(self, active):
        return True

    def place(self, sites, args, shape, n):
        keepdim = len(args) > 2 and bool(args[2])
        return placement.reduction(sites[0], _dims(args), keepdim, linear=True)

    def transpose(self, call: Call, wrt, g):
        x, *rest = call.args
        dims = sorted(d % x.ndim for d in _dims(call.args)) if x.ndim else []
        dims = dims or list(range(x.ndim))
        keepdim = len(rest) > 1 and bool(rest[1])
        if not keepdim:
            for d in dims:
                g = g.unsqueeze(d + 1)
        scale = prod(x.shape[d] for d in dims) if self.mean else 1
        g = g.expand(g.shape[0], *x.shape).to(x.dtype)
        return [g / scale if self.mean else g]


for _name in ("sum", "mean"):
    _packet = getattr(aten, _name)
    register(_packet.default, _packet.dim_IntList if _name == "sum" else _packet.dim, rule=Sum(_name == "mean"))


@rewrite(aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default)
def _split(x, sizes, dim=0):
    total = x.shape[dim]
    sizes = sizes if isinstance(sizes, (list, tuple)) else [min(sizes, total - s) for s in range(0, total, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [aten.slice.Tensor(x, dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]


@rewrite(aten.chunk.default)
def _chunk(x, chunks, dim=0):
    return _split(x, -(-x.shape[dim] // chunks), dim)


@rewrite(aten.unbind.int)
def _unbind(x, dim=0):
    return [aten.select.int(x, dim, i) for i in range(x.shape[dim])]


@rewrite(aten.stack.default)
def _stack(xs, dim=0):
    ndim = xs[0].ndim + 1
    return aten.cat.default([x.unsqueeze(dim % ndim) for x in xs], dim % ndim)


@rewrite(aten.repeat.default)
def _repeat(x, repeats):
    """Repetition is broadcasting along new axes, merged with the old ones."""
    x = x.reshape([1] * (len(repeats) - x.ndim) + list(x.shape))
    sizes = list(x.shape)
    for d in reversed(range(x.ndim)):
        if not (isinstance(repeats[d], int) and repeats[d] == 1):
            x = x.unsqueeze(d)
            x = x.expand(*x.shape[:d], repeats[d], *x.shape[d + 1 :])
    return x.reshape([r * s for r, s in zip(repeats, sizes, strict=True)])


@rewrite(aten.pad.default)
def _pad(x, pad, mode="constant", value=None):
    if mode != "circular":
        return aten.pad.default(x, pad, mode, value)
    for k in range(len(pad) // 2):
        (low, high), d = pad[2 * k : 2 * k + 2], x.ndim - 1 - k
        inner = x.narrow(d, max(-low, 0), x.shape[d] - max(-low, 0) - max(-high, 0))
        # the ends are those of what is not cropped, as in PyTorch
        before = [inner.narrow(d, inner.shape[d] - low, low)] if low > 0 else []
        after = [inner.narrow(d, 0, high)] if high > 0 else []
        x = torch.cat([*before, inner, *after], d)
    return x


@rewrite(aten.copy.default)
def copied(x, source, non_blocking=False):
    """`source` in place of what x holds."""
    return source.to(x.dtype).expand(x.shape)


@rewrite(aten._cdist_forward.default)
def _cdist(x, z, p, mode):
    """Rewritten because PyTorch's derivative of the op is wrong under `vmap`."""
    return torch.linalg.vector_norm(x.unsqueeze(-2) - z.unsqueeze(-3), p, -1)


@rewrite(aten.block_diag.default)
def _block_diag(blocks):
    blocks = [b.reshape([1] * (2 - b.ndim) + list(b.shape)) for b in blocks]
    widths = [b.shape[1] for b in blocks]
    padded = [(sum(widths[:k]), sum(widths[k + 1 :])) for k in range(len(widths))]
    return aten.cat.default([aten.constant_pad_nd.default(b, p) for b, p in zip(blocks, padded, strict=True)])
