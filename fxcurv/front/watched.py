"""A trace function for `sys.settrace` that is off inside PyTorch's own functions.

It is called for each Python function that begins. One op of a trace runs some hundred functions of PyTorch, which read
nothing of the user's: watching them takes longer than all else of an export.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

_IN_C = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType)


class Watched(TorchFunctionMode):
    """While it is entered, `watch` is the trace function, except inside PyTorch's functions in C.

    A C function that is given a function, or an object of a class that is neither PyTorch's nor Python's (its
    `__index__`, its `__torch_function__`), may run the user's code, so it is watched. So are PyTorch's functions in
    Python, which look up others by names that a user may have bound to functions of his own, and ops of other
    libraries.
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
        if types or not isinstance(func, _IN_C) or not all(map(_runs_nothing, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        sys.settrace(self.before)
        try:
            return func(*args, **kwargs)
        finally:
            sys.settrace(self.watch)


def _runs_nothing(value: Any) -> bool:
    """Whether a function that is given this value runs none of the user's code."""
    if type(value) in (tuple, list):
        return all(map(_runs_nothing, value))
    if type(value) is slice:
        return all(map(_runs_nothing, (value.start, value.stop, value.step)))
    return not callable(value) and type(value).__module__.partition(".")[0] in ("builtins", "torch")
