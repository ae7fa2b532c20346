"""Side effects of a forward pass: a program runs none of them, so those that a capture would lose are refused by name.

A hook that only changes or returns values is traced, as part of the model. Code that hands tensors to Python (an
attribute, a list that a hook or the forward itself appends to) would see one fake tensor and never run again. A program
depends on which hooks there are.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fxcurv.errors import CaptureError
from fxcurv.front.reparametrized import computed_by_hooks
from fxcurv.ir.origin import is_user_file, running_line
from fxcurv.ir.private import FakeTensor, FunctionalTensor, hooks_of_tensor, own_parameters, patched

_FORWARD = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
HOOKS = (*_FORWARD, *_BACKWARD)
_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, functools.partial)
_OWN = ("_parameters", "_buffers", "_modules", "_flat_weights", *HOOKS)

WAY_OUT = (
    "Way out: return the tensor as an output of the model (result.output has it), or remove the hook while fxcurv runs; a plain "
    "forward pass of the model still has the side effect."
)


def hooks_of(modules: Sequence[nn.Module]) -> tuple:
    """The hooks on all modules and their parameters, and the global ones, by numbers that PyTorch never gives twice."""
    every = [(k, m) for root in modules for k, m in enumerate(root.modules())]
    own = [(k, name, *hooks) for k, m in every for name in HOOKS if (hooks := getattr(m, name))]
    own += [
        (k, name, *hooks)
        for k, m in every
        for name, p in own_parameters(m).items()
        if p is not None and (hooks := hooks_of_tensor(p))
    ]
    return tuple(own), tuple(tuple(_global_hooks(name)) for name in _GLOBAL)


@contextlib.contextmanager
def no_side_effects(
    modules: Sequence[nn.Module],
) -> Iterator[Callable[[Callable[[Any], bool], dict[int, set[str]]], bool]]:
    """While a model is captured, refuse side effects that would be lost, and leave Python as it was.

    Yields a function to call at the end of a forward pass, because export puts attributes back before it returns: whether
    there were any. It is given what says of a traced tensor that it follows from this call's values, and the attributes that
    every call sets.

    Raises:
        CaptureError: for hooks of the backward pass, and where a tensor was handed to Python.
    """
    named = [(name, m) for root in modules for name, m in root.named_modules()]
    _check_backward(named)
    watched = [*_attributes(named), *_containers_of(_functions(named))]
    before: list[tuple[str, Any, Any]] = [
        (what, owner, dict(owner) if isinstance(owner, dict) else list(owner)) for what, owner in watched
    ]
    numbers = _numbers(named)
    set_by_calls = {id(vars(m)): set(names) for _, m in named if (names := computed_by_hooks(m))}
    changed: list[str] = []

    def look(traced: Callable[[Any], bool] = holds_traced) -> bool:
        changed.extend(
            _name_attribute(what, owner, traced)
            for what, owner, old in before
            if _leaks(owner, old, traced, set_by_calls.get(id(owner), ()))
        )
        return bool(changed)

    def at_the_end(follows: Callable[[Any], bool], kept: dict[int, set[str]]) -> bool:
        for owner, names in kept.items():
            set_by_calls.setdefault(owner, set()).update(names)
        found = look(lambda value: depends_on_call(value) or follows(value))
        for _, owner, old in before:  # export warns of an attribute that changed
            for name in set_by_calls.get(id(owner), ()):
                owner.pop(name, None)
                owner.update({name: old[name]} if name in old else {})
        return found

    with patched("torch.Tensor.register_hook", _no_tensor_hook):
        try:
            yield at_the_end
        except BaseException as error:
            look()
            _restore(before)
            if changed and "during export" in str(error):  # export refuses some of them, in words of its own
                raise _side_effect_error(changed[0]) from error
            raise
    look()
    changed += [what for (what, old), (_, new) in zip(numbers, _numbers(named), strict=False) if old != new]
    _restore(before)
    if changed:
        raise _side_effect_error(changed[0])


def _side_effect_error(what: str) -> CaptureError:
    return CaptureError(
        f"{what} changes in the forward pass, a side effect that a compiled program does not repeat.\n{WAY_OUT}"
    )


def is_pytorchs(hook: Any) -> bool:
    """Whether a hook is PyTorch's own, such as a FLOP counter's: it watches a model and is no part of it."""
    code = getattr(getattr(hook, "__func__", hook), "__code__", None)
    return code is not None and not is_user_file(code.co_filename)


def global_hooks() -> list[dict[int, Callable]]:
    """The global hooks, PyTorch's own too: a table per kind."""
    return [getattr(nn_module, kind) for kind in _GLOBAL]


def _global_hooks(kind: str) -> dict[int, Callable]:
    """The global hooks of one kind, without PyTorch's own."""
    return {key: hook for key, hook in getattr(nn_module, kind).items() if not is_pytorchs(hook)}


