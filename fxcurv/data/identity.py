"""What a pass over data is of, in texts that are equal in another process: so a state of another pass is refused.

Numbers depend on the model's structure and code, the loss, the options of `compile` and the extensions. (Parameters and
buffers have digests of their own, and batches marks.) A function is told by its code and by what it reads by name:
closures, defaults, globals, members of the object whose method it is. What it does not name does not count, such as a
trainer's counters. An installed library's functions are told by their names, its modules by their public attributes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.api import Compiled
from fxcurv.data.together import local
from fxcurv.front.members import with_inner
from fxcurv.front.portable import code_of
from fxcurv.front.python_state import MAPPINGS, SCALARS, SEQUENCES, holds_state, is_users, members_of
from fxcurv.front.reads import content
from fxcurv.ir.private import own_forward_hooks

# How many objects, and how deep, are told of one value.
OBJECTS, DEPTH = 20_000, 60
OPTIONS = ("batch_dim", "split", "rules", "loss_params", "sample", "sample_index")
_STANDARD = set(vars(nn.Module()))
_WHOLE = (Tensor, types.FunctionType, type)  # of which all is told, whatever code names


def identity(compiled: Compiled) -> dict[str, str]:
    """What its quantities of a batch depend on, besides the batch, parameters and buffers of the model, and the seed."""
    subject = compiled.subject
    known = {id(m): k for k, m in enumerate(subject.modules())}
    found = {"extensions": ", ".join(map(repr_of, compiled.extensions)), "params": ", ".join(compiled.covered()[0])}
    found |= {name: told(getattr(compiled.options, name), known) for name in OPTIONS}
    found["argument of an extension"] = told([[type(e).__qualname__, vars(e)] for e in compiled.extensions], known)
    found["loss"] = told(compiled.loss, known)
    for whose, root in zip(("model", "loss module"), subject.roots(), strict=False):
        for name, m in root.named_modules(remove_duplicate=False):
            found[f"module '{name}'" if name else whose] = _digest(_Telling(known).of_module(m))
    return found


def repr_of(extension: Any) -> str:
    """An extension with its plain arguments."""
    said = [f"{k}={v!r}" for k, v in vars(extension).items() if k != "savefield" and type(v) in SCALARS]
    return f"{type(extension).__name__}({', '.join(said)})"


def differences(theirs: dict[str, str], mine: dict[str, str]) -> str:
    """What differs between two identities, in words; empty if nothing does."""
    names = [n for n in {**theirs, **mine} if theirs.get(n) != mine.get(n)]
    short = [n for n in names if len(theirs.get(n, "")) < 60 and len(mine.get(n, "")) < 60]
    said = [f"{n}={theirs.get(n, '')}, not {mine.get(n, '')}" if n in short else f"another {n}" for n in names]
    return "; ".join(said[:3])


def told(value: Any, known: dict[int, int] | None = None) -> str:
    """A digest of any value.

    Args:
        known: the numbers of modules that are told elsewhere, by id.
    """
    return _digest(_Telling(known or {})(value))


def digests(subject: Any) -> dict[str, str]:
    """A digest of each parameter and buffer of the model, and of a loss that is a module, by name."""
    named = [
        (f"{prefix}{name}", t)
        for prefix, root in zip(("", "loss."), subject.roots(), strict=False)
        for name, t in (*root.named_parameters(), *root.named_buffers())
    ]
    return {name: digest(t) for name, t in named}


def digest(t: Tensor) -> str:
    """Equal for equal numbers."""
    data = local(t.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _digest(said: Any) -> str:
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


class _Telling:
    """Tells a value in nested lists of texts; what it does not know, by its type."""

    def __init__(self, known: dict[int, int]):
        self._known = known
        self._seen: dict[Any, int] = {}
        self._held: list[Any] = []  # keeps objects alive, so that no id is given twice
        self._depth = 0

    def __call__(self, value: Any, names: frozenset[str] | None = None) -> Any:
        """The description; of a user's object, the members with these names, or all."""
        if type(value) in SCALARS:
            return [type(value).__name__, repr(value)]
        if id(value) in self._known:
            return ["module", self._known[id(value)]]
        key = id(value), None if isinstance(value, _WHOLE) else names
        if key in self._seen:
            return ["again", self._seen[key]]
        if self._depth > DEPTH or len(self._seen) > OBJECTS:
            return ["more"]
        self._seen[key] = len(self._seen)
        self._held.append(value)
        self._depth += 1
        try:
            return [type(value).__qualname__, *self._parts(value, names)]
        finally:
            self._depth -= 1

    def _parts(self, value: Any, names: frozenset[str] | None) -> Iterator[Any]:
        if isinstance(value, Tensor):
            yield from (str(value.dtype), str(tuple(value.shape)), digest(value))
        elif isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, types.MethodType):
            yield from self._function(value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            yield [self(part, names) for part in (value.func, value.args, value.keywords)]
        elif isinstance(value, type | types.BuiltinFunctionType):
            yield f"{value.__module__}.{value.__qualname__}"
            code = vars(value).values() if _is_own(value) else ()
            yield [code_of(v) for v in code if isinstance(v, types.FunctionType)]
        elif type(value).__module__ == "torch._ops":
            yield str(value)
        elif isinstance(value, nn.Module):
            yield self.of_module(value)
            yield [[name, digest(t)] for name, t in (*value.named_parameters(), *value.named_buffers())]
            yield [[name, self(m)] for name, m in value.named_children()]
        elif isinstance(value, types.ModuleType):
            yield self._members(value, names) if holds_state(getattr(value, "__file__", None) or "") else value.__name__
        elif isinstance(value, MAPPINGS) or isinstance(value, Mapping) and type(value).__module__.startswith("fxcurv."):
            yield [[self(k), self(v, names)] for k, v in value.items()]
        elif isinstance(value, SEQUENCES):
            yield [self(v, names) for v in value]
        elif isinstance(value, set | frozenset):
            yield sorted(json.dumps(self(v, names)) for v in value)
        elif type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            yield from (str(value.dtype), str(value.shape), hashlib.sha256(value.tobytes()).hexdigest())
        elif is_users(type(value)) or type(value).__module__.startswith("fxcurv."):
            yield [*self._function(type(value).__call__, value)] if callable(value) else []
            yield self._members(value, names)

    def _function(self, function: Any, owner: Any = None) -> Iterator[Any]:
        """Tell a function, and what it reads by name; `owner`: the object whose method it is."""
        code = getattr(function, "__code__", None)
        yield f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
        if code is None or not _is_users_file(code.co_filename):
            return
        names = frozenset(name for inner in with_inner(code) for name in inner.co_names)
        read = {name: v for name, v in sorted(function.__globals__.items()) if name in names}
        cells = [content(c) for c in function.__closure__ or ()]
        yield code_of(function)
        yield [self(part, names) for part in (function.__defaults__, function.__kwdefaults__, cells, read)]
        yield self._members(owner, names) if owner is not None else []

    def _members(self, value: Any, names: frozenset[str] | None) -> list[Any]:
        """Tell the members of an object, its methods and properties too if they are named."""
        held = {k: v for k, v in members_of(value).items() if (names is None or k in names) and k not in _STANDARD}
        found = [[k, self(v, names)] for k, v in sorted(held.items())]
        for k, v in [
            (k, v) for c in type(value).__mro__ if _is_own(c) for k, v in vars(c).items() if k in (names or ())
        ]:
            function = getattr(v, "fget", None) or getattr(v, "__func__", v)
            if not isinstance(function, types.FunctionType):
                found.append([k, self(v, names)])
            elif (id(value), function) not in self._seen:
                self._seen[id(value), function] = len(self._seen)
                found.append([k, *self._function(function, value)])
        return found

    def of_module(self, m: nn.Module) -> list[Any]:
        """Tell one module without its children, parameters and buffers."""
        kind = f"{type(m).__module__}.{type(m).__qualname__}"
        hooks = [self(list(table.values())) for table in own_forward_hooks(m)]
        forward = getattr(m.forward, "__func__", m.forward)
        code = [*self._function(forward, m)]
        told = (
            {} if _is_own(type(m)) else {k: v for k, v in sorted(vars(m).items()) if k[0] != "_" and k not in _STANDARD}
        )
        plain = [[k, self(v)] for k, v in told.items() if not isinstance(v, Tensor)]  # a pass leaves tensors there
        return [kind, m.training, code, plain, hooks]


def _is_users_file(path: str) -> bool:
    """Whether code is the user's; that of a prompt, a notebook or a graph module has no file."""
    return holds_state(path) or path.startswith("<") and not path.startswith("<frozen")


def _is_own(kind: Any) -> bool:
    """Whether a class is the user's."""
    return isinstance(kind, type) and kind.__module__ != "builtins" and is_users(kind)
