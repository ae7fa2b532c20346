"""Python values that a program depends on: where they are, and whether they have changed. `reads` finds them.

Numbers, strings, None, dtypes, and lists, dicts and plain objects of them are compared by value; functions, modules and all other
objects by identity; a tensor is read anew at every call. What the forward pass itself counts up (`self.calls += 1`) is no
dependence: every call counts it up again.
"""

from __future__ import annotations

import argparse
import collections
import functools
import logging
import operator
import os
import re
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import grad_scaler

from fxcurv.front.reparametrized import compute_again
from fxcurv.front.side_effects import HOOKS, entries
from fxcurv.ir.origin import is_user_file
from fxcurv.ir.private import version_of

SCALARS = (
    int,
    float,
    bool,
    str,
    complex,
    type(None),
    bytes,
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.layout,
)
MAPPINGS = (dict, collections.ChainMap, collections.UserDict, types.MappingProxyType)
SEQUENCES = (list, tuple, collections.deque, collections.UserList)
CONTAINERS = (*MAPPINGS, *SEQUENCES, set, frozenset)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, functools.partial)
TRACED = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
# beyond this depth, or number of objects, a structure is compared by identity and length
DEEPEST, MOST = 8, 10_000
_STDLIB = sysconfig.get_path("stdlib")
# An environment may take packages from several such folders: its own, the user's, the system's.
_INSTALLED = re.compile(r".*[\\/](?:site|dist)-packages[\\/]([^\\/.]+)")
_LIBRARIES = {
    "torch", "functorch", "torchgen", "sympy", "mpmath", "networkx", "numpy", "filelock", "fsspec", "jinja2", "triton", "optree",
    "typing_extensions", "tqdm", "rich", "pytest", "_pytest", "pluggy", "hypothesis", "coverage",
}  # fmt: skip
# What taking a member raises if it is not there: an empty cell is a ValueError.
NOT_THERE = (AttributeError, KeyError, IndexError, TypeError, ValueError, ReferenceError)
# PyTorch's own objects that hold numbers of the training: optimizers, schedules of learning rates, scales of gradients.
_OF_TRAINING = (os.path.dirname(torch.optim.__file__) + os.sep, grad_scaler.__file__)
MISSING = type("Missing", (), {"__repr__": lambda self: "nothing"})()


# ---- where a value is ------------------------------


@dataclass(frozen=True)
class Path:
    """A place that holds a value: a module of the model or loss by its index, or another object, and steps from there.

    steps: ("attr", name), ("item", key), or ("call", None) of a weak reference.
    """

    module: int | None
    root: Any
    steps: tuple[tuple[str, Any], ...] = ()
    title: str = ""

    @property
    def key(self) -> tuple:
        """Equal for equal places."""
        return (id(self.root) if self.module is None else self.module), self.module is None, self.steps

    def step(self, kind: str, name: Any) -> Path:
        """The place of a member of the value at this one."""
        shown = "()" if kind == "call" else f".{name}" if kind == "attr" else f"[{name!r}]"
        return Path(self.module, self.root, (*self.steps, (kind, name)), (self.title + shown).removeprefix("."))

    def source(self, objects: list[Any]) -> str:
        """A Python expression in `m`, the modules, and `o`, the list `objects`, to which this appends the root."""
        if self.module is None:
            objects.append(self.root)
        text = f"o[{len(objects) - 1}]" if self.module is None else f"m[{self.module}]"
        for kind, name in self.steps:
            if kind == "attr":
                text = f"{text}.{name}" if name.isidentifier() else f"getattr({text}, {name!r})"
            else:
                text = f"{text}()" if kind == "call" else f"{text}[{name!r}]"
        return text

    def owner(self, modules: Sequence[nn.Module]) -> Any:
        """The object that the last step is taken from."""
        value = self.root if self.module is None else modules[self.module]
        for kind, name in self.steps[:-1]:
            value = _member(value, kind, name)
        return value

    def get(self, modules: Sequence[nn.Module]) -> Any:
        """The value; `MISSING` if there is none."""
        try:
            return _member(self.owner(modules), *self.steps[-1])
        except NOT_THERE:
            return MISSING

    def set(self, modules: Sequence[nn.Module], value: Any) -> None:
        """Set the value."""
        kind, name = self.steps[-1]
        owner = self.owner(modules)
        setattr(owner, name, value) if kind == "attr" else operator.setitem(owner, name, value)


