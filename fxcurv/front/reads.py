"""Python values that a trace reads, found while it runs: `python_state` compares them at every call.

Attributes of modules (PyTorch's own too: a dropout's `p`) are recorded as they are read. Globals, closures and default
arguments of the functions that ran, and attributes of plain objects whose methods ran, are found in their code. A read
is followed through attributes and constant subscripts (`self.config.scale`, `self.weights["kl"]`) as far as the code
goes; an object that is passed on counts with all of its members. A module that runs and is no part of the model or loss
counts with its mode, parts, hooks and tensors; of a class, what code that asks for it names. A number that a forward
pass both reads and changes, other than by counting it up, is refused by name.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import gc
import importlib
import inspect
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.errors import CaptureError
from fxcurv.front.left_behind import LeftBehind
from fxcurv.front.members import counting_step, follow, instructions_of, with_inner
from fxcurv.front.python_state import (
    CONTAINERS,
    ENVIRONMENT,
    MISSING,
    SCALARS,
    Effect,
    Path,
    Recomputed,
    State,
    as_tensor,
    frozen,
    holds_state,
    is_notes,
    is_plain,
    is_users,
)
from fxcurv.front.reparametrized import computed_by_hooks
from fxcurv.front.schedules import Number
from fxcurv.front.side_effects import hook_of
from fxcurv.front.watched import Watched
from fxcurv.ir.origin import is_ours
from fxcurv.rules.custom import backwards

_LAYERS = os.path.dirname(nn.__file__)
# attributes that PyTorch reads of every module; a recurrent layer's `_flat_weights` are its parameters again
_STANDARD = {*vars(nn.Module()), *(n for n, v in vars(nn.Module).items() if not callable(v)), "_flat_weights"}
# by these, code may read any attribute
_SPELLED_OUT = ("__dict__", "__class__")
# the first entries of keys that say how a place is compared
_BY_KEY = ("identity", "module")
# A mode that watches or changes ops (a profiler, a FLOP counter) is no part of the model.
_OF_MODES = {"__torch_dispatch__", "__torch_function__"}
_METHODS = (types.FunctionType, classmethod, staticmethod, property)
# Runs where a module is imported for the first time.
_IMPORT = importlib._bootstrap._find_and_load.__code__  # type: ignore[attr-defined]
# Makes the new object in `copy.copy` and `copy.deepcopy`.
_NEW_COPY = copyreg.__newobj__.__code__  # type: ignore[attr-defined]


class Reads:
    """Records the Python values that are read while it is entered."""

    def __init__(self, model: nn.Module, loss: Any, promoted: Sequence[Path] = ()):
        self.modules = all_modules(model, loss)
        self.promoted = tuple(promoted)
        self._index = {id(m): k for k, m in reversed(list(enumerate(self.modules)))}
        self._dicts = {id(vars(m)) for m in self.modules}  # export makes stand-ins for a module, with its attributes
        self._outside: dict[int, nn.Module] = {}
        self._titles = _titles(model, loss)
        self._paths: dict[tuple, Path] = {}
        self._first: dict[tuple, Any] = {}
        self._counted: dict[tuple[int, str], tuple[Any, Any]] = {}
        self._written: dict[tuple[int, str], nn.Module] = {}
        self._born: dict[int, Any] = {}
        self._codes: dict[int, tuple[types.CodeType, list]] = {}
        self._closures: dict[weakref.ref[types.FunctionType], None] = {}  # in the order of the calls
        self._running: list[types.FrameType] = []
        self._absent: list[Path] = []  # what was not there, unless a `__getattr__` of the module's found it elsewhere
        self._inner: set[int] = set()  # code of functions that this trace makes, whose closures are its own
        self._before: dict[int, Any] = {}  # what containers in closures were equal to before their function ran
        self._ran: list[tuple[types.CodeType, dict[str, Any]]] = []
        self._looked: set[tuple[int, type]] = set()
        self._custom = self._importing = False
        self._changed: list[Path] = []
        self._effects: list[Effect] = []
        self.left = LeftBehind(self.modules)
        self.left.function(loss)
        self.of_code(loss)

    # -- floats that are inputs --

    def tensors(self, device: torch.device) -> list[Tensor]:
        """The present values of the floats that become inputs."""
        return [as_tensor(path.get(self.modules), device) for path in self.promoted]

    @contextlib.contextmanager
    def numbers(self, tensors: Sequence[Tensor]):
        """Put a `Number` in place of each."""
        before = [path.get(self.modules) for path in self.promoted]
        try:
            for path, tensor in zip(self.promoted, tensors, strict=True):
                path.set(self.modules, Number(tensor))
            yield
        finally:
            for path, value in zip(self.promoted, before, strict=True):
                path.set(self.modules, value)

    # -- recording --

    def born(self, objects: Iterable[Any]) -> None:
        """Note objects that were made for this trace: no program depends on them."""
        self._born |= {id(new): new for new in objects}

    def __enter__(self) -> Reads:
        thread = threading.get_ident()  # reads of other threads are not recorded

        def read(module: nn.Module, name: str) -> Any:
            own = threading.get_ident() == thread
            if own and id(module) not in self._index and name[:2] != "__":
                self._note_outside(module, sys._getframe(1).f_code)
            try:
                value = object.__getattribute__(module, name)
            except AttributeError:
                if own and not _is_standard(name):
                    self._record_attribute(module, name, MISSING, sys._getframe(1))
                raise
            if own and (name in _SPELLED_OUT or not _is_standard(name)):
                self._record_attribute(module, name, value, sys._getframe(1))
            return value

        original = self._setattr = nn.Module.__setattr__

        def write(module: nn.Module, name: str, value: Any) -> None:
            own = threading.get_ident() == thread
            if own and not _is_standard(name) and not isinstance(value, nn.Parameter | nn.Module):
                self._written.setdefault((id(module), name), module)
            original(module, name, value)

        self._watched = Watched(self._on_call)
        self._trace = self._watched.before
        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        nn.Module.__setattr__ = write  # type: ignore[method-assign]
        self._watched.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._watched.__exit__(*error)
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = self._setattr  # type: ignore[method-assign]
        if error[0] is None:
            self._record_outside()
            self._record_closures()
            for path in [p for p in self._absent if p.get(self.modules) is MISSING]:
                self.add(path, MISSING)
            self.later(backwards())
            self._sort_writes()
        self._codes, self._closures, self._running, self._before, self._born = {}, {}, [], {}, {}
        self._inner = set()

    def later(self, functions: Iterable[Callable]) -> None:
        """Record what functions will read that no trace of the model runs: backwards, when their rules are traced."""
        for function in functions:
            self._custom = True
            self._record_function(function)

    def _on_call(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        """Trace function: record what a called function reads, then call the debugger's or the coverage tool's."""
        code = frame.f_code
        if self._importing:
            return self._trace(frame, event, arg) if self._trace is not None else None  # type: ignore[arg-type]
        if code is _IMPORT:
            self._importing, frame.f_trace_lines = True, False
            return self._on_import
        self.left.random.on_call(frame)
        new_code = id(code) not in self._codes
        if new_code:
            watched = holds_state(code.co_filename) and code.co_name not in _OF_MODES
            self._codes[id(code)] = (code, instructions_of(code) if watched else [])
            self._inner |= {id(inner) for inner in with_inner(code)} - {id(code)} if watched else set()
            if self._codes[id(code)][1]:
                self._ran.append((code, frame.f_globals))
                self._record_globals(code, frame.f_globals)
        instructions = self._codes[id(code)][1]
        if new_code and instructions:
            self.left.code(code, frame.f_globals)
        if code is _NEW_COPY:
            return self._on_copy
        new = frame.f_locals.get(code.co_varnames[0]) if code.co_name == "__init__" and code.co_argcount else None
        if new is not None and (instructions or code.co_filename == "<string>" or issubclass(type(new), nn.Module)):
            self._born[id(new)] = new
        elif instructions and (code.co_freevars or code.co_argcount):
            self._record_frame(frame, instructions)
        return self._trace(frame, event, arg) if self._trace is not None else None  # type: ignore[arg-type]

    def _on_import(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        """Trace function of an import, in which a module's own code runs, once: what that reads is no program's."""
        self._importing = event != "return"
        return self._on_import

    def _on_copy(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        """Trace function of `copyreg.__newobj__`: note the copy that it returns, for which no `__init__` runs."""
        if event == "return" and arg is not None:
            self._born[id(arg)] = arg
        return self._on_copy

    def _record_frame(self, frame: types.FrameType, instructions: list) -> None:
        code, local = frame.f_code, frame.f_locals
        self._record_classes(code, local)
        if code.co_freevars:
            held = {name: local.get(name, MISSING) for name in code.co_freevars}
            self._find_closures()
            self._running.append(frame)
            for value in held.values() if id(code) not in self._inner else ():
                if isinstance(value, CONTAINERS) and id(value) not in self._before:
                    self._before[id(value)] = frozen(value, tensors=False)
        first = code.co_varnames[0] if code.co_argcount else ""
        value = local.get(first)
        method = hasattr(type(value), code.co_name) and is_plain(value) and id(value) not in self._born
        if not method:
            return
        self.left.of_object(code, value)
        for k, i in enumerate(instructions):
            names = i.argval if isinstance(i.argval, tuple) else (i.argval,)
            if i.opname.startswith("LOAD_FAST") and names[-1] == first:
                follow(self, Path(None, value, (), type(value).__name__), value, instructions, k + 1)

    def _record_classes(self, code: types.CodeType, local: dict[str, Any]) -> None:
        """Record what code may read of classes by `cls`, `type(...)` and `super()`: what has a name, or a text, in it."""
        values = [local[n] for n in (*code.co_varnames[: code.co_argcount], *code.co_freevars) if n in local]
        kinds = {v for v in values if isinstance(v, type)}
        if "type" in code.co_names:
            kinds |= {*map(type, values), *map(type, self.modules)}
        if "super" in code.co_names:
            kinds |= {c for v in values for c in type(v).__mro__}
        for kind in kinds:
            if (id(code), kind) in self._looked or not is_users(kind):
                continue
            self._looked.add((id(code), kind))
            for name in {*code.co_names, *(text for text in code.co_consts if isinstance(text, str))}:
                value = inspect.getattr_static(kind, name, MISSING) if name[:2] != "__" else MISSING
                if value is not MISSING and (isinstance(value, _METHODS) or not hasattr(type(value), "__get__")):
                    self.add(_class(kind).step("attr", name), getattr(kind, name))

    def _record_attribute(self, module: nn.Module, name: str, value: Any, frame: types.FrameType) -> None:
        code = frame.f_code
        instructions = self._codes[id(code)][1] if id(code) in self._codes else []
        machinery = id(module) not in self._index and not code.co_filename.startswith(_LAYERS) and not instructions
        if is_ours(code.co_filename) or id(module) in self._born or machinery:
            return
        if name in _SPELLED_OUT and not instructions:  # nn.Module's own code, say
            return
        path = self._path_of(module, name)
        at = next((k for k, i in enumerate(instructions) if i.offset >= frame.f_lasti), len(instructions))
        if name in _SPELLED_OUT:
            follow(self, path if name == "__dict__" else _class(value), value, instructions, at + 1)
            return
        step = counting_step(instructions, at, name)
        if (id(module), name) in self._written:  # a value of this very pass, unless the write counted up an older one
            self._changed += [path] if (id(module), name) in self._counted and isinstance(value, SCALARS) else []
            return
        if value is MISSING:
            known = any(name in module.__dict__.get(group, ()) for group in ("_parameters", "_buffers", "_modules"))
            if not known and name not in _STANDARD and name[:2] != "__":
                if type(module).__getattr__ is nn.Module.__getattr__:
                    self.add(path, MISSING)
                else:
                    self._absent.append(path)
            return
        own = name in module.__dict__
        found = MISSING if own else next((vars(c)[name] for c in type(module).__mro__ if name in vars(c)), MISSING)
        if isinstance(found, types.FunctionType):
            # by the place on the module, which may get a method of its own
            if name == "forward" or holds_state(found.__code__.co_filename):
                self.add(path.step("attr", "__func__"), found)
                self.of_code(found)
            return
        if found is not MISSING and hasattr(type(found), "__get__"):
            return  # what a property reads is recorded when it runs
        if step is not None and own:
            self._counted[(id(module), name)] = step
            return
        follow(self, path, value, instructions, at + 1)

    def _note_outside(self, module: nn.Module, code: types.CodeType) -> None:
        """Note a module that runs, or that the user's code reads, and that is no part of the model or loss."""
        known = id(vars(module)) in self._dicts or id(module) in self._born or type(module) is nn.Module
        if not known and (code.co_filename.startswith(_LAYERS) or self._codes.get(id(code), (code, []))[1]):
            self._outside[id(module)] = module

    def _record_outside(self) -> None:
        """Record the parts, hooks, mode and tensors of the modules outside of the model and the loss."""
        for module in self._outside.values():
            path = Path(None, module, (("attr", "__dict__"),), f"a {type(module).__name__} outside of the model")
            self._paths["module", *path.key] = path
            for group in ("_parameters", "_buffers"):
                for name in [name for name, t in getattr(module, group).items() if t is not None]:
                    steps = ("attr", group), ("item", name)  # its attribute takes ten times as long
                    path = replace(self._path_of(module, name), steps=steps)
                    self._paths[path.key] = path

    def _path_of(self, module: nn.Module, name: str) -> Path:
        k = self._index.get(id(module))
        if k is None:
            return Path(None, module, (("attr", name),), f"'{name}' of a {type(module).__name__}")
        return Path(k, module, (("attr", name),), f"'{name}' of {self._titles[id(module)]}")

    def _record_globals(self, code: types.CodeType, held: dict[str, Any]) -> None:
        instructions = self._codes[id(code)][1]
        for k, i in enumerate(instructions):
            if i.opname in ("LOAD_GLOBAL", "LOAD_NAME") and i.argval in held:
                path = Path(None, held, (("item", i.argval),), f"the global '{i.argval}'")
                follow(self, path, held[i.argval], instructions, k + 1)

    def of_code(self, value: Any) -> None:
        """Record a function's default arguments, also behind bound methods and partials, and a partial's keywords."""
        while isinstance(value, types.MethodType):
            value = value.__func__
        if isinstance(value, functools.partial):
            self.add(Path(None, value, (("attr", "keywords"),), "the keywords of a partial"), value.keywords)
            self.of_code(value.func)
        elif isinstance(value, types.FunctionType) and holds_state(value.__code__.co_filename):
            for name in ("__defaults__", "__kwdefaults__"):
                if getattr(value, name) is not None:
                    title = f"the default arguments of {value.__name__}"
                    self.add(Path(None, value, (("attr", name),), title), getattr(value, name))
            if hasattr(value, "__wrapped__"):
                self.of_code(value.__wrapped__)

    def _find_closures(self) -> None:
        """Note the functions of the frames that have ended, and let go of those: made in the forward pass, they end too."""
        found = [(frame, function_of(frame)) for frame in self._running]
        self._closures |= {weakref.ref(function): None for _, function in found if function is not None}
        self._running = [frame for frame, function in found if function is None]

    def _record_closures(self) -> None:
        """Record what the functions that ran read of their closures."""
        self._find_closures()
        living = [function for ref in self._closures if (function := ref()) is not None]
        for function in (*living, *self._of_generators()):
            cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
            self.of_code(function)
            for code in with_inner(function.__code__):  # a function made in it may have read them, and be gone
                self._record_cells(cells, function.__qualname__, self._codes.get(id(code), (code, []))[1])

    def _of_generators(self) -> list[types.FunctionType]:
        """The functions of generators that are still at work, which hide theirs: whatever has the code of one.

        Raises:
            CaptureError: if the collector does not see it.
        """
        codes = {id(frame.f_code): frame.f_code for frame in self._running}
        referring = gc.get_referrers(*codes.values()) if codes else []
        found = [f for f in referring if isinstance(f, types.FunctionType)]
        for code in codes.values():
            if all(f.__code__ is not code for f in found):
                raise CaptureError(
                    f"the model or loss takes values from a generator of {code.co_qualname}, which reads its closure, and "
                    "which gc.freeze() has hidden.\nWay out: call gc.unfreeze() before compiling, or pass the generator what it "
                    "needs as arguments."
                )
        return found

    def _record_function(self, function: Any) -> None:
        """Record what a function that has not run yet will read, and what the functions that it names will."""
        code = getattr(function, "__code__", None)
        if code is None or id(code) in self._codes or not holds_state(code.co_filename):
            return
        instructions = instructions_of(code)
        self._codes[id(code)] = code, instructions
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        self._record_globals(code, function.__globals__)
        self._record_cells(cells, function.__qualname__, instructions)
        self.of_code(function)
        for value in (*map(function.__globals__.get, code.co_names), *map(content, cells.values())):
            if isinstance(value, types.FunctionType):
                self._record_function(value)

    def _record_cells(self, cells: dict[str, Any], where: str, instructions: list) -> None:
        for k, i in enumerate(instructions):
            names = i.argval if isinstance(i.argval, tuple) else (i.argval,)
            if "DEREF" in i.opname and "LOAD" in i.opname and names[-1] in cells:
                cell = cells[names[-1]]
                path = Path(None, cell, (("attr", "cell_contents"),), f"'{names[-1]}' in {where}")
                follow(self, path, content(cell), instructions, k + 1)

    def is_new(self, value: Any) -> bool:
        """Whether a value was made in this trace: no program depends on it."""
        return id(value) in self._born

    def add_by_identity(self, path: Path) -> None:
        """Note a place that must hold the same object at every call."""
        if path.steps:
            self._paths.setdefault(("identity", *path.key), path)

    def add(self, path: Path, value: Any) -> None:
        """Note a place that must hold an equal value at every call."""
        if path is ENVIRONMENT:
            self._paths[path.key] = path
            return
        if isinstance(value, Number) or not path.steps or path.key in self._paths:
            return
        self._paths[path.key] = path
        self._first[path.key] = self._before.get(id(value)) or frozen(value, tensors=False)

    # -- what the trace changed --

    def tensors_written(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """(module, name, tensor) of the attributes of the model that the forward pass has set, and did not read before."""
        for (_, name), module in self._written.items():
            value = _own_attribute(module, name)
            read_before = self._path_of(module, name).key in self._paths
            own = id(module) in self._index and name not in computed_by_hooks(module)
            if isinstance(value, Tensor) and own and not read_before:
                yield module, name, value

    def _sort_writes(self) -> None:
        """Sort the attributes that the forward pass wrote: a call counts them up or sets them, or they are refused."""
        kept = {id(m) for (_, name), m in self._written.items() if not isinstance(_own_attribute(m, name), SCALARS)}
        for (_, name), module in self._written.items():
            path, now = self._path_of(module, name), _own_attribute(module, name)
            if isinstance(now, Number):
                self._changed.append(path)
            if name in computed_by_hooks(module):
                self._effects.append(Recomputed(path, None))
            elif (id(module), name) in self._counted and path.key not in self._paths:
                value, count = self._counted[(id(module), name)]
                self._effects.append(Effect(path, value, count))
            elif path.key not in self._paths:
                self._effects += [Effect(path, now)] if isinstance(now, SCALARS) else []
            elif id(module) not in kept and frozen(now, False) != self._first[path.key]:
                self._changed.append(path)
        for key, path in list(self._paths.items()):
            written = _is_attribute(path) and (id(path.root), path.steps[0][1]) in self._written
            now = frozen(path.get(self.modules), False) if key in self._first and not written else None
            if now is None or now == self._first[key]:
                continue
            if is_notes(path, self._first[key], now):
                del self._paths[key]
            else:
                self._changed.append(path)

    def check(self) -> None:
        """Refuse what no program could keep.

        Raises:
            CaptureError: if the forward pass changes a value that it reads.
        """
        if self._changed:
            first = self._changed[0]
            hook = hook_of(first.owner(self.modules), self.modules) or hook_of(first.root, self.modules)
            out = f"remove {hook} while fxcurv runs; or " if hook else ""
            error = CaptureError(
                f"{hook or 'the model or loss'} reads {first.title} and changes it: its next value would depend on how often the "
                f"forward pass ran, which a program does not repeat.\nWay out: {out}change it outside of the forward pass, "
                "before or after each call (a new value is seen), or keep it in a buffer (a tensor). What only counts "
                "(`self.calls += 1`) is done at every call."
            )
            error.changed = True  # type: ignore[attr-defined]
            raise error

    # -- the outcome --

    def state(self, constants: dict[str, Tensor], own: Iterable[Tensor]) -> State:
        """The values that the program depends on, as they are now.

        Args:
            constants: of the program; one that a single place holds is read from there at every call.
            own: parameters and buffers, which are inputs anyway.
        """
        # a parameter outside of the model is a constant as a tensor of its own, in the same memory
        names = {key: name for name, t in constants.items() for key in (id(t), _layout(t))}
        known = {id(t) for t in own}
        state = State(numbers=self.promoted, effects=self._effects, ran=self._ran, custom=self._custom)
        inputs = {path.key for path in self.promoted}
        places: dict[str, list[Path]] = {}
        state.leaves += [(path, "number") for path in self.promoted]
        for key, path in self._paths.items():
            if path.key in inputs:
                continue
            value = path.get(self.modules)
            if value is MISSING:
                state.leaves += [(Absent(path.module, path.root, path.steps, path.title), "scalar")]
            elif id(value) in known and (isinstance(value, nn.Parameter) or id(value) not in names):
                state.leaves.append((path, "identity"))
            elif (found := names.get(_layout(value) if isinstance(value, nn.Parameter) else id(value))) is not None:
                places.setdefault(found, []).append(path)
            else:
                state.leaves.append((path, key[0] if key[0] in _BY_KEY else _comparison_for(path, value)))
        for name, paths in places.items():
            if len(paths) == 1:
                state.sources[name] = paths[0]
            state.leaves += [(path, "tensor" if len(paths) == 1 else "identity") for path in paths]
        # by the modules' index alone: a program that held its model would keep it alive
        state.leaves = [(_by_index(path), how) for path, how in state.leaves]
        state.sources = {name: _by_index(path) for name, path in state.sources.items()}
        state.effects = [replace(e, path=_by_index(e.path)) for e in state.effects]
        state.numbers = type(state.numbers)(map(_by_index, state.numbers))
        return state.freeze(self.modules)


def _by_index(path: Path) -> Path:
    """The same place, without its root if the module's index identifies it."""
    return path if path.module is None else replace(path, root=None)


def _layout(t: Tensor) -> Any:
    """Where the entries of a tensor are in memory."""
    if type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided or not t.numel():
        return id(t)
    return t.data_ptr(), t.shape, t.stride(), t.dtype


class Absent(Path):
    """A place that held nothing."""

    def source(self, objects: list[Any]) -> str:
        """An expression that gives `MISSING` while the place holds nothing."""
        objects.append(functools.partial(Path.get, Path(self.module, self.root, self.steps)))
        return f"o[{len(objects) - 1}](m)"


def _comparison_for(path: Path, value: Any) -> str:
    if type(value) in SCALARS:
        return "scalar"
    if path is ENVIRONMENT:
        return "table"
    if isinstance(value, tuple) and type(path.root).__module__.startswith("torch."):
        return "scalar"  # a stride or a padding: integers
    if isinstance(value, Tensor):
        return "state"
    if isinstance(value, nn.Module | types.FunctionType | type | types.BuiltinFunctionType | types.CodeType):
        return "identity"
    return "frozen"


def _class(kind: type) -> Path:
    return Path(None, kind, (), f"the class {kind.__name__}")


def _is_attribute(path: Path) -> bool:
    """Whether a place is an attribute of a module."""
    return isinstance(path.root, nn.Module) and len(path.steps) == 1


def _is_standard(name: str) -> bool:
    """Whether an attribute is PyTorch's own: every module's, or one that export lifts a tensor into."""
    return name in _STANDARD or name.startswith(("__", "_param_constant", "_tensor_constant"))


def _own_attribute(module: nn.Module, name: str) -> Any:
    return module.__dict__.get(name, MISSING)


def function_of(frame: types.FrameType) -> types.FunctionType | None:
    """The function that a frame ran, which is the frame's own once it has ended, and is the first that it refers to."""
    functions = (f for f in gc.get_referents(frame) if isinstance(f, types.FunctionType) and f.__code__ is frame.f_code)
    return next(functions, None)


def content(cell: Any) -> Any:
    """What a cell of a closure holds; it may be empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def all_modules(model: nn.Module, loss: Any) -> list[nn.Module]:
    """The modules of the model, then those of a loss that is one."""
    return [*model.modules(), *(loss.modules() if isinstance(loss, nn.Module) else ())]


def _titles(model: nn.Module, loss: Any) -> dict[int, str]:
    parts = [(model, "the model"), *([(loss, "the loss")] if isinstance(loss, nn.Module) else [])]
    return {
        id(m): f"{title}'s '{name}'" if name else title for part, title in parts for name, m in part.named_modules()
    }
