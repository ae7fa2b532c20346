"""outer_batch_conv: per-sample products P[v, n] = sum_s g[v, n, s, :] a[n, s, :]^T, a being a convolution's patches.

Shapes: x [N, C, *in], g [V, N, O, *out] -> [V, N, O, C / groups, *kernel], in the factors' dtype. The geometry is
`torch.nn.functional.conv2d`'s. The input is unfolded a few samples at a time. For a linear layer, `bmm` does the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.kernels import blocks as cpu
from fxcurv.kernels.patches import Patches, grouped, windows
from fxcurv.kernels.register import INTO


def reference(x: Tensor, g: Tensor, *geometry) -> Tensor:
    """The definition: autograd's gradient of each sample and column."""
    kernel, stride, padding, dilation, groups = geometry
    weight = x.new_zeros(g.shape[2], x.shape[1] // groups, *kernel)
    rest = ([0], stride, padding, dilation, False, [0] * len(kernel), groups, [False, True, False])
    back = torch.ops.aten.convolution_backward
    return torch.stack(
        [
            torch.stack([back(gn, xn, weight, *rest)[1] for gn, xn in zip(c.split(1), x.split(1), strict=True)])
            for c in g
        ]
    )


@torch.library.custom_op("fxcurv::outer_batch_conv", mutates_args=())
def outer_batch_conv(
    x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """See the module."""
    return into(x, g, kernel, stride, padding, dilation, groups, out=g.new_empty(shape(x, g, kernel, groups)))


def into(
    x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int, *,
    out: Tensor,
) -> Tensor:  # fmt: skip
    """The op on a CPU, written into contiguous memory of the caller's."""
    a = Patches(x, g.shape[3:], (kernel, stride, padding, dilation), groups, in_order=True)
    columns = grouped(g, groups)
    rows = out.view(*columns.shape[:3], columns.shape[4], a.i)
    for n in cpu.spans(x.shape[0], a.most):
        patches = a(n).to(g.dtype).flatten(0, 1)
        for column, target in zip(columns, rows, strict=True):
            cpu.product_into(column[n].flatten(0, 1).mT, patches, target[n].flatten(0, 1))
    return out


INTO[torch.ops.fxcurv.outer_batch_conv.default] = into


def shape(x: Tensor, g: Tensor, kernel: list[int], groups: int) -> tuple[int, ...]:
    """The shape of P."""
    return (g.shape[0], x.shape[0], g.shape[2], x.shape[1] // groups, *kernel)


@outer_batch_conv.register_kernel("cuda")
def _(x, g, kernel, stride, padding, dilation, groups):
    """Unfold the input at once: the result P is larger than the patches."""
    dims = len(kernel)
    view = windows(x, g.shape[3:], kernel, stride, padding, dilation)
    view = view.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    a = view.reshape(len(x), -1, groups, x.shape[1] // groups * math.prod(kernel))
    p = torch.einsum("nski,vnkso->vnkoi", a, grouped(g, groups))
    return p.reshape(shape(x, g, kernel, groups))


@outer_batch_conv.register_fake
def _(x, g, kernel, stride, padding, dilation, groups):
    return g.new_empty(shape(x, g, kernel, groups))


@register_flop_formula(torch.ops.fxcurv.outer_batch_conv)
def _(x, g, kernel, stride, padding, dilation, groups, *rest, out_shape=None, **kwargs):
    return 2 * math.prod(g) * (x[1] // groups) * math.prod(kernel)
