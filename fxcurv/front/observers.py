"""Forward hooks that only look: a program returns the values that they look at, and every call runs them on these.

A hook that returns a value is part of the model, and traced. A hook that returns nothing is an observer, unless it is
PyTorch's own, or of the library that the module is of (transformers collects hidden states so): it does not run while a
model is traced, where it would see tensors without values. Its code shows
whether a hook returns something; where it does not (a lambda that appends), the hook is tried in a trace, and the model
is traced again without it. The forward pass may read what a hook writes, which only a run can show: so hooks run in the
plain passes of the self-check, and what they wrote is undone. A pre-hook may set something that its module reads: it is
always traced.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module

from fxcurv.errors import CaptureError
from fxcurv.front.arguments import filled, map_leaves, templated
from fxcurv.front.python_state import library_of
from fxcurv.front.side_effects import is_pytorchs, name_of, path_of, undone
from fxcurv.front.wrapped import head
from fxcurv.ir.private import own_buffers, version_of
from fxcurv.ir.program import Observed

_OWN, _GLOBAL = "_forward_hooks", "_global_forward_hooks"
Where = tuple[int, str, int]  # a hook: index of its module (-1: global), name of the table, key in it


@dataclass(frozen=True)
class _Look:
    """What a hook would have looked at in a trace: its arguments after the module."""

    module: int
    where: Where | None
    title: str
    values: tuple
    attribute: str = ""


class Observers:
    """The observers of one capture, and what they would look at.

    Args:
        named: (name, module) of all modules that may run.
        everything: whether to keep the inputs and outputs of every module as well, without a hook.
        known: hooks that are known to return nothing.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Module]], everything: bool, known: set[Where]):
        self.names = {id(m): (k, name) for k, (name, m) in enumerate(named)}
        self.modules = [m for _, m in named]
        self.everything, self.known = everything, known
        self._nothing, self._values = set[Where](), set[Where]()  # hooks that were tried, by what they returned
        self.looks: list[_Look] = []

    @property
    def found(self) -> set[Where]:
        """Hooks that returned nothing, or failed, each time they were tried."""
        return self._nothing - self._values

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Take the place of the hooks while a model is traced."""
        replaced = []
        for k, table, hooks in _tables(self.modules):
            for key, hook in list(hooks.items()):
                if not is_pytorchs(hook) and (k < 0 or not _is_of_library(hook, self.modules[k])):
                    replaced.append((hooks, key, hook))
                    hooks[key] = functools.partial(self._look, (k, table, key), hook)
        handles = [m.register_forward_hook(self._keep) for m in self.modules] if self.everything else []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for hooks, key, hook in replaced:
                hooks[key] = hook

    def begin(self) -> None:
        """Begin a forward pass: forget the looks of an earlier one."""
        self.looks = []

    def tensors(self) -> list[Tensor]:
        """All tensors that were looked at; they become outputs of the graph."""
        return [t for _, _, tensors in self._templates() for t in tensors]

    def observed(self, nodes: Sequence[fx.Node]) -> list[Observed]:
        """The looks, given the nodes that stand for `tensors()`.

        Raises:
            CaptureError: where a hook is given a number that follows from the batch size.
        """
        given, out = iter(nodes), []
        for look, template, tensors in self._templates():
            own = tuple(next(given) for _ in tensors)
            if look.where is not None:
                map_leaves(template, torch.SymInt, functools.partial(_no_size, look.title))
            out.append(Observed(look.module, look.where, look.title, template, own, look.attribute))
        return out

    def set_in_trace(self, written: Iterable[tuple[nn.Module, str, Tensor]]) -> None:
        """Note attributes that the forward pass has set to tensors: every call sets them to its own."""
        for module, name, value in written:
            number, path = self.names[id(module)]
            title = f"the attribute '{name}' of {path_of(path, module)}"
            keep = head(value) if value.is_floating_point() else value
            self.looks.append(_Look(number, None, title, (keep,), name))

    def attributes(self) -> dict[int, set[str]]:
        """The names of these attributes, by the id of their module's dictionary."""
        found = collections.defaultdict(set)
        for look in self.looks:
            if look.attribute:
                found[id(vars(self.modules[look.module]))].add(look.attribute)
        return found

    def _templates(self) -> Iterator[tuple[_Look, Any, list[Tensor]]]:
        for look in self.looks:
            tensors: list[Tensor] = []
            yield look, templated(look.values, tensors), tensors

    def _note(self, module: nn.Module, where: Where | None, title: str, values: tuple) -> None:
        """Keep the values as they are now: an in-place op may follow."""
        keep = lambda t: head(t) if t.is_floating_point() else t  # noqa: E731
        number, _ = self.names[id(module)]
        self.looks.append(_Look(number, where, title, map_leaves(values, Tensor, keep)))

    def _keep(self, module: nn.Module, args: tuple, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output  # of a recurrent layer
        tensors = [t if isinstance(t, Tensor) else None for t in (*args, output)]
        self._note(module, None, "", (tuple(tensors[:-1]), tensors[-1]))

    def _look(self, where: Where, hook: Callable, module: nn.Module, *values: Any) -> Any:
        if id(module) not in self.names:  # the exported module around the model
            return None
        _, name = self.names[id(module)]
        if where in self.known or returns_nothing(hook):
            return self._note(module, where, f"the hook '{name_of(hook)}' of {path_of(name, module)}", values)
        with contextlib.ExitStack() as stack:
            stack.enter_context(undone(hook))
            try:
                given = hook(module, *values)
            except Exception:  # perhaps as tensors have no values here: if it returns something later, that is refused
                given = None
            if given is None:
                self._nothing.add(where)
            else:
                self._values.add(where)
                stack.pop_all()  # part of the model, so `no_side_effects` looks for its side effects
        return given


def _is_of_library(hook: Any, module: nn.Module) -> bool:
    """Whether a hook is a part of the module that its library gives it: its forward pass reads what the hook has written."""
    code = getattr(getattr(hook, "__func__", hook), "__code__", None)
    library = library_of(code.co_filename) if code is not None else ""
    return bool(library) and library == library_of(
        getattr(sys.modules.get(type(module).__module__), "__file__", "") or ""
    )


def _tables(modules: Sequence[nn.Module]) -> Iterator[tuple[int, str, dict[int, Callable]]]:
    yield from ((k, _OWN, getattr(m, _OWN)) for k, m in enumerate(modules))
    yield -1, _GLOBAL, getattr(nn_module, _GLOBAL)


def _no_size(title: str, _: Any) -> None:
    raise CaptureError(
        f"{title} is given a number that follows from the batch size, which no program returns. Way out: a hook of a module that "
        "is given tensors, or remove it while fxcurv runs."
    )


def returns_nothing(hook: Any) -> bool:
    """Whether a function's code returns None wherever it returns; False for a callable without code."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    if not hasattr(hook, "__code__") and not hasattr(hook, "__func__"):
        hook = vars(type(hook)).get("__call__")
    code = getattr(getattr(hook, "__func__", hook), "__code__", None)
    if code is None:
        return False
    last: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "RETURN_CONST" and instruction.argval is not None:
            return False
        constant = last is not None and last.opname == "LOAD_CONST" and last.argval is None
        if instruction.opname == "RETURN_VALUE" and (instruction.is_jump_target or not constant):
            return False
        last = instruction
    return True


# ---- when a program runs ------------------------------


def run_observers(
    observed: Iterable[Observed],
    modules: Sequence[nn.Module],
    value_of: Callable[[fx.Node], Tensor],
    buffers: bool = True,
) -> None:
    """Run the hooks on the values of a call, and set attributes, in the order of the model's own forward pass.

    Args:
        modules: of the subject, in order.
        value_of: gives a node's value.
        buffers: whether attributes that are buffers are set too.

    Raises:
        CaptureError: for a hook that returns a value after all, or writes to one.
    """
    for look in observed:
        if look.attribute and (buffers or look.attribute not in own_buffers(modules[look.module])):
            setattr(modules[look.module], look.attribute, value_of(look.nodes[0]).detach())
        if look.where is None:
            continue
        number, table, key = look.where
        hook = getattr(modules[number] if number >= 0 else nn_module, table)[key]
        tensors = [value_of(n).detach() for n in look.nodes]
        versions = [version_of(t) for t in tensors]
        given = hook(modules[look.module], *filled(look.template, tensors))
        if given is not None or versions != [version_of(t) for t in tensors]:
            what = "returns one, which it did not while the model was traced" if given is not None else "writes to one"
            raise CaptureError(
                f"{look.title} runs after the program, to look at values, and {what}. Way out: a hook that changes values "
                "returns them always, by code that torch.export can trace."
            )


@contextlib.contextmanager
def silent(observed: Iterable[Observed], modules: Sequence[nn.Module]) -> Iterator[dict[Where, Callable]]:
    """Remove the observers, for a pass of the model that is not the user's, and yield them."""
    taken, found = [], {}
    for number, table, key in {look.where for look in observed if look.where is not None}:
        hooks = getattr(modules[number] if number >= 0 else nn_module, table)
        taken.append((hooks, list(hooks.items())))
        if key in hooks:  # another check may have taken it
            found[number, table, key] = hooks.pop(key)
    try:
        yield found
    finally:
        for hooks, items in reversed(taken):
            hooks.clear()
            hooks.update(items)


@contextlib.contextmanager
def heard(found: dict[Where, Callable], modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put back what `silent` removed, for a pass that must equal the user's; undo what the observers write."""
    with contextlib.ExitStack() as stack:
        for (number, table, key), hook in found.items():
            hooks = getattr(modules[number] if number >= 0 else nn_module, table)
            stack.enter_context(undone(hook))
            hooks[key] = hook
            stack.callback(hooks.pop, key, None)
        yield


def refuse_observers(observed: Iterable[Observed], where: str) -> None:
    """Refuse observers where a program cannot run hooks.

    Raises:
        CaptureError: for the first observer.
    """
    for look in observed:
        if look.attribute:
            raise CaptureError(
                f"{look.title} is set by the forward pass, and {where} sets none. Way out: return the tensor as an output of the "
                "model (result.output has it)."
            )
        if look.where is not None:
            raise CaptureError(
                f"{look.title} looks at values, and {where} runs no hooks. Way out: remove it there, or return what it looks "
                "at as an output of the model (result.output has it)."
            )
