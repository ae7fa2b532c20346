"""`compile` and what it returns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv import passes
from fxcurv.errors import ArgumentError, ExtensionError, FxcurvError, LossError
from fxcurv.explain.lowered import Lowered
from fxcurv.explain.report import Report
from fxcurv.extensions import Extension
from fxcurv.extensions.parameters import Choice, chosen, hashable
from fxcurv.front.arguments import Arguments, filled, flatten_arguments
from fxcurv.front.capture import capture
from fxcurv.front.python_state import Path, Schedule, alike, all_modules, reasons
from fxcurv.front.requests import check_trainable, checked
from fxcurv.front.side_effects import hooks_of
from fxcurv.ir.program import Kept, Program
from fxcurv.ir.state import Options
from fxcurv.passes.recycle import functional
from fxcurv.quantity import Identity
from fxcurv.result import Result
from fxcurv.runtime.backend import Backend
from fxcurv.runtime.call import cuda_devices, owner, run_error, seed_tensor
from fxcurv.runtime.export import export
from fxcurv.runtime.keys import Key, shortened, why
from fxcurv.runtime.memory import Pool
from fxcurv.runtime.probe import Probe
from fxcurv.runtime.programs import Autocast, at_numbers_if_need_be, doubled, log, single_sample, tensors_in
from fxcurv.runtime.progress import progress, silent
from fxcurv.runtime.selfcheck import Check, SelfCheck
from fxcurv.runtime.step import Step, guarded, named_tensors, parted, step_for


def compile(  # noqa: A001
    model: nn.Module,
    loss: Callable[..., Tensor] | None,
    extensions: Iterable[Extension] = (),
    *,
    batch_dim: Any = 0,
    split: str | None = None,
    rules: dict | None = None,
    update_buffers: bool = True,
    memory_budget: int | None = None,
    check: str | None = "first",
    debug: bool = False,
    params: Choice = None,
    sample: str = "sequence",
    backend: str | Callable = "eager",
    mode: str | None = None,
    dynamic: bool | None = None,
) -> Compiled:
    """Compile `model` and `loss` for a set of quantities.

    Args:
        model: any module that `torch.export` can trace.
        loss: `loss(output, *targets) -> scalar`, a module or a callable; None for `Jacobian` alone.
        extensions: instances of classes in `fxcurv.extensions`.
        batch_dim: the samples' dimension in the inputs: an int, or one per input (tuple, or dict by keyword),
            None for an input without samples.
        split: path of the submodule whose output is f (default: the model's output).
        rules: {op: Rule}, which override registered ones.
        update_buffers: write what training mode updates (running statistics) to the model, as a forward pass
            would; otherwise it is returned as `result.buffers`.
        memory_budget: bytes that the columns of the walk may take (default: half of the free memory); what is more
            goes down in several sweeps, but where a result holds all columns.
        check: "first" (default): at the first call of every new program, before it returns, loss, output, gradient and new
            buffers are compared with a plain forward and backward pass of the model as it is, sums of individual
            quantities with their totals, and samples are exchanged (as under "probe"); a difference raises
            `SelfCheckError`, naming where it begins. It takes a few plain steps per compilation, which `explain()` shows,
            at most a plain step's memory and one more gradient, and changes no result. "always": at every call, for
            debugging. "probe": samples alone, exchanged in runs of the forward pass at the first call for each kind of
            input; raises `MixedSamplesError` where a sample moves another's values though the placements say that it
            does not (a wrong rule in `rules`, say). None: nothing is checked.
        debug: verify the program between passes and check values at every call.
        params: the parameters that the gradient and all quantities are of (default: all that are trainable); all others
            are treated as frozen. A name, a prefix ("encoder.layer.1") or pattern ("head.*"), a list of these, or a
            predicate (name, parameter) -> bool, asked once per program. Extensions take `params=` of their own.
        sample: "sequence" (one per entry of the batch), or "token": every position of the model's output [N, T, C] has a
            loss of its own, so individual gradients are [N, T, *P], and what is made of them is of all N T. For a loss
            that is a sum over positions; they all count as samples, also those that a mask or `ignore_index` leaves out,
            whose gradient is zero. Sums over samples of the GGN and the Hessian are the same for both.
        backend: "eager" runs the emitted graph op by op; "inductor", or another backend of `torch.compile`, compiles it
            with `fullgraph=True`. (A call inside a `torch.compile`d function is compiled with that function.)
        mode, dynamic: passed to `torch.compile`, for such a backend. The batch size is dynamic where it is symbolic. With
            "reduce-overhead" on a GPU, results are overwritten by the next call.

    Returns:
        a callable `compiled(inputs, *targets, seed=None, generator=None) -> Result`; it traces at the first
        call for each kind of input.

    Raises:
        ExtensionError: for a class instead of an instance, an unknown extension, or one asked for twice.
        ArgumentError: if `model` is no module or has no trainable parameter, or `params` matches none.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}, not an nn.Module: wrap it in one")
    if loss is not None and not callable(loss):
        raise ArgumentError(
            f"loss is a {type(loss).__name__}, not callable: pass a module or a function (output, target)"
        )
    if memory_budget is not None and (not isinstance(memory_budget, int) or memory_budget < 1):
        raise ArgumentError(f"memory_budget={memory_budget!r}: pass a number of bytes")
    if check not in (None, "first", "always", "probe"):
        raise ArgumentError(f"check={check!r}: pass 'first', 'always', 'probe' or None")
    check_trainable(model)
    found = checked(extensions)
    if loss is None:
        names = ", ".join(type(e).__name__ for e in found if not isinstance(e.requires, Identity))
        if names or not found:
            raise ArgumentError(f"{names or 'the gradient'} needs a loss: pass one as the second argument")
    if sample not in ("sequence", "token"):
        raise ArgumentError(f"sample={sample!r}: use 'sequence' or 'token'")
    params = hashable(params, ArgumentError, "compile")
    compiled = Compiled(
        model,
        loss,
        found,
        batch_dim,
        split,
        dict(rules or {}),
        update_buffers,
        debug,
        memory_budget=memory_budget,
        check=check,
        params=params,
        sample=sample,
        backend=Backend(backend, mode, dynamic),
    )
    compiled.covered()
    return compiled


