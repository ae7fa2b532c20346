"""outer_batch: the per-sample products P[v, n] = sum_s g[v, n, s, :] a[n, s, :]^T, written once.

Shapes: a [N, S, I], g [V, N, S, O] -> [V, N, O, I], in the factors' dtype. `outer_batch_out` writes them to memory that the
caller has.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

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
