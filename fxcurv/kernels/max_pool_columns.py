"""max_pool_columns: the transpose of 2-d max-pooling for a stack of columns, from the indices of the forward pass.

Shapes: g [V, N, C, *out], index [N, C, *out], x [N, C, H, W] -> [V, N, C, H, W], laid out as x. Columns share the indices,
which a batch of V N images would have to repeat. On a CPU, PyTorch's kernel writes each column into the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

backward = torch.ops.aten.max_pool2d_with_indices_backward


def reference(g: Tensor, x: Tensor, index: Tensor, *window: Any) -> Tensor:
    """The definition: every value goes to the index of its maximum; the window does not matter any more."""
    v, (n, c, h, w) = g.shape[0], x.shape
    where = index.flatten(2).unsqueeze(0).expand(v, -1, -1, -1)
    return g.new_zeros(v, n, c, h * w).scatter_add(3, where, g.flatten(3)).reshape(v, n, c, h, w)


@torch.library.custom_op("fxcurv::max_pool_columns", mutates_args=())
def max_pool_columns(
    g: Tensor, x: Tensor, index: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil: bool,
) -> Tensor:  # fmt: skip
    """See the module."""
    out = _empty(g, x)
    for k in range(g.shape[0]):
        backward.grad_input(g[k], x, kernel, stride, padding, dilation, ceil, index, grad_input=out[k])
    return out


@max_pool_columns.register_kernel("cuda")
def _(g, x, index, kernel, stride, padding, dilation, ceil):
    return _empty(g, x).copy_(reference(g, x, index))


@max_pool_columns.register_fake
def _(g, x, index, kernel, stride, padding, dilation, ceil):
    return _empty(g, x)


def _empty(g: Tensor, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    if c != 1 and x.stride(1) == 1:  # channels last
        return g.new_empty(g.shape[0], n, h, w, c).permute(0, 1, 4, 2, 3)
    return g.new_empty(g.shape[0], n, c, h, w)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _gather(ctx, out):
    (index,) = ctx.saved_tensors
    where = index.flatten(2).unsqueeze(0).expand(out.shape[0], -1, -1, -1)
    return out.flatten(3).gather(3, where).reshape(out.shape[0], *index.shape), *[None] * 7


max_pool_columns.register_autograd(_gather, setup_context=_setup)


@max_pool_columns.register_vmap
def _(info, in_dims, g, x, index, *window):
    if any(d is not None for d in in_dims[1:3]):
        raise RuntimeError("max_pool_columns: vmap over columns only, not over the images")
    g = g.movedim(in_dims[0], 0)
    return max_pool_columns(g.flatten(0, 1), x, index, *window).unflatten(0, g.shape[:2]), 0


@register_flop_formula(torch.ops.fxcurv.max_pool_columns)
def _(g, *rest, out_shape=None, **kwargs):
    return torch.Size(g).numel()
