"""Weights that pre-hooks of PyTorch's compute: `prune`, `weight_norm` and `spectral_norm` of `torch.nn.utils`.

Such a hook sets an attribute of its module before each forward pass, which a program computes as any other value. After a
call the attribute is set as a plain pass would: the next pruning reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxcurv.ir.private import own_forward_hooks


def computed_by_hooks(module: nn.Module) -> dict[str, Any]:
    """The hook of each attribute that a pre-hook sets."""
    before, _ = own_forward_hooks(module)
    pruned = {h._tensor_name: h for h in before.values() if isinstance(h, BasePruningMethod)}
    return pruned | {h.name: h for h in before.values() if isinstance(h, WeightNorm | SpectralNorm)}


def compute_again(module: nn.Module, name: str) -> None:
    """Set an attribute that a pre-hook sets, from the parameters as they are."""
    hook = computed_by_hooks(module).get(name)
    with torch.no_grad():
        if isinstance(hook, SpectralNorm):  # the call has made its step of power iteration
            setattr(module, name, hook.compute_weight(module, do_power_iteration=False))
        elif hook is not None:
            hook(module, ())
