"""Pooling: the transpose of max-pooling reads the forward pass's indices; average pooling uses the fallback."""

from __future__ import annotations

import torch

from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Shard
from fxcurv.kernels.max_pool_columns import max_pool_columns
from fxcurv.rules.base import Rule, register, rewrite
from fxcurv.rules.call import Call

aten = torch.ops.aten


class Pool(Rule):
    """A window op over the last axes."""

    name = "pooling"

    def __init__(self, dims: int, linear: bool):
        self.dims, self.is_linear = dims, linear

    def linear(self, active):
        return self.is_linear

    def mixed_axes(self, args):
        return self.dims

    def place(self, sites, args, shape, n):
        x = sites[0]
        if x.place == PARTIAL and not self.is_linear:
            return MIXED
        windowed = isinstance(x.place, Shard) and x.place.dim >= len(shape) - self.dims
        return MIXED if windowed else x.place


class MaxPool(Pool):
    """(values, indices); the transpose scatters by the indices."""

    piecewise_linear = True
    picks = True

    def __init__(self, dims: int):
        super().__init__(dims, linear=False)

    def transpose(self, call: Call, wrt, g):
        g, (x, *window), index = g[0], call.args, call.y[1]
        if call.op is aten.max_pool2d_with_indices.default and x.ndim == 4:
            window[1] = window[1] or window[0]  # the stride defaults to the kernel's size
            if g.shape[0] == 1:
                back = aten.max_pool2d_with_indices_backward.default
                return [back(g[0], x, *window, index).unsqueeze(0)]
            return [max_pool_columns(g, x, index, *window)]
        flat = x.ndim - self.dims
        index = index.flatten(flat).unsqueeze(0).expand(g.shape[0], *[-1] * (flat + 1))
        zeros = g.new_zeros(g.shape[0], *x.shape[:flat], x.shape[flat:].numel())
        return [zeros.scatter_add(flat + 1, index, g.flatten(flat + 1)).reshape(g.shape[0], *x.shape)]


@register(aten.max_pool2d_with_indices_backward.default)
class MaxPoolBack(Rule):
    """The transpose of max-pooling, which a model may differentiate; only the shape of its argument 1 matters."""

    name = "pooling"

    def linear(self, active):
        return True

    def place(self, sites, args, shape, n):
        g, index = sites[0].place, sites[-1].place
        if g == REPLICATE:
            g = index
        kept = index in (g, REPLICATE) and sites[1].place in (g, REPLICATE)
        return g if kept and not (isinstance(g, Shard) and g.dim >= len(shape) - 2) else MIXED


def _op_and_rewrite(dims: int):
    op = getattr(aten, f"max_pool{dims}d_with_indices").default

    def pool(x, kernel, stride=(), padding=0, dilation=1, ceil_mode=False):
        return op(x, kernel, stride, padding, dilation, ceil_mode)[0]

    return op, pool


for _d in (2, 3):
    _op, _pool = _op_and_rewrite(_d)
    register(_op, rule=MaxPool(_d))
    rewrite(getattr(aten, f"max_pool{_d}d").default)(_pool)
    register(getattr(aten, f"adaptive_max_pool{_d}d").default, rule=MaxPool(_d))
    register(
        getattr(aten, f"avg_pool{_d}d").default, getattr(aten, f"_adaptive_avg_pool{_d}d").default, rule=Pool(_d, True)
    )


@rewrite(aten.max_pool1d.default)
def _max_pool1d(x, kernel, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    stride = stride or kernel
    pool = aten.max_pool2d_with_indices.default
    y = pool(x.unsqueeze(-2), [1, *kernel], [1, *stride], [0, *padding], [1, *dilation], ceil_mode)[0]
    return y.squeeze(-2)
