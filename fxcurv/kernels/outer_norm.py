"""outer_norm: ||sum_s g[v, n, s, :] a[n, s, :]^T||^2 per column and sample, without keeping the products.

Shapes: a [N, S, I], g [V, N, S, O] -> [V, N].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def reference(a: Tensor, g: Tensor) -> Tensor:
    """The definition, with P materialised."""
    return torch.einsum("vnso,nsi->vnoi", g, a).square().sum((2, 3))


@torch.library.custom_op("fxcurv::outer_norm", mutates_args=())
def outer_norm(a: Tensor, g: Tensor) -> Tensor:
    """See the module; one sample's products at a time, in memory that stays in the cache."""
    v, n, s, o = g.shape
    out = g.new_empty(v, n)
    left = g.permute(1, 0, 3, 2)
    scratch = g.new_empty(v * o, a.shape[2])
    for k in range(n):
        p = torch.mm(left[k].reshape(v * o, s), a[k], out=scratch).view(v, -1)
        torch.linalg.vecdot(p, p, out=out[:, k])
    return out


@outer_norm.register_fake
def _(a, g):
    return g.new_empty(g.shape[0], g.shape[1])


@register_flop_formula(torch.ops.fxcurv.outer_norm)
def _(a, g, *rest, out_shape=None, **kwargs):
    v, n, s, o = g
    return 2 * v * n * s * o * a[2]
