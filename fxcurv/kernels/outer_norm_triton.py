"""outer_norm on CUDA, in the two ways of `outer_norm`. Neither writes P or a Gram matrix to memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fxcurv.ir.precision import wide
from fxcurv.kernels.outer_norm import costs
from fxcurv.kernels.tiles import LEAST, SQUARE, launch, product, tiles, tuned


@tuned(key=["S", "O", "I"], rows="O", cols="I", zero=["parts"])
def by_products(
    a, g, parts, V, N, S, O, I, stride_an, stride_as, stride_ai, stride_gv, stride_gn, stride_gs, stride_go,
    ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[tile, v, n] = the sum of squares of a tile of P[v, n]."""
    across = tl.cdiv(I, COLS)
    count = tl.cdiv(O, ROWS) * across
    tile, vn = tl.program_id(0) % count, tl.program_id(0) // count
    v, n = (vn // N).to(tl.int64), (vn % N).to(tl.int64)
    o = tile // across * ROWS + tl.arange(0, ROWS)
    i = tile % across * COLS + tl.arange(0, COLS)
    p = product(
        g + v * stride_gv + n * stride_gn, a + n * stride_an, o, i, S, O, I, stride_go, stride_gs, stride_as, stride_ai,
        parts.dtype.element_ty, ROWS, COLS, INNER, PRECISION,
    )  # fmt: skip
    tl.store(parts + tile.to(tl.int64) * V * N + vn, tl.sum(p * p))


@tuned(key=["S", "O", "I"], rows="S", cols="S", zero=["parts"], configs=SQUARE)
def by_gram(
    a, g, parts, V, N, S, O, I, stride_an, stride_as, stride_ai, stride_gv, stride_gn, stride_gs, stride_go,
    ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[pair, v, n] = the sum of (a_s . a_t) (g_s . g_t) over positions s, t in the blocks r and r + d (cyclic).

    With d up to half the number of blocks, each pair of different blocks occurs once and counts twice. Only a pair
    with d = half occurs twice, from either end.
    """
    blocks = tl.cdiv(S, ROWS)
    pairs = blocks * (blocks // 2 + 1)
    pair, n = tl.program_id(0) % pairs, (tl.program_id(0) // pairs).to(tl.int64)
    r, d = pair % blocks, pair // blocks
    s = r * ROWS + tl.arange(0, ROWS)
    t = (r + d) % blocks * COLS + tl.arange(0, COLS)
    ACC: tl.constexpr = parts.dtype.element_ty
    base = a + n * stride_an
    aa = product(
        base, base, s, t, I, S, S, stride_as, stride_ai, stride_ai, stride_as, ACC, ROWS, COLS, INNER, PRECISION
    )
    if (d > 0) & (2 * d < blocks):
        aa *= 2
    base = g + n * stride_gn
    for v in range(V):
        gg = product(
            base, base, s, t, O, S, S, stride_gs, stride_go, stride_go, stride_gs, ACC, ROWS, COLS, INNER, PRECISION
        )
        tl.store(parts + (pair.to(tl.int64) * V + v) * N + n, tl.sum(aa * gg))
        base += stride_gv


def outer_norm(a: Tensor, g: Tensor) -> Tensor:
    """See `outer_norm.outer_norm`."""
    v, n, s, o = g.shape
    i = a.shape[2]
    direct, gram = costs(v, n, s, o, i, block=64)
    if 0 in (*g.shape, i):
        return g.new_zeros(v, n, dtype=wide(g.dtype))
    if gram < direct:
        kernel, bound = by_gram, _pairs(s, LEAST)
        grid = lambda meta: (n * _pairs(s, meta["ROWS"]),)  # noqa: E731
    else:
        kernel, bound = by_products, tiles(o, i, LEAST, LEAST)
        grid = lambda meta: (v * n * tiles(o, i, meta["ROWS"], meta["COLS"]),)  # noqa: E731
    parts = g.new_zeros(bound, v, n, dtype=wide(g.dtype))
    launch(kernel, grid, g, a, g, parts, v, n, s, o, i, *a.stride(), *g.stride())
    return parts.sum(0)


def _pairs(s: int, rows: int) -> int:
    blocks = triton.cdiv(s, rows)
    return blocks * (blocks // 2 + 1)
