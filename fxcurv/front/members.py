"""What code takes of a value that it reads: a member, a member's member, or all of it, by the instructions that follow."""

from __future__ import annotations

import dis
import inspect
import operator
import os
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from fxcurv.front.python_state import (
    CONTAINERS,
    ENVIRONMENT,
    FUNCTIONS,
    MISSING,
    SCALARS,
    TRACED,
    Path,
    holds_state,
    is_plain,
    members_of,
)

_FOLLOWED = (nn.Module, *TRACED, *SCALARS, *CONTAINERS)


class Record(Protocol):
    """Who notes the places that are found."""

    def add(self, path: Path, value: Any) -> None:
        """Note a place by its value."""

    def add_by_identity(self, path: Path) -> None:
        """Note a place by the object that it holds."""

    def of_code(self, value: Any) -> None:
        """Note the defaults of a function."""

    def is_new(self, value: Any) -> bool:
        """Whether a value was made in the trace."""


class _Here(NamedTuple):
    """A value, its place, and the instruction after the one that loads it."""

    path: Path
    value: Any
    at: int

    def step(self, kind: str, name: Any, value: Any, length: int = 1) -> _Here:
        return _Here(self.path.step(kind, name), value, self.at + length)


def follow(record: Record, path: Path, value: Any, instructions: list, at: int) -> None:
    """Note what code takes of the value at `path` from instruction `at` on."""
    here: _Here | None = _Here(path, value, at)
    while here is not None:
        here = _next(record, here, instructions)


def _next(record: Record, here: _Here, instructions: list) -> _Here | None:
    """The member that the code takes; None if there is none to follow, and all is noted."""
    after = instructions[here.at] if here.at < len(instructions) else None
    takes = after is not None and after.opname.startswith(("LOAD_ATTR", "LOAD_METHOD"))
    name = after.argval if after is not None and takes else ""
    value = here.value
    if isinstance(value, weakref.ref):
        calls = sum(1 for _ in _leading(instructions, here.at, ("PRECALL", "CALL")))
        return here.step("call", None, value(), calls)
    if isinstance(value, types.ModuleType):
        return _of_module(record, here, name)
    if isinstance(value, type) and name:
        inner = inspect.getattr_static(value, name, MISSING)
        if not hasattr(type(inner), "__get__"):  # a class as a namespace
            return here.step("attr", name, inner)
    if isinstance(value, FUNCTIONS):
        return _of_function(record, here, name)
    if record.is_new(value) and here.path.steps and here.path.module is None:
        return None
    if name and is_plain(value):
        known, found = _of_object(record, here, name)
        if known:
            return found
    if isinstance(value, list | tuple | dict):
        known, found = _of_container(record, here, name, instructions)
        if known:
            return found
    _all_of(record, here, name)
    return None


def _of_module(record: Record, here: _Here, name: str) -> _Here | None:
    """A Python module: its name, if it is the user's or a tensor or table of PyTorch's."""
    value = here.value
    if not name:
        return None
    if value is os and name in ("environ", "getenv"):
        record.add(ENVIRONMENT, None)
        return None
    if holds_state(getattr(value, "__file__", None) or "<string>"):
        return here.step("attr", name, getattr(value, name, MISSING))
    if value.__name__.partition(".")[0] != "torch" or name not in vars(value):
        return None
    there = here.step("attr", name, vars(value)[name])
    if isinstance(there.value, types.ModuleType | Tensor | list | dict):
        return there
    record.add_by_identity(there.path)
    return None


def _of_function(record: Record, here: _Here, name: str) -> _Here | None:
    """A function: itself, and an attribute that it has been given."""
    record.add(here.path, here.value)
    if not isinstance(here.value, type):
        record.of_code(here.value)
    given = isinstance(here.value, types.FunctionType) and name in vars(here.value)
    return here.step("attr", name, vars(here.value)[name]) if given else None


