"""embedding_square_sum on CUDA: one program per pair of a sample and a row that occurs in it; sorting finds these."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcurv.ir.precision import wide
from fxcurv.kernels.tiles import tuned


def config(columns: int, width: int, warps: int) -> triton.Config:
    """Tiles [columns, width] of g."""
    return triton.Config({"ROWS": columns, "COLS": width}, num_warps=warps)


CONFIGS = [
    config(4, 128, 4),
    config(1, 128, 1),
    config(1, 256, 2),
    config(8, 128, 4),
    config(16, 64, 4),
    config(2, 512, 4),
]


@tuned(key=["V", "S", "D"], configs=CONFIGS)
def squares(
    order, begins, ends, g, w, parts, V, S, D, stride_gv, stride_gn, stride_gs, stride_gd, stride_wv, stride_wn,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """parts[t] = squares of the pair with the positions order[t : ends[t]], 0 if no pair begins at t."""
    t = tl.program_id(0)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros((COLS,), parts.dtype.element_ty)
    if tl.load(begins + t) == t:
        end = tl.load(ends + t)
        sample = tl.load(order + t) // S
        for start in range(0, V, ROWS):
            v = (start + tl.arange(0, ROWS)).to(tl.int64)
            inside = (v < V)[:, None] & (d < D)[None, :]
            tile = g + v[:, None] * stride_gv + sample * stride_gn + d[None, :] * stride_gd
            h = tl.zeros((ROWS, COLS), parts.dtype.element_ty)
            for k in range(t, end):
                h += tl.load(tile + tl.load(order + k) % S * stride_gs, inside, 0.0).to(h.dtype)
            h *= h
            if WEIGHTED:
                h *= tl.load(w + v * stride_wv + sample * stride_wn, v < V, 0.0).to(h.dtype)[:, None]
            total += tl.sum(h, 0)
    tl.store(parts + t.to(tl.int64) * D + d, total, d < D)


def embedding_square_sum(index: Tensor, g: Tensor, w: Tensor | None, rows: int, padding: int) -> Tensor:
    """See `embedding_square_sum`."""
    v, n, s, d = g.shape
    out = g.new_zeros(rows, d, dtype=wide(g.dtype))
    if not g.numel():
        return out
    pairs = (torch.arange(n, device=index.device).unsqueeze(1) * rows + index).flatten()
    pairs, order = pairs.sort()
    found = pairs % rows
    begins, ends = torch.searchsorted(pairs, pairs), torch.searchsorted(pairs, pairs, right=True)
    begins = begins.masked_fill(found == padding, -1)
    parts = out.new_empty(len(pairs), d)

    def grid(meta):
        return len(pairs), triton.cdiv(d, meta["COLS"])

    weights, strides = (g, (0, 0)) if w is None else (w, w.stride())
    with torch.cuda.device_of(g):
        squares[grid](order, begins, ends, g, weights, parts, v, s, d, *g.stride(), *strides, w is not None)
    # samples share rows; with deterministic algorithms on, PyTorch's index_add_ sums them in a fixed order
    return out.index_add_(0, found, parts)
