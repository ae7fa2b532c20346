"""outer_norm: ||P[v, n]||^2 of P[v, n] = sum_s g[v, n, s, :] a[n, s, :]^T, without keeping P.

Shapes: a [N, S, I], g [V, N, S, O] -> [V, N], in float32 for inputs in half precision.

The cheaper of two ways: square P block by block; or take the inner product of the Gram matrices of positions,
||P||^2 = sum_{s,t} (a_s . a_t) (g_s . g_t) (Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679), a block
of positions at a time, each pair once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.ir.precision import wide
from fxcurv.kernels import blocks as cpu
from fxcurv.kernels.register import on_cuda


def reference(a: Tensor, g: Tensor) -> Tensor:
    """The definition, with P materialised."""
    return torch.einsum("vnso,nsi->vnoi", g, a).square().sum((2, 3))


def costs(v: int, n: int, s: int, o: int, i: int, block: int | None = None) -> tuple[int, int]:
    """FLOPs of the two ways, (by P, by Gram matrices); `block`: its positions, by default what fits a CPU's cache."""
    block = max(1, cpu.BLOCK // max(1, s)) if block is None else block
    return 2 * v * n * s * o * i, n * s * (s + min(block, s)) * (i + v * o)


@torch.library.custom_op("fxcurv::outer_norm", mutates_args=())
def outer_norm(a: Tensor, g: Tensor) -> Tensor:
    """See the module."""
    v, n, s, o = g.shape
    direct, gram = costs(v, n, s, o, a.shape[2])
    out = g.new_zeros(v, n, dtype=wide(g.dtype))
    return _by_gram(a, g, out) if gram < direct else _by_products(a, g, out)


def _by_products(a: Tensor, g: Tensor, out: Tensor) -> Tensor:
    for v, n, _, p in cpu.products(lambda n: a[n].unsqueeze(1), g.unsqueeze(2), a.shape[2]):
        out[v, n] += p.square_().flatten(1).sum(1)
    return out


def _by_gram(a: Tensor, g: Tensor, out: Tensor) -> Tensor:
    """Pair each block of positions with all up to its end; pairs with positions before the block count twice."""
    s = a.shape[1]
    for n, t in cpu.boxes((a.shape[0], s), max(1, cpu.BLOCK // s)):
        block = a[n, : t.stop].to(out.dtype)
        pairs = torch.bmm(block[:, t], block.mT)
        pairs[:, :, : t.start] *= 2
        for v in range(g.shape[0]):
            block = g[v, n, : t.stop].to(out.dtype)
            out[v, n] += torch.bmm(block[:, t], block.mT).mul_(pairs).sum((1, 2))
    return out


@outer_norm.register_fake
def _(a, g):
    return g.new_empty(g.shape[0], g.shape[1], dtype=wide(g.dtype))


@register_flop_formula(torch.ops.fxcurv.outer_norm)
def _(a, g, *rest, out_shape=None, **kwargs):
    v, n, s, o = g
    return min(costs(v, n, s, o, a[2]))


on_cuda(outer_norm, "outer_norm")
