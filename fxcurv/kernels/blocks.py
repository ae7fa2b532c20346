"""P in blocks on a CPU: each block is squared or summed while it is in the cache, and overwritten by the next.

Axes: V columns, N samples, K groups, S shared positions, O outputs, I inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fxcurv.ir.precision import wide

# Elements of a block: 2 MiB in float32.
BLOCK = 1 << 19
# Elements of a sample's part of a block from which a call per sample is quicker than a pass more over the block.
LONG = 1 << 15
# The fewest samples in a block: with fewer, a batched product leaves threads without work.
FEWEST = 4
# The most inputs for which the library is quicker, by up to eight times, on the transpose of P, if that has more of them.
NARROW = 32
# The fewest shared positions from which that pays for a copy.
SHARED = 64


def boxes(sizes: tuple[int, ...], budget: int) -> Iterator[tuple[slice, ...]]:
    """Boxes of at most `budget` elements (at least one) that cover an array of `sizes`; the last axis is filled first."""
    steps: list[int] = []
    for size in reversed(sizes):
        steps.insert(0, max(1, min(size, budget)))
        budget //= steps[0]
    spans = ([slice(x, min(x + d, size)) for x in range(0, size, d)] for size, d in zip(sizes, steps, strict=True))
    return itertools.product(*spans)


def products(
    a: Callable[[slice], Tensor], g: Tensor, i: int, most: int | None = None
) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Blocks (v, n, o, p) of P = sum_s g a^T of one column, p [N', K, O', I] in `wide(g.dtype)`, valid until the next block.

    Args:
        a: slice of samples -> the factor [N', K, S, I]; called once per slice.
        g: [V, N, K, S, O].
        i: the size I.
        most: the largest N'.
    """
    v, n, k, _, o = g.shape
    row = max(1, k * i)
    outputs = max(1, min(o, BLOCK // row))
    count = max(1, min(n, most or n, max(FEWEST, BLOCK // (row * outputs))))
    scratch = g.new_empty(count * row * outputs, dtype=wide(g.dtype))
    for ns in spans(n, count):
        inputs = a(ns).to(scratch.dtype).flatten(0, 1)
        for column, os in itertools.product(range(v), spans(o, outputs)):
            left = g[column, ns, :, :, os].to(scratch.dtype).flatten(0, 1).mT
            p = scratch[: left.shape[0] * left.shape[1] * i]
            yield column, ns, os, product(left, inputs, p).unflatten(0, (-1, k))


def product(left: Tensor, right: Tensor, memory: Tensor) -> Tensor:
    """The batched product [B, O, S] x [B, S, I], in flat memory of its size; transposed there if it is narrow."""
    (b, o, _), i = left.shape, right.shape[2]
    if i < o and i <= NARROW:
        return torch.bmm(right.mT, left.mT, out=memory.view(b, i, o)).mT
    return torch.bmm(left, right, out=memory.view(b, o, i))


def product_into(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write the batched product [B, O, S] x [B, S, I] to contiguous memory."""
    (_, o, s), i = left.shape, right.shape[2]
    if i < o and i <= NARROW and s >= SHARED:
        out.copy_(torch.bmm(right.mT, left.mT).mT)
    else:
        torch.bmm(left, right, out=out)


def spans(size: int, step: int) -> list[slice]:
    """Slices of at most `step` that cover an axis."""
    return [slice(start, min(size, start + step)) for start in range(0, size, step)]


def square_sum(
    a: Callable[[slice], Tensor], g: Tensor, i: int, w: Tensor | None, per_sample: bool, most: int | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """sum_v w[v, n] P[v, n]^2, [N, K, O, I], or its sum over samples, [1, K, O, I], in `wide(g.dtype)`.

    Args:
        a, g, i, most: as in `products`.
        w: signed weights [V, N], or None for ones.
        per_sample: whether to keep samples apart.
        out: memory for the result; new by default.
    """
    v, n, k, _, o = g.shape
    shape = (n if per_sample else 1, k, o, i)
    out = g.new_empty(shape, dtype=wide(g.dtype)) if out is None else out.view(shape)
    fresh = per_sample and v > 0 and g.shape[3] > 0  # the first column overwrites `out`, later ones add to it
    out = out if fresh else out.zero_()
    values = None if w is None else w.tolist()
    for column, ns, os, p in products(a, g, i, most):
        if values is None and not per_sample:
            add_squares(out[0, :, os], p)
            continue
        for sample, one in enumerate(p, ns.start):
            weight, target = 1 if values is None else values[column][sample], out[sample if per_sample else 0, :, os]
            if fresh and column == 0:
                torch.mul(one, one if values is None else one * weight, out=target)
            else:
                target.addcmul_(one, one, value=weight)
    return out


def add_squares(out: Tensor, p: Tensor, squared: bool = False) -> None:
    """Add the sum of squares of a block p [N', ...] to `out` [...]; the block is squared already, or may be overwritten."""
    if squared:
        out += p.sum(0)
    elif p[0].numel() >= LONG:
        for one in p:
            out.addcmul_(one, one)
    else:
        out += p.square_().sum(0)