_register_hook = Tensor.register_hook


def _no_tensor_hook(tensor: Tensor, hook: Callable) -> Any:
    """Refuse the user's hooks on tensors; register those of PyTorch's own modes (a FLOP counter's)."""
    if is_pytorchs(hook) and all(is_pytorchs(fn) for fn in _functions_in(hook)):
        return _register_hook(tensor, hook)
    raise CaptureError(
        f"the model registers the hook '{name_of(hook)}' on a tensor in its forward pass (register_hook), which no program runs\n"
        f"{running_line()}Way out: say what it does to the gradient as a torch.autograd.Function, or drop it."
    )


def _functions_in(hook: Any) -> list[Any]:
    """The functions in a hook's closure: the user's, where `register_multi_grad_hook` makes hooks of one."""
    cells = [c.cell_contents for c in getattr(hook, "__closure__", None) or () if c.cell_contents is not hook]
    return [value for value in cells if isinstance(value, types.FunctionType | types.MethodType)]


def _check_backward(named: Iterable[tuple[str, nn.Module]]) -> None:
    for name, m in named:
        for hook in [h for kind in _BACKWARD for h in getattr(m, kind).values()]:
            raise CaptureError(
                f"{path_of(name, m)} has the backward hook '{name_of(hook)}', which no program runs.\nWay out: remove it while "
                "fxcurv runs, or say what it does to the gradient as a torch.autograd.Function."
            )
        for title, p in m.named_parameters(recurse=False):
            for hook in (hooks_of_tensor(p) or {}).values():
                raise CaptureError(
                    f"the parameter '{title}' of {path_of(name, m)} has the hook '{name_of(hook)}', which no program runs.\n"
                    "Way out: remove it while fxcurv runs, and apply it to the result's gradient."
                )
    for kind in _GLOBAL[2:]:
        for hook in getattr(nn_module, kind).values():
            raise CaptureError(
                f"there is a global backward hook '{name_of(hook)}', which no program runs. Way out: remove it while fxcurv runs."
            )


def path_of(name: str, m: nn.Module) -> str:
    """A module, for a message."""
    return f"module '{name}' ({type(m).__name__})" if name else f"the model or loss ({type(m).__name__})"


def name_of(hook: Callable) -> str:
    """A hook, for a message."""
    hook = _without_partials(hook)
    return getattr(hook, "__qualname__", type(hook).__name__)


def _without_partials(hook: Any) -> Any:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook


def hook_of(owner: Any, modules: Iterable[nn.Module]) -> str | None:
    """For a message: the forward hook that is `owner`, or a method of `owner`; None if there is none."""
    for m in modules:
        for hook in [_without_partials(h) for kind in _FORWARD for h in getattr(m, kind).values()]:
            if hook is owner or getattr(hook, "__self__", None) is owner:
                return f"the hook '{name_of(hook)}' of a {type(m).__name__}"
    return None


# ---- what a forward pass may write to ------------------------------


def _attributes(named: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any]]:
    """(what it is, a dict or list): the attributes of all modules, and the containers among them."""
    for name, m in named:
        yield f"an attribute of {path_of(name, m)}", vars(m)
        for key, value in vars(m).items():
            if key not in _OWN:
                yield from ((f"the attribute '{key}' of {path_of(name, m)}", c) for c in _containers(value))


def _functions(named: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Callable]]:
    """The hooks, and the forwards that a user wrote."""
    for name, m in named:
        for kind in _FORWARD:
            for hook in getattr(m, kind).values():
                yield f"what the hook '{name_of(hook)}' of {path_of(name, m)} keeps", hook
        forward = forward_of(type(m))
        code = getattr(forward, "__code__", None)
        if code is not None and is_user_file(code.co_filename):
            yield f"what the forward of {path_of(name, m)} keeps", forward
    for kind in _GLOBAL[:2]:
        for hook in _global_hooks(kind).values():
            yield f"what the global hook '{name_of(hook)}' keeps", hook


def forward_of(kind: type) -> Any:
    """The `forward` of a class of modules; that of a scripted one cannot be got from the class."""
    return inspect.getattr_static(kind, "forward", None)


def _containers_of(functions: Iterable[tuple[str, Callable]]) -> Iterator[tuple[str, Any]]:
    for what, fn in functions:
        for value in _kept(fn):
            yield from ((what, c) for c in _containers(value))


@contextlib.contextmanager
def undone(fn: Callable) -> Iterator[None]:
    """Restore afterwards the lists, dicts and attributes that a function may write to."""
    before = [(owner, owner.copy()) for _, owner in _containers_of([("", fn)])]
    try:
        yield
    finally:
        for owner, old in before:
            refill(owner, old)


