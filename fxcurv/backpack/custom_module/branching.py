"""Branches that meet again."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn


class _Branch(nn.Module):
    """Passes one input to every module, given as `nn.Sequential` takes them; returns the tuple of their outputs."""

    def __init__(self, *args: OrderedDict[str, nn.Module] | nn.Module):
        super().__init__()
        named = args[0] if len(args) == 1 and isinstance(args[0], OrderedDict) else OrderedDict()
        for name, module in named.items() or enumerate(args):
            self.add_module(str(name), module)

    def forward(self, input: Tensor) -> tuple[Any, ...]:  # noqa: A002
        return tuple(module(input) for module in self.children())


class SumModule(nn.Module):
    """The sum of tensors of one shape.

    Raises:
        AssertionError: for anything else.
    """

    def forward(self, *input: Tensor) -> Tensor:  # noqa: A002
        if not input or not all(isinstance(t, Tensor) and t.shape == input[0].shape for t in input):
            got = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in input]
            raise AssertionError(f"the branches end in {got}: a sum takes tensors of one shape")
        return sum(input[1:], input[0])


class Parallel(nn.Module):
    """Passes one input to every module, and their outputs to one more.

    Args:
        args: modules, or one ordered dictionary of them.
        merge_module: takes the outputs (default: `SumModule()`).
    """

    def __init__(self, *args: OrderedDict[str, nn.Module] | nn.Module, merge_module: nn.Module | None = None):
        super().__init__()
        self.branch = _Branch(*args)
        self.merge = SumModule() if merge_module is None else merge_module

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.merge(*self.branch(input))
