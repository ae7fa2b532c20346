"""outer_gram: inner products <P[v, n], Q[w, m]>, P[v, n] = sum_s g[v, n, s, :] a[n, s, :]^T and Q likewise of h and b.

Shapes: a [N, S, I], g [V, N, S, O], b [M, T, I], h [W, M, T, O] -> [V, N, W, M], in float32 for inputs in half precision.
Without b and h, Q is P.

The cheaper of two ways: multiply a few rows (outputs) of all P by the same rows of all Q; or sum products of positions,
sum_{s,t} <a_s, b_t> <g_s, h_t>, for a few samples at a time. P never exists as a whole.

outer_dots: inner products of P with given matrices, by rows of P.
Shapes: a [N, S, I], g [V, N, S, O], vectors [Q, O, I] -> [V, N, Q].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.ir.precision import wide
from fxcurv.kernels import blocks as cpu

# Elements of a block on other devices than a CPU.
LARGE = 1 << 24


def reference(a: Tensor, g: Tensor, b: Tensor | None = None, h: Tensor | None = None) -> Tensor:
    """The definition, with P and Q materialised."""
    p = torch.einsum("vnso,nsi->vnoi", g, a)
    q = p if b is None or h is None else torch.einsum("vnso,nsi->vnoi", h, b)
    return torch.einsum("vnoi,wmoi->vnwm", p, q)


def costs(left: Sequence[int], right: Sequence[int], o: int, i: int, same: bool) -> tuple[int, int]:
    """FLOPs of the two ways, (by rows of P, by positions); `left` is (V, N, S), `right` is (W, M, T)."""
    (v, n, s), (w, m, t) = left, right
    made = 2 * o * i * (v * n * s + (0 if same else w * m * t))
    return made + 2 * v * n * w * m * o * i, 2 * n * s * m * t * (i + v * w * (o + 1))


@torch.library.custom_op("fxcurv::outer_gram", mutates_args=())
def outer_gram(a: Tensor, g: Tensor, b: Tensor | None = None, h: Tensor | None = None) -> Tensor:
    """See the module."""
    same = b is None or h is None
    b, h = (a, g) if b is None or h is None else (b, h)
    out = g.new_zeros(*g.shape[:2], *h.shape[:2], dtype=wide(g.dtype))
    if not out.numel():
        return out
    by_rows, by_positions = costs(g.shape[:3], h.shape[:3], g.shape[3], a.shape[2], same)
    return _by_positions(a, g, b, h, out) if by_positions < by_rows else _by_rows(a, g, b, h, out, same)


def _by_rows(a: Tensor, g: Tensor, b: Tensor, h: Tensor, out: Tensor, same: bool) -> Tensor:
    (v, n, _, o), (w, m) = g.shape, h.shape[:2]
    most = cpu.BLOCK if g.device.type == "cpu" else LARGE
    flat = out.view(v * n, w * m)
    for rows in cpu.spans(o, max(1, most // max(1, (v * n + w * m) * a.shape[2]))):
        p = _rows(a, g, rows, out.dtype)
        flat.addmm_(p, (p if same else _rows(b, h, rows, out.dtype)).t())
    return out


def _rows(a: Tensor, g: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of P, [V N, rows I]."""
    v, n, s, _ = g.shape
    left = g[..., rows].to(dtype).permute(1, 0, 3, 2).reshape(n, -1, s)  # [N, V O, S]
    p = torch.bmm(left, a.to(dtype))
    return p.unflatten(1, (v, -1)).transpose(0, 1).reshape(v * n, -1)


def _by_positions(a: Tensor, g: Tensor, b: Tensor, h: Tensor, out: Tensor) -> Tensor:
    s, (m, t) = a.shape[1], b.shape[:2]
    right, columns = b.to(out.dtype).flatten(0, 1).t(), h.to(out.dtype).flatten(1, 2).mT
    for some in cpu.spans(len(a), max(1, cpu.BLOCK // max(1, s * m * t))):
        pairs = a[some].to(out.dtype).flatten(0, 1) @ right
        for v in range(len(g)):
            left = g[v, some].to(out.dtype).flatten(0, 1)
            for w in range(len(h)):
                product = (left @ columns[w]).mul_(pairs)
                out[v, some, w] = product.view(-1, s, m, t).sum((1, 3))
    return out


@outer_gram.register_fake
def _(a, g, b=None, h=None):
    return g.new_empty(*g.shape[:2], *(g if h is None else h).shape[:2], dtype=wide(g.dtype))


@register_flop_formula(torch.ops.fxcurv.outer_gram)
def _(a, g, b=None, h=None, *rest, out_shape=None, **kwargs):
    return min(costs(g[:3], (g if h is None else h)[:3], g[3], a[2], h is None))


@torch.library.custom_op("fxcurv::outer_dots", mutates_args=())
def outer_dots(a: Tensor, g: Tensor, vectors: Tensor) -> Tensor:
    """See the module."""
    (v, n, _, o), most = g.shape, cpu.BLOCK if g.device.type == "cpu" else LARGE
    out = g.new_zeros(v * n, len(vectors), dtype=wide(g.dtype))
    for rows in cpu.spans(o, max(1, most // max(1, v * n * a.shape[2]))) if out.numel() else []:
        out.addmm_(_rows(a, g, rows, out.dtype), vectors[:, rows].to(out.dtype).flatten(1).t())
    return out.view(v, n, len(vectors))


@outer_dots.register_fake
def _(a, g, vectors):
    return g.new_empty(*g.shape[:2], vectors.shape[0], dtype=wide(g.dtype))


@register_flop_formula(torch.ops.fxcurv.outer_dots)
def _(a, g, vectors, *rest, out_shape=None, **kwargs):
    return 2 * g[0] * g[1] * g[3] * a[2] * (g[2] + vectors[0])
