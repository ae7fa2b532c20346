"""Blocks of products on a CPU: what is squared or summed is written to memory that stays in the cache.

Axes: V columns, N samples, K groups, S shared positions, O outputs, I inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fxcurv.precision import wide

# Elements of a block: 1 MiB in float32, half of a typical L2 cache.
BLOCK = 1 << 18


def boxes(sizes: tuple[int, ...], budget: int, most: int | None = None) -> Iterator[tuple[slice, ...]]:
    """Boxes of at most `budget` elements, or one, that cover an array of `sizes`; the last axis is filled first.

    `most` bounds a box's length along the first axis.
    """
    steps: list[int] = []
    for size in reversed(sizes):
        steps.insert(0, max(1, min(size, budget)))
        budget //= steps[0]
    steps[0] = max(1, min(steps[0], most or steps[0]))
    spans = ([slice(x, min(x + d, size)) for x in range(0, size, d)] for size, d in zip(sizes, steps, strict=True))
    return itertools.product(*spans)


def products(
    a: Callable[[slice], Tensor], g: Tensor, i: int, most: int | None = None
) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Blocks (v, n, o, p) of P = sum_s g a^T: p [N', K, V', O', I] in `wide(g.dtype)`, valid until the next block.

    Args:
        a: the factor [N', K, S, I] of the samples in a slice; called once for every slice.
        g: [V, N, K, S, O].
        i: the size I.
        most: the largest N'.
    """
    v, n, k, s, o = g.shape
    budget = max(1, BLOCK // max(1, k * i))
    scratch = g.new_empty(min(budget, v * n * o) * k * i, dtype=wide(g.dtype))
    left = g.permute(1, 2, 0, 4, 3)
    samples, inputs = None, scratch
    for ns, vs, os in boxes((n, v, o), budget, most):
        if ns != samples:
            samples, inputs = ns, a(ns).to(scratch.dtype).flatten(0, 1)
        part = left[ns, :, vs, os].to(scratch.dtype)
        shape = (*part.shape[:-1], i)
        rows = part.flatten(0, 1).flatten(1, 2)
        p = scratch[: rows.shape[0] * rows.shape[1] * i].view(*rows.shape[:2], i)
        yield vs, ns, os, torch.bmm(rows, inputs, out=p).view(shape)
