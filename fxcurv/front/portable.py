"""The Python values that a trace read, in a form that another process can compare: `python_state` compares objects.

Two things are noted of every value. Where it is: a path from the model's modules, the loss or the name of a Python
module, which another process can follow (`Places`). What it is: a text (`Describer`) of a function's code, a class'
members, a container's contents. The same is noted of the code that ran, and of the files that hold it. A program that
read a value without such a path or text is not kept on disk: `NotPortable` names the value.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import logging
import os
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv.front.members import with_inner
from fxcurv.front.python_state import (
    CONTAINERS,
    DEEPEST,
    ENVIRONMENT,
    MAPPINGS,
    MISSING,
    MOST,
    NOT_THERE,
    SCALARS,
    SEQUENCES,
    Path,
    State,
    holds_state,
    is_own_file,
    is_plain,
    is_users,
    members_of,
)
from fxcurv.front.reads import Absent, content
from fxcurv.front.requests import Subject
from fxcurv.front.side_effects import HOOKS

# The place of a value: ("module", k), ("loss", "") or ("python", name), then ("attr", name) and ("item", key).
Place = tuple[tuple[str, Any], ...]

# How many objects are visited to find the place of one, and up to how many entries a tensor is compared by value.
OBJECTS, ENTRIES = 200_000, 1 << 22
_STANDARD = set(vars(nn.Module()))
# The members of a class that are compared: others may differ between processes, and what code reads is compared anyway.
_STILL = (types.FunctionType, property, staticmethod, classmethod, tuple, *SCALARS)


class NotPortable(Exception):
    """A value that the program depends on cannot be compared in another process; the message says which."""


def portable(state: State, subject: Subject, constants: Iterable[Tensor]) -> dict[str, Any]:
    """What a program depends on in Python, as plain values that JSON holds; `restored` takes them in another process.

    Args:
        constants: tensors that the program holds, other than those that it reads anew at every call.

    Raises:
        NotPortable: for a value that is not known to be comparable.
    """
    if state.effects:
        raise NotPortable(f"every call changes {state.effects[0].path.title}")
    if state.numbers:
        raise NotPortable(f"{state.numbers[0].title} is an input of the program")
    if state.custom:
        raise NotPortable("a custom autograd function is in the model or loss")
    modules = subject.modules()
    if not state.holds(modules):
        raise NotPortable("values that Python holds have changed since the model was traced")
    names = [_module_of(code, held) for code, held in state.ran]
    places = Places(subject, names)
    describe = Describer(subject)
    leaves = [_describe_leaf(path, how, places, describe, modules) for path, how in state.leaves]
    if describe.seen & set(map(id, constants)):
        raise NotPortable(
            "a tensor is read that a list, or several attributes, hold: in a buffer it is read at every call"
        )
    sources = {name: [places.root(path), path.steps, path.title] for name, path in state.sources.items()}
    code = {json.dumps(places.of_code(code)): _code_digest(places.function(code)) for code, _ in state.ran}
    files = {path: _file_digest(path) for path in _files({*names, *(type(m).__module__ for m in modules)})}
    return {"leaves": leaves, "sources": sources, "code": code, "files": files}


def restored(kept: dict[str, Any], subject: Subject) -> State | str:
    """The state of these values in this process, to be compared at every call; or, in words, what differs."""
    changed = next((path for path, digest in kept["files"].items() if _file_digest(path) != digest), None)
    if changed is not None:
        return f"{changed} has changed"
    modules, describe = subject.modules(), Describer(subject)
    for place, digest in kept["code"].items():
        try:
            same = _code_digest(at(json.loads(place), subject)) == digest
        except NOT_THERE:
            same = False
        if not same:
            return f"the code of {json.loads(place)[-1][-1]} has changed"
    state = State()
    for place, steps, title, how, absent, text in kept["leaves"]:
        try:
            path = _make_path(place, steps, title, subject, Absent if absent else Path)
            same = _text(path, how, describe, modules) == text
        except (*NOT_THERE, NotPortable):
            same = False
        if not same:
            return f"{title} is another value"
        state.leaves.append((path, how))
    try:
        state.sources = {
            name: _make_path(place, steps, title, subject, Path)
            for name, (place, steps, title) in kept["sources"].items()
        }
    except NOT_THERE:
        return "a tensor that Python held is not there"
    return state.freeze(modules)


def checked_modules(subject: Subject) -> None:
    """Refuse code that is in no file.

    Raises:
        NotPortable: naming the class, or the loss.
    """
    for value in (*(m.forward for m in subject.modules()), subject.loss):
        code = getattr(value, "__code__", None)
        holder = getattr(value, "__self__", value)
        made = code is not None and code.co_filename.startswith(("<eval_with_key>", "<string>"))
        if made or isinstance(holder, fx.GraphModule | torch.jit.ScriptModule):
            raise NotPortable(f"the code of {type(holder).__name__} was made while the program ran")


def _module_of(code: types.CodeType, held: dict[str, Any]) -> str:
    """The name of the Python module that owns a function's globals."""
    name = held.get("__name__")
    if not isinstance(name, str) or getattr(sys.modules.get(name), "__dict__", None) is not held:
        raise NotPortable(f"{code.co_name} is of no module that Python has imported")
    return name


