"""outer_square_sum: sum_v w[v, n] (sum_s g[v, n, s, o] a[n, s, i])^2, per sample or summed over samples.

Shapes: a [N, S, I], g [V, N, S, O], w [V, N] or None -> [O, I], or [N, O, I] with `per_sample`.
The per-sample products [V, N, O, I] never exist: a block that fits the cache is written, squared and added.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Elements of the scratch block, 2 MiB in float32; a batched product of fewer samples leaves threads without work.
BLOCK = 1 << 19
FEWEST = 4


def reference(a: Tensor, g: Tensor, w: Tensor | None, per_sample: bool) -> Tensor:
    """The definition, with P materialised."""
    p = torch.einsum("vnso,nsi->vnoi", g, a).square()
    p = p if w is None else p * w[:, :, None, None]
    return p.sum(0) if per_sample else p.sum((0, 1))


@torch.library.custom_op("fxcurv::outer_square_sum", mutates_args=())
def outer_square_sum(a: Tensor, g: Tensor, w: Tensor | None, per_sample: bool) -> Tensor:
    """See the module; columns with real weights, so the sum needs no root and no sign."""
    v, n, s, o = g.shape
    i = a.shape[2]
    out = g.new_zeros((n, o, i) if per_sample else (o, i))
    factor = None if w is None else w.tolist()
    count = max(1, min(n, max(FEWEST, BLOCK // max(1, o * i))))
    scratch = g.new_empty(count, o, i)
    for start in range(0, n, count):
        stop = min(n, start + count)
        for k in range(v):
            p = torch.bmm(g[k, start:stop].mT, a[start:stop], out=scratch[: stop - start])
            for j, one in enumerate(p, start):
                target = out[j] if per_sample else out
                target.addcmul_(one, one, value=1 if factor is None else factor[k][j])
    return out


@outer_square_sum.register_fake
def _(a, g, w, per_sample):
    o, i = g.shape[3], a.shape[2]
    return g.new_empty((g.shape[1], o, i) if per_sample else (o, i))


@register_flop_formula(torch.ops.fxcurv.outer_square_sum)
def _(a, g, *rest, out_shape=None, **kwargs):
    v, n, s, o = g
    return 2 * v * n * s * o * a[2]
