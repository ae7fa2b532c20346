"""One eager call: find the program, bind its arguments, check, run, give the result memory of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import ArgumentError, FxcurvError, SelfCheckError, UnsupportedOpError
from fxcurv.front.arguments import Arguments, described, filled
from fxcurv.front.observers import run_observers, silent
from fxcurv.front.requests import Request, Subject
from fxcurv.front.wrapped import reason
from fxcurv.ir.lengths import at
from fxcurv.ir.origin import locate
from fxcurv.ir.private import compile_lock
from fxcurv.ir.program import Kept, Program
from fxcurv.passes.recycle import functional
from fxcurv.result import Result
from fxcurv.runtime.again import Again
from fxcurv.runtime.backend import Backend
from fxcurv.runtime.bind import bind, cuda_devices
from fxcurv.runtime.empty import of_no_sample
from fxcurv.runtime.lengths import lengths_of
from fxcurv.runtime.programs import Programs, Ready
from fxcurv.runtime.selfcheck import Check


@torch.compiler.disable
def call(
    programs: Programs[Ready],
    subject: Subject,
    backend: Backend,
    inputs: Any,
    targets: tuple,
    *,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    create_graph: bool,
    out: Result | None,
    values: dict[str, Tensor] | None = None,
    first: int | None = None,
) -> tuple[Result, Again | None]:
    """`Compiled.__call__` outside of `torch.compile`: (the result, how to repeat the call).

    The second is None unless the call is plain and the one before had the same sizes.

    Args:
        values: in place of the model's parameters.
        first: the number of the first sample, if this is a part of a batch.
    """
    with contextlib.ExitStack() as alone:
        alone.enter_context(compile_lock)
        request = programs.request(subject, inputs, targets, subject.autocast(), create_graph)
        kept = None if out is None else keep(out, create_graph, backend)
        if not request.arguments.batch_size:
            with request.apart():
                return of_no_sample(programs.like(request).program, request, values or {}), None
        run = functools.partial(
            _call, programs, request, backend, alone, inputs, targets, seed, generator, kept, out, values, first
        )
        try:
            return run()
        except FxcurvError as error:
            if not programs.distrust(request, isinstance(error, SelfCheckError)):
                raise
        return run()  # with a program that is made in this process


def _call(
    programs: Programs[Ready], request: Request, backend: Backend, alone: contextlib.ExitStack, inputs: Any, targets: tuple,
    seed: Any, generator: torch.Generator | None, kept: Kept | None, out: Result | None, values: dict[str, Tensor] | None,
    first: int | None,
) -> tuple[Result, Again | None]:  # fmt: skip
    """`call` for a batch that is not empty; `alone`: holds the lock, and is closed once other threads may go on."""
    subject, create_graph = request.subject, request.create_graph
    with request.apart(), contextlib.ExitStack() as within, contextlib.ExitStack() as unseen:
        ready = _found(programs, request)
        program, lengths = ready.program, lengths_of(ready.program, request.arguments)
        within.enter_context(at(lengths))
        # those on all modules would also look at the graph, which is a module
        hooks = unseen.enter_context(silent(program.observed, subject.modules()))
        part = None if first is None else (request.arguments.batch_size, first)
        flat = bind(program, subject, request.arguments, seed, generator, values, part)
        memory = take_memory(ready, backend, request.arguments, flat, kept)
        if _is_settled(ready, backend):
            alone.close()
        try:
            check_values(ready, flat, request.arguments.batch_size)
            if values:
                _check_own_parameters(ready, request, backend, hooks)
            selfcheck = None if values else begin_selfcheck(ready, request, flat, hooks)
            with torch.set_grad_enabled(create_graph):
                found = _run(ready, backend, flat, memory)
            if selfcheck is not None:
                selfcheck.finish(found)
                ready.verified = True
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError) as error:
            raise run_error(program, request.arguments, flat, error) from error
        with torch.set_grad_enabled(create_graph):
            result = result_of(ready, subject, backend, flat, found, memory)
        unseen.close()
        if program.observed:
            given = dict(zip(program.output.args[0], found, strict=True))
            update = program.options.update_buffers
            run_observers(program.observed, subject.modules(), given.__getitem__, update)
        programs.keep(ready, request)
        program.python.run_effects(subject.modules())
        if out is not None:
            out._memory = None
        size = request.arguments.batch_size, lengths
        repeated, ready.size = ready.size == size, size
        plain = repeated and backend.name == "eager" and not values
        return result, _again(ready, request, inputs, targets) if plain else None


def _again(ready: Ready, request: Request, inputs: Any, targets: tuple) -> Again | None:
    """How to repeat the call; None while another thread traces, which puts values of its own into the modules."""
    if not compile_lock.acquire(blocking=False):
        return None
    try:
        return Again.of(ready, request, inputs, targets)
    finally:
        compile_lock.release()


def _is_settled(ready: Ready, backend: Backend) -> bool:
    """Whether a call only runs the program: no check is due, and no hooks have to be off the modules meanwhile."""
    options, program = ready.program.options, ready.program
    known = ready.checked and (ready.selfcheck is None or ready.verified)
    often = options.debug or options.check == "always" or program.python.numbers or program.observed
    return known and not often and (backend.name == "eager" or ready.runner is not None)


# ---- memory ------------------------------


def keep(out: Any, create_graph: bool, backend: Backend) -> Kept:
    """The memory of an earlier result, if this call may write to it."""
    if not isinstance(out, Result):
        raise ArgumentError(f"out= is a {type(out).__name__}: pass a result of an earlier call")
    if create_graph:
        raise ArgumentError("out= with create_graph=True: what is differentiated again must stay as it is, drop one")
    if backend.name != "eager":
        raise ArgumentError(f'out= with backend={backend.name!r}, which plans its own memory: use "eager"')
    if out._memory is None:
        raise ArgumentError(
            "out= is a result without memory of its own: a copy, one of a compiled step or with create_graph=True, or "
            "one that was out= before. Pass the latest result"
        )
    return out._memory


def take_memory(
    ready: Ready, backend: Backend, arguments: Arguments, flat: list[Any], kept: Kept | None
) -> list[Tensor]:
    """The memory that the eager graph writes large results to: its last arguments."""
    if backend.name != "eager":
        return []
    n, lengths = arguments.batch_size, lengths_of(ready.program, arguments)
    return ready.pool.take(n, lengths) if kept is None else ready.pool.take_from(kept, n, flat, lengths)


# ---- checks ------------------------------


def check_values(ready: Ready, flat: list[Any], n: int) -> None:
    """Check placements and conditions on values at a program's first call.

    Conditions are checked at every call under `debug`, and where Python floats are inputs of the program.

    n: the batch size of the call. One sample shows nothing for a program of more, so the next call checks again.
    """
    program = ready.program
    if ready.checked and not program.options.debug and not program.python.numbers:
        return
    if ready.probe is not None and not ready.checked:
        with torch.random.fork_rng(cuda_devices(flat)):
            ready.probe.run(flat, n)
    with torch.random.fork_rng(cuda_devices(flat)):  # dropout is drawn once, by the program
        holds = program.check_module(*flat) if program.check_module is not None else ()
    refuse_values(program, holds)
    ready.checked = n > 1 or program.batch.size == 1


def refuse_values(program: Program, holds: Any) -> None:
    """Raise for the first condition on values that does not hold."""
    for held, error in zip(holds, program.verdicts, strict=True):
        if not bool(held):
            raise error()


def begin_selfcheck(
    ready: Ready, request: Request, flat: list[Any], hooks: dict[Any, Any] | None = None
) -> Check | None:
    """Run the plain passes of this call's check, and return it; None if no check is due."""
    if ready.selfcheck is None or ready.verified and ready.program.options.check != "always":
        return None
    return ready.selfcheck.begin(ready.program, request, flat, hooks)


