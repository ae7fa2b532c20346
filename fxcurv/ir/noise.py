"""Counter-based noise: a hash of (seed, stream, column, sample, position) in plain tensor ops.

Bit-equal in eager mode, under Inductor, on every device and for any sharding of the samples, because no value depends
on the order in which values are drawn.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from fxcurv.ir.lengths import said
from fxcurv.ir.placement import Shard, samples_back

_MASK, _STEP = 0xFFFFFFFF, 0x2545F491

# a 0-dim integer tensor; or a pair of it and the number of the batch's first sample
Seed: TypeAlias = Tensor | tuple[Tensor, Tensor]


def _mix(x: Tensor, key: Tensor) -> Tensor:
    """A keyed bijection of 32-bit words in int64 ("lowbias32"; constants below 2**31, so that no product overflows)."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = torch.add(key, x ^ (x >> 15), alpha=0x735A2D97) & _MASK
    return x ^ (x >> 15)


def uniform(seed: Seed, stream: int, columns: int, like: Tensor, place: Shard) -> Tensor:
    """Independent uniform numbers in (0, 1), [columns, *like.shape], in the dtype of `like`.

    Args:
        seed: see `Seed`.
        stream: distinguishes independent draws of one program.
        place: where the samples are on `like`.
    """
    outer, inner = said(place.outer), said(place.inner)
    slice_shape = [*like.shape[: place.dim], outer * inner, *like.shape[place.dim + 1 :]]
    n = like.shape[place.dim] // (outer * inner) if outer * inner > 1 else like.shape[place.dim]
    size = math.prod(slice_shape[: place.dim]) * outer * inner * math.prod(slice_shape[place.dim + 1 :])
    key, first = seed if isinstance(seed, tuple) else (seed, 0)
    # the counter of (sample, position, column) does not depend on how many samples there are; it counts in steps
    each = size * columns
    counter = torch.arange(0, n * each * _STEP, _STEP, device=like.device).reshape(n, *slice_shape, columns)
    counter = counter + first * (each * _STEP)
    counter = samples_back(counter, place).movedim(-1, 0)
    low, high = (key + stream * 0x9E3779B1 if stream else key) & _MASK, (key >> 31) & _MASK
    bits = _mix(_mix((counter + low) & _MASK, high), low)
    return ((bits.to(torch.float64) + 0.5) * 2.0**-32).to(like.dtype)


def normal(seed: Seed, stream: int, columns: int, like: Tensor, place: Shard) -> Tensor:
    """Independent standard normal numbers, [columns, *like.shape] (Box-Muller)."""
    u = uniform(seed, stream, columns, like, place)
    v = uniform(seed, stream + 0x10000, columns, like, place)
    return torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * math.pi * v)


def signs(entries: Tensor, columns: int, key: int, dtype: torch.dtype) -> Tensor:
    """Independent +1 and -1, [E, columns], by key, entry and column; `entries` are numbers below 2**32."""
    low, high = key & _MASK, (key >> 32) & _MASK
    own = _mix((entries * 0x2545F491 + low) & _MASK, high)
    words = torch.arange(-(-columns // 32), device=entries.device)  # of 32 columns each
    words = _mix(_mix((words * 0x9E3779B1 + high) & _MASK, low), high)
    bits = _mix(_mix(own.unsqueeze(1), words), low)
    bits = (bits.unsqueeze(2) >> torch.arange(32, device=entries.device)) & 1
    return (1 - 2 * bits.flatten(1)[:, :columns]).to(dtype)
