"""outer_batch on CUDA: a program for each tile of each product."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from fxcurv.kernels.outer_batch import check_out, shape
from fxcurv.kernels.tiles import launch, product, tiles, tuned


@tuned(key=["S", "O", "I"], rows="O", cols="I")
def batch(
    a, g, out, N, S, O, I, stride_an, stride_as, stride_ai, stride_gv, stride_gn, stride_gs, stride_go,
    stride_v, stride_n, stride_o, stride_i,
    ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of out[v, n]."""
    ACC: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    across = tl.cdiv(I, COLS)
    count = tl.cdiv(O, ROWS) * across
    tile, vn = tl.program_id(0) % count, tl.program_id(0) // count
    v, n = (vn // N).to(tl.int64), (vn % N).to(tl.int64)
    o = tile // across * ROWS + tl.arange(0, ROWS)
    i = tile % across * COLS + tl.arange(0, COLS)
    p = product(
        g + v * stride_gv + n * stride_gn, a + n * stride_an, o, i, S, O, I, stride_go, stride_gs, stride_as, stride_ai,
        ACC, ROWS, COLS, INNER, PRECISION,
    )  # fmt: skip
    out += v * stride_v + n * stride_n
    at = o[:, None].to(tl.int64) * stride_o + i[None, :] * stride_i
    tl.store(out + at, p.to(out.dtype.element_ty), (o[:, None] < O) & (i[None, :] < I))


def outer_batch(a: Tensor, g: Tensor) -> Tensor:
    """See `outer_batch.outer_batch`."""
    out = g.new_empty(shape(a, g))
    outer_batch_out(a, g, out)
    return out


def outer_batch_out(a: Tensor, g: Tensor, out: Tensor) -> None:
    """See `outer_batch.outer_batch_out`."""
    check_out(a, g, out)
    v, n, s, o = g.shape
    i = a.shape[2]
    if out.numel() == 0:
        return
    launch(
        batch, lambda meta: (v * n * tiles(o, i, meta["ROWS"], meta["COLS"]),), g,
        a, g, out, n, s, o, i, *a.stride(), *g.stride(), *out.stride(),
    )  # fmt: skip
