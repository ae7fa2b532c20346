"""outer_batch: the per-sample products P[v, n] = sum_s g[v, n, s, :] a[n, s, :]^T, written once.

Shapes: a [N, S, I], g [V, N, S, O] -> [V, N, O, I], in the factors' dtype. `outer_batch_out` writes them to memory that the
caller has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.kernels import blocks as cpu
from fxcurv.kernels.patches import Patches, grouped, windows
from fxcurv.kernels.register import on_cuda


def reference(a: Tensor, g: Tensor) -> Tensor:
    """The definition."""
    return torch.einsum("vnso,nsi->vnoi", g, a)


@torch.library.custom_op("fxcurv::outer_batch_out", mutates_args={"out"})
def outer_batch_out(a: Tensor, g: Tensor, out: Tensor) -> None:
    """Write P to `out` [V, N, O, I], of the factors' dtype and any strides that do not overlap.

    Raises:
        ValueError: `out` has another shape or dtype.
    """
    check_out(a, g, out)
    for column, target in zip(g.mT, out, strict=True):
        if a.shape[1] == 1:
            torch.mul(column, a, out=target)
        else:
            torch.bmm(column, a, out=target)


@torch.library.custom_op("fxcurv::outer_batch", mutates_args=())
def outer_batch(a: Tensor, g: Tensor) -> Tensor:
    """See the module."""
    out = g.new_empty(shape(a, g))
    outer_batch_out(a, g, out)
    return out


def shape(a: Tensor, g: Tensor) -> tuple[int, ...]:
    """The shape of P."""
    return (g.shape[0], g.shape[1], g.shape[3], a.shape[2])


def check_out(a: Tensor, g: Tensor, out: Tensor) -> None:
    """Refuse memory that does not fit, which PyTorch's own `out=` would resize."""
    if tuple(out.shape) != shape(a, g) or out.dtype != g.dtype:
        raise ValueError(f"out is {list(out.shape)} {out.dtype}, the products are {list(shape(a, g))} {g.dtype}")


@outer_batch.register_fake
def _(a, g):
    return g.new_empty(shape(a, g))


@outer_batch_out.register_fake
def _(a, g, out):
    check_out(a, g, out)


@register_flop_formula([torch.ops.fxcurv.outer_batch, torch.ops.fxcurv.outer_batch_out])
def _(a, g, *rest, out_shape=None, **kwargs):
    v, n, s, o = g
    return 2 * v * n * s * o * a[2]


on_cuda(outer_batch, "outer_batch")
on_cuda(outer_batch_out, "outer_batch_out", "outer_batch")


# convolutions ----------------------------------------------------------------------------------------


@torch.library.custom_op("fxcurv::outer_batch_conv", mutates_args=())
def outer_batch_conv(
    x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """The same for a convolution's weight: x [N, C, *in], g [V, N, O, *out] -> [V, N, O, C / groups, *kernel].

    The geometry is `torch.nn.functional.conv2d`'s. The input is unfolded a few samples at a time.
    """
    return into_conv(x, g, kernel, stride, padding, dilation, groups, out=g.new_empty(shape_conv(x, g, kernel, groups)))


def reference_conv(x: Tensor, g: Tensor, *geometry) -> Tensor:
    """The definition: autograd's gradient of each sample and column."""
    kernel, stride, padding, dilation, groups = geometry
    weight = x.new_zeros(g.shape[2], x.shape[1] // groups, *kernel)
    rest = ([0], stride, padding, dilation, False, [0] * len(kernel), groups, [False, True, False])
    back = torch.ops.aten.convolution_backward
    return torch.stack(
        [torch.stack([back(gn, xn, weight, *rest)[1] for gn, xn in zip(c.split(1), x.split(1), strict=True)]) for c in g]
    )


def into_conv(
    x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int, *,
    out: Tensor,
) -> Tensor:  # fmt: skip
    """`outer_batch_conv` in memory that the caller has, contiguous."""
    a = Patches(x, g.shape[3:], (kernel, stride, padding, dilation), groups, in_order=True)
    columns = grouped(g, groups)
    into = out.view(*columns.shape[:3], columns.shape[4], a.i)
    for n in cpu.spans(x.shape[0], a.most):
        patches = a(n).to(g.dtype).flatten(0, 1)
        for column, target in zip(columns, into, strict=True):
            torch.bmm(column[n].flatten(0, 1).mT, patches, out=target[n].flatten(0, 1))
    return out


def shape_conv(x: Tensor, g: Tensor, kernel: list[int], groups: int) -> tuple[int, ...]:
    """The shape of P."""
    return (g.shape[0], x.shape[0], g.shape[2], x.shape[1] // groups, *kernel)


@outer_batch_conv.register_kernel("cuda")
def _(x, g, kernel, stride, padding, dilation, groups):
    """By unfolding: P, which is returned whole, is larger."""
    dims = len(kernel)
    view = windows(x, g.shape[3:], kernel, stride, padding, dilation)
    view = view.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    a = view.reshape(len(x), -1, groups, x.shape[1] // groups * math.prod(kernel))
    p = torch.einsum("nski,vnkso->vnkoi", a, grouped(g, groups))
    return p.reshape(shape_conv(x, g, kernel, groups))


@outer_batch_conv.register_fake
def _(x, g, kernel, stride, padding, dilation, groups):
    return g.new_empty(shape_conv(x, g, kernel, groups))


@register_flop_formula(torch.ops.fxcurv.outer_batch_conv)
def _(x, g, kernel, stride, padding, dilation, groups, *rest, out_shape=None, **kwargs):
    return 2 * math.prod(g) * (x[1] // groups) * math.prod(kernel)
