"""softmax_root on CUDA: every column written once, q and r W by the library."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcurv.ir.precision import wide
from fxcurv.kernels.softmax_root import parts, result_dtype
from fxcurv.kernels.tiles import tuned


def config(samples: int, inputs: int, columns: int, warps: int) -> triton.Config:
    """`columns` tiles [samples, inputs] one after the other, from one tile of r W."""
    return triton.Config({"ROWS": samples, "COLS": inputs, "COLUMNS": columns}, num_warps=warps)


CONFIGS = [config(8, 128, 16, 4), config(16, 128, 16, 4), config(4, 256, 16, 4), config(2, 512, 8, 4), config(8, 128, 4, 4)]


@tuned(key=["V", "N", "D"], configs=CONFIGS)
def columns(
    heights, rows, mean, out, V, N, D, first, stride_hv, stride_hn, stride_rv, stride_rd, stride_mn, stride_md,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[v, n, d] = heights[v, n] (rows[v, d] - mean[n, d]); without a weight, row v is e_{v + first}."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    start = tl.program_id(2) * COLUMNS
    inside = (n < N)[:, None] & (d < D)[None, :]
    m = tl.load(mean + n.to(tl.int64)[:, None] * stride_mn + d[None, :] * stride_md, inside, 0.0)
    at = n.to(tl.int64)[:, None] * D + d[None, :]
    for v in range(start, tl.minimum(V, start + COLUMNS)):
        h = tl.load(heights + v * stride_hv + n * stride_hn, n < N, 0.0)
        if WEIGHTED:
            row = tl.load(rows + tl.cast(v, tl.int64) * stride_rv + d * stride_rd, d < D, 0.0).to(m.dtype)
        else:
            row = tl.where(d == v + first, 1.0, 0.0).to(m.dtype)
        value = h[:, None] * (row[None, :] - m)
        tl.store(out + tl.cast(v, tl.int64) * N * D + at, value.to(out.dtype.element_ty), inside)


def softmax_root(logits: Tensor, scale: Tensor, weight: Tensor | None, few: bool) -> Tensor:
    """See `softmax_root`."""
    heights, r, first = parts(logits, scale, few)
    dtype = result_dtype(logits, weight)
    if weight is None:
        rows, mean = heights, r
    else:
        rows = weight[first:]
        mean = r.to(wide(dtype)) @ weight.to(wide(dtype))
        heights = heights.to(mean.dtype)
    v, (n, i) = len(heights), mean.shape
    out = mean.new_empty(v, n, i, dtype=dtype)
    if not out.numel():
        return out

    def grid(meta):
        return triton.cdiv(n, meta["ROWS"]), triton.cdiv(i, meta["COLS"]), triton.cdiv(v, meta["COLUMNS"])

    with torch.cuda.device_of(out):
        columns[grid](
            heights, rows, mean, out, v, n, i, first, *heights.stride(), *rows.stride(), *mean.stride(), weight is not None
        )
    return out