def _describe_leaf(
    path: Path, how: str, places: Places, describe: Describer, modules: Sequence[nn.Module]
) -> list[Any]:
    try:
        text = _text(path, how, describe, modules)
        return [places.root(path), path.steps, path.title, how, isinstance(path, Absent), text]
    except NotPortable as error:
        raise NotPortable(f"{path.title}: {error}") from None


def _make_path(place: Any, steps: Any, title: str, subject: Subject, kind: type[Path]) -> Path:
    steps = tuple((way, name) for way, name in steps)
    if len(place) == 1 and place[0][0] == "module":
        return kind(place[0][1], None, steps, title)
    return kind(None, at(place, subject), steps, title)


def _text(path: Path, how: str, describe: Describer, modules: Sequence[nn.Module]) -> str:
    """What a place holds, or a digest of it."""
    if path.root is ENVIRONMENT.root:
        raise NotPortable("the model or loss reads os.environ")
    value = MISSING if isinstance(path, Absent) else path.get(modules)
    if isinstance(path, Absent) and path.get(modules) is not MISSING:
        return "there"
    if how == "module":
        parts = [[name, _name(type(m))] for name, m in value["_modules"].items()]
        if any(value[name] for name in HOOKS):
            raise NotPortable("it has hooks")
        return digested([value["training"], parts, sorted(value["_parameters"]), sorted(value["_buffers"])])
    if how == "tensor":
        return f"{tuple(value.shape)} {value.dtype} {value.device} {value.layout}"
    return digested(describe(value))


# ---- where a value is ------------------------------


def at(place: Iterable[Any], subject: Subject) -> Any:
    """The value at a place, in this process."""
    (kind, name), *steps = place
    value: Any = subject.loss if kind == "loss" else sys.modules[name] if kind == "python" else subject.modules()[name]
    for way, step in steps:
        value = getattr(value, step) if way == "attr" else value[step]
    return value


