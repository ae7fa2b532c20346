"""Lookups in a table, and sums of rows by index."""

from __future__ import annotations

import torch

from fxcurv.contractions.factors import Explicit, Factor, Gather
from fxcurv.ir.placement import MIXED, Replicate, Shard, samples_first
from fxcurv.rules.base import Refused, Rule, register
from fxcurv.rules.call import Call

aten = torch.ops.aten


BY_FREQUENCY = (
    "divides a row's gradient by how often the batch has it, so that it is the derivative of no sample's loss. Way out: "
    "scale_grad_by_freq=False."
)


@register(aten.embedding.default)
class Embedding(Rule):
    """y[...] = W[index[...]]; rows at `padding_idx` get no gradient."""

    name = "embedding"

    def linear(self, active):
        return True

    def place(self, sites, args, shape, n):
        weight, index = sites[0], sites[1]
        return index.place if isinstance(weight.place, Replicate) else MIXED

    def transpose(self, call: Call, wrt, g):
        """Add rows where they were read. Tracing PyTorch's own backward would fix the number of columns."""
        weight, index, padding, by_frequency, _ = call.args
        index, g = index.flatten(), g.reshape(g.shape[0], index.numel(), g.shape[-1])
        if padding >= 0:
            g = g * (index != padding).unsqueeze(1)
        if by_frequency:
            ones = torch.ones_like(index, dtype=g.dtype)
            g = g / g.new_zeros(weight.shape[0]).index_add(0, index, ones)[index].unsqueeze(1)
        return [g.new_zeros(g.shape[0], *weight.shape).index_add(1, index, g)]

    def factors(self, call: Call, position: int, g) -> Factor:
        weight, index, padding, by_frequency, _ = call.args
        if by_frequency:
            raise Refused(BY_FREQUENCY)
        index = samples_first(index, call.places[1]).flatten(1)
        g = samples_first(g, call.place, lead=1).flatten(2, -2)
        return Gather(index, g, weight.shape[0], int(padding))


@register(aten.index_add.default)
class AddedRows(Rule):
    """y = x with alpha * source[k] added to slice index[k] along an axis; PyTorch's backward fixes symbolic sizes."""

    name = "index_add"

    def linear(self, active):
        return True

    def transpose(self, call: Call, wrt, g):
        x, dim, index, source, alpha = call.args
        if not x.ndim:
            return super().transpose(call, wrt, g)
        rows = g.index_select(dim % x.ndim + 1, index.reshape(-1)).reshape(g.shape[0], *source.shape)
        of_source = rows if alpha == 1 else rows * alpha
        return [g if i == 0 else of_source for i in wrt]

    def factors(self, call: Call, position: int, g) -> Factor:
        """P of a source without samples: a sample has the cotangents of those rows that are added to its own slice."""
        x, dim, index, *_ = call.args
        if position == 0 or not x.ndim or call.place != Shard(dim % x.ndim):
            return super().factors(call, position, g)
        (rows,) = self.transpose(call, (position,), g)
        samples = torch.arange(x.shape[call.place.dim], device=index.device, dtype=index.dtype)
        mine = index.reshape(-1) == samples.unsqueeze(1)
        mine = mine.view(*mine.shape[:1], *[1] * call.place.dim, *mine.shape[1:], *[1] * (x.ndim - call.place.dim - 1))
        return Explicit(rows.unsqueeze(1) * mine)
