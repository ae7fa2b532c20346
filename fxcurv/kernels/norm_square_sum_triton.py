"""norm_square_sum on CUDA: a program per tile of features and share of the samples, all columns in turn."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcurv.ir.precision import wide
from fxcurv.kernels.tiles import tuned


def config(positions: int, width: int, warps: int) -> triton.Config:
    """Tiles [positions, width] of g."""
    return triton.Config({"ROWS": positions, "COLS": width}, num_warps=warps)


CONFIGS = [config(16, 64, 4), config(1, 128, 1), config(1, 512, 4), config(4, 128, 4), config(32, 64, 4), config(64, 32, 4)]
# Shares of the samples, at most: programs enough for a large device.
SHARES = 1024


@tuned(key=["V", "N", "S", "D"], configs=CONFIGS)
def squares(
    x, g, w, parts, V, N, S, D, stride_xn, stride_xs, stride_xd, stride_gv, stride_gn, stride_gs, stride_gd, stride_wv,
    stride_wn, SCALE: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """parts[share] = the sum over the samples share, share + shares, ..."""
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros((COLS,), parts.dtype.element_ty)
    for sample in range(tl.program_id(0), N, tl.num_programs(0)):
        n = tl.cast(sample, tl.int64)
        for v in range(V):
            column = g + tl.cast(v, tl.int64) * stride_gv + n * stride_gn
            products = tl.zeros((ROWS, COLS), parts.dtype.element_ty)
            for start in range(0, S, ROWS):
                s = (start + tl.arange(0, ROWS)).to(tl.int64)
                inside = (s < S)[:, None] & (d < D)[None, :]
                tile = tl.load(column + s[:, None] * stride_gs + d[None, :] * stride_gd, inside, 0.0).to(total.dtype)
                if SCALE:
                    at = n * stride_xn + s[:, None] * stride_xs + d[None, :] * stride_xd
                    tile *= tl.load(x + at, inside, 0.0).to(total.dtype)
                products += tile
            h = tl.sum(products, 0)
            h *= h
            if WEIGHTED:
                h *= tl.load(w + v * stride_wv + n * stride_wn).to(total.dtype)
            total += h
    tl.store(parts + tl.program_id(0) * D + d, total, d < D)


def norm_square_sum(x_hat: Tensor | None, g: Tensor, w: Tensor | None) -> Tensor:
    """See `norm_square_sum`."""
    v, n, s, d = g.shape
    if not g.numel():
        return g.new_zeros(d, dtype=wide(g.dtype))
    parts = g.new_empty(min(n, SHARES), d, dtype=wide(g.dtype))

    def grid(meta):
        return len(parts), triton.cdiv(d, meta["COLS"])

    x, of_x = (g, (0, 0, 0)) if x_hat is None else (x_hat, x_hat.stride())
    weights, of_w = (g, (0, 0)) if w is None else (w, w.stride())
    with torch.cuda.device_of(g):
        squares[grid](x, g, weights, parts, v, n, s, d, *of_x, *g.stride(), *of_w, x_hat is not None, w is not None)
    return parts.sum(0)
