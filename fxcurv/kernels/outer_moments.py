"""outer_moments: sums over samples of P[n] = sum_s g[n, s, :] a[n, s, :]^T and of its squares, and its norms, at once.

Shapes: a [N, S, I], g [N, S, O] -> (total [O, I], squares [O, I], norms [N]): sum_n P[n], sum_n P[n]^2, ||P[n]||^2.
Those not wanted are empty. `outer_moments_conv` is the same for a convolution, x [N, C, *in], g [N, O, *out], with the
weight's shape in place of [O, I]; its input is unfolded a few samples at a time. All three come from the same block of
P in the cache, so the gradient needs no product of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.ir.precision import wide
from fxcurv.kernels import blocks as cpu
from fxcurv.kernels.outer_norm import outer_norm
from fxcurv.kernels.outer_square_sum import outer_square_sum
from fxcurv.kernels.outer_square_sum_conv import outer_square_sum_conv
from fxcurv.kernels.patches import Patches, grouped, windows


def reference(a: Tensor, g: Tensor, total: bool, squares: bool, norms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, with P materialised."""
    p = torch.einsum("nso,nsi->noi", g, a)
    found = p.sum(0), p.square().sum(0), p.square().sum((1, 2))
    wanted = zip(found, (total, squares, norms), strict=True)
    return tuple(t if want else t.new_empty(0) for t, want in wanted)  # type: ignore[return-value]


