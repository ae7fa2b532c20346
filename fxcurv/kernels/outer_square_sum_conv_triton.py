"""outer_square_sum_conv on CUDA: as `outer_square_sum`; the addresses of patches are computed at each load."""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl
from torch import Tensor

from fxcurv.ir.precision import wide
from fxcurv.kernels.tiles import TWO_TILES, launch, splits, tiles, tuned


@triton.jit
def product(
    x, g, o, i, O, I, S, OUT1, OUT2, IN0, IN1, IN2,
    stride_xc, stride_x0, stride_x1, stride_x2, stride_go, stride_g0, stride_g1, stride_g2,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile [ROWS, COLS] of sum_s g[o, s] patch[s, i], for one sample and column."""
    # offset of the patch's element i = (channel, k0, k1, k2) from its first
    i0 = i // (KERNEL[1] * KERNEL[2]) % KERNEL[0] * DILATION[0] - PADDING[0]
    i1 = i // KERNEL[2] % KERNEL[1] * DILATION[1] - PADDING[1]
    i2 = i % KERNEL[2] * DILATION[2] - PADDING[2]
    from_first = i // (KERNEL[0] * KERNEL[1] * KERNEL[2]) * stride_xc + i0 * stride_x0 + i1 * stride_x1 + i2 * stride_x2
    tile = tl.zeros((ROWS, COLS), ACC)
    for start in range(0, S, INNER):
        s = start + tl.arange(0, INNER)
        s0, s1, s2 = s // (OUT1 * OUT2), s // OUT2 % OUT1, s % OUT2
        at = s0 * stride_g0 + s1 * stride_g1 + s2 * stride_g2
        left = tl.load(g + o[:, None] * stride_go + at[None, :], (o[:, None] < O) & (s[None, :] < S), 0.0)
        s0, s1, s2 = s0 * STRIDE[0], s1 * STRIDE[1], s2 * STRIDE[2]
        within = (s[:, None] < S) & (i[None, :] < I)
        # without padding, every patch lies inside the input
        if PADDING[0] > 0:
            within &= (s0[:, None] + i0[None, :] >= 0) & (s0[:, None] + i0[None, :] < IN0)
        if PADDING[1] > 0:
            within &= (s1[:, None] + i1[None, :] >= 0) & (s1[:, None] + i1[None, :] < IN1)
        if PADDING[2] > 0:
            within &= (s2[:, None] + i2[None, :] >= 0) & (s2[:, None] + i2[None, :] < IN2)
        first = s0 * stride_x0 + s1 * stride_x1 + s2 * stride_x2
        right = tl.load(x + first[:, None] + from_first[None, :], within, 0.0)
        tile = tl.dot(left, right, tile, input_precision=PRECISION, out_dtype=ACC)
    return tile


@tuned(key=["S", "O", "I"], rows="O", cols="I", configs=TWO_TILES)
def square_sum(
    x, g, w, out, each, V, N, S, O, I, GROUPS, OUT1, OUT2, IN0, IN1, IN2,
    stride_xn, stride_xc, stride_x0, stride_x1, stride_x2,
    stride_gv, stride_gn, stride_go, stride_g0, stride_g1, stride_g2, stride_wv, stride_wn,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[part] = a tile of a group's [O, I], summed over V columns and the `each` samples of the part."""
    ACC: tl.constexpr = out.dtype.element_ty
    across = tl.cdiv(I, COLS)
    count = tl.cdiv(O, ROWS) * across
    tile, rest = tl.program_id(0) % count, tl.program_id(0) // count
    group, part = rest % GROUPS, (rest // GROUPS).to(tl.int64)
    o = tile // across * ROWS + tl.arange(0, ROWS)
    i = tile % across * COLS + tl.arange(0, COLS)
    first = part * each
    x += first * stride_xn + group * (I // (KERNEL[0] * KERNEL[1] * KERNEL[2])) * stride_xc
    g += first * stride_gn + group * O * stride_go
    w += first * stride_wn
    total = tl.zeros((ROWS, COLS), ACC)
    for _ in range(tl.minimum(each, N - first)):
        column, weight = g, w
        for _ in range(V):
            p = product(
                x, column, o, i, O, I, S, OUT1, OUT2, IN0, IN1, IN2,
                stride_xc, stride_x0, stride_x1, stride_x2, stride_go, stride_g0, stride_g1, stride_g2,
                KERNEL, STRIDE, PADDING, DILATION, ACC, ROWS, COLS, INNER, PRECISION,
            )  # fmt: skip
            if WEIGHTED:
                total += tl.load(weight).to(ACC) * (p * p)
            else:
                total += p * p
            column += stride_gv
            weight += stride_wv
        x += stride_xn
        g += stride_gn
        w += stride_wn
    out += (part * GROUPS + group) * O * I
    tl.store(out + o[:, None] * I + i[None, :], total, (o[:, None] < O) & (i[None, :] < I))


def outer_square_sum_conv(
    x: Tensor, g: Tensor, w: Tensor | None, per_sample: bool,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """See `outer_square_sum_conv.outer_square_sum_conv`; one or two dimensions become three, with sizes 1 in front."""
    v, n = g.shape[:2]
    shape = (g.shape[2], x.shape[1] // groups, *kernel)
    if 0 in (*g.shape, *x.shape):
        return x.new_zeros((n, *shape) if per_sample else shape, dtype=wide(x.dtype))
    missing = 3 - len(kernel)
    for _ in range(missing):
        x, g = x.unsqueeze(2), g.unsqueeze(3)
    geometry = [
        (*[d] * missing, *sizes) for d, sizes in zip((1, 1, 0, 1), (kernel, stride, padding, dilation), strict=True)
    ]
    o, i, s = g.shape[2] // groups, prod(shape[1:]), prod(g.shape[3:])
    parts, each = (n, 1) if per_sample else splits(n, groups * tiles(o, i, 64, 64), g.device)
    out = x.new_empty(parts, *shape, dtype=wide(x.dtype))
    weights = (out, 0, 0) if w is None else (w, *w.stride())
    launch(
        square_sum, lambda meta: (parts * groups * tiles(o, i, meta["ROWS"], meta["COLS"]),), g,
        x, g, weights[0], out, each, v, n, s, o, i, groups, *g.shape[4:], *x.shape[2:], *x.stride(), *g.stride(),
        *weights[1:], *geometry, w is not None,
    )  # fmt: skip
    return out if per_sample else out.sum(0)