class Compiled:
    """A model and loss, compiled for a set of quantities; programs are made per kind of input and cached.

    Attributes:
        recompiles: for every program after the first, why it was needed: what is not as the nearest earlier one has it.
            The logger "fxcurv" says so at level INFO when it happens (`TORCH_LOGS=fxcurv` in the environment shows it).
    """

    _as_written = False
    """Whether no op of the model may be said in others, for quantities that depend on them."""
    _schedules = True
    """Whether a float that changes at every call may become an input of the program."""

    def __init__(
        self,
        model,
        loss,
        extensions,
        batch_dim,
        split,
        rules,
        update_buffers,
        debug,
        *,
        memory_budget=None,
        check=None,
        params=None,
        sample="sequence",
        backend=None,
    ):
        self.model, self.loss, self.extensions, self.params = model, loss, extensions, params
        self._batch_dim, self._split, self._rules = batch_dim, split, rules
        self._update_buffers, self._debug, self._memory_budget = update_buffers, debug, memory_budget
        self._check_when, self._sample = check, sample
        self._backend = backend or Backend()
        self._forget()

    def _forget(self) -> None:
        """Have no programs, nor anything that is known of them."""
        self._runners: dict[int, Callable] = {}
        self.recompiles: list[str] = []
        self._programs: dict[tuple[Key, Autocast, bool], list[Program]] = {}
        self._checked: set[int] = set()
        self._schedule = Schedule()
        self._verified: set[int] = set()
        self._steps = SimpleNamespace()  # by name: Dynamo guards the length of a list or dict that it reads
        self._pool = Pool()

    def __getstate__(self) -> dict[str, Any]:
        """What it was made of: a copy, also one by `pickle`, makes its own programs."""
        made = ("_runners", "recompiles", "_programs", "_checked", "_schedule", "_verified", "_steps", "_pool")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __call__(
        self,
        inputs: Any,
        *targets: Any,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = False,
        out: Result | None = None,
    ) -> Result:
        """Compute all quantities on one batch.

        Args:
            inputs: a tensor, or a tuple (positional) or dict (keyword) of tensors.
            targets: passed to the loss after the model's output, as they are.
            seed: int or 0-dim integer tensor for sampled columns; the same seed gives the same columns.
            generator: a `torch.Generator` that draws the seed. With neither, the default generator does.
            create_graph: results (loss and output too) can be differentiated again, by `torch.autograd.grad`, with
                respect to parameters and inputs; only algorithms that autograd can follow are chosen.
            out: an earlier result of this object, whose memory this call writes to, though it is still held: large
                results on the CPU (of 1 MiB and more: individual gradients, roots, diagonals per sample) take the storage
                that theirs had there, for a batch that is not larger; smaller ones are new. Those fields of the earlier
                result, their views, and what `attach` put on parameters then hold this call's numbers (after a smaller
                batch, with old ones behind them), its other fields stay as they were, and it cannot be `out` again.
                Without `out`, memory is used again only when nobody holds it.

        Raises:
            ArgumentError: also for an `out` that cannot serve: no result of this program, or too small a one, fields
                that were replaced, or with `create_graph`, another backend than "eager", or inside `torch.compile`.
            FxcurvError: see `fxcurv.errors`; nothing on the model has changed then.
        """
        if torch.compiler.is_dynamo_compiling():
            if out is not None:
                raise ArgumentError("out= inside torch.compile: drop it, the compiled step plans its own memory")
            return self._traced(inputs, targets, seed, generator, create_graph)
        return self._eager(inputs, targets, seed, generator, create_graph, out)

    @torch.compiler.disable
    def _eager(self, inputs, targets, seed, generator, create_graph, out) -> Result:
        arguments = self._arguments(inputs, targets)
        kept = None if out is None else self._kept(out, create_graph)
        # results are normal tensors also under inference_mode, so that `attach` and an optimizer can use them
        mode = self._autocast()
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(mode.device_type, enabled=False):
            program = self._program(arguments, mode, create_graph)
            flat = self._bind(program, arguments, seed, generator)
            memory = self._memory(program, arguments.batch_size, flat, kept)
            try:
                if self._debug or id(program) not in self._checked or program.python.numbers:
                    self._check(program, flat)
                selfcheck = self._selfcheck(program, arguments, mode, flat)
                with torch.set_grad_enabled(create_graph):
                    values = self._run(program, flat, memory)
                if selfcheck is not None:
                    selfcheck.finish(values)
                    self._verified.add(id(program))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError) as error:
                raise run_error(program, arguments, flat, error) from error
            with torch.set_grad_enabled(create_graph):
                result = self._result(program, flat, values)
            program.python.run_effects(self._all_modules())
            if out is not None:
                out._memory = None
            return result

    def _kept(self, out: Any, create_graph: bool) -> Kept:
        """The memory of an earlier result, if this call may write to it."""
        if not isinstance(out, Result):
            raise ArgumentError(f"out= is a {type(out).__name__}: pass a result of an earlier call")
        if create_graph:
            raise ArgumentError("out= with create_graph=True: what is differentiated again must stay as it is, drop one")
        if self._backend.name != "eager":
            raise ArgumentError(f'out= with backend={self._backend.name!r}, which plans its own memory: use "eager"')
        if out._memory is None:
            raise ArgumentError(
                "out= is a result without memory of its own: a copy, one of a compiled step or with create_graph=True, or "
                "one that was out= before. Pass the latest result"
            )
        return out._memory

    def _memory(self, program: Program, n: int, flat: list[Any], kept: Kept | None) -> list[Tensor]:
        """What the eager graph writes large results to, its last arguments."""
        if self._backend.name != "eager":
            return []
        return self._pool.take(program, n) if kept is None else self._pool.take_from(kept, program, n, flat)

    def _run(self, program: Program, flat: list[Any], memory: list[Tensor]) -> tuple:
        if self._backend.name == "eager":
            return program.gm(*flat, *memory)
        if id(program) not in self._runners:
            self._runners[id(program)] = self._backend.runner(program)
        return self._runners[id(program)](flat)

    def _traced(self, inputs, targets, seed, generator, create_graph) -> Result:
        """A call inside `torch.compile`: Dynamo traces this."""
        if generator is not None:
            raise ArgumentError("generator= inside torch.compile: pass seed=, an int or a 0-dim integer tensor")
        mode = self._autocast()
        skeleton, tensors = parted((inputs, targets))
        modes = [m.training for module in self._modules() for m in module.modules()]
        step = getattr(self._steps, step_for(self, skeleton, modes, create_graph, mode.device_type, mode.dtype, *tensors))
        if not step.accepts(tensors):
            raise ArgumentError("the program is for other sizes: call compiled.lower(inputs, targets) before the step")
        values, tensors_held = step.read(self._all_modules())
        guarded(values)
        named = {**named_tensors(self.model, self.loss), **tensors_held}
        with torch.autocast(mode.device_type, enabled=False), torch.set_grad_enabled(create_graph):
            drawn = seed_tensor(seed, None, next(self.model.parameters()).device)
            values = step(named, tensors, drawn)
        fields = step.fields(values)
        if self._update_buffers:
            with torch.no_grad():
                for name, k in step.writes.items():
                    named[name].copy_(values[k])
        else:
            fields["buffers"] = {name: values[k] for name, k in step.writes.items()}
        return Result(fields, self.extensions, self.model)

    def _step(self, inputs, targets, create_graph: bool, device_type: str, dtype: torch.dtype | None) -> str:
        """The name of the `Step` for a call inside `torch.compile`, its values checked; Dynamo does not trace this."""
        arguments, mode = self._arguments(inputs, targets), Autocast(device_type, dtype)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
            program = self._program(arguments, mode, create_graph, schedules=False)
            unseen = program.python.unguarded()
            if unseen:
                raise ArgumentError(
                    f"{unseen} is read by the model or the loss, and torch.compile would not see it change. Way out: an "
                    "attribute of the model, or of a loss that is a module; a counter outside of the forward pass; or a call "
                    "outside of the compiled function."
                )
            flat = self._bind(program, arguments, 0, None)
            if self._debug or id(program) not in self._checked:
                self._check(program, flat)
            selfcheck = self._selfcheck(program, arguments, mode, flat)
            if selfcheck is not None:
                with torch.random.fork_rng(cuda_devices(flat)):
                    selfcheck.finish(functional(program)(*flat))
                self._verified.add(id(program))
            name = f"step_{id(program)}"
            if not hasattr(self._steps, name):
                setattr(self._steps, name, Step(program, arguments))
            return name

    def lower(self, inputs: Any, *targets: Any, after: str | None = None) -> Lowered:
        """The program for this kind of input, to be looked at: `.graph_module`, `.print_readable()`, `.draw("graph.svg")`.

        Args:
            inputs, targets: as in a call.
            after: the name of a stage ("capture", or a pass in `fxcurv.passes`): the program as it is after that stage, made
                anew and not to be called.

        Raises:
            ArgumentError: for a stage that does not exist; the message lists them.
        """
        stages = ["capture", *dict.fromkeys(p.__name__ for p in (*passes.ANALYSIS, *passes.PIPELINE))]
        if after is not None and after not in stages:
            raise ArgumentError(f"after={after!r} is no stage of the pipeline: use one of {', '.join(stages)}")
        arguments = self._arguments(inputs, targets)
        mode = self._autocast()
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(mode.device_type, enabled=False):
            if after is None:
                return Lowered(self._program(arguments, mode))
            program = self._captured(arguments, mode)
            return Lowered(passes.until(program, after) if after != "capture" else program)

    def export(self, inputs: Any, *targets: Any) -> torch.export.ExportedProgram:
        """The whole computation as a program of its own, with the model's parameters and buffers in it.

        Its module is called with `(inputs, targets, seed)`, `targets` a tuple, `seed` a 0-dim int64 tensor (of no effect
        where nothing is sampled), and returns the result's fields as a dict, Kronecker factors as lists of tensors. The
        batch size is dynamic where it is symbolic. `torch.export.save` and AOTInductor take it; programs with fxcurv's
        own ops need `import fxcurv.kernels` where they run.

        Raises:
            ArgumentError: with products, which are callables.
        """
        arguments, mode = self._arguments(inputs, targets), self._autocast()
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(mode.device_type, enabled=False):
            program = self._program(arguments, mode, schedules=False)
            seed = seed_tensor(0, None, next(self.model.parameters()).device)
            return export(self.model, self.loss, program, arguments, inputs, targets, seed)

    def explain(self, inputs: Any, *targets: Any, measure: bool = False):
        """A report: per parameter the rule, the algorithm, FLOPs, bytes, predicted time; totals; the columns carried.

        Args:
            inputs, targets: as in a call.
            measure: run the eager graph a few times on these values, and show what each choice took beside the prediction.
        """
        program = self.lower(inputs, *targets).program
        if not measure:
            return Report(program)
        arguments, mode = self._arguments(inputs, targets), self._autocast()
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(mode.device_type, enabled=False):
            flat = self._bind(program, arguments, 0, None)
            try:
                return Report(program, flat, arguments.batch_size)
            except (RuntimeError, IndexError) as error:
                raise run_error(program, arguments, flat, error) from error

    def covered(self, extensions: tuple[Extension, ...] | None = None) -> tuple[list[str], dict[Extension, list[str]]]:
        """(the parameters of all quantities, those of each extension that chose its own), by name."""
        names = chosen(self.params, self.model, ArgumentError, "compile")
        own = [e for e in (self.extensions if extensions is None else extensions) if e.params is not None]
        return names, {e: chosen(e.params, self.model, ExtensionError, type(e).__name__, names) for e in own}

    def _arguments(self, inputs: Any, targets: tuple) -> Arguments:
        if self.loss is None and targets:
            raise ArgumentError("there is no loss, so nothing reads the targets: call compiled(inputs)")
        check_trainable(self.model)
        arguments = flatten_arguments(inputs, targets, self._batch_dim)
        n = arguments.batch_size
        for e in self.extensions:
            indices = getattr(e, "subsampling", None) or ()
            if any(i >= n for i in indices):
                raise ArgumentError(f"{e}: sample {max(indices)} of a batch of {n}, use indices below {n}")
        return arguments

    def _autocast(self) -> Autocast:
        """The caller's autocast: traced into the program as casts, so off when the program runs."""
        device = next(self.model.parameters()).device.type
        enabled = torch.is_autocast_enabled(device)
        return Autocast(device, torch.get_autocast_dtype(device) if enabled else None)

    def _program(
        self, arguments: Arguments, mode: Autocast, create_graph: bool = False, schedules: bool = True
    ) -> Program:
        """The program for these arguments and what Python holds; `schedules`: whether floats may be inputs of it."""
        n = arguments.batch_size
        key, modules = (self._key(arguments), mode, create_graph), self._all_modules()
        serving = [program for program in self._programs.get(key, []) if program.serves(n)]
        serving = [program for program in serving if schedules or not program.python.numbers]
        for program in serving:
            if program.python.holds(modules):
                return program
        changed: list[Any] = min((program.python.differences(modules) for program in serving), key=len, default=[])
        reason = shortened(reasons(changed)) if changed else why(key, self._programs, n, self._modules())
        made = self._scheduled(arguments, mode, create_graph, changed) if schedules and self._schedules else None
        program = made or self._lower(arguments, mode, create_graph)
        again = f" again, because {reason}" if reason else ""
        log.info("compiled%s; batch size: %s", again, program.batch_note)
        self.recompiles += [reason] if reason else []
        self._programs.setdefault(key, []).append(program)
        return program

    def _scheduled(self, arguments: Arguments, mode: Autocast, create_graph: bool, changed: list) -> Program | None:
        """A program in which floats that have changed twice are inputs, if the model can be traced so.

        Args:
            changed: what is not as the nearest program has it, of `State.differences`.
        """
        numbers = self._schedule.changed(changed)
        while numbers:
            try:
                if self._schedule.new() and not self._same_forward(arguments, mode, numbers):
                    raise LossError("with the float as a tensor, the model computes something else")
                program = self._lower(arguments, mode, create_graph, numbers)
                self._schedule.works()
                return program
            except (FxcurvError, RuntimeError, TypeError, ValueError) as error:
                given_up = ", ".join(path.title for path in self._schedule.give_up())
                log.info("%s: a program for each value, because %s", given_up, error)
            numbers = self._schedule.changed(())
        return None

    def _same_forward(self, arguments: Arguments, mode: Autocast, numbers: tuple[Path, ...]) -> bool:
        """Whether the forward pass with these floats as inputs computes what it does with their values in it."""
        outcomes = []
        for chosen_numbers in ((), numbers):
            with torch.autocast(mode.device_type, mode.dtype, enabled=mode.dtype is not None):
                program = capture(self.model, self.loss, arguments, self._split, chosen_numbers)
            flat = self._bind(program, arguments, 0, None)
            with torch.random.fork_rng(cuda_devices(flat)):
                torch.manual_seed(0)
                outcomes.append(program.gm(*flat))
        return all(alike(a, b) for a, b in zip(*outcomes, strict=True))

    def _all_modules(self) -> list[nn.Module]:
        return all_modules(self.model, self.loss)

    def _modules(self) -> list[nn.Module]:
        return [self.model, *([self.loss] if isinstance(self.loss, nn.Module) else [])]

    def _key(self, arguments: Arguments) -> Key:
        """What a program depends on, but for the batch size."""
        n = arguments.batch_size

        def describe(t: Tensor, batch_dim: int | None) -> tuple:
            shape = tuple(("n", s // n) if d == batch_dim else s for d, s in enumerate(t.shape))
            return shape, t.dtype, t.device

        inputs = tuple(describe(t, d) for t, d in zip(arguments.inputs, arguments.batch_dims, strict=True))
        targets = tuple(describe(t, d) for t, d in zip(arguments.targets, arguments.target_dims(), strict=True))
        modules = self._modules()
        flags = tuple((type(m), m.training) for module in modules for m in module.modules())
        tensors = [pair for module in modules for pair in tensors_in(module)]
        state = tuple((name, t.requires_grad, t.dtype, t.device, t.shape) for name, t in tensors)
        return Key(inputs, targets, arguments.structure, flags, state, n == 1, hooks_of(modules))

    def _lower(
        self, arguments: Arguments, mode: Autocast, create_graph: bool, numbers: tuple[Path, ...] = ()
    ) -> Program:
        single = arguments.batch_size == 1
        with progress(f"compiling {type(self.model).__name__}") as tell:
            program = self._analyse(doubled(arguments) if single else arguments, mode, tell, numbers)
            if single:  # a model that fixes the batch size is captured at one sample after all
                program = self._analyse(arguments, mode, tell, numbers) if program.fixed else single_sample(program)
            return at_numbers_if_need_be(
                lambda p: self._emitted(p, create_graph, tell),
                program,
                lambda: self._analyse(arguments, mode, tell, numbers),
                arguments.batch_size,
            )

    def _emitted(self, program: Program, create_graph: bool, tell: Callable[[str], None]) -> Program:
        program.options = dataclasses.replace(program.options, create_graph=create_graph)
        program.probe = Probe(program) if self._check_when else None
        program.selfcheck = SelfCheck(program, self._split) if self._check_when in ("first", "always") else None
        return passes.run(program, passes.PIPELINE, self._debug, tell)

    def _analyse(
        self,
        arguments: Arguments,
        mode: Autocast,
        tell: Callable[[str], None] = silent,
        numbers: tuple[Path, ...] = (),
    ) -> Program:
        tell("capture")
        return passes.run(self._captured(arguments, mode, numbers), passes.ANALYSIS, self._debug, tell)

    def _captured(self, arguments: Arguments, mode: Autocast, numbers: tuple[Path, ...] = ()) -> Program:
        start = time.perf_counter()
        with torch.autocast(mode.device_type, mode.dtype, enabled=mode.dtype is not None):
            program = capture(self.model, self.loss, arguments, self._split, numbers)
        program.timings["capture"] = time.perf_counter() - start
        program.extensions, program.rules = self.extensions, self._rules
        names, program.covers = self.covered()
        program.params = {name: node for name, node in program.params.items() if name in names}
        program.shapes = {name: shape for name, shape in program.shapes.items() if name in names}
        program.options = Options(
            batch_dims=tuple(arguments.batch_dims), memory_budget=self._memory_budget, sample=self._sample,
            as_written=self._as_written or any(e.by_op for e in self.extensions), split=self._split,
        )  # fmt: skip
        return program

    def _bind(self, program: Program, arguments: Arguments, seed, generator) -> list[Any]:
        """What the placeholders are bound to, but memory for results."""
        params = dict(self.model.named_parameters())
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        of_loss = dict(tensors_in(self.loss)) if isinstance(self.loss, nn.Module) else {}
        targets = arguments.split_targets()
        python, modules = program.python, self._all_modules()
        constants = {**program.constants, **python.tensors(modules)}
        flat: list[Any] = []
        for bound in program.inputs[: len(program.inputs) - len(program.buffers)]:
            if bound.kind == "param":
                flat.append(params[bound.name])
            elif bound.kind == "buffer":
                flat.append(buffers[bound.name])
            elif bound.kind == "constant":
                flat.append(of_loss.get(bound.name.removeprefix("loss."), constants[bound.name]))
            elif bound.kind == "number":
                flat.append(python.number(bound.index, modules, next(iter(params.values())).device))
            elif bound.kind == "seed":
                flat.append(seed_tensor(seed, generator, next(iter(params.values())).device))
            else:
                flat.append((arguments.inputs if bound.kind == "input" else targets)[bound.index])
        return flat

    def _selfcheck(self, program: Program, arguments: Arguments, mode: Autocast, flat: list[Any]) -> Check | None:
        """The check of a call that is to be checked, its plain passes done."""
        known = program.selfcheck
        if known is None or id(program) in self._verified and self._check_when != "always":
            return None
        return known.begin(self.model, self.loss, program, arguments, mode, flat)

    def _check(self, program: Program, flat: list[Any]) -> None:
        if program.probe is not None and id(program) not in self._checked:
            with torch.random.fork_rng(cuda_devices(flat)):
                program.probe.run(flat, program.batch.size)
        with torch.random.fork_rng(cuda_devices(flat)):  # dropout is drawn once, by the program
            holds = program.check_module(*flat) if program.check_module is not None else ()
        for held, error in zip(holds, program.verdicts, strict=True):
            if not bool(held):
                raise error()
        self._checked.add(id(program))

    def _result(self, program: Program, flat: list[Any], values: tuple) -> Result:
        loss, leaves, mutations, results, extras = program.unpack(values, owner(flat))
        fields: dict[str, Any] = {} if loss is None else {"loss": loss}
        fields["output"] = filled(program.output_template, leaves)
        fields.update(results)
        fields.update(extras)
        if not self._update_buffers:
            fields["buffers"] = mutations
        else:
            buffers = dict(self.model.named_buffers(remove_duplicate=False))
            for name, value in mutations.items():
                buffers[name].copy_(value.detach())
        own = self._backend.name == "eager" and not program.options.create_graph
        return Result(fields, self.extensions, self.model, self._pool.kept(program, fields) if own else None)