class Places:
    """Finds the places of objects: paths from the model, the loss and Python modules, the shortest first.

    Args:
        names: of the Python modules whose code ran.
    """

    def __init__(self, subject: Subject, names: Iterable[str]):
        self._found: dict[int, Place] = {}
        self._codes: dict[int, tuple[Place, Any]] = {}
        self._queue: collections.deque[tuple[Place, Any]] = collections.deque()
        self._held: list[Any] = []  # keeps objects alive, so that no id is given twice
        self._modules = {id(vars(m)): k for k, m in enumerate(subject.modules())}
        for k, m in enumerate(subject.modules()):
            self._note((("module", k),), m)
        if subject.loss is not None:
            self._note((("loss", ""),), subject.loss)
        for name in dict.fromkeys(names):
            self._note((("python", name),), sys.modules[name])

    def root(self, path: Path) -> Place:
        """The place of a path's root.

        Raises:
            NotPortable: if it is not found.
        """
        # export makes a stand-in for a module that is held twice, with the same attributes
        stands_for = self._modules.get(id(vars(path.root))) if isinstance(path.root, nn.Module) else None
        k = path.module if path.module is not None else stands_for
        if k is not None:
            return (("module", k),)
        place = self._search(self._found, path.root)
        if place is None:
            raise NotPortable(
                f"the {type(path.root).__name__} that holds it is reached from no module and not from the loss"
            )
        return place

    def of_code(self, code: types.CodeType) -> Place:
        """The place of the function that has this code, or contains the function that has it.

        Raises:
            NotPortable: if it is not found.
        """
        found = self._search(self._codes, code)
        if found is None:
            raise NotPortable(f"{code.co_name}, in {code.co_filename}, is reached from no module and not from the loss")
        return found[0]

    def function(self, code: types.CodeType) -> Any:
        """The function at the place of `of_code`."""
        self.of_code(code)
        return self._codes[id(code)][1]

    def _search(self, table: dict[int, Any], value: Any) -> Any:
        while id(value) not in table and self._queue and len(self._found) < OBJECTS:
            place, holder = self._queue.popleft()
            for steps, member in _held_members(holder):
                self._note((*place, *steps), member)
        return table.get(id(value))

    def _note(self, place: Place, value: Any) -> None:
        if id(value) in self._found or type(value) in SCALARS or isinstance(value, Tensor):
            return
        self._found[id(value)] = place
        self._held.append(value)
        self._queue.append((place, value))
        if isinstance(value, types.FunctionType):
            for code in with_inner(value.__code__):
                self._codes.setdefault(id(code), (place, value))


_PARTS: dict[type, tuple[str, ...]] = {
    types.FunctionType: ("__wrapped__", "__closure__", "__defaults__", "__kwdefaults__"),
    types.MethodType: ("__func__", "__self__"), types.CellType: ("cell_contents",), property: ("fget",),
    staticmethod: ("__func__",), classmethod: ("__func__",), functools.partial: ("func", "args", "keywords"),
}  # fmt: skip


def _held_members(value: Any) -> Iterator[tuple[Place, Any]]:
    """(steps, member) of everything that a user's object holds; runs none of the user's code."""
    kind = type(value)
    if kind in _PARTS:
        names = [name for name in _PARTS[kind] if name != "cell_contents" or content(value) is not MISSING]
        yield from (((("attr", name),), v) for name in names if (v := getattr(value, name, None)) is not None)
    elif isinstance(value, types.ModuleType):
        if holds_state(getattr(value, "__file__", None) or ""):
            yield (("attr", "__dict__"),), vars(value)
    elif isinstance(value, type):
        if is_users(value):
            yield from (((("attr", "__dict__"), ("item", name)), v) for name, v in list(vars(value).items()))
            yield from (((("attr", "__mro__"), ("item", k)), c) for k, c in enumerate(value.__mro__))
    elif kind is dict:
        yield from (((("item", k),), v) for k, v in list(value.items()) if type(k) in (str, int))
    elif kind in (list, tuple):
        yield from (((("item", k),), v) for k, v in enumerate(value))
    elif isinstance(value, nn.Module) or is_plain(value):
        yield (("attr", "__class__"),), kind
        yield from (((("attr", name),), v) for name, v in members_of(value).items() if name not in _STANDARD)
    elif kind.__module__ == "functools":
        yield (("attr", "__wrapped__"),), getattr(value, "__wrapped__", None)  # a cached function


# ---- what a value is ------------------------------


def digested(said: Any) -> str:
    """A nested description as one text, or the digest of that if it is long."""
    text = json.dumps(said)
    return text if len(text) < 100 else hashlib.sha256(text.encode()).hexdigest()


