"""While a model is captured, every custom autograd function becomes one op of the graph (see `rules.custom`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.autograd.function import Function, FunctionMeta

from fxcurv.errors import CustomFunctionError
from fxcurv.ir.origin import running_line
from fxcurv.ir.private import patched, pytree
from fxcurv.rules.custom import KINDS, ORIGINALS, WAY_OUT, Custom, is_separate, saying

# Functions of these modules have no backward to keep, or PyTorch made them for a backward that it knows.
_INSIDE = ("torch._functorch", "torch._library", "torch._higher_order_ops", "torch._dynamo", "fxcurv.")


def _is_custom(cls: type) -> bool:
    generated = cls.__name__.startswith(("GeneratedBackwardFor_", "_NoopSaveInputs"))
    return not generated and not cls.__module__.startswith(_INSIDE)


class _Transparent:
    """Reentrant checkpointing, replaced by the checkpointed function itself: checkpointing only saves memory."""

    @staticmethod
    def apply(function: Callable, preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


@contextlib.contextmanager
def kept_functions() -> Iterator[None]:
    """In a capture, calls of custom functions become `fxcurv::custom_function`, whatever way `apply` was reached."""
    KINDS.clear()
    with contextlib.ExitStack() as stack:
        for cls in _subclasses(Function):
            _replace(stack, cls)
        made = FunctionMeta.__init__

        def new_class(cls, *args, **kwargs):
            made(cls, *args, **kwargs)
            if cls.__mro__[1:] and issubclass(cls, Function):
                _replace(stack, cls)

        stack.enter_context(patched("torch.autograd.function.FunctionMeta.__init__", new_class))
        stack.enter_context(patched("torch.utils.checkpoint.CheckpointFunction", _Transparent))
        try:
            yield
        finally:
            ORIGINALS.clear()


def _subclasses(cls: type) -> list[type]:
    """All subclasses, once each."""
    found: dict[type, None] = {}
    sub: type
    for sub in cls.__subclasses__():
        found.update(dict.fromkeys([sub, *_subclasses(sub)]))
    return list(found)


def _replace(stack: contextlib.ExitStack, cls: type) -> None:
    if not _is_custom(cls):
        return
    names = ["forward", "setup_context", "backward", "vjp"]
    originals = {name: getattr(cls, name) for name in names}
    for name in names:
        ORIGINALS[cls, name] = _first(cls, name, originals[name])
    separate = is_separate(cls)
    latest: list[Any] = []

    def forward(*args):
        out, kind = _call_op(cls, args if separate else args[1:])
        latest[:] = [kind]
        if not separate:
            _mark(args[0], out, kind)
        return out

    def setup_context(ctx, inputs, output):
        _mark(ctx, output, latest.pop())

    def backward(*args):
        raise CustomFunctionError(
            f"the model or loss differentiates through the custom autograd function '{cls.__qualname__}' itself (by "
            f"torch.autograd.grad, say), which is not kept.\n{running_line()}{WAY_OUT}"
        )

    used = "backward" if ORIGINALS[cls, "backward"] is not Function.backward else "vjp"  # PyTorch wants one of them
    new: dict[str, Callable] = {"forward": forward, used: backward}
    if separate:
        new["setup_context"] = setup_context
    for name, fn in new.items():
        stack.enter_context(_replaced_attribute(cls, name, staticmethod(fn)))


def _first(cls: type, name: str, fallback: Callable) -> Callable:
    """The author's function of this name, also where a base class already has the replacement."""
    for base in cls.__mro__:
        if name in vars(base):
            return ORIGINALS.get((base, name), fallback)
    return fallback


@contextlib.contextmanager
def _replaced_attribute(cls: type, name: str, value: Any) -> Iterator[None]:
    own = vars(cls).get(name)
    setattr(cls, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(cls, name)
        else:
            setattr(cls, name, own)


def _call_op(cls: type, args: tuple) -> tuple[Any, Custom]:
    """(what the op returns in place of `forward`, the `Custom` of this call)."""
    kind = Custom(cls, args)
    leaves = pytree.tree_leaves(args)
    if any(isinstance(leaf, torch.SymFloat | torch.SymBool) for leaf in leaves):
        raise kind.refused("is given a number that depends on the batch size", where=running_line())
    KINDS.append(kind)
    xs, sizes = [v for v in leaves if isinstance(v, Tensor)], [v for v in leaves if isinstance(v, SymInt)]
    with saying(kind, running_line()):
        ys = torch.ops.fxcurv.custom_function(xs, sizes, len(KINDS) - 1)
    # the run shows which outputs are no tensors, and which tensors carry no gradient
    ran = kind.last
    assert ran is not None
    kind.single, kind.constant = not ran.several, ran.constant
    ys = [y.detach() if c and y.is_floating_point() else y for y, c in zip(ys, ran.constant, strict=True)]
    given = iter(ys)
    out = [next(given) if isinstance(t, Tensor) else t for t in ran.leaves]
    kind.last = None
    return (tuple(out) if ran.several else out[0]), kind


def _mark(ctx: Any, out: Any, kind: Custom) -> None:
    ys = [t for t in (out if isinstance(out, tuple) else [out]) if isinstance(t, Tensor)]
    ctx.mark_non_differentiable(*[y for y, c in zip(ys, kind.constant, strict=True) if c])