def _check_own_parameters(ready: Ready, request: Request, backend: Backend, hooks: dict[Any, Any]) -> None:
    """Check the model with its own parameters, before a call with other values of them."""
    flat = bind(ready.program, request.subject, request.arguments, 0, None)
    selfcheck = begin_selfcheck(ready, request, flat, hooks)
    if selfcheck is not None:
        with torch.set_grad_enabled(request.create_graph), torch.random.fork_rng(cuda_devices(flat)):
            memory = take_memory(ready, backend, request.arguments, flat, None)
            selfcheck.finish(_run(ready, backend, flat, memory))
        ready.verified = True


# ---- run, own, return ------------------------------


def _run(ready: Ready, backend: Backend, flat: list[Any], memory: list[Tensor]) -> tuple:
    if backend.name == "eager":
        return ready.program.gm(*flat, *memory)
    if ready.runner is None:
        ready.runner = backend.runner(ready.program)
    return ready.runner(flat)


def result_of(
    ready: Ready, subject: Subject, backend: Backend, flat: list[Any], values: tuple, memory: list[Tensor] | None = None
) -> Result:
    """The result from the program's `values`, written to `memory`; buffers get their new values."""
    program = ready.program
    loss, leaves, mutations, results, extras = program.unpack(values, owner(flat))
    fields: dict[str, Any] = {} if loss is None else {"loss": loss}
    fields["output"] = filled(program.output_template, leaves)
    fields.update(results)
    fields.update(extras)
    if not program.options.update_buffers:
        fields["buffers"] = mutations
    else:
        buffers = dict(subject.model.named_buffers(remove_duplicate=False))
        for name, value in mutations.items():
            buffers[name].copy_(value.detach())
    own = backend.name == "eager" and not program.options.create_graph
    return Result(fields, program.extensions, subject.holder, ready.pool.kept(fields, memory) if own else None)


