"""In-place writes, which capture turns into functions: y is x, except for a region that `source` fills.

Both enter linearly. The transpose for `source` reads the region of the cotangent, that for x sets it to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcurv.ir import placement
from fxcurv.ir.placement import MIXED, Shard, Site
from fxcurv.rules.base import Rule, register, rewrite
from fxcurv.rules.call import Call

aten = torch.ops.aten

END = 2**62
"""A slice that runs to the end of its axis has a larger end than this."""


def region(size, start, end, step):
    """(start, end) of a slice of an axis, between 0 and its size; a symbolic size is used only where it has to be."""
    start, end = start or 0, size if end is None or (isinstance(end, int) and end >= END) else end
    start, end = (e + size if isinstance(e, int) and e < 0 else e for e in (start, end))
    if not all(isinstance(e, int) for e in (size, start, end)):
        return start, end
    start = min(max(start, 0), size)
    return start, min(max(end, start), size)


class Write(Rule):
    """y = x with the entries of a slice along an axis replaced by `source`, which lacks that axis if `select`."""

    name = "write"

    def __init__(self, select: bool = False):
        self.select = select

    def linear(self, active):
        return True

    def _slice(self, args, size):
        """(start, end, step) along the axis."""
        start, end, step = (args[3], args[3] + 1 or None, 1) if self.select else args[3:6]
        return *region(size, start, end, step), step

    def place(self, sites, args, shape, n):
        x, source, dim = sites[0], sites[1], args[2] % len(shape)
        start, end, step = self._slice(args, shape[dim])
        place = placement.pointwise([x, _with_axis(source, dim) if self.select else source], len(shape), True)
        whole = (start, end, step) == (0, shape[dim], 1)
        return MIXED if isinstance(place, Shard) and place.dim == dim and not whole else place

    def transpose(self, call: Call, wrt, g):
        dim = call.args[2] % (g.ndim - 1)
        size = g.shape[dim + 1]
        start, end, step = self._slice(call.args, size)
        out = []
        for i in wrt:
            if i == 1:
                there = aten.slice.Tensor(g, dim + 1, start, end, step)
                out.append(there.squeeze(dim + 1) if self.select else there)
                continue
            at = torch.arange(size, device=g.device)
            written = (at >= start) & (at < end) & ((at - start) % step == 0)
            out.append(torch.where(written.view(-1, *[1] * (g.ndim - dim - 2)), 0, g))
        return out


def _with_axis(site: Site, dim: int) -> Site:
    """The site of a value with an axis of size one inserted at `dim`."""
    place = site.place
    if isinstance(place, Shard):
        place = Shard(place.dim + (place.dim >= dim), place.outer, place.inner)
    return Site((*site.shape[:dim], 1, *site.shape[dim:]), place, site.active)


register(aten.slice_scatter.default, rule=Write())
register(aten.select_scatter.default, rule=Write(select=True))


class Strided(Rule):
    """Reads or writes at strides in memory; their placement is found by trial."""

    name = "write"

    def linear(self, active):
        return True

    @staticmethod
    def _places(x: Tensor, size, stride, offset) -> Tensor:
        """The row-major numbers of the entries of x that a view of x's memory contains."""
        count = torch.empty_like(x, dtype=torch.long)  # with the strides of x
        count = count.copy_(torch.arange(x.numel(), device=x.device).reshape(x.shape))
        return aten.as_strided.default(count, size, stride, offset).flatten()


@register(aten.as_strided.default)
class ReadStrided(Strided):
    """y = x's memory at given size, stride and offset."""

    def transpose(self, call: Call, wrt, g):
        x, *view = call.args
        places = self._places(x, *view)
        gx = g.new_zeros(g.shape[0], x.numel()).index_add(1, places, g.flatten(1))
        return [gx.reshape(g.shape[0], *x.shape)]


@register(aten.as_strided_scatter.default)
class WriteStrided(Strided):
    """y = x with the entries at given size, stride and offset in memory replaced by `source`."""

    def transpose(self, call: Call, wrt, g):
        x, source, *view = call.args
        places, flat = self._places(x, *view), g.flatten(1)
        out = []
        for i in wrt:
            new = flat.index_select(1, places) if i == 1 else flat.index_fill(1, places, 0)
            out.append(new.reshape(g.shape[0], *(source if i == 1 else x).shape))
        return out


@register(
    aten.index_put.default, aten.index_copy.default, aten.index_fill.int_Scalar, aten.diagonal_scatter.default,
)  # fmt: skip
class Linear(Rule):
    """Jointly linear in all differentiable arguments; otherwise the fallback."""

    name = "write"

    def linear(self, active):
        return True


@register(aten.index_fill.int_Tensor)
class Fill(Linear):
    """y = x with one value at some places along an axis; PyTorch's derivative in the value has a size that the places decide."""

    def transpose(self, call: Call, wrt, g):
        x, dim, index, _ = call.args
        filled = torch.zeros(x.shape, dtype=torch.bool, device=x.device).index_fill(dim, index, True)
        return [g.masked_fill(filled, 0) if i == 0 else (g * filled).reshape(g.shape[0], x.numel()).sum(1) for i in wrt]


@rewrite(aten.fill.Tensor)
def _fill(x, value):
    return value.to(x.dtype).expand(x.shape)