def _member(value: Any, kind: str, name: Any) -> Any:
    return value() if kind == "call" else getattr(value, name) if kind == "attr" else value[name]


# The environment variables, as bytes: compared as a whole, since code may read them by any name.
ENVIRONMENT = Path(None, os.environ, (("attr", "_data"),), "os.environ")


# ---- what is compared ------------------------------


def frozen(value: Any, tensors: bool = True) -> Any:
    """A stand-in for a value, equal for values that may share a program.

    Args:
        tensors: whether tensors are compared, by identity.
    """
    return _frozen(value, tensors, (), [MOST])


def _frozen(value: Any, tensors: bool, outer: tuple[int, ...], left: list[int]) -> Any:
    kind = type(value)
    if kind in SCALARS or isinstance(value, Enum):
        return kind, value
    left[0] -= 1
    if isinstance(value, TRACED):
        return id(value) if tensors else None
    if isinstance(value, types.MethodType):
        return id(value.__func__), id(value.__self__)
    if isinstance(value, nn.Module | types.FunctionType | type | types.ModuleType) or id(value) in outer:
        return id(value)
    if len(outer) > DEEPEST or left[0] < 0:
        return id(value), _length(value) if isinstance(value, CONTAINERS) else 0
    inside = lambda v: _frozen(v, tensors, (*outer, id(value)), left)  # noqa: E731
    counts = lambda v: tensors or not isinstance(v, TRACED)  # noqa: E731
    if isinstance(value, MAPPINGS):
        items = dict.items(value) if isinstance(value, dict) else value.items()
        return kind, tuple((inside(k), inside(v)) for k, v in items if counts(v))
    if isinstance(value, ContextVar):
        return kind, inside(_value_in_context(value))
    if isinstance(value, set | frozenset):
        return kind, frozenset(map(inside, entries(value)))
    if isinstance(value, SEQUENCES):
        listed = value if isinstance(value, collections.UserList) else entries(value)
        return kind, tuple(inside(v) for v in listed if counts(v))
    if isinstance(value, functools.partial):
        return kind, inside(value.func), inside(value.args), inside(value.keywords)
    if isinstance(value, slice | range):
        return kind, inside(value.start), inside(value.stop), inside(value.step)
    if isinstance(value, weakref.ref):
        return kind, inside(value())
    if kind.__module__ in ("numpy", "array") and hasattr(value, "tobytes"):
        return kind, getattr(value, "shape", None), str(getattr(value, "dtype", "")), value.tobytes()
    if is_plain(value):
        return kind, tuple((k, inside(v)) for k, v in members_of(value).items() if counts(v))
    try:
        return kind, bytes(memoryview(value))
    except (TypeError, ValueError, BufferError, NotImplementedError):  # it holds no bytes
        return id(value)


def _length(value: Any) -> int:
    """The number of entries; 0 for a container that does not say."""
    try:
        return len(value)
    except Exception:  # whatever the user's class raises
        return 0


def _value_in_context(variable: ContextVar) -> Any:
    try:
        return variable.get()
    except LookupError:
        return MISSING


def members_of(value: Any) -> dict[str, Any]:
    """The attributes that an object holds itself, in its dictionary or in slots."""
    slots = [
        name
        for c in value.__class__.__mro__  # what a weak proxy stands for
        for name, v in vars(c).items()
        if isinstance(v, types.MemberDescriptorType)
    ]
    return {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **getattr(value, "__dict__", {})}


def is_plain(value: Any) -> bool:
    """Whether an object is compared by its members: an instance of a user's class, or a namespace."""
    if isinstance(
        value, (nn.Module, Tensor, Enum, logging.Logger, types.ModuleType, *SCALARS, *CONTAINERS, *FUNCTIONS)
    ):
        return False
    return isinstance(value, NAMESPACES) or is_users(value.__class__)  # of a weak proxy: what it stands for