def refill(owner: Any, old: Any) -> None:
    """Give a list, dict, set or deque its old members back, unless it has them still: it may refuse a write."""
    if len(owner) == len(old) and all(a is b for a, b in zip(_members(owner), _members(old), strict=True)):
        return
    owner.clear()
    owner.update(old) if isinstance(owner, dict | set) else owner.extend(old)


def _members(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _kept(fn: Any) -> Iterator[Any]:
    """The values that a function may write to: those of its closure, defaults, partial arguments, object and globals."""
    if isinstance(fn, functools.partial):
        yield from [*fn.args, *fn.keywords.values()]
        yield from _kept(fn.func)
        return
    owner = getattr(fn, "__self__", None)
    if owner is None and not hasattr(fn, "__code__"):
        owner, fn = fn, vars(type(fn)).get("__call__")
    if owner is not None and not isinstance(owner, nn.Module) and hasattr(owner, "__dict__"):
        yield vars(owner)
        yield from vars(owner).values()
    elif owner is not None:
        yield owner
    fn = getattr(fn, "__func__", fn)
    for cell in getattr(fn, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents
    yield from getattr(fn, "__defaults__", None) or ()
    code = getattr(fn, "__code__", None)
    yield from (fn.__globals__[n] for n in code.co_names if n in fn.__globals__) if code is not None else ()


def _containers(value: Any, depth: int = 2) -> Iterator[Any]:
    """A list or dict, those in it, and the attributes of a plain object."""
    if isinstance(value, dict | list | deque):
        yield value
    elif not isinstance(value, tuple | set):
        if isinstance(value, (Tensor, nn.Module, *FUNCTIONS)) or not hasattr(value, "__dict__"):
            return
        if type(value).__module__.startswith(("torch", "builtins")) or type(value).__name__ == "module":
            return
        yield vars(value)
        value = vars(value)
    items = entries(value)
    if depth and len(items) < 1000:
        for item in items:
            if isinstance(item, dict | list | deque):
                yield from _containers(item, depth - 1)


def _numbers(named: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, Any]]:
    """The numbers and lengths that hooks reach, by which they may count."""
    out: list[tuple[str, Any]] = []
    for what, fn in [(what, fn) for what, fn in _functions(named) if "hook" in what]:
        for value in _kept(fn):
            for c in _containers(value):
                plain = [v for v in (c.values() if isinstance(c, dict) else c) if isinstance(v, int | float)]
                out.append((what, (len(c), plain)))
        cells = [v for v in _kept(fn) if isinstance(v, int | float)]
        out.append((what, cells))
    return out


def holds_traced(value: Any, depth: int = 3) -> bool:
    """Whether a value is or holds a tensor of the capture."""
    if isinstance(value, Tensor):
        return isinstance(value, FakeTensor | FunctionalTensor)
    if getattr(type(value), "of_trace", False):  # a number that stands for one
        return True
    if not isinstance(value, dict | list | tuple | set | deque):
        return False
    return depth > 0 and any(holds_traced(v, depth - 1) for v in entries(value))


def entries(value: Any) -> list[Any]:
    """What a container holds, as its base class has it: a subclass may count and iterate in another way, or raise."""
    base: Any = next(b for b in (dict, list, tuple, set, frozenset, deque) if isinstance(value, b))
    return [*(dict.values(value) if base is dict else base.__iter__(value))]


def depends_on_call(value: Any) -> bool:
    """Whether a value is a traced tensor of parameters or samples (constants may stay), or holds traced ones."""
    if not isinstance(value, Tensor):
        return holds_traced(value)
    return holds_traced(value) and (value.requires_grad or any(isinstance(size, torch.SymInt) for size in value.shape))


def _leaks(owner: Any, old: Any, traced: Callable[[Any], bool], set_by_calls: Collection[str] = ()) -> bool:
    """Whether a tensor of the capture is in a dict or list now, but for attributes that every call sets."""
    if isinstance(owner, dict):
        return any(
            traced(v)
            for k, v in owner.items()
            if k not in (*_OWN, *set_by_calls) and not (k in old and old[k] is v and holds_traced(v, 0))
        )
    return any(traced(v) for v in owner)


def _name_attribute(what: str, owner: Any, traced: Callable[[Any], bool]) -> str:
    """`what`, with the attribute's name if it is an attribute."""
    names = [k for k, v in owner.items() if k not in _OWN and traced(v)] if isinstance(owner, dict) else []
    return what.replace("an attribute of", f"the attribute '{names[0]}' of") if names else what


def _restore(before: Iterable[tuple[str, Any, Any]]) -> None:
    """Take the capture's tensors out again."""
    for _, owner, old in before:
        if _leaks(owner, old, holds_traced):
            if isinstance(owner, dict):
                for k in [k for k, v in owner.items() if k not in _OWN and holds_traced(v)]:
                    if k in old:
                        owner[k] = old[k]
                    else:
                        del owner[k]
            else:
                refill(owner, old)
