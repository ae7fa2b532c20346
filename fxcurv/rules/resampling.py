"""Sampling of images at positions: the general rule, of a form whose second derivative is batched."""

from __future__ import annotations

import torch

from fxcurv.ir.private import decomposition_table
from fxcurv.rules.base import Rule, register

aten = torch.ops.aten


@register(aten.grid_sampler.default)
class GridSample(Rule):
    """y[n, :, p] = the image x[n] at the position grid[n, p]; PyTorch's second derivative is in place, which `vmap` refuses."""

    name = "resampling"

    def formula(self, op, args):
        if args[0].ndim == 4:
            op = decomposition_table[aten.grid_sampler_2d.default]  # there is none for volumes
        return (op(*args),)
