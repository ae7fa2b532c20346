"""A call inside `torch.compile`: Dynamo finds the program by the real values, then traces its graph as part of the step.

What a program depends on besides sizes and dtypes (training flags, which parameters are trainable) is read in the traced
code, so that Dynamo guards it; the program itself is a constant there.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import ArgumentError
from fxcurv.front.observers import refuse_observers
from fxcurv.front.python_state import reasons
from fxcurv.front.requests import Autocast, Subject
from fxcurv.ir.private import constant_result, pytree, tracing
from fxcurv.passes.recycle import functional
from fxcurv.result import Result
from fxcurv.runtime.bind import bind, cuda_devices, seed_tensor
from fxcurv.runtime.call import begin_selfcheck, check_values
from fxcurv.runtime.programs import Programs, Ready
from fxcurv.runtime.stateless import HOLE, Stateless, named_tensors, parted, refuse_packed

# Looked up by name: before PyTorch 2.13, a constant of Dynamo's may be computed from strings, but not from any object.
STEPS: weakref.WeakValueDictionary[str, Steps] = weakref.WeakValueDictionary()
_COUNT = itertools.count()


class Steps:
    """What a compiled model is inside `torch.compile`.

    Attributes:
        name: the traced code finds the object by it.
        changes: a mark for each time that `unchanged` found Python state changed. Dynamo guards this text. (A number
            that changes would become dynamic, and no constant can be computed from that.)
        call: makes a call on several ranks; for these, `forms`, `skeletons`: see `runtime.step_on_ranks`.
    """

    def __init__(self, programs: Programs[Ready], subject: Subject, call: Callable[..., Any]):
        self.programs, self.subject, self.changes = programs, subject, ""
        self.call = call
        self.forms, self.skeletons = SimpleNamespace(), {}  # type: ignore[var-annotated]
        self.name = f"compiled_{next(_COUNT)}"
        STEPS[self.name] = self


def call_in_step(
    steps: Steps,
    inputs: Any,
    targets: tuple,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    create_graph: bool,
    given: dict[str, Tensor] | None = None,
) -> Result:
    """`Compiled.__call__` where Dynamo traces it; `given`: values in place of the model's parameters."""
    if generator is not None:
        raise ArgumentError("generator= inside torch.compile: pass seed=, an int or a 0-dim integer tensor")
    refuse_packed(inputs)
    programs, subject = steps.programs, steps.subject
    mode = subject.autocast()
    skeleton, tensors = parted((inputs, targets))
    modes = [m.training for root in subject.roots() for m in root.modules()]
    name = name_for(steps.name, steps.changes, skeleton, modes, create_graph, mode.device_type, mode.dtype, *tensors)
    step = getattr(programs.named, name).stateless
    if not step.accepts(tensors):
        raise ArgumentError("the program is for other sizes: call compiled.lower(inputs, targets) before the step")
    values, tensors_held = step.read(subject.modules())
    guarded(values)
    if step.unseen:
        unchanged(step.ticks, steps.name, name)
    named = {**named_tensors(subject.model, subject.loss), **tensors_held, **(given or {})}
    with torch.autocast(mode.device_type, enabled=False), torch.set_grad_enabled(create_graph):
        values = step(named, tensors, seed_tensor(seed, None, subject.device()))
    fields = step.fields(values)
    if step.updates:
        with torch.no_grad():
            for name, k in step.writes.items():
                named[name].copy_(values[k])
    else:
        fields["buffers"] = {name: values[k] for name, k in step.writes.items()}
    return Result(fields, programs.extensions, subject.holder)


@constant_result
def guarded(values: list[Any]) -> int:
    """Make Dynamo guard these values: it guards what a constant is computed from."""
    return len(values)


@torch.library.custom_op("fxcurv::unchanged", mutates_args=("ticks",))
def unchanged(ticks: Tensor, name: str, step: str) -> None:
    """Raise if Python state has changed that the program depends on and that Dynamo does not guard.

    It runs with every call of the step. It writes to `ticks`, so that no compiler drops it.
    """
    steps = STEPS[name]
    python, modules = getattr(steps.programs.named, step).program.python, steps.subject.modules()
    ticks += 1
    if not python.holds(modules):
        found = "; ".join(reasons(python.differences(modules)))
        steps.changes += "|"  # Dynamo guards it: the next call gets its program
        raise ArgumentError(
            f"inside torch.compile, {found}, which its guards do not see. Call the step again: it is compiled anew. Way out, for "
            "what changes often: a number or tensor that is an attribute of the model (or of a loss module), or an input."
        )


@unchanged.register_fake
def _(ticks: Tensor, name: str, step: str) -> None:
    return None


@torch.compiler.assume_constant_result
def name_for(
    name: str,
    changes: str,
    skeleton: Any,
    modes: list[bool],
    create_graph: bool,
    device_type: str,
    dtype: torch.dtype | None,
    *tensors: Tensor,
) -> str:
    """The name of the program for arguments of this structure, `HOLE` for each tensor. Dynamo calls this with real tensors.

    A module as an argument would be a constant without a source, which Dynamo cannot guard. It guards the arguments: so
    the training flags are passed as `modes`, and what `unchanged` saw as `changes`, though the program is found without
    them.
    """
    inputs, targets = filled_in(skeleton, tensors)
    with tracing(None):
        steps = STEPS[name]
        mode = Autocast(device_type, dtype)
        return steps.programs.name_of(_find_ready(steps.programs, steps.subject, inputs, targets, mode, create_graph))


def _find_ready(
    programs: Programs[Ready], subject: Subject, inputs: Any, targets: tuple, mode: Autocast, create_graph: bool
) -> Ready:
    """Find the program for a call inside `torch.compile`, check it, make it stateless. Dynamo does not trace this."""
    request = programs.request(subject, inputs, targets, mode, create_graph)
    with request.apart():
        ready = programs.find(request, schedules=False)
        program = ready.program
        refuse_observers(program.observed, "a step under torch.compile")
        unseen = program.python.unguarded()
        if unseen:
            raise ArgumentError(
                f"{unseen} is read by the model or the loss, and torch.compile would not see it change. Way out: an "
                "attribute of the model, or of a loss that is a module; a counter outside of the forward pass; or a call "
                "outside of the compiled function."
            )
        flat = bind(program, subject, request.arguments, 0, None)
        check_values(ready, flat, request.arguments.batch_size)
        selfcheck = begin_selfcheck(ready, request, flat)
        if selfcheck is not None:
            with torch.random.fork_rng(cuda_devices(flat)):
                selfcheck.finish(functional(program)(*flat))
            ready.verified = True
        if ready.stateless is None:
            ready.stateless = Stateless(program, request.arguments)
        return ready


def filled_in(skeleton: Any, tensors: Sequence[Tensor]) -> Any:
    """The structure that `parted` took apart, with these tensors."""
    given = iter(tensors)
    return pytree.tree_map(lambda leaf: next(given) if isinstance(leaf, str) and leaf == HOLE else leaf, skeleton)
