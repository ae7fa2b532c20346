"""outer_clip_sum: sum_n c[n] sum_s g[n, s, :] a[n, s, :]^T, the weighted sum of per-sample products without the products.

Shapes: a [N, S, I], g [N, S, O], c [N] -> [O, I], in float32 for inputs in half precision. With c the factors to which
per-sample gradients are clipped, their clipped sum (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.ir.precision import wide
from fxcurv.kernels import blocks as cpu
from fxcurv.kernels.register import on_cuda


def reference(a: Tensor, g: Tensor, c: Tensor) -> Tensor:
    """The definition."""
    return torch.einsum("n,nso,nsi->oi", c, g, a)


@torch.library.custom_op("fxcurv::outer_clip_sum", mutates_args=())
def outer_clip_sum(a: Tensor, g: Tensor, c: Tensor) -> Tensor:
    """See the module; the smaller factor of a few samples at a time is weighted, in the cache."""
    n, s, o = g.shape
    i = a.shape[2]
    out = g.new_zeros(o, i, dtype=wide(g.dtype))
    for (ns,) in cpu.boxes((n,), cpu.BLOCK // max(1, s * min(o, i))):
        left, right, weight = g[ns].to(out.dtype), a[ns].to(out.dtype), c[ns, None, None].to(out.dtype)
        left, right = (left * weight, right) if o <= i else (left, right * weight)
        out.addmm_(left.flatten(0, 1).t(), right.flatten(0, 1))
    return out


@outer_clip_sum.register_fake
def _(a, g, c):
    return g.new_empty(g.shape[2], a.shape[2], dtype=wide(g.dtype))


@register_flop_formula(torch.ops.fxcurv.outer_clip_sum)
def _(a, g, *rest, out_shape=None, **kwargs):
    n, s, o = g
    return 2 * n * s * o * a[2]


on_cuda(outer_clip_sum, "outer_clip_sum")
