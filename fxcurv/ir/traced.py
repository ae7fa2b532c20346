"""Functions of tensors that several parts of the compiler emit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of a list of tensors."""
    return sum(tensors[1:], tensors[0])


def in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A cast."""
    return t.to(dtype)


def zeros_behind(some: Tensor, like: Tensor) -> Tensor:
    """Zeros [V, *like], V of `some`."""
    return like.new_zeros(some.shape[0], *like.shape)
