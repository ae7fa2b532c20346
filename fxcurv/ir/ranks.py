"""Sums over the ranks of a process group, in plain ops and functional collectives, which graphs can hold."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

# In place of a group's name: one process computes the parts of a batch, one after the other.
IN_TURNS = "in turns"


def across(ranks: str) -> bool:
    """Whether these are several processes, and not a single one that may compute parts in turns."""
    return ranks not in ("", IN_TURNS)


def summed(triangles: Sequence[bool], group: str, values: Sequence[Tensor]) -> list[Tensor]:
    """The values' sums over the ranks of a group, by one collective; `triangles`: which of them are symmetric matrices."""
    if len(values) == 1 and not triangles[0]:
        return [all_reduce(values[0].contiguous(), group)]
    flat = packed(triangles, values)
    return unpacked(triangles, all_reduce(torch.cat(flat) if len(flat) > 1 else flat[0], group), values)


def packed(triangles: Sequence[bool], values: Sequence[Tensor]) -> list[Tensor]:
    """Values as they are sent: flat, symmetric matrices as a triangle."""
    return [_triangle(v) if t else v.reshape(-1) for v, t in zip(values, triangles, strict=True)]


def unpacked(triangles: Sequence[bool], joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `packed`, from its tensors joined into one, in the shapes of `like`."""
    parts = joined.split([len(v) * (len(v) + 1) // 2 if t else v.numel() for v, t in zip(like, triangles, strict=True)])
    return [_square(p, v) if t else p.view(v.shape) for p, v, t in zip(parts, like, triangles, strict=True)]


def all_reduce(t: Tensor, group: str) -> Tensor:
    """The sum of the ranks' values."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor.default(ops.all_reduce.default(t, "sum", group))


def _triangle(t: Tensor) -> Tensor:
    rows, columns = _lower(t)
    return t[rows, columns]


def _lower(t: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(t.shape[0], t.shape[0], device=t.device)
    return rows, columns


def _square(flat: Tensor, like: Tensor) -> Tensor:
    """A symmetric matrix from its lower triangle, row by row."""
    k = torch.arange(like.shape[0], device=flat.device)
    high, low = torch.maximum(k[:, None], k), torch.minimum(k[:, None], k)
    return flat[high * (high + 1) // 2 + low]


def plain_text(text: str) -> str:
    """The text of a printed value without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)
