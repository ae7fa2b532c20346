"""Tensors of a trace that the user's code left in Python: a value that is built at its first use, and kept.

`if self.table is None: self.table = torch.ones(3)` would leave a tensor without values, on which plain PyTorch fails.
What the code that runs reaches (globals, closures, default arguments, the object of a method, and the objects, dicts and
lists in those) is noted when it begins, put back when the trace ends, and refused by name. Attributes of the model's own
modules are `side_effects`'.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import gc
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from fxcurv.errors import CaptureError
from fxcurv.front.python_random import PythonRandom
from fxcurv.front.python_state import MISSING, SCALARS, holds_state, members_of
from fxcurv.front.side_effects import depends_on_call, forward_of, holds_traced, refill
from fxcurv.ir.origin import is_user_file, line_number, line_of

# how deep objects are looked into, the members of the largest that is, and the most that are noted in a trace
_DEEPEST, _LONGEST, _MOST = 3, 1000, 20_000
# of PyTorch's parts that keep what they need of a trace themselves
_INNER = ("torch._", "torch.fx", "torch.utils", "torch.autograd", "torch.nn.modules", "builtins", "logging", "fxcurv")
_LOADS, _STORES = ("LOAD_GLOBAL", "LOAD_NAME"), ("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF", "STORE_NAME")
_CACHED = type(functools.lru_cache(lambda: None))


class LeftBehind:
    """Notes what a trace may write to, and puts it back.

    Attributes:
        found: (what held a tensor of the trace, for a message; whether that depends on parameters or samples), once `restore`
            has run.
        random: notes which random numbers are drawn.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.found: list[tuple[str, bool]] = []
        self._known = {id(m): m for m in modules}
        self._places: list[tuple[str, types.CodeType, Any, Any]] = []
        self._cached: list[Any] = []
        self.random = PythonRandom()
        self._codes: dict[int, types.CodeType] = {}
        for m in list(self._known.values()):
            self._note(
                f"the class {type(m).__name__}", getattr(forward_of(type(m)), "__code__", None), type(m), _DEEPEST
            )

    # -- noting --

    def code(self, code: types.CodeType, held: dict[str, Any]) -> None:
        """Note the globals that a function's code names, before it runs for the first time."""
        self._codes[id(code)] = code
        self._note_globals(code, held)

    def of_object(self, code: types.CodeType, value: Any) -> None:
        """Note the object whose method is about to run."""
        self._note(f"a {type(value).__name__}", code, value, _DEEPEST)

    def function(self, fn: Any) -> None:
        """Note what a loss that is a function, a method or a partial keeps."""
        inner = fn
        while isinstance(inner, functools.partial):
            inner = inner.func
        code = getattr(getattr(inner, "__func__", inner), "__code__", None)
        self._note("the loss", code, fn, _DEEPEST)

    def _note_globals(self, code: types.CodeType, held: dict[str, Any]) -> None:
        own: dict[str, Any] = {}
        for i in dis.get_instructions(code):
            if i.opname in _LOADS and i.argval in held:
                value = held[i.argval]
                if isinstance(value, types.ModuleType):
                    self._note_module(code, value)
                else:
                    self._note(f"the global '{i.argval}'", code, value, _DEEPEST)
            elif i.opname in ("STORE_GLOBAL", "STORE_NAME"):
                own[i.argval] = held.get(i.argval, MISSING)
        if own:
            self._places.append(("a global", code, held, own))

    def _note_module(self, code: types.CodeType, module: types.ModuleType) -> None:
        if not holds_state(getattr(module, "__file__", None) or "<string>"):
            return
        own = {name: vars(module)[name] for name in code.co_names if name in vars(module)}
        self._places.append((f"the module '{module.__name__}'", code, vars(module), own))
        for name, value in own.items():
            self._note(f"'{name}' of the module '{module.__name__}'", code, value, _DEEPEST)

    def _note(self, what: str, code: Any, value: Any, depth: int) -> None:
        """Note a value's members, and theirs."""
        if (
            isinstance(value, (Tensor, types.ModuleType, types.BuiltinFunctionType, *SCALARS))
            or id(value) in self._known
        ):
            return
        if len(self._known) > _MOST or depth < 0:
            return
        self._known[id(value)] = value  # held, so that no other gets its id
        if isinstance(value, _CACHED):
            self._cached.append(value)
            return
        if self.random.note(f"the random numbers of {what}", value, lambda: self._line(code, what, "")):
            return
        if isinstance(value, types.MethodType):
            self._note(what, code, value.__self__, depth)
            self._note(what, code, value.__func__, depth)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._note(what, code, part, depth)
        elif isinstance(value, types.FunctionType):
            if is_user_file(value.__code__.co_filename):
                self._note_function(what, code, value, depth)
        elif isinstance(value, tuple):
            self._note_all(what, code, value, depth)
        elif isinstance(value, dict | list | deque | set):
            if len(value) < _LONGEST:
                old = dict(value) if isinstance(value, dict) else list(value)
                self._places.append((what, code, value, old))
                self._note_all(what, code, old.values() if isinstance(old, dict) else old, depth - 1)
        elif not (value if isinstance(value, type) else type(value)).__module__.startswith(_INNER):
            self._note_object(what, code, value, depth)

    def _note_all(self, what: str, code: Any, values: Iterable[Any], depth: int) -> None:
        for value in list(values):
            self._note(what, code, value, depth)

    def _note_function(self, what: str, code: Any, fn: types.FunctionType, depth: int) -> None:
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            held = members(cell)
            self._places.append((f"'{name}' in {fn.__qualname__}", fn.__code__, cell, held))
            for value in held.values():
                self._note(f"'{name}' in {fn.__qualname__}", fn.__code__, value, depth)
        for kept in (vars(fn), fn.__kwdefaults__ or {}):
            self._note(what, code, kept, depth)
        self._note(f"the default arguments of {fn.__qualname__}", fn.__code__, fn.__defaults__, depth)

    def _note_object(self, what: str, code: Any, value: Any, depth: int) -> None:
        own = members(value)
        if not isinstance(value, type):
            self._note(f"the class {type(value).__name__}", code, type(value), depth)
        self._places.append((what, code, value, dict(own)))
        for name, member in own.items():
            if not name.startswith("__"):
                self._note(f"'{name}' of {what}" if depth == _DEEPEST else what, code, member, depth - 1)

    # -- the end --

    def restore(self) -> None:
        """Take the trace's tensors out of what was noted."""
        for what, code, owner, old in self._places:
            for key, values in _put_back(owner, old):
                container = isinstance(owner, dict | list | deque | set) and what != "a global"
                text = f"{_named(what, owner, key)}\n{self._line(code, what, key, container)}"
                self.found.append((text, any(map(depends_on_call, values))))
        for cached in self._cached:
            if holds_traced(gc.get_referents(cached), 3):
                cached.cache_clear()  # which only costs time: a cached function gives the same again
        self.random.restore()

    def check(self, error: BaseException | None = None) -> None:
        """Refuse what was found.

        Args:
            error: why the trace failed, where a tensor that was built at its first use may be the reason.

        Raises:
            CaptureError: names the first.
        """
        if error is None:
            self.random.check(self._codes.values())
        built = [text for text, depends in self.found if not depends]
        if built:
            raise CaptureError(
                f"the model or loss builds a value at its first use, and keeps it in Python: {built[0]}"
                "While fxcurv captures a program, that is a tensor without values, so it was taken out again.\n"
                "Way out: build it before the first call, as by running the model and the loss once without fxcurv; or keep it "
                "as a buffer of the model."
            ) from error
        if self.found and error is None:
            raise CaptureError(
                f"the model or loss keeps a tensor of the call in Python, a side effect that a compiled program does not repeat: "
                f"{self.found[0][0]}Way out: return it as an output of the model (result.output has it), or compute it from the "
                "result after the call."
            )

    def _line(self, code: types.CodeType | None, what: str, key: Any, container: bool = False) -> str:
        """The line that writes, or else reads, a member `key` of `what`, for all that can be told from the code."""
        name = what.split("'")[1] if "'" in what else ""
        tests: list[Callable[[dis.Instruction], bool]] = [
            lambda i: i.opname in _STORES and i.argval == key,
            lambda i: i.opname == "LOAD_ATTR" and i.argval == key,
        ]
        if container:
            tests = [lambda i: i.opname == "STORE_SUBSCR"] * (code is not None)
        tests += [lambda i: i.opname == "LOAD_ATTR" and i.argval == name, lambda i: i.argval == name]
        for test in tests:
            ran = [] if container and test is tests[0] else [*self._codes.values()]
            for c in ran if code is None else [*ran, code]:
                at = next(filter(test, dis.get_instructions(c)), None)
                if at is not None and is_user_file(c.co_filename):
                    return line_of(c.co_filename, line_number(c, at), c.co_name)
        return line_of(code.co_filename, code.co_firstlineno, code.co_name) if code is not None else ""


