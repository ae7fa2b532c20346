"""norm_square_sum: sum_{v,n} w[v, n] (sum_s g[v, n, s, :] x_hat[n, s, :])^2, squares for a normalisation's scale.

Without `x_hat`, sum_{v,n} w[v, n] (sum_s g[v, n, s, :])^2, those for its shift.

Shapes: x_hat [N, S, D] or None, g [V, N, S, D], w [V, N] (real, signed) or None -> [D]. The products are written for a few
samples at a time, to memory that stays in the cache. Half precision is accumulated and returned in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.ir.precision import wide
from fxcurv.kernels import blocks as cpu
from fxcurv.kernels.register import on_cuda


def reference(x_hat: Tensor | None, g: Tensor, w: Tensor | None) -> Tensor:
    """The definition, with all products."""
    p = (g if x_hat is None else g * x_hat).sum(2).square()
    return (p if w is None else p * w.unsqueeze(2)).sum((0, 1))


@torch.library.custom_op("fxcurv::norm_square_sum", mutates_args=())
def norm_square_sum(x_hat: Tensor | None, g: Tensor, w: Tensor | None) -> Tensor:
    """Squares for a scale or a shift; the module says more."""
    v, n, s, d = g.shape
    dtype = wide(g.dtype)
    out = g.new_zeros(d, dtype=dtype)
    scratch = g.new_empty(0 if x_hat is None else min(v * n * s * d, max(s * d, cpu.BLOCK)), dtype=dtype)
    for samples, columns in cpu.boxes((n, v), max(1, cpu.BLOCK // max(1, s * d))):
        part = g[columns, samples].to(dtype)
        if x_hat is not None:
            part = torch.mul(part, x_hat[samples].to(dtype), out=scratch[: part.numel()].view(part.shape))
        h = part.sum(2)
        weighted = h if w is None else h * w[columns, samples].to(dtype).unsqueeze(2)
        out += torch.linalg.vecdot(h.flatten(0, 1), weighted.flatten(0, 1), dim=0)
    return out


@norm_square_sum.register_fake
def _(x_hat, g, w):
    return g.new_empty(g.shape[3], dtype=wide(g.dtype))


@register_flop_formula(torch.ops.fxcurv.norm_square_sum)
def _(x_hat, g, *rest, out_shape=None, **kwargs):
    v, n, s, d = g
    return (1 if x_hat is None else 2) * v * n * s * d


on_cuda(norm_square_sum, "norm_square_sum")