class Describer:
    """Describes values in nested lists of texts, equal in any two processes that may share a program.

    A function is described by its code and the values bound to it. What code *reads* is compared separately: so what
    cannot be described in a function's closure, or among a class' members, is described by its type.

    Attributes:
        seen: ids of the tensors that were described by their entries.
    """

    def __init__(self, subject: Subject):
        self._modules = {id(vars(m)): k for k, m in enumerate(subject.modules())}
        self.seen: set[int] = set()
        self._own = {
            id(t): f"{k}.{name}"
            for k, root in reversed(list(enumerate(subject.roots())))
            for name, t in (*root.named_parameters(), *root.named_buffers())
        }

    def __call__(self, value: Any) -> Any:
        """The description.

        Raises:
            NotPortable: for a value that can be compared by identity alone.
        """
        return self._describe(value, (), [MOST], False)

    def _describe(self, value: Any, outer: tuple[int, ...], left: list[int], soft: bool) -> Any:
        kind = type(value)
        if kind in SCALARS:
            return [kind.__name__, repr(value)]
        left[0] -= 1
        if value is MISSING:
            return ["missing"]
        if id(value) in outer:
            return ["again", len(outer) - outer.index(id(value))]
        if isinstance(value, nn.Module) and id(vars(value)) in self._modules:
            return ["module", self._modules[id(vars(value))]]
        if len(outer) > DEEPEST or left[0] < 0:
            if soft:
                return ["deep", _name(kind)]
            raise NotPortable("it is nested too deeply, or too large")
        inside = lambda v, soft=soft: self._describe(v, (*outer, id(value)), left, soft)  # noqa: E731
        try:
            found = self._describe_code(value, inside)
            return found if found is not None else self._describe_data(value, inside)
        except NotPortable:
            if soft:
                return ["some", _name(kind)]
            raise

    def _describe_code(self, value: Any, inside: Any) -> Any:
        """Describe a function, class, module or op; None for anything else."""
        if value is os.getenv:
            raise NotPortable("the model or loss reads os.environ")
        if isinstance(value, types.FunctionType):
            if value.__code__.co_filename.startswith("<") and not value.__code__.co_filename.startswith("<frozen"):
                raise NotPortable(f"the code of {value.__name__} was made while the program ran")
            if not holds_state(value.__code__.co_filename):
                return ["function", value.__module__, value.__qualname__]
            cells = [inside(content(c), True) for c in value.__closure__ or ()]
            bound = [inside(value.__defaults__, True), inside(value.__kwdefaults__, True), cells]
            return ["function", value.__module__, value.__qualname__, _code_digest(value), bound]
        if isinstance(value, type):
            members = vars(value).items() if is_users(value) else ()
            own = [
                [name, inside(v, True)]
                for name, v in sorted(members, key=lambda pair: pair[0])
                if isinstance(v, _STILL)
            ]
            return ["class", _name(value), own, [_name(c) for c in value.__mro__]]
        if isinstance(value, types.ModuleType):
            return ["python", value.__name__]
        if isinstance(value, types.MethodType):
            return ["method", inside(value.__func__), inside(value.__self__)]
        if isinstance(value, functools.partial):
            return ["partial", inside(value.func), inside(value.args), inside(value.keywords)]
        if isinstance(value, property | staticmethod | classmethod):
            return ["descriptor", inside(getattr(value, "fget", None) or getattr(value, "__func__", None))]
        if isinstance(value, types.BuiltinFunctionType):
            return _describe_builtin(value)
        if isinstance(value, types.MethodDescriptorType | types.WrapperDescriptorType):
            return ["descriptor", _name(value.__objclass__), value.__name__]
        return ["op", str(value)] if type(value).__module__ == "torch._ops" else None

    def _describe_data(self, value: Any, inside: Any) -> Any:
        kind = type(value)
        if isinstance(value, Tensor):
            return self._describe_tensor(value)
        if isinstance(value, Enum):
            return ["enum", _name(kind), value.name, inside(value.value)]
        if isinstance(value, logging.Logger):
            return ["logger", value.name]
        if isinstance(value, ContextVar):
            return ["context", value.name, inside(value.get(MISSING))]
        if isinstance(value, MAPPINGS):
            return ["mapping", _name(kind), [[inside(k), inside(v)] for k, v in value.items()]]
        if isinstance(value, set | frozenset):
            return ["set", _name(kind), sorted(json.dumps(inside(v)) for v in value)]
        if isinstance(value, SEQUENCES):
            return ["sequence", _name(kind), [inside(v) for v in value]]
        if kind.__module__ in ("numpy", "array") and hasattr(value, "tobytes"):
            shown = str(getattr(value, "shape", None)), str(getattr(value, "dtype", ""))
            return ["array", _name(kind), *shown, hashlib.sha256(value.tobytes()).hexdigest()]
        if kind.__module__.startswith("fxcurv.") and is_dataclass(value):
            return ["fields", _name(kind), [[f.name, inside(getattr(value, f.name))] for f in fields(value)]]
        if is_plain(value) and not isinstance(value, CONTAINERS) and kind.__module__ != "builtins":  # an iterator, say
            members = [[name, inside(v)] for name, v in sorted(members_of(value).items())]
            return ["object", inside(kind, True), members]
        raise NotPortable(f"a {kind.__name__} is compared by identity")

    def _describe_tensor(self, t: Tensor) -> Any:
        if id(t) in self._own:
            return ["own", self._own[id(t)]]
        self.seen.add(id(t))
        if type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided or t.numel() > ENTRIES:
            raise NotPortable("a tensor of this kind, or size, is compared by identity")
        flat = t.detach().cpu().contiguous().view(-1).view(torch.uint8) if t.numel() else torch.empty(0)
        return ["tensor", str(t.dtype), str(tuple(t.shape)), str(t.device), _digest(bytes(flat.tolist()))]


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _describe_builtin(value: Any) -> Any:
    """Describe a function in C by its name, if it is Python's, PyTorch's or NumPy's."""
    holder = value.__self__
    if holder is not None and not isinstance(holder, types.ModuleType | type):
        raise NotPortable("a method in C is compared by identity")
    name = getattr(holder, "__name__", None) or value.__module__ or ""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is not None and holds_state(file):
        raise NotPortable(f"the code of {name}.{value.__name__} is in C")
    return ["builtin", name, value.__qualname__]


