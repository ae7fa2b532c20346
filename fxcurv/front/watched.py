"""A trace function that PyTorch's own functions run without.

`sys.settrace` calls a function for each Python function that begins. One op of a trace runs some hundred of PyTorch's own, which
hold nothing of the user's: watching them takes longer than all else of an export.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

_IN_C = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType)
_IN_PYTHON = {"torch.nn.functional", "torch.functional", "torch._tensor"}


class Watched(TorchFunctionMode):
    """While it is entered, `watch` is the trace function, but not inside of PyTorch's functions.

    A function that is given another one, or a tensor of a class that has functions of its own, may run the user's code, so may
    an op of another library: these are watched.
    """

    def __init__(self, watch: Callable):
        super().__init__()
        self.watch, self.before = watch, sys.gettrace()

    def __enter__(self) -> Watched:
        super().__enter__()
        sys.settrace(self.watch)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.settrace(self.before)
        super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: D105
        kwargs = kwargs or {}
        if types or not _of_torch(func) or any(map(callable, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        sys.settrace(self.before)
        try:
            return func(*args, **kwargs)
        finally:
            sys.settrace(self.watch)


def _of_torch(func: Any) -> bool:
    return isinstance(func, _IN_C) or isinstance(func, types.FunctionType) and func.__module__ in _IN_PYTHON
