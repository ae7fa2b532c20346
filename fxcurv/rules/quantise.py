"""Fake quantisation in plain ops: its derivative is one where x is not clamped, and zero elsewhere.

In PyTorch's kernels, scales are float32 for every dtype of x. So are values on the grid if there is one scale for all;
with one per channel, their dtype is promoted (aten/src/ATen/native/cpu/QuantizedOpKernels.cpp).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcurv.rules.base import rewrite

aten = torch.ops.aten


@rewrite(aten.fake_quantize_per_tensor_affine_cachemask.default)
def _per_tensor(x, scale, zero_point, low, high):
    return _straight_through(x, scale, zero_point, low, high)


@rewrite(aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default)
def _by_tensors(x, scale, zero_point, enabled, low, high):
    y, within = _straight_through(x, scale, zero_point, low, high)
    on = enabled != 0
    return torch.where(on, y, x), within | ~on


@rewrite(aten.fake_quantize_per_channel_affine_cachemask.default)
def _per_channel(x, scale, zero_point, axis, low, high):
    shape = [-1 if d == axis % x.ndim else 1 for d in range(x.ndim)]
    wide = torch.promote_types(x.dtype, torch.float32)
    return _straight_through(x, scale.view(shape), zero_point.view(shape), low, high, wide)


def _straight_through(
    x: Tensor, scale, zero_point, low: int, high: int, grid: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(nearest value on the grid, which is computed in dtype `grid`, mask of values that are not clamped)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = (
        scale.float() if isinstance(scale, Tensor) else torch.scalar_tensor(scale, dtype=torch.float32, device=x.device)
    )
    at = x.detach().to(wide) * (1 / scale)
    whole = not isinstance(zero_point, Tensor) or not zero_point.is_floating_point()
    steps = torch.round(at) + zero_point if whole else torch.round(at + zero_point)
    within = (steps >= low) & (steps <= high)
    y = ((steps.clamp(low, high) - zero_point).to(grid) * scale.to(grid)).to(x.dtype)
    passing = torch.where(within, x, 0.0)
    return y.detach() + (passing - passing.detach()), within  # the second term is zero: values are exactly y