# ---- what code is ------------------------------


def code_of(function: Any) -> str:
    """`_code_digest` of a function or method; for anything without code, the name of its type."""
    while hasattr(function, "__func__") or isinstance(function, functools.partial):
        function = getattr(function, "__func__", None) or function.func
    return _code_digest(function) if hasattr(function, "__code__") else type(function).__qualname__


def _code_digest(function: Any) -> str:
    """A digest of a function's code and of the functions in it, whatever line of the file they stand on."""
    return _digest(repr(_code_content(function.__code__)).encode())


def _code_content(code: types.CodeType) -> tuple:
    named = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    return (code.co_name, code.co_code, code.co_exceptiontable, named, counts, tuple(map(_constant, code.co_consts)))


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _code_content(value)
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    if isinstance(value, frozenset):
        return "frozenset", sorted(repr(_constant(v)) for v in value)
    return type(value).__name__, repr(value)


def _files(names: Iterable[str]) -> list[str]:
    """The files of these Python modules, and of all imported modules that are not installed packages.

    A trace may read values by other ways than globals and attributes (an import in a function, a class' attribute by
    `type(self)`, a registry). These are not noted, but they come from one of these files.
    """
    found = {vars(m).get("__file__"): name for name, m in list(sys.modules.items()) if isinstance(m, types.ModuleType)}
    return sorted(f for f, name in found.items() if isinstance(f, str) and (name in names or is_own_file(f)))


def _file_digest(path: str) -> str:
    """A digest of a file; "" if there is none."""
    try:
        with open(path, "rb") as f:
            return _digest(f.read())
    except OSError:
        return ""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
