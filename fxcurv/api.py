"""`compile` and what it returns."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fxcurv import passes
from fxcurv.errors import ArgumentError, ExtensionError
from fxcurv.explain.lowered import Lowered
from fxcurv.explain.report import Report
from fxcurv.extensions import Extension
from fxcurv.extensions.parameters import Choice, hashable
from fxcurv.front.arguments import Arguments, flatten_arguments
from fxcurv.front.requests import Request, Subject, check_loss_params, check_trainable, checked
from fxcurv.front.values import given_values, member
from fxcurv.ir.private import compile_lock, pytree
from fxcurv.ir.program import Program
from fxcurv.ir.ranks import IN_TURNS
from fxcurv.ir.state import Options
from fxcurv.result import Result
from fxcurv.runtime.again import Again, latest
from fxcurv.runtime.backend import Backend
from fxcurv.runtime.bind import bind, seed_tensor
from fxcurv.runtime.call import call, run_error
from fxcurv.runtime.disk import folder
from fxcurv.runtime.export import export
from fxcurv.runtime.one import serves_one
from fxcurv.runtime.programs import Programs, Ready, covered, emitted
from fxcurv.runtime.ranks import Ranks, no_numbers, ranks_of, unwrapped
from fxcurv.runtime.spread import call_on_ranks
from fxcurv.runtime.step import Steps, call_in_step
from fxcurv.runtime.step_on_ranks import call_in_step_on_ranks
from fxcurv.runtime.turns import call_in_turns


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
    loss_params: bool = False,
    sample: str = "sequence",
    sample_index: int | str | None = None,
    outputs: bool = True,
    dynamic_shapes: Any = None,
    backend: str | Callable = "eager",
    mode: str | None = None,
    dynamic: bool | None = None,
    mesh: Any = None,
) -> Compiled:
    """Compile `model` and `loss` for a set of quantities.

    Args:
        model: any module that `torch.export` can trace.
        loss: `loss(output, *targets) -> scalar`, a module or a callable; None for `Jacobian` alone.
        extensions: instances of classes in `fxcurv.extensions`.
        batch_dim: the samples' dimension in the inputs: an int, or one per input (tuple, or dict by keyword),
            None for an input without samples, `Rows(k)` for an input with k adjacent rows per sample, a dict
            {attribute: dimension} for an input that is an object of tensors (others of it have the samples at 0).
        split: path of the submodule whose output is f (default: the model's output). Parameters behind it do not enter
            f: their quantities of the Gauss-Newton and their Jacobian are zero.
        rules: {op: Rule}, which override registered ones.
        update_buffers: write what training mode updates (running statistics) to the model, as a forward pass
            would; otherwise the new values are returned as `result.buffers`.
        memory_budget: bytes that the columns of the walk may take (default: half of the free memory). Larger stacks
            are split into several sweeps, unless a result holds all columns anyway.
        check: "first" (default): the first call of every new program checks its numbers before it returns. It compares
            loss, output, gradient and new buffers with a plain forward and backward pass of the model as it is,
            compares sums of individual quantities with their totals, and exchanges samples (as under "probe"). A
            difference raises `SelfCheckError`, which names where it begins. The check takes a few plain steps per
            compilation (`explain()` shows them), at most a plain step's memory and one more gradient, and changes no
            result. "always": the same at every call, for debugging. "probe": only exchange samples, in runs of the
            forward pass at the first call for each kind of input; raises `MixedSamplesError` where a sample moves
            another's values although the placements say that it does not (a wrong rule in `rules`, say). None: no
            check.
        debug: verify the program between passes and check values at every call.
        params: the parameters of the gradient and of all quantities (default: all trainable ones); all others are
            treated as frozen. A name, a prefix ("encoder.layer.1") or pattern ("head.*"), a list of these, or a
            predicate (name, parameter) -> bool, called once per program. Extensions have a `params=` of their own.
        loss_params: include the parameters of a loss that is a module (a temperature, the transitions of a conditional
            random field), named "loss.<name>"; by default they are constants, as `explain()` says. A parameter that is
            also the model's keeps the model's name.
        sample: "sequence": a sample is an entry of the batch. "token": a sample is a position of the model's output
            [N, T, C], so individual gradients are [N, T, *P], and quantities made of them are over all N T positions.
            The loss has to be a sum or mean over positions. Positions that a mask or `ignore_index` leaves out count as
            samples with gradient zero. Sums over samples of the GGN and the Hessian are the same for both.
        sample_index: where samples of different sizes are merged (graphs, bags), the input that says which sample each
            entry belongs to, a vector of sample numbers: given by its position, its keyword, or its name as an
            attribute of an input (`"batch"` in PyTorch Geometric). N is then the length of the targets, the loss is a
            sum over the N rows of the model's output, and inputs have no `batch_dim`. Quantities of individual
            gradients and sums over samples are exact; the walk carries a column per sample for them.
            `MixedSamplesError` is raised at the first call for a kind of input if a sample moves another's output
            (through an edge between them), and at every call if an input named `edge_index` holds such an edge.
        outputs: False: the result has no `output`, and the batch is computed in parts, one after the other, so that
            large values, such as the logits of a large vocabulary, never exist for all samples at once. All sums and
            quantities per sample are those of the whole batch. Not available with products, `subsampling=`, other
            backends, `create_graph`, `out=` and `params=` of a call.
        dynamic_shapes: the input sizes, other than the batch's, that vary from call to call, in the form of
            `torch.export`: a dict {dimension: name} for each input, by keyword or in order (for a single tensor that
            dict itself), None for an input without any. Target sizes that are equal to them vary with them. Other
            varying sizes are detected: the second call that differs only in sizes gets a program for any size. Where an
            op fixes a size, `explain()` names the op, and every size gets a program of its own.
            `torch._dynamo.mark_dynamic` on an argument has the same effect.
        backend: "eager" runs the emitted graph op by op; "inductor", or another backend of `torch.compile`, compiles it
            with `fullgraph=True`. (A call inside a `torch.compile`d function is compiled with that function.)
        mode, dynamic: passed to `torch.compile`, for such a backend. The batch size is dynamic where it is symbolic. With
            "reduce-overhead" on a GPU, results are overwritten by the next call.
        mesh: a `torch.distributed.device_mesh.DeviceMesh`. Every rank compiles and calls with its own part of the batch (of
            any size, empty ones included), and gets what one process computes on the batch concatenated in the order of
            the ranks: every rank has whole sums and the loss, and per-sample results of its own samples
            (`result.whole(field)` gathers these, `result.sizes` says how many each rank has). If a rank raises, all
            raise. A `DistributedDataParallel` model is unwrapped.

    Returns:
        a callable `compiled(inputs, *targets, seed=None, generator=None) -> Result`; it traces at the first
        call for each kind of input.

    Raises:
        ExtensionError: for a class instead of an instance, an unknown extension, or one asked for twice.
        ArgumentError: if `model` is no module or has no trainable parameter, or `params` matches none; for
            `loss_params` without a loss that is a module, or where the model has a parameter of such a name.
    """
    _check_kinds(model, loss, memory_budget, check)
    subject = Subject(model, loss, bool(loss_params))
    check_loss_params(subject)
    check_trainable(subject)
    found = checked(extensions)
    _check_loss(loss, found)
    _check_samples(sample, sample_index, batch_dim)
    ranks = ranks_of(mesh, model, found, backend)
    if ranks is not None:
        _check_on_ranks(loss_params, sample_index)
    if not outputs:
        _check_in_turns(loss, found, backend, plain=sample == "sequence" and sample_index is None and ranks is None)
    options = Options(
        outputs=outputs, batch_dim=batch_dim, split=split, rules=dict(rules or {}), update_buffers=update_buffers,
        memory_budget=memory_budget, check=check, debug=debug, params=hashable(params, ArgumentError, "compile"),
        loss_params=subject.loss_params, sample=sample, sample_index=sample_index, as_written=any(e.by_op for e in found),
        lengths=outputs and _any_lengths(found, sample, sample_index, ranks), dynamic_shapes=dynamic_shapes,
        schedules=ranks is None and outputs, ranks=ranks.name if ranks is not None else "" if outputs else IN_TURNS,
        rank=ranks.rank if ranks is not None else 0, size=ranks.size if ranks is not None else 1,
    )  # fmt: skip
    compiled = Compiled(unwrapped(model), loss, found, options, Backend(backend, mode, dynamic), ranks)
    compiled.covered()
    return compiled


def _check_kinds(model: Any, loss: Any, memory_budget: Any, check: Any) -> None:
    """Refuse arguments of `compile` of a wrong kind or value."""
    if not isinstance(model, nn.Module):
        staged = type(model).__module__.startswith("torch.distributed.pipelining")
        way = "pipeline stages are not supported, pass the whole model" if staged else "wrap it in one"
        raise ArgumentError(f"model is a {type(model).__name__}, not an nn.Module: {way}")
    scripted = [name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        what = f"the module '{scripted[0]}'" if scripted[0] else "the model"
        raise ArgumentError(
            f"{what} is a torch.jit.ScriptModule, which no trace looks into: pass the module that was scripted"
        )
    if loss is not None and not callable(loss):
        raise ArgumentError(
            f"loss is a {type(loss).__name__}, not callable: pass a module or a function (output, target)"
        )
    if memory_budget is not None and (not isinstance(memory_budget, int) or memory_budget < 1):
        raise ArgumentError(f"memory_budget={memory_budget!r}: pass a number of bytes")
    if check not in (None, "first", "always", "probe"):
        raise ArgumentError(f"check={check!r}: pass 'first', 'always', 'probe' or None")


def _check_loss(loss: Any, found: Sequence[Extension]) -> None:
    """Refuse to go without a loss where something needs one."""
    names = ", ".join(type(e).__name__ for e in found if e.requires.needs_loss)
    if loss is None and (names or not found):
        raise ArgumentError(f"{names or 'the gradient'} needs a loss: pass one as the second argument")


def _check_samples(sample: str, sample_index: Any, batch_dim: Any) -> None:
    """Refuse an unknown `sample`, and `sample_index` beside another argument that says where the samples are."""
    if sample not in ("sequence", "token"):
        raise ArgumentError(f"sample={sample!r}: use 'sequence' or 'token'")
    if sample_index is not None and (batch_dim != 0 or sample != "sequence"):
        raise ArgumentError("sample_index= says where the samples are: drop batch_dim= and sample=")


def _check_on_ranks(loss_params: bool, sample_index: Any) -> None:
    """Refuse arguments that `mesh=` does not support."""
    if loss_params:
        raise ArgumentError(
            "mesh= and loss_params=True: let one module hold model and loss, and pass its method as the loss"
        )
    if sample_index is not None:
        raise ArgumentError("mesh= and sample_index=: merged samples are of one process, drop one")


def _check_in_turns(loss: Any, found: Sequence[Extension], backend: Any, plain: bool) -> None:
    """Refuse extensions and arguments that `outputs=False` does not support."""
    products = [type(e).__name__ for e in found if e.requires.of_vectors]
    numbered = [str(e) for e in found if getattr(e, "subsampling", None) is not None]
    if products or numbered:
        raise ExtensionError(f"{(products + numbered)[0]} with outputs=False is not supported: ask for it without")
    if loss is None or backend != "eager" or not plain:
        raise ArgumentError(
            "outputs=False computes the parts of a batch with a loss one after the other: drop it, or sample=, sample_index=, "
            "mesh= and other backends than 'eager'"
        )


def _any_lengths(found: Iterable[Extension], sample: str, sample_index: Any, ranks: Ranks | None) -> bool:
    """Whether sizes other than the batch's may be symbolic: not on ranks, in products, or by positions or rows."""
    plain = sample == "sequence" and sample_index is None and ranks is None
    return plain and not any(e.requires.of_vectors for e in found)


class Compiled:
    """A model and loss, compiled for a set of quantities; programs are made per kind of input and cached.

    Attributes:
        recompiles: for every program after the first, why it was needed: how it differs from the nearest earlier one.
            The logger "fxcurv" says so at level INFO when it happens (`TORCH_LOGS=fxcurv` in the environment shows it).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor] | None,
        extensions: tuple[Extension, ...],
        options: Options,
        backend: Backend,
        ranks: Ranks | None = None,
    ):
        self.model, self.loss, self.extensions, self.params = model, loss, extensions, options.params
        self._subject = Subject(model, loss, options.loss_params)
        self._options, self._backend, self._ranks = options, backend, ranks
        self._forget()

    def _forget(self) -> None:
        """Drop all programs, and all that is known of them."""
        self._programs: Programs[Ready] = Programs(self.extensions, self._options, emitted, serves_one, Ready)
        self._programs.folder = folder(getattr(sys.modules[__package__], "cache_dir", None))
        on_ranks: Any = functools.partial(call_on_ranks, self._ranks, self._programs, self._subject, self._backend)  # type: ignore
        self._steps = Steps(self._programs, self._subject, on_ranks)
        self._again: list[Again] = []  # the kinds of the last calls, the latest first
        self._counting: Compiled | None = None
        self.recompiles = self._programs.recompiles

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the programs: a copy, also one by `pickle`, makes its own."""
        made = ("recompiles", "_programs", "_steps", "_again", "_counting")
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
        params: dict[str, Tensor] | None = None,
    ) -> Result:
        """Compute all quantities on one batch.

        Args:
            inputs: a tensor, or a tuple (positional) or dict (keyword) of tensors.
            targets: passed to the loss after the model's output, as they are.
            seed: int or 0-dim integer tensor for sampled columns; the same seed gives the same columns.
            generator: a `torch.Generator` that draws the seed. With neither, the default generator does.
            create_graph: results (loss and output too) can be differentiated again, by `torch.autograd.grad`, with
                respect to parameters and inputs; only algorithms that autograd can follow are chosen.
            out: an earlier result of this object, whose memory this call overwrites although it is still held. Large
                results on the CPU (1 MiB and more: individual gradients, roots, diagonals per sample) are written to
                the storage of the same fields there; the batch must not be larger than the earlier one. Smaller results
                get new memory. Afterwards those fields of the earlier result, their views, and what `attach` put on
                parameters hold this call's numbers (followed by old ones, if the batch is smaller). The earlier
                result's other fields stay as they were, and it cannot be `out` again. Without `out`, memory is reused
                only when nobody holds it.
            params: parameter name -> tensor [*P], which the same program reads in place of the module's own. With
                stacks [E, *P] it runs for E models in a row, and every tensor of the result has E as its first axis.
                The module stays as it is.

        Raises:
            ArgumentError: also for a name, shape, dtype or device in `params` that is not the parameter's; for an `out`
                that is no result of this program, is too small, or has replaced fields; and for `out` with
                `create_graph`, with another backend than "eager", or inside `torch.compile`.
            FxcurvError: see `fxcurv.errors`; nothing on the model has changed then.
        """
        if self._ranks is not None:
            if params is not None:
                raise ArgumentError("params= with mesh=: set the parameters of the model on every rank")
            if torch.compiler.is_dynamo_compiling():
                if create_graph or out is not None or generator is not None:
                    raise ArgumentError("mesh= inside torch.compile takes no create_graph, out= or generator=: drop it")
                return call_in_step_on_ranks(self._steps, inputs, targets, seed)
            return call_on_ranks(
                self._ranks, self._programs, self._subject, self._backend, inputs, targets,
                seed=seed, generator=generator, out=out, create_graph=create_graph, again=self._again,
            )  # fmt: skip
        if not self._options.outputs:
            if torch.compiler.is_dynamo_compiling() or create_graph or out is not None or params is not None:
                raise ArgumentError(
                    "outputs=False takes no create_graph, out=, params= or torch.compile around it: drop one"
                )
            return call_in_turns(self._programs, self._subject, inputs, targets, seed=seed, generator=generator)
        values, models = given_values(self._subject, params) if params is not None else ({}, None)
        if models is not None:
            return self._call_models(values, models, inputs, targets, seed, generator, create_graph, out)
        if torch.compiler.is_dynamo_compiling():
            if out is not None:
                raise ArgumentError("out= inside torch.compile: drop it, the compiled step plans its own memory")
            return call_in_step(self._steps, inputs, targets, seed, generator, create_graph, values)
        if out is None and not create_graph and not values:
            for again in self._again:
                result = again.call(inputs, targets, seed, generator)
                if result is not None:
                    return result
        result, new = call(
            self._programs, self._subject, self._backend, inputs, targets,
            seed=seed, generator=generator, create_graph=create_graph, out=out, values=values,
        )  # fmt: skip
        if new is not None:
            self._again = latest(new, self._again)
        return result

    def _call_models(
        self, values: dict[str, Tensor], models: int, inputs: Any, targets: tuple, seed: Any, generator: Any, create_graph: bool,
        out: Result | None,
    ) -> Result:  # fmt: skip
        """Call once for each model in the stacks `values`, and stack the results. All calls draw the same columns."""
        if out is not None:
            raise ArgumentError("out= with stacks in params=: drop it, every model's result is new")
        products = [type(e).__name__ for e in self.extensions if e.requires.of_vectors]
        if products:
            raise ArgumentError(
                f"{products[0]} with stacks in params=: products are of one model each, call once for each"
            )
        seed = seed_tensor(seed, generator, self._subject.device())
        each = [
            self(inputs, *targets, seed=seed, create_graph=create_graph, params=member(self._subject, values, k))
            for k in range(models)
        ]
        fields = pytree.tree_map(
            lambda *ts: torch.stack(ts) if isinstance(ts[0], Tensor) else ts[0], *[r._fields for r in each]
        )
        return Result(fields, self.extensions, self._subject.holder)

    def part(self, inputs: Any, *targets: Any, seed: int, first: int | None) -> Result:
        """Call on one of several batches (`fxcurv.over`), or on a part of a batch (`fxcurv.accumulate`).

        Args:
            inputs, targets, seed: as in a call.
            first: the number of this part's first sample in the whole (under `mesh=`, of this rank's first one), by
                which sampled columns are drawn; see `counting`. None: samples count from zero.

        Raises:
            MixedSamplesError: under `mesh=`, where samples interact; without it, `over` has checked that.
        """
        if self._ranks is not None:
            return call_on_ranks(
                self._ranks, self._programs, self._subject, self._backend, inputs, targets,
                seed=seed, generator=None, out=None, part=True, first=first,
            )  # fmt: skip
        if not self._options.counted:  # no columns are sampled
            return self(inputs, *targets, seed=seed)
        result, _ = call(
            self._programs, self._subject, self._backend, inputs, targets,
            seed=seed, generator=None, create_graph=False, out=None, first=first,
        )  # fmt: skip
        return result

    def counting(self) -> Compiled:
        """This object; or, if columns are sampled, one whose programs take the number `first` of `part`."""
        drawn = any(getattr(e.requires, "mc", None) for e in self.extensions)
        if not drawn or self._ranks is not None or self._options.counted:
            return self
        if not self._options.outputs:
            raise ArgumentError("outputs=False computes a batch in parts by itself: pass it whole, or compile without")
        if self._counting is None:
            options = dataclasses.replace(self._options, counted=True, lengths=False)
            self._counting = Compiled(self.model, self.loss, self.extensions, options, self._backend)
        return self._counting

    def lower(self, inputs: Any, *targets: Any, after: str | None = None) -> Lowered:
        """The program for this kind of input, to inspect: `.graph_module`, `.print_readable()`, `.draw("graph.svg")`.

        Args:
            inputs, targets: as in a call.
            after: the name of a stage ("capture", or a pass in `fxcurv.passes`): give the program as it is after that
                stage, made anew, which cannot be called.

        Raises:
            ArgumentError: for a stage that does not exist; the message lists them.
        """
        stages = ["capture", *dict.fromkeys(p.__name__ for p in (*passes.ANALYSIS, *passes.pipeline(self._options)))]
        if after is not None and after not in stages:
            raise ArgumentError(f"after={after!r} is no stage of the pipeline: use one of {', '.join(stages)}")
        request = self._request(inputs, targets)
        with compile_lock, request.apart():
            if after is None:
                return Lowered(self._programs.find(request).program)
            program = self._programs.captured(request)
            return Lowered(passes.until(program, after) if after != "capture" else program)

    def export(self, inputs: Any, *targets: Any) -> torch.export.ExportedProgram:
        """The whole computation as a program of its own, with the model's parameters and buffers in it.

        Its module is called with `(inputs, targets, seed)`, `targets` a tuple, `seed` a 0-dim int64 tensor (of no effect
        where nothing is sampled), and returns the result's fields as a dict, Kronecker factors as lists of tensors. The
        batch size is dynamic where it is symbolic. `torch.export.save` and AOTInductor take it; programs with fxcurv's
        own ops need `import fxcurv.kernels` where they run.

        Raises:
            ArgumentError: with products, which are callables; with `outputs=False` or `mesh=`.
        """
        if not self._options.outputs:
            raise ArgumentError(
                "export() with outputs=False is not supported: compile with outputs=True, and export that"
            )
        if self._ranks is not None:
            raise ArgumentError("export() with mesh= is not supported: compile without a mesh, and export that")
        request = self._request(inputs, targets)
        with compile_lock, request.apart():
            program = self._programs.find(request, schedules=False).program
            seed = seed_tensor(0, None, self._subject.device())
            return export(self._subject, program, request.arguments, inputs, targets, seed)

    def explain(self, inputs: Any, *targets: Any, measure: bool = False):
        """A report: per parameter the rule, the algorithm, FLOPs, bytes, predicted time; totals; the columns carried.

        Args:
            inputs, targets: as in a call.
            measure: run the eager graph a few times on these values, and show measured times beside the predicted ones.
        """
        request = self._request(inputs, targets)
        with request.apart():
            ready = self._programs.find(request)
        program, arguments = ready.program, request.arguments
        if not measure:
            return Report(program, check=ready.note)
        with request.apart():
            flat = bind(program, self._subject, arguments, 0, None)
            try:
                return Report(program, flat, arguments.batch_size, ready.note)
            except (RuntimeError, IndexError) as error:
                raise run_error(program, arguments, flat, error) from error

    def asking(self, extensions: Iterable[Extension], **others: Any) -> Compiled:
        """The same model, loss and options with other extensions; `others`: options (`ir.state.Options`) that differ."""
        found = checked(extensions)
        if self._ranks is not None:
            no_numbers(found)
        lengths = self._options.outputs and _any_lengths(
            found, self._options.sample, self._options.sample_index, self._ranks
        )
        options = dataclasses.replace(self._options, as_written=any(e.by_op for e in found), lengths=lengths, **others)
        return Compiled(self.model, self.loss, found, options, self._backend, self._ranks)

    def alone(self, asked: str) -> None:
        """Refuse `asked`, a feature that does not work on several ranks.

        Raises:
            ArgumentError: with `mesh=`.
        """
        if self._ranks is not None:
            raise ArgumentError(
                f"{asked} of a model compiled with mesh= is not supported, as every rank has batches of its own: compile without"
                " it, and go over all of the data on one rank"
            )

    @property
    def ranks(self) -> Ranks | None:
        """The ranks of `mesh=`."""
        return self._ranks

    def program_of(self, inputs: Any, *targets: Any) -> Program:
        """The program that a call with these arguments has just run."""
        latest = self._programs.latest  # set on several ranks, where a look-up would have to gather parameters
        return self.lower(inputs, *targets).program if latest is None else latest.program

    @property
    def options(self) -> Options:
        """The options of `compile`."""
        return self._options

    @property
    def subject(self) -> Subject:
        """The model and the loss."""
        return self._subject

    def arguments(self, inputs: Any, *targets: Any) -> Arguments:
        """The tensors of a call, flat, and where the samples are in each."""
        return flatten_arguments(inputs, targets, self._options.batch_dim, self._options.sample_index)

    def covered(self) -> tuple[list[str], dict[Extension, list[str]]]:
        """(the names of the parameters of all quantities, those of each extension that chose its own)."""
        return covered(self._subject, self.params, self.extensions)

    def _request(self, inputs: Any, targets: tuple) -> Request:
        if self._ranks is not None and any(isinstance(p, DTensor) for p in self.model.parameters()):
            raise ArgumentError(
                "the parameters are sharded, and only a call gathers them: look at the model before fully_shard"
            )
        with compile_lock:
            return self._programs.request(self._subject, inputs, targets, self._subject.autocast())
