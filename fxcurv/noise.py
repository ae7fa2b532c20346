"""Counter-based noise: a hash of (seed, stream, column, sample, position) in plain tensor ops.

Bit-equal in eager mode, under Inductor, on every device and for any sharding of the samples, because no value depends
on the order in which values are drawn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxcurv.placement import Shard, samples_back

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in int64 ("lowbias32", constants below 2**31 so that no product overflows)."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def uniform(seed: Tensor, stream: int, columns: int, like: Tensor, place: Shard) -> Tensor:
    """Independent uniform numbers in (0, 1), [columns, *like.shape], in the dtype of `like`.

    Args:
        seed: 0-dim integer tensor.
        stream: distinguishes independent draws of one program.
        place: where the samples are on `like`.
    """
    outer, inner = place.outer, place.inner
    slice_shape = [*like.shape[: place.dim], outer * inner, *like.shape[place.dim + 1 :]]
    n = like.shape[place.dim] // (outer * inner)
    size = math.prod(slice_shape)
    device = like.device
    state = _mix((seed & _MASK) ^ 0x5BD1E995)
    state = _mix(((seed >> 32) & _MASK) ^ state)
    state = _mix(state ^ stream)
    samples = _mix(state ^ torch.arange(n, device=device))
    positions = _mix(samples.unsqueeze(1) ^ torch.arange(size, device=device)).reshape(n, *slice_shape)
    words = samples_back(positions, place)
    column = torch.arange(columns, device=device).view(-1, *[1] * like.ndim)
    bits = _mix(_mix(words.unsqueeze(0) ^ _mix(column + 1)) ^ 0x3C6EF372)
    return ((bits.to(torch.float64) + 0.5) * 2.0**-32).to(like.dtype)


def normal(seed: Tensor, stream: int, columns: int, like: Tensor, place: Shard) -> Tensor:
    """Independent standard normal numbers, [columns, *like.shape] (Box-Muller)."""
    u = uniform(seed, stream, columns, like, place)
    v = uniform(seed, stream + 0x10000, columns, like, place)
    return torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * math.pi * v)