@torch.library.custom_op("fxcurv::outer_moments", mutates_args=())
def outer_moments(a: Tensor, g: Tensor, total: bool, squares: bool, norms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See the module; in float32 for half precision."""
    out = tuple(t.zero_().unsqueeze(0) for t in _empty(a, g, total, squares, norms))
    _add(lambda n: a[n].unsqueeze(1), g.unsqueeze(1), a.shape[2], None, out, (total, squares, norms))
    return tuple(t.squeeze(0) for t in out)  # type: ignore[return-value]


def _add(
    a: Callable[[slice], Tensor], g: Tensor, i: int, most: int | None, out: Sequence[Tensor], wanted: Sequence[bool]
) -> None:
    """Add the moments of P, from a(samples) [N', K, S, I] and g [N, K, S, O], to `out` [K, O, I], [K, O, I], [1, N]."""
    for _, n, o, p in cpu.products(a, g.unsqueeze(0), i, most):
        if wanted[0]:
            out[0][:, o] += p.sum(0)
        if wanted[2]:
            out[2][0, n] += p.square_().flatten(1).sum(1)
        if wanted[1]:
            cpu.add_squares(out[1][:, o], p, squared=wanted[2])


@outer_moments.register_kernel("cuda")
def _(a, g, total, squares, norms):
    """Use one op per moment: on CUDA, computing P again costs less than keeping it."""
    empty = _empty(a, g, False, False, False)
    columns = g.unsqueeze(0)
    return (
        g.flatten(0, 1).t().to(empty[0].dtype) @ a.flatten(0, 1).to(empty[0].dtype) if total else empty[0],
        outer_square_sum(a, columns, None, False) if squares else empty[1],
        outer_norm(a, columns)[0] if norms else empty[2],
    )


@outer_moments.register_fake
def _(a, g, total, squares, norms):
    return _empty(a, g, total, squares, norms)


def _empty(a: Tensor, g: Tensor, total: bool, squares: bool, norms: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_of(g, (g.shape[2], a.shape[2]), total, squares, norms)


def _empty_of(
    g: Tensor, weight: tuple[int, ...], total: bool, squares: bool, norms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the wanted results: two sums of the weight's shape, and a norm per sample."""

    def new(wanted, *shape):
        return g.new_empty(shape if wanted else (0,), dtype=wide(g.dtype))

    return new(total, *weight), new(squares, *weight), new(norms, g.shape[0])


@register_flop_formula(torch.ops.fxcurv.outer_moments)
def _(a, g, *rest, out_shape=None, **kwargs):
    n, s, o = g
    return 2 * n * s * o * a[2]


# convolutions ----------------------------------------------------------------------------------------


def reference_conv(
    x: Tensor, g: Tensor, total: bool, squares: bool, norms: bool,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The definition: autograd's gradient of each sample."""
    weight = x.new_zeros(g.shape[1], x.shape[1] // groups, *kernel)
    geometry = ([0], stride, padding, dilation, False, [0] * len(kernel), groups, [False, True, False])
    pairs = zip(g.split(1), x.split(1), strict=True)
    p = torch.stack([torch.ops.aten.convolution_backward(gn, xn, weight, *geometry)[1] for gn, xn in pairs])
    found = p.sum(0), p.square().sum(0), p.square().flatten(1).sum(1)
    return tuple(t if w else t.new_empty(0) for t, w in zip(found, (total, squares, norms), strict=True))  # type: ignore[return-value]


@torch.library.custom_op("fxcurv::outer_moments_conv", mutates_args=())
def outer_moments_conv(
    x: Tensor, g: Tensor, total: bool, squares: bool, norms: bool,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See the module; the geometry is `torch.nn.functional.conv2d`'s."""
    a = Patches(x, g.shape[2:], (kernel, stride, padding, dilation), groups, in_order=False)
    cotangents = grouped(g.unsqueeze(0), groups).squeeze(0)

    def new(wanted: bool, *shape: int) -> Tensor:
        return g.new_zeros(shape if wanted else (0,), dtype=wide(g.dtype))

    matrix = (groups, cotangents.shape[3], a.i)
    out = new(total, *matrix), new(squares, *matrix), new(norms, 1, g.shape[0])
    _add(a, cotangents, a.i, a.most, out, (total, squares, norms))
    matrices = [a.weight(t) if wanted else t for t, wanted in zip(out[:2], (total, squares), strict=True)]
    return matrices[0], matrices[1], out[2].squeeze(0) if norms else out[2]


@outer_moments_conv.register_kernel("cuda")
def _(x, g, total, squares, norms, kernel, stride, padding, dilation, groups):
    """Use one op per moment, for the norms on the unfolded input."""
    empty = _empty_conv(x, g, False, False, False, kernel, groups)
    columns, weight = g.unsqueeze(0), g.new_empty(()).expand(g.shape[1], x.shape[1] // groups, *kernel)
    geometry = ([0], stride, padding, dilation, False, [0] * len(kernel), groups, [False, True, False])
    found = list(empty)
    if total:
        found[0] = torch.ops.aten.convolution_backward(g, x, weight, *geometry)[1].to(empty[0].dtype).contiguous()
    if squares:
        found[1] = outer_square_sum_conv(x, columns, None, False, kernel, stride, padding, dilation, groups)
    if norms:
        dims = len(kernel)
        view = windows(x, g.shape[2:], kernel, stride, padding, dilation)
        view = view.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
        a = view.reshape(len(x), -1, groups, x.shape[1] // groups * weight[0, 0].numel())
        parts = zip(a.unbind(2), grouped(columns, groups).unbind(2), strict=True)
        found[2] = sum(outer_norm(u, v)[0] for u, v in parts)
    return tuple(found)


@outer_moments_conv.register_fake
def _(x, g, total, squares, norms, kernel, stride, padding, dilation, groups):
    return _empty_conv(x, g, total, squares, norms, kernel, groups)


def _empty_conv(x, g, total, squares, norms, kernel, groups):
    return _empty_of(g, (g.shape[1], x.shape[1] // groups, *kernel), total, squares, norms)


@register_flop_formula(torch.ops.fxcurv.outer_moments_conv)
def _(x, g, total, squares, norms, kernel, stride, padding, dilation, groups, *rest, out_shape=None, **kwargs):
    return 2 * prod(g) * (x[1] // groups) * prod(kernel)