def owner(flat: list[Any]) -> Callable[[Any], Any]:
    """A function that clones values in an argument's memory: a gradient may be a parameter, which a step changes."""
    given = {t.untyped_storage().data_ptr() for t in flat if isinstance(t, Tensor)}

    def own(value: Any) -> Any:
        shared = isinstance(value, Tensor) and value.untyped_storage().data_ptr() in given
        return value.clone() if shared else value

    return own


# ---- which op failed ------------------------------


def _found(programs: Programs[Ready], request: Request) -> Ready:
    """The program for a call.

    Raises:
        ArgumentError: where an op has no derivative because it fails on these inputs in the forward pass already, which a
            trace by shapes may pass over (layers and inputs of two dtypes).
    """
    try:
        return programs.find(request, kept=True)
    except UnsupportedOpError as error:
        program = programs.captured(request)
        flat = bind(program, request.subject, request.arguments, 0, None)
        try:
            with torch.no_grad(), torch.random.fork_rng(cuda_devices(flat)):
                fx.Interpreter(program.gm).run(*flat)
        except (RuntimeError, IndexError) as failure:
            raise run_error(program, request.arguments, flat, failure) from error
        raise


class _Locate(fx.Interpreter):
    """Runs a graph and remembers the node that fails."""

    at: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.at = n
        return super().run_node(n)


def run_error(program: Program, arguments: Arguments, flat: list[Any] | None, error: Exception) -> ArgumentError:
    """The error for an op that refuses its values at run time; `flat`: the graph's arguments, needed to name the op."""
    where = ""
    finder = _Locate(functional(program))
    with contextlib.suppress(RuntimeError, IndexError):
        finder.run(*flat or ())
        finder.at = None
    if flat is not None and finder.at is not None:
        where = f"{locate(finder.at)}\n"
    return ArgumentError(
        f"{where}fails on the inputs, {described(arguments.inputs)}, and the targets, "
        f"{described(arguments.targets)}: {reason(error)}\n"
        "Way out: inputs and targets of the dtype, shape and range that the model and the loss expect (class "
        "indices: int64, below the number of classes)."
    )
