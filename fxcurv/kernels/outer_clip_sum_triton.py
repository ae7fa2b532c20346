"""outer_clip_sum on CUDA: a matrix product over the rows (n, s), in parts; g is weighted as it is loaded."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from fxcurv.ir.precision import wide
from fxcurv.kernels.tiles import TWO_TILES, launch, splits, tiles, tuned


@tuned(key=["S", "O", "I"], rows="O", cols="I", configs=TWO_TILES)
def clip_sum(
    a, g, c, out, each, N, S, O, I, stride_an, stride_as, stride_ai, stride_gn, stride_gs, stride_go, stride_cn,
    ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[part] = the sum over the part's `each` samples, a tile of [O, I]."""
    across = tl.cdiv(I, COLS)
    count = tl.cdiv(O, ROWS) * across
    tile, part = tl.program_id(0) % count, (tl.program_id(0) // count).to(tl.int64)
    o = tile // across * ROWS + tl.arange(0, ROWS)
    i = tile % across * COLS + tl.arange(0, COLS)
    first = part * each
    a += first * stride_an
    g += first * stride_gn
    c += first * stride_cn
    end = (tl.minimum(each, N - first) * S).to(tl.int32)
    total = tl.zeros((ROWS, COLS), out.dtype.element_ty)
    for start in range(0, end, INNER):
        row = start + tl.arange(0, INNER)
        n, s = (row // S).to(tl.int64), row % S
        within = row < end
        left = tl.load(
            g + o[:, None] * stride_go + (n * stride_gn + s * stride_gs)[None, :], (o[:, None] < O) & within[None, :], 0.0
        )
        right = tl.load(
            a + (n * stride_an + s * stride_as)[:, None] + i[None, :] * stride_ai, within[:, None] & (i[None, :] < I), 0.0
        )
        weight = tl.load(c + n * stride_cn, within, 0.0)
        # half precision is weighted in float32 and rounded once
        left = (left.to(total.dtype) * weight.to(total.dtype)[None, :]).to(right.dtype)
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)
    tl.store(out + part * O * I + o[:, None] * I + i[None, :], total, (o[:, None] < O) & (i[None, :] < I))


def outer_clip_sum(a: Tensor, g: Tensor, c: Tensor) -> Tensor:
    """See `outer_clip_sum.outer_clip_sum`."""
    n, s, o = g.shape
    i = a.shape[2]
    if 0 in (*g.shape, i):
        return g.new_zeros(o, i, dtype=wide(g.dtype))
    parts, each = splits(n, tiles(o, i, 64, 64), g.device)
    out = g.new_empty(parts, o, i, dtype=wide(g.dtype))
    launch(
        clip_sum, lambda meta: (parts * tiles(o, i, meta["ROWS"], meta["COLS"]),), g,
        a, g, c, out, each, n, s, o, i, *a.stride(), *g.stride(), *c.stride(),
    )  # fmt: skip
    return out.sum(0)
