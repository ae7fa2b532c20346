"""outer_moments: the sum over samples of P[n] = sum_s g[n, s, :] a[n, s, :]^T, that of its squares, and its norms, at once.

Shapes: a [N, S, I], g [N, S, O] -> (total [O, I], squares [O, I], norms [N]): sum_n P[n], sum_n P[n]^2, ||P[n]||^2; what is not
wanted is empty. A gradient costs no product of its own beside the others: a block of P in the cache serves all three.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.kernels import cpu
from fxcurv.kernels.outer_norm import outer_norm
from fxcurv.kernels.outer_square_sum import outer_square_sum
from fxcurv.precision import wide


def reference(a: Tensor, g: Tensor, total: bool, squares: bool, norms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, with P materialised."""
    p = torch.einsum("nso,nsi->noi", g, a)
    found = p.sum(0), p.square().sum(0), p.square().sum((1, 2))
    wanted = zip(found, (total, squares, norms), strict=True)
    return tuple(t if want else t.new_empty(0) for t, want in wanted)  # type: ignore[return-value]


@torch.library.custom_op("fxcurv::outer_moments", mutates_args=())
def outer_moments(a: Tensor, g: Tensor, total: bool, squares: bool, norms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See the module; in float32 for half precision."""
    out = tuple(t.zero_() for t in _empty(a, g, total, squares, norms))
    for _, n, o, p in cpu.products(lambda n: a[n].unsqueeze(1), g.unsqueeze(0).unsqueeze(2), a.shape[2]):
        p = p.squeeze(1)
        if total:
            out[0][o] += p.sum(0)
        if squares:
            for one in p:
                out[1][o].addcmul_(one, one)
        if norms:
            rows = p.flatten(1)
            out[2][n] += torch.linalg.vecdot(rows, rows)
    return out  # type: ignore[return-value]


@outer_moments.register_kernel("cuda")
def _(a, g, total, squares, norms):
    """By an op for each: there a product costs less than what would keep it for all."""
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
    def new(wanted, *shape):
        return g.new_empty(shape if wanted else (0,), dtype=wide(g.dtype))

    matrix = (g.shape[2], a.shape[2])
    return new(total, *matrix), new(squares, *matrix), new(norms, g.shape[0])


@register_flop_formula(torch.ops.fxcurv.outer_moments)
def _(a, g, *rest, out_shape=None, **kwargs):
    n, s, o = g
    return 2 * n * s * o * a[2]
