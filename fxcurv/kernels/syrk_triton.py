"""syrk and syrk_conv on CUDA: each program computes a tile of the lower triangle, and stores it and its mirror image.

Both use one kernel: x [K, M] is one sample with K channels under a 1 x 1 convolution. The addresses of patches are
computed, so that no patch is written. Programs that share a tile sum different positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import triton
import triton.language as tl
from torch import Tensor

from fxcurv.ir.precision import HALF, wide
from fxcurv.kernels.syrk import by_strips
from fxcurv.kernels.tiles import launch, precision, tuned


def config(side: int, inner: int, warps: int, stages: int) -> triton.Config:
    """A tile [side, side] of the result, `inner` positions at a time."""
    return triton.Config({"SIDE": side, "INNER": inner}, num_warps=warps, num_stages=stages)


# The first is used if nothing can be timed. Addresses of patches take registers: the largest tiles are for matrices.
CONFIGS = [
    config(32, 32, 4, 2),
    config(64, 16, 8, 2),
    config(64, 32, 8, 3),
    config(128, 32, 8, 3),
    config(128, 64, 8, 3),
]
# How many programs fill a large device, for tiles of side TILE, and how many positions are worth a program.
PROGRAMS = 512
TILE = 64
POSITIONS = 512


@triton.jit
def row_and_column(tile, tiles):
    """The tile's row and column in the lower triangle of tiles x tiles.

    A row from the top and one from the bottom are together tiles or tiles + 1 long, so such pairs form a rectangle.
    """
    odd = tiles % 2
    across = tiles + 1 - odd
    pair, place = tile // across, tile % across
    long = tiles - pair
    row = tl.where(place < long, long - 1, pair - odd)
    return row, tl.where(place < long, place, place - long)


@triton.jit
def features(k, stride_c, stride_0, stride_1, stride_2, KERNEL: tl.constexpr, DILATION: tl.constexpr):
    """(offset, steps along the three axes) of element k = (channel, *kernel) from the start of a patch."""
    k2, k1 = k % KERNEL[2] * DILATION[2], k // KERNEL[2] % KERNEL[1] * DILATION[1]
    k0 = k // (KERNEL[2] * KERNEL[1]) % KERNEL[0] * DILATION[0]
    c = (k // (KERNEL[2] * KERNEL[1] * KERNEL[0])).to(tl.int64)
    return c * stride_c + k0 * stride_0 + k1 * stride_1 + k2 * stride_2, k0, k1, k2


@triton.jit
def read(start, inside, offset, a0, a1, a2, k0, k1, k2, D0, D1, D2, PADDING: tl.constexpr):
    """The elements [K, M] of patches that begin at the pointers `start`, at (a0, a1, a2) in x; zeros in the padding."""
    if PADDING[0]:
        inside &= (a0[None, :] + k0[:, None]).to(tl.uint32) < D0
    if PADDING[1]:
        inside &= (a1[None, :] + k1[:, None]).to(tl.uint32) < D1
    if PADDING[2]:
        inside &= (a2[None, :] + k2[:, None]).to(tl.uint32) < D2
    return tl.load(start[None, :] + offset[:, None], inside, 0.0)


@tuned(key=["K", "M"], configs=CONFIGS)
def triangle(
    x, parts, K, M, length, P0, P1, P2, D0, D1, D2, stride_n, stride_c, stride_0, stride_1, stride_2,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    SIDE: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[part] = sum of u u^T over `length` positions."""
    row, column = row_and_column(tl.program_id(0), tl.cdiv(K, SIDE))
    part = tl.program_id(1)
    rows, columns = row * SIDE + tl.arange(0, SIDE), column * SIDE + tl.arange(0, SIDE)
    stop = tl.minimum(M, (part + 1) * length)
    off_l, l0, l1, l2 = features(rows, stride_c, stride_0, stride_1, stride_2, KERNEL, DILATION)
    off_r, r0, r1, r2 = features(columns, stride_c, stride_0, stride_1, stride_2, KERNEL, DILATION)
    total = tl.zeros((SIDE, SIDE), parts.dtype.element_ty)
    for first in range(part * length, stop, INNER):
        m = first + tl.arange(0, INNER)
        a2, a1 = m % P2 * STRIDE[2] - PADDING[2], m // P2 % P1 * STRIDE[1] - PADDING[1]
        a0, n = m // (P2 * P1) % P0 * STRIDE[0] - PADDING[0], (m // (P2 * P1 * P0)).to(tl.int64)
        start = x + n * stride_n + a0 * stride_0 + a1 * stride_1 + a2 * stride_2
        below, across = (rows < K)[:, None] & (m < stop)[None, :], (columns < K)[:, None] & (m < stop)[None, :]
        left = read(start, below, off_l, a0, a1, a2, l0, l1, l2, D0, D1, D2, PADDING)
        right = read(start, across, off_r, a0, a1, a2, r0, r1, r2, D0, D1, D2, PADDING)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION, out_dtype=parts.dtype.element_ty)
    out = parts + part.to(tl.int64) * K * K
    inside = (rows < K)[:, None] & (columns < K)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * K + columns[None, :], total, inside)
    # not on the diagonal, where a tile is its own mirror image up to rounding
    if row != column:
        tl.store(out + columns.to(tl.int64)[None, :] * K + rows[:, None], total, inside)


def syrk_conv(
    x: Tensor, out_shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """See `syrk_conv`."""
    flat = 3 - len(kernel)  # how many axes to add for three dimensions
    x = x.reshape(*x.shape[:2], *[1] * flat, *x.shape[2:])
    k, m = x.shape[1] * prod(kernel), x.shape[0] * prod(out_shape)
    if not k or not m:
        return x.new_zeros(k, k, dtype=wide(x.dtype))
    tiles = triton.cdiv(k, TILE)
    shared = max(1, min(2 * PROGRAMS // (tiles * (tiles + 1)), m // POSITIONS))
    length = triton.cdiv(m, shared)
    parts = x.new_empty(triton.cdiv(m, length), k, k, dtype=wide(x.dtype))

    def grid(meta):
        tiles = triton.cdiv(k, meta["SIDE"])
        return tiles * (tiles + 1) // 2, len(parts)

    ones, zeros = [1] * flat, [0] * flat
    geometry = (*ones, *kernel), (*ones, *stride), (*zeros, *padding), (*ones, *dilation)
    launch(triangle, grid, x, x, parts, k, m, length, *ones, *out_shape, *x.shape[2:], *x.stride(), *geometry)
    return parts.sum(0) if len(parts) > 1 else parts[0]


def syrk(x: Tensor) -> Tensor:
    """See `syrk`. For float64 and full float32, the library's products are used, on which the kernel cannot improve."""
    if x.dtype in HALF or precision(x.dtype) == "tf32":
        return products(x)
    return by_strips(x)


def products(x: Tensor) -> Tensor:
    """x x^T by `triangle`."""
    return syrk_conv(x.unsqueeze(0), x.shape[1:], (1,), (1,), (0,), (1,))