def is_users(kind: type) -> bool:
    """Whether a class is the user's, or one of PyTorch's that hold numbers of the training."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return holds_state(file) if file else kind.__module__ not in sys.builtin_module_names


def library_of(path: str) -> str:
    """The installed package that a file belongs to; "" for the user's own."""
    installed = _INSTALLED.match(path)
    return installed[1] if installed is not None else ""


def holds_state(path: str) -> bool:
    """Whether code of this file may read the user's state: not if it is Python's, PyTorch's or of a library below."""
    installed = _INSTALLED.match(path)
    if path.startswith(_OF_TRAINING):
        return True
    if not is_user_file(path) or installed is None and path.startswith(_STDLIB):
        return False
    return installed is None or installed[1] not in _LIBRARIES


def is_own_file(path: str) -> bool:
    """Whether code of this file is the user's own, not of an installed package."""
    return holds_state(path) and _INSTALLED.match(path) is None


def is_notes(path: Path, before: Any, after: Any) -> bool:
    """Whether a place is a table of an installed package that only grew, by what it has met: einops notes types so.

    Args:
        before, after: the table, `frozen`.
    """
    root = path.root
    file = root.get("__file__") if isinstance(root, dict) else None
    if isinstance(root, type):
        file = getattr(sys.modules.get(root.__module__), "__file__", None)
    if _INSTALLED.match(file or "") is None or not isinstance(before, tuple) or not isinstance(after, tuple):
        return False
    tables = before[0] is after[0] and before[0] in MAPPINGS
    return tables and len(before[1]) < len(after[1]) and after[1][: len(before[1])] == before[1]


def _tensor_properties(t: Any) -> Any:
    """The properties that a program depends on, of a tensor that it reads anew at every call."""
    return (t.shape, t.dtype, t.device, t.layout) if isinstance(t, Tensor) else type(t)


def _tensor_version(t: Any) -> Any:
    """The identity and version of a tensor whose values may have become numbers: a write changes the version."""
    return (id(t), 0 if t.is_inference() else version_of(t)) if isinstance(t, Tensor) else type(t)


def _module_state(held: dict[str, Any]) -> tuple:
    """What a program depends on, of a module that is no part of the model: its dictionary of attributes is given.

    Its tensors are read anew at every call.
    """
    training, parts, params, buffers, *hooks = _of_module(held)
    kinds = *map(type, params.values()), *map(type, buffers.values())  # an entry may be None
    return training, any(hooks) and [*map(tuple, hooks)], *map(id, parts.values()), *params, *buffers, *kinds


_of_module = operator.itemgetter("training", "_modules", "_parameters", "_buffers", *HOOKS)


@dataclass
class Effect:
    """A write of the forward pass to an attribute, which every call repeats: `count` it up by `value`, or set it."""

    path: Path
    value: Any
    count: Callable[[Any, Any], Any] | None = None

    def run(self, modules: Sequence[nn.Module]) -> None:
        """Write to the attribute."""
        now = self.value if self.count is None else self.count(self.path.get(modules), self.value)
        self.path.set(modules, now)


@dataclass
class Recomputed(Effect):
    """A weight that a pre-hook of PyTorch's sets before each forward pass, which it computes anew after every call."""

    def run(self, modules: Sequence[nn.Module]) -> None:
        """Have the hook set it."""
        compute_again(self.path.owner(modules), self.path.steps[-1][1])


_HOW = {
    "scalar": "{}", "frozen": "F({})", "identity": "I({})", "tensor": "T({})", "state": "S({})", "number": "type({})",
    "table": "dict({})", "module": "M({})",
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "F": frozen, "I": id, "T": _tensor_properties, "S": _tensor_version, "M": _module_state,
    "type": type, "dict": dict, "getattr": getattr,
}  # fmt: skip


_KEPT = ("identity", "frozen", "state", "module")