def _named(what: str, owner: Any, key: Any) -> str:
    """A place in words: 'the attribute 'w' of a Table'."""
    if key is MISSING or isinstance(owner, types.CellType):
        return what
    if isinstance(owner, dict):
        return f"the global '{key}'" if what == "a global" else f"{what}[{key!r}]"
    return f"the attribute '{key}' of {what}"


def members(owner: Any) -> dict[Any, Any]:
    """What an object, a class or a cell holds, by name."""
    if isinstance(owner, types.CellType):
        try:
            return {"cell_contents": owner.cell_contents}
        except ValueError:
            return {}
    if isinstance(owner, type):
        return {k: v for k, v in vars(owner).items() if not isinstance(v, types.MemberDescriptorType)}
    return members_of(owner)


def _put_back(owner: Any, old: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Put back the members that hold tensors of the trace; yields (name or `MISSING` for a list's, what it held)."""
    if isinstance(owner, list | deque | set):
        now = list(owner)
        if any(map(holds_traced, now)) and [*map(id, now)] != [*map(id, old)]:
            refill(owner, old)
            yield MISSING, [v for v in now if holds_traced(v)]
        return
    found = dict(owner) if isinstance(owner, dict) else members(owner)
    if isinstance(owner, dict) and "__builtins__" in owner:  # the globals of a module, of which some names were noted
        found = {key: found.get(key) for key in old}
    for key, value in found.items():
        before = old.get(key, MISSING)
        if value is before or not holds_traced(value):
            continue
        with contextlib.suppress(AttributeError, TypeError):
            _write(owner, key, before)
        yield key, [value]


def _write(owner: Any, key: Any, value: Any) -> None:
    if isinstance(owner, dict):
        owner.pop(key) if value is MISSING else owner.__setitem__(key, value)
        return
    kind = type if isinstance(owner, type) else object
    kind.__delattr__(owner, key) if value is MISSING else kind.__setattr__(owner, key, value)
