"""Floats that change at every step: from the second change on they are inputs of a program, as `Number`s of tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxcurv.front.python_state import Path
from fxcurv.ir.private import pytree


class Number:
    """Stands for a Python float while tracing: a 0-dim float64 tensor that promotes others only as a float does.

    Code that needs its value (a branch, a dropout's probability) fails, and the program is made for the value instead.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run `func` with a tensor for each `Number`, of a dtype that promotes the others as a float does."""
        leaves = [t for t in pytree.tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        wide = [t for t in leaves if t.ndim and t.is_floating_point()]
        dtype = None
        if leaves and not wide:
            dtype = functools.reduce(torch.promote_types, (torch.result_type(t, 1.0) for t in leaves))
        given = lambda n: n.tensor if dtype is None else n.tensor.to(dtype)  # noqa: E731
        args, kwargs = pytree.tree_map_only(Number, given, (args, kwargs or {}))
        return func(*args, **kwargs)

    of_trace = True  # what code keeps of it is refused, as a traced tensor is

    def error(self) -> Exception:
        """What an operation that needs the value raises."""
        return TypeError("the value of this number is needed while tracing")

    def refuse(self, *_: Any) -> Any:
        """Raise `error`, in place of every operation that needs the value."""
        raise self.error()

    __bool__ = __float__ = __int__ = __index__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = refuse  # type: ignore[assignment]
    __format__ = __round__ = __floor__ = __ceil__ = __trunc__ = __floordiv__ = __mod__ = refuse  # type: ignore[assignment]


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Number, *others: Any) -> Any:
        if any(isinstance(o, Tensor) for o in others):
            return getattr(torch, name.strip("_").replace("truediv", "true_divide"))(self, *others)
        if not all(isinstance(o, int | float | Number) for o in others):
            return NotImplemented
        plain = [o.tensor if isinstance(o, Number) else o for o in others]
        kind = next((type(o) for o in (self, *others) if isinstance(o, Number) and type(o) is not Number), Number)
        return kind(getattr(self.tensor, name)(*plain))

    return apply


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "neg", "abs"):
    setattr(Number, f"__{_name}__", _operator(f"__{_name}__"))


@dataclass
class Schedule:
    """Which floats change often enough to be inputs of a program."""

    counts: dict[tuple, int] = field(default_factory=dict)
    chosen: dict[tuple, Path] = field(default_factory=dict)
    refused: set[tuple] = field(default_factory=set)
    proved: set[tuple] = field(default_factory=set)

    def changed(self, found: Sequence[tuple[Path, str, Any, Any]]) -> tuple[Path, ...]:
        """Count these changes; returns the floats to make inputs of the new program, all that have changed twice.

        Args:
            found: the changes since the nearest program, of `State.differences`.
        """
        for path, how, now, then in found:
            if how == "scalar" and type(now) is type(then) is float:
                self.counts[path.key] = self.counts.get(path.key, 0) + 1
                if self.counts[path.key] > 1 and path.key not in self.refused:
                    self.chosen[path.key] = path
        return tuple(self.chosen.values())

    def new(self) -> list[Path]:
        """The chosen floats that no program has as inputs yet."""
        return [path for key, path in self.chosen.items() if key not in self.proved]

    def works(self) -> None:
        """Note that all chosen floats can be tensors."""
        self.proved |= set(self.chosen)

    def give_up(self) -> list[Path]:
        """Note that the new floats, or all if none is new, cannot be tensors; returns them."""
        given_up = self.new() or list(self.chosen.values())
        for path in given_up:
            self.chosen.pop(path.key)
            self.refused.add(path.key)
        return given_up