@dataclass
class State:
    """The Python values that one program depends on.

    Attributes:
        leaves: (place, how it is compared), a key of `_HOW`.
        numbers: places of floats that are inputs of the graph.
        effects: what every call does to the model's attributes.
        sources: constants of the program that are read from a place at every call, by name.
        kept: the compared objects, held so that no id is given twice.
        ran: the user's code that ran while tracing, and its globals; `custom`: whether custom functions are in it.
    """

    leaves: list[tuple[Path, str]] = field(default_factory=list)
    numbers: tuple[Path, ...] = ()
    effects: list[Effect] = field(default_factory=list)
    sources: dict[str, Path] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)
    ran: list[tuple[types.CodeType, dict[str, Any]]] = field(default_factory=list)
    custom: bool = False

    def freeze(self, modules: Sequence[nn.Module]) -> State:
        """Compile the one function that reads all values, and keep the present values."""
        objects: list[Any] = []
        sources = [_HOW[how].format(path.source(objects)) for path, how in self.leaves]
        body = f"lambda m: ({', '.join(sources)}{',' if sources else ''})"
        self._read = eval(body, {"o": objects, **_FUNCTIONS})
        self.values = self._read(modules)
        self._kinds = tuple(map(type, self.values))
        self.kept += [path.get(modules) for path, how in self.leaves if how in _KEPT]
        return self

    def holds(self, modules: Sequence[nn.Module]) -> bool:
        """Whether the values are as they were when the program was made."""
        try:
            now = self._read(modules)
        except NOT_THERE:
            return False
        return tuple(map(type, now)) == self._kinds and now == self.values

    def differences(self, modules: Sequence[nn.Module]) -> list[tuple[Path, str, Any, Any]]:
        """(place, how it is compared, the value now, the value then) of every value that has changed."""
        found = []
        for (path, how), then in zip(self.leaves, self.values, strict=True):
            value = path.get(modules)
            now = value if how == "scalar" else _FUNCTIONS[_HOW[how].partition("(")[0]](value)
            if type(now) is not type(then) or now != then:
                found.append((path, how, value, then))
        return found

    def tensors(self, modules: Sequence[nn.Module]) -> dict[str, Tensor]:
        """Constants of the program that are read from a place, as they are now."""
        return {name: path.get(modules) for name, path in self.sources.items()}

    def number(self, index: int, modules: Sequence[nn.Module], device: torch.device) -> Tensor:
        """The value of a float that is an input."""
        return as_tensor(self.numbers[index].get(modules), device)

    def run_effects(self, modules: Sequence[nn.Module]) -> None:
        """Repeat what the forward pass writes to attributes of the model."""
        for effect in self.effects:
            effect.run(modules)

    def unguarded(self) -> str:
        """A value whose change a function of `torch.compile` could not see; "" if there is none."""
        cells = [p.title for p, how in self.leaves if how == "scalar" and isinstance(p.root, types.CellType)]
        return next(iter([*cells, *(effect.path.title for effect in self.effects)]), "")

    def names(self) -> list[str]:
        """The values that are compared by value, and those that are inputs, for a report."""
        pairs = zip(self.leaves, self.values, strict=True)
        shown = [f"{path.title} = {then!r}" for (path, how), then in pairs if how == "scalar"]
        return [*(f"{path.title} (an input)" for path in self.numbers), *dict.fromkeys(shown)]


def as_tensor(number: float, device: torch.device) -> Tensor:
    """A float as a program takes it: a 0-dim float64 tensor."""
    return torch.full((), number, dtype=torch.float64, device=device)


def reasons(found: Iterable[tuple[Path, str, Any, Any]]) -> list[str]:
    """Differences in words."""
    out = []
    for path, how, now, then in found:
        if how == "scalar":
            out.append(f"{path.title} is {_show(now)} instead of {_show(then)}")
        elif how == "module":
            out.append(f"{path.title} is in another mode, or has other parts or hooks")
        else:
            out.append(f"{path.title} is another {'value' if how in ('frozen', 'number') else type(now).__name__}")
    return out


def _show(value: Any) -> str:
    text = f"a {type(value).__name__}" if isinstance(value, Tensor | nn.Module) else repr(value)
    return text if len(text) < 60 else text[:57] + "..."
