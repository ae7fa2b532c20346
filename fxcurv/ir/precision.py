"""Half precision: what is squared or summed over samples is computed in float32.

float16 ends at 65504 and bfloat16 has eight bits, so the square of a gradient overflows, underflows or loses its sum's last
terms. Values, cotangents and individual results keep the model's dtype; squares, norms, variances, diagonals and Kronecker
factors are accumulated and returned in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.private import pytree

HALF = (torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are accumulated."""
    return torch.float32 if dtype in HALF else dtype


def widened(values: Any) -> Any:
    """The pytree `values` with half-precision tensors, and dtypes, in float32; everything else as it is."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(torch.float32) if leaf.dtype in HALF else leaf
        return wide(leaf) if isinstance(leaf, torch.dtype) else leaf

    return pytree.tree_map(one, values)


def widely(fn: Callable, *args: Any) -> Any:
    """`fn(*args)` in float32 where the arguments are in half precision."""
    return fn(*widened(args))
