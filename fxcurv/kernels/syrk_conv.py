"""syrk_conv: sum_{n,s} u[n, :, s] u[n, :, s]^T over the patches u of a convolution, by one triangle.

u[n, :, s] is the patch of sample n, in the order (c, *kernel), at position s of the output, whose shape is `out_shape`.

Shapes: x [N, C, *in] in one to three dimensions -> [K, K], K = C * prod(kernel), in float32 for half precision. The patches
of a few samples at a time are written to one block of memory that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.ir.precision import wide
from fxcurv.kernels.blocks import boxes
from fxcurv.kernels.patches import channels_last, windows
from fxcurv.kernels.register import on_cuda
from fxcurv.kernels.syrk import add_triangle, mirror, triangle_flops

# Elements of a block of patches, 8 MiB in float32: a product of fewer positions takes more time per position.
BLOCK = 1 << 21


def reference(
    x: Tensor, out_shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """The definition; a convolution with one-hot weights cuts the patches out."""
    k = x.shape[1] * prod(kernel)
    onehot = torch.eye(k, dtype=x.dtype, device=x.device).reshape(k, x.shape[1], *kernel)
    args = list(stride), list(padding), list(dilation), False, [0] * len(kernel), 1
    u = torch.ops.aten.convolution.default(x, onehot, None, *args)
    u = u[(..., *(slice(o) for o in out_shape))].flatten(2)
    return torch.einsum("nks,nls->kl", u, u)


@torch.library.custom_op("fxcurv::syrk_conv", mutates_args=())
def syrk_conv(
    x: Tensor, out_shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """The sum of u u^T; see the module."""
    c, k = x.shape[1], x.shape[1] * prod(kernel)
    out = x.new_zeros(k, k, dtype=wide(x.dtype))
    for u in patches(x, out_shape, kernel, stride, padding, dilation):
        add_triangle(out, u)
    out = mirror(out)
    if not channels_last(x):
        return out
    size = (prod(kernel), c)
    return out.view(*size, *size).permute(1, 0, 3, 2).reshape(k, k)


def patches(
    x: Tensor, out_shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Iterator[Tensor]:  # fmt: skip
    """Blocks [K, M] of patches in `wide(x.dtype)`, each valid until the next; together they have every patch once.

    If the channels of x are last in memory, K runs over (*kernel, c), so that runs of channels are copied. A block
    holds several samples, or rows of the output's first axis if one sample does not fit.
    """
    n, dims, k = x.shape[0], len(kernel), x.shape[1] * prod(kernel)
    row = k * prod(out_shape[1:])
    scratch = x.new_empty(min(n * out_shape[0] * row, max(row, BLOCK)), dtype=wide(x.dtype))
    outs, kernels = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    order, rows_at = ([0, *outs, *kernels, 1], 1) if channels_last(x) else ([1, *kernels, 0, *outs], dims + 2)
    for samples, rows in boxes((n, out_shape[0]), max(1, BLOCK // max(1, row))):
        view = windows(x[samples], out_shape, kernel, stride, padding, dilation).permute(order)
        part = view.narrow(rows_at, rows.start, rows.stop - rows.start)
        block = scratch[: part.numel()].view(part.shape).copy_(part)
        yield block.view(-1, k).t() if channels_last(x) else block.view(k, -1)


@syrk_conv.register_fake
def _(x, out_shape, kernel, stride, padding, dilation):
    k = x.shape[1] * prod(kernel)
    return x.new_empty(k, k, dtype=wide(x.dtype))


@register_flop_formula(torch.ops.fxcurv.syrk_conv)
def _(x, positions, kernel, *rest, out_shape=None, **kwargs):
    return triangle_flops(x[1] * prod(kernel), x[0] * prod(positions))


def _backward(ctx, grad):
    """With all patches at once: the cotangent of u is (G + G^T) u."""
    (x,) = ctx.saved_tensors
    out, geometry = ctx.geometry
    dims = len(geometry[0])
    order = [1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims)]

    def unfolded(x: Tensor) -> Tensor:
        return windows(x, out, *geometry).permute(order).reshape(grad.shape[0], -1).to(grad.dtype)

    u, pull = torch.func.vjp(unfolded, x)
    return *pull((grad + grad.t()) @ u), *[None] * 5


def _save(ctx, inputs, output):
    x, out, *geometry = inputs
    ctx.save_for_backward(x)
    ctx.geometry = out, geometry


syrk_conv.register_autograd(_backward, setup_context=_save)
on_cuda(syrk_conv, "syrk_conv", "syrk")
