"""BackPACK's conversion of modules, which the compiler does without."""

from __future__ import annotations

from torch import nn


def convert_module_to_backpack(module: nn.Module, debug: bool = False) -> nn.Module:
    """`module` itself: any model that `torch.export` can trace is served as it is.

    Args:
        module: a model.
        debug: accepted, without effect.
    """
    return module
