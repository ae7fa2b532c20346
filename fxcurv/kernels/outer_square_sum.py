"""outer_square_sum: sum_v w[v, n] (sum_s g[v, n, s, o] a[n, s, i])^2, per sample or summed over samples.

Shapes: a [N, S, I], g [V, N, S, O], w [V, N] or None (ones), of either sign -> [O, I], or [N, O, I] with `per_sample`; in
float32 for inputs in half precision. The per-sample products [V, N, O, I] never exist: a block that fits the cache, or a
tile in registers, is squared and added.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.ir.precision import wide
from fxcurv.kernels import blocks as cpu
from fxcurv.kernels.register import INTO, on_cuda


def reference(a: Tensor, g: Tensor, w: Tensor | None, per_sample: bool) -> Tensor:
    """The definition, with P materialised."""
    p = torch.einsum("vnso,nsi->vnoi", g, a).square()
    p = p if w is None else p * w[:, :, None, None]
    return p.sum(0) if per_sample else p.sum((0, 1))


@torch.library.custom_op("fxcurv::outer_square_sum", mutates_args=())
def outer_square_sum(a: Tensor, g: Tensor, w: Tensor | None, per_sample: bool) -> Tensor:
    """See the module; weights may be negative, so no root of them is needed."""
    out = cpu.square_sum(lambda n: a[n].unsqueeze(1), g.unsqueeze(2), a.shape[2], w, per_sample).squeeze(1)
    return out if per_sample else out.squeeze(0)


def into(a: Tensor, g: Tensor, w: Tensor | None, per_sample: bool, *, out: Tensor) -> Tensor:
    """The op on a CPU, written into memory of the caller's."""
    cpu.square_sum(lambda n: a[n].unsqueeze(1), g.unsqueeze(2), a.shape[2], w, per_sample, out=out)
    return out


INTO[torch.ops.fxcurv.outer_square_sum.default] = into


@outer_square_sum.register_fake
def _(a, g, w, per_sample):
    o, i = g.shape[3], a.shape[2]
    return g.new_empty((g.shape[1], o, i) if per_sample else (o, i), dtype=wide(g.dtype))


@register_flop_formula(torch.ops.fxcurv.outer_square_sum)
def _(a, g, *rest, out_shape=None, **kwargs):
    v, n, s, o = g
    return 2 * v * n * s * o * a[2]


on_cuda(outer_square_sum, "outer_square_sum")
