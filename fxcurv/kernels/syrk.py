"""syrk: x x^T, by computing one triangle and mirroring it.

Shapes: x [K, M] -> [K, K], in float32 for half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.ir.precision import wide
from fxcurv.kernels.register import on_cuda

# Rows of a strip of the triangle. With fewer, the library's matrix product loses more than the triangle saves.
STRIP = 256
# With fewer rows, all of x x^T is one product.
FEW = 256


def reference(x: Tensor) -> Tensor:
    """The definition."""
    return torch.einsum("km,lm->kl", x, x)


def strips(k: int) -> list[slice]:
    """Equal strips of `k` rows: two to sixteen of about `STRIP` rows; one if `k` is below `FEW`."""
    rows = -(-k // (1 if k < FEW else max(2, min(16, k // STRIP))))
    return [slice(start, min(k, start + rows)) for start in range(0, k, max(1, rows))]


def add_triangle(out: Tensor, x: Tensor, beta: int = 1) -> None:
    """Set `out` to beta out + x x^T, strip by strip, each up to its block on the diagonal."""
    for rows in strips(len(x)):
        out[rows, : rows.stop].addmm_(x[rows], x[: rows.stop].t(), beta=beta)


def mirror(out: Tensor) -> Tensor:
    """Copy what lies below the diagonal blocks of the strips to its mirror place, and return `out`."""
    for rows in strips(len(out))[1:]:
        out[: rows.start, rows] = out[rows, : rows.start].t()
    return out


@torch.library.custom_op("fxcurv::syrk", mutates_args=())
def syrk(x: Tensor) -> Tensor:
    """x x^T; see the module."""
    return by_strips(x.to(wide(x.dtype)))


def by_strips(x: Tensor) -> Tensor:
    """x x^T by the library's matrix products."""
    out = x.new_empty(len(x), len(x))
    add_triangle(out, x, beta=0)
    return mirror(out)


@syrk.register_fake
def _(x):
    return x.new_empty(x.shape[0], x.shape[0], dtype=wide(x.dtype))


def triangle_flops(k: int, m: int) -> int:
    """FLOPs of a lower triangle with its diagonal."""
    return k * (k + 1) * m


@register_flop_formula(torch.ops.fxcurv.syrk)
def _(x, *rest, out_shape=None, **kwargs):
    return triangle_flops(*x)


syrk.register_autograd(
    lambda ctx, grad: (grad + grad.t()).to(ctx.saved_tensors[0].dtype) @ ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)
on_cuda(syrk, "syrk")
