"""outer_square_sum on CUDA: a program holds a tile of the sum in registers and loops over samples and columns."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from fxcurv.ir.precision import wide
from fxcurv.kernels.tiles import TWO_TILES, launch, product, splits, tiles, tuned


@tuned(key=["S", "O", "I"], rows="O", cols="I", configs=TWO_TILES)
def square_sum(
    a, g, w, out, each, V, N, S, O, I,
    stride_an, stride_as, stride_ai, stride_gv, stride_gn, stride_gs, stride_go, stride_wv, stride_wn,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[part] = a tile of [O, I], summed over V columns and the `each` samples of the part."""
    ACC: tl.constexpr = out.dtype.element_ty
    across = tl.cdiv(I, COLS)
    count = tl.cdiv(O, ROWS) * across
    tile, part = tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)
    o = tile // across * ROWS + tl.arange(0, ROWS)
    i = tile % across * COLS + tl.arange(0, COLS)
    first = part * each
    a += first * stride_an
    g += first * stride_gn
    w += first * stride_wn
    total = tl.zeros((ROWS, COLS), ACC)
    for _ in range(tl.minimum(each, N - first)):
        column, weight = g, w
        for _ in range(V):
            p = product(
                column, a, o, i, S, O, I, stride_go, stride_gs, stride_as, stride_ai, ACC, ROWS, COLS, INNER, PRECISION
            )
            if WEIGHTED:
                total += tl.load(weight).to(ACC) * (p * p)
            else:
                total += p * p
            column += stride_gv
            weight += stride_wv
        a += stride_an
        g += stride_gn
        w += stride_wn
    tl.store(out + part * O * I + o[:, None] * I + i[None, :], total, (o[:, None] < O) & (i[None, :] < I))


def outer_square_sum(a: Tensor, g: Tensor, w: Tensor | None, per_sample: bool) -> Tensor:
    """See `outer_square_sum.outer_square_sum`."""
    v, n, s, o = g.shape
    i = a.shape[2]
    if 0 in (*g.shape, i):
        return g.new_zeros((n, o, i) if per_sample else (o, i), dtype=wide(g.dtype))
    parts, each = (n, 1) if per_sample else splits(n, tiles(o, i, 64, 64), g.device)
    out = g.new_empty(parts, o, i, dtype=wide(g.dtype))
    weights = (out, 0, 0) if w is None else (w, *w.stride())
    launch(
        square_sum, lambda meta: (parts * tiles(o, i, meta["ROWS"], meta["COLS"]),), g,
        a, g, weights[0], out, each, v, n, s, o, i, *a.stride(), *g.stride(), *weights[1:], w is not None,
    )  # fmt: skip
    return out if per_sample else out.sum(0)
