"""Fake quantisation, said in mathematics: its derivative is that of the identity where nothing is clamped, and zero elsewhere."""

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
    return _straight_through(x, scale.view(shape), zero_point.view(shape), low, high)


def _straight_through(x: Tensor, scale, zero_point, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The nearest value of the grid, and where that is within its range."""
    steps = torch.round(x.detach() * (1 / scale)) + zero_point
    within = (steps >= low) & (steps <= high)
    y = (steps.clamp(low, high) - zero_point) * scale
    passing = torch.where(within, x, x.detach())
    return passing + (y - passing).detach(), within
