"""syrk_conv: sum_{n,s} u[n, :, s] u[n, :, s]^T over the patches u that a convolution reads, one triangle computed.

u[n, :, s] is the patch of sample n, in the order (c, *kernel), at position s of the convolution's output, `out_shape`.

Shapes: x [N, C, *in] in one to three dimensions -> [K, K], K = C * prod(kernel), in float32 for half precision. The patches
of a few samples at a time are written to one block of memory that stays in the cache, never all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.kernels.cpu import boxes
from fxcurv.kernels.patches import windows
from fxcurv.kernels.register import on_cuda
from fxcurv.kernels.syrk import add_triangle, mirror, triangle_flops
from fxcurv.precision import wide

# Elements of a block of patches: 2 MiB in float32.
BLOCK = 1 << 19


def reference(
    x: Tensor, out_shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """The definition, with every patch cut out by a convolution with one-hot weights."""
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
    """The sum of u u^T; the module says more."""
    k = x.shape[1] * prod(kernel)
    out = x.new_zeros(k, k, dtype=wide(x.dtype))
    for u in patches(x, out_shape, kernel, stride, padding, dilation):
        add_triangle(out, u)
    return mirror(out)


def patches(
    x: Tensor, out_shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Iterator[Tensor]:  # fmt: skip
    """Every patch once, some [K, M] at a time in `wide(x.dtype)`, valid until the next block.

    A block holds several samples, or rows of the output's first axis where one sample has more than fits.
    """
    n, dims, k = x.shape[0], len(kernel), x.shape[1] * prod(kernel)
    row = k * prod(out_shape[1:])
    scratch = x.new_empty(min(n * out_shape[0] * row, max(row, BLOCK)), dtype=wide(x.dtype))
    features_first = [1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims)]
    for samples, rows in boxes((n, out_shape[0]), max(1, BLOCK // max(1, row))):
        view = windows(x[samples], out_shape, kernel, stride, padding, dilation).permute(features_first)
        part = view.narrow(dims + 2, rows.start, rows.stop - rows.start)
        yield scratch[: part.numel()].view(part.shape).copy_(part).view(k, -1)


@syrk_conv.register_fake
def _(x, out_shape, kernel, stride, padding, dilation):
    k = x.shape[1] * prod(kernel)
    return x.new_empty(k, k, dtype=wide(x.dtype))


@register_flop_formula(torch.ops.fxcurv.syrk_conv)
def _(x, positions, kernel, *rest, out_shape=None, **kwargs):
    return triangle_flops(x[1] * prod(kernel), x[0] * prod(positions))


on_cuda(syrk_conv, "syrk_conv")