def _of_object(record: Record, here: _Here, name: str) -> tuple[bool, _Here | None]:
    """(whether this is known, the attribute to follow) of an object with an attribute of this name."""
    value, members = here.value, members_of(here.value)
    if name in members or not hasattr(value.__class__, name):
        # one that `__getattr__` makes is asked for again at every call
        inner = members[name] if name in members else Path(None, value, (("attr", name),)).get([])
        return True, here.step("attr", name, inner)
    found = next(vars(c)[name] for c in value.__class__.__mro__ if name in vars(c))
    code = getattr(getattr(found, "fget", found), "__code__", None)
    if code is not None and holds_state(code.co_filename):  # what the method reads is recorded when it runs
        record.add_by_identity(here.path)
        return True, None
    return (False, None) if hasattr(type(found), "__get__") else (True, here.step("attr", name, found))


def _of_container(record: Record, here: _Here, name: str, instructions: list) -> tuple[bool, _Here | None]:
    """(whether this is known, the entry to follow) of a list, tuple or table that is read at a constant."""
    key, length = _subscript(instructions, here.at)
    if name == "get" and isinstance(here.value, dict):
        key = _constant(instructions, here.at + 1)
        if key is not None:
            record.add(here.path.step("item", key), here.value.get(key, MISSING))
            return True, None
    try:
        inner = here.value[key] if length else MISSING
    except (KeyError, IndexError, TypeError):
        inner = MISSING
    return (False, None) if inner is MISSING else (True, here.step("item", key, inner, length))


def _all_of(record: Record, here: _Here, name: str) -> None:
    """A number that a library's object shows; else the value, or all members of an object that is passed on."""
    path, value = here.path, here.value
    shown = getattr(value, name, MISSING) if name and path.steps and not isinstance(value, _FOLLOWED) else MISSING
    if type(shown) in SCALARS:
        record.add(path.step("attr", name), shown)
    elif path.steps:
        record.add(path, value)
    else:
        for key, member in members_of(value).items():
            record.add(path.step("attr", key), member)


# ---- instructions ------------------------------


def instructions_of(code: types.CodeType) -> list:
    """The instructions of code, without those that do nothing."""
    return [i for i in dis.get_instructions(code) if i.opname not in ("PUSH_NULL", "EXTENDED_ARG", "NOP", "NOT_TAKEN")]


def with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    """This code, and the code of the functions in it."""
    yield code
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from with_inner(value)


_AUGMENTED = {"+=": operator.add, "-=": operator.sub}


def counting_step(instructions: list, at: int, name: str) -> tuple[Any, Callable[[Any, Any], Any]] | None:
    """(constant, operation) of `self.name += constant`, if the value read at `at` is used for that alone."""
    rest = [i for i in instructions[at + 1 : at + 5] if i.opname != "SWAP"]
    if len(rest) < 3 or rest[0].opname not in ("LOAD_CONST", "LOAD_SMALL_INT") or rest[1].opname != "BINARY_OP":
        return None
    operation = _AUGMENTED.get(rest[1].argrepr)
    stored = rest[2].opname == "STORE_ATTR" and rest[2].argval == name
    return (rest[0].argval, operation) if operation is not None and stored else None


def _leading(instructions: list, at: int, names: tuple[str, ...]) -> Iterator[Any]:
    """The instructions from `at` on, as long as they have one of these names."""
    while at < len(instructions) and instructions[at].opname in names:
        yield instructions[at]
        at += 1


def _subscript(instructions: list, at: int) -> tuple[Any, int]:
    """(key, number of instructions) if a subscript by a constant follows, else (None, 0)."""
    key, then = _constant(instructions, at), instructions[at + 1 : at + 2]
    if key is None or not then:
        return None, 0
    read = then[0].opname == "BINARY_SUBSCR" or then[0].opname == "BINARY_OP" and then[0].argrepr == "[]"
    return (key, 2) if read else (None, 0)


def _constant(instructions: list, at: int) -> int | str | None:
    """The number or text that the instruction loads; None if it loads something else."""
    loads = at < len(instructions) and instructions[at].opname in ("LOAD_CONST", "LOAD_SMALL_INT")
    return instructions[at].argval if loads and isinstance(instructions[at].argval, int | str) else None
