"""The emitted parts of an extended model: one forward part per kind of input, and the backward parts that go with it."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.backpack import cut
from fxcurv.backpack.check import PassCheck
from fxcurv.backpack.context import disable
from fxcurv.backpack.losses import LossCall, TotalLoss, gradients, leaves_only, same_gradients, targets_of, tensors_of
from fxcurv.errors import ArgumentError, LossError, SelfCheckError
from fxcurv.extensions import Extension
from fxcurv.front.arguments import Arguments, flatten_arguments
from fxcurv.front.requests import Autocast, Request, Subject, tensors_in
from fxcurv.ir.private import no_hooks, pytree
from fxcurv.ir.program import Input, Program
from fxcurv.ir.state import Options
from fxcurv.rules.traits import random
from fxcurv.runtime.bind import bind, cuda_devices, seed_tensor
from fxcurv.runtime.empty import zeros_of
from fxcurv.runtime.one import serves_one
from fxcurv.runtime.programs import Programs, Ready, Tell, at_numbers_if_need_be, covered, emitted

# `as_written`, because the extensions are not known yet when the forward part is made. No schedules, because both
# halves must be programs of the same captured graph.
OPTIONS = Options(as_written=True, schedules=False)


@dataclass(eq=False)
class Forward:
    """The forward part of a model for one kind of input, and the backward parts that go with it.

    Attributes:
        program: the analysed program of the model alone, numbered.
        random: whether it draws random numbers.
        backwards: (extensions, create_graph) -> endings of the model alone, for different batch sizes.
        with_loss: (keys of the calls of extended losses, extensions) -> parts captured together with the losses.
        roots: programs for the roots of loss Hessians at the output (`backpack.custom`).
    """

    program: Program
    part: cut.Part
    random: bool
    backwards: dict[tuple[tuple[Extension, ...], bool], list[Ending]] = field(default_factory=dict)
    with_loss: dict[tuple[Any, tuple[Extension, ...]], LossParts] = field(default_factory=dict)
    roots: dict[Any, Any] = field(default_factory=dict)


def _make_forward(program: Program, tell: Tell) -> Forward:
    part = cut.forward_part(program)
    return Forward(program, part, any(random(n.target) for n in program.graph.nodes))


@dataclass
class Pass:
    """One forward pass of an extended model, as the backward pass finds it.

    Attributes:
        forward: the forward part that ran.
        arguments: of the call, without the input tensors.
        samples: the batch size.
        rng: the state of the generators before the pass, if it draws random numbers.
        calls: of extended losses on its output.
        twice: numbers of backward passes that differentiate results of an earlier backward pass.
        leaves: the tensors of the output, as long as someone holds them; `shapes`: theirs.
        follows: passes of extended models that take the output.
        arrived: the number of the last backward pass that came here, and the calls of extended losses that it came by.
        cotangents: of the output's leaves, in that backward pass.
        context: the context in which the backward pass runs, whichever is active; None: the active one.
    """

    parts: ModelParts
    forward: Forward
    arguments: Arguments
    samples: int
    mode: Autocast
    rng: Any = None
    calls: list[LossCall] = field(default_factory=list)
    twice: set[int] = field(default_factory=set)
    leaves: list[weakref.ref] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    follows: list[Any] = field(default_factory=list)
    arrived: tuple[int, list[LossCall]] = (-1, [])
    cotangents: Sequence[Any] = ()
    context: Any = None

    def forget(self) -> None:
        """Drop what arrived by the backward pass that has ended."""
        self.arrived, self.cotangents = (-1, []), ()

    @property
    def template(self) -> Program:
        """The analysed program of the model alone."""
        return self.forward.program

    def bound(self, values: dict[int, Any]) -> dict[Input, Any]:
        """What the placeholders of the template were bound to; `values`: those of the pass, by number."""
        placeholders = [n for n in self.template.graph.nodes if n.op == "placeholder"]
        return {what: values[n.meta["key"]] for n, what in zip(placeholders, self.template.inputs, strict=True)}

    def with_inputs(self, bound: dict[Input, Any]) -> Arguments:
        """The arguments of the call, with the input tensors taken from `bound`."""
        inputs = [bound[what] for what in sorted(bound, key=lambda what: what.index) if what.kind == "input"]
        return replace(self.arguments, inputs=inputs)


class ModelParts:
    """The parts of one extended model. They hold it weakly, as values of a dictionary whose weak keys are models."""

    def __init__(self, model: nn.Module):
        self.of(model)
        self._programs: Programs[Forward] = Programs((), OPTIONS, _make_forward)
        self._shapes: dict[tuple[Extension, ...], Programs[Ready]] = {}

    def of(self, model: nn.Module) -> ModelParts:
        """Let these parts serve `model`, which computes the same; returns them."""
        self._model = weakref.ref(model)
        return self

    @property
    def model(self) -> nn.Module:
        """The extended model, which is alive while one of its passes is."""
        model = self._model()
        assert model is not None
        return model

    def arguments(self, args: tuple, kwargs: dict) -> tuple[Arguments, Autocast]:
        """(the flat arguments of a call, the state of autocast)."""
        return flatten_arguments(self._inputs(args, kwargs), (), 0), Subject(self.model, None).autocast()

    def begin_with(self, arguments: Arguments, mode: Autocast) -> tuple[Pass, list[Any]]:
        """A pass for these arguments, and what its program's placeholders are bound to."""
        subject = Subject(self.model, None, watched=True)
        request = _request(subject, arguments, mode)
        with torch.no_grad(), _as_plain(self.model), torch.autocast(request.mode.device_type, enabled=False):
            forward = self._programs.find(request)
            flat = bind(forward.program, subject, arguments, None, None)
        rng = _rng_state(arguments.inputs) if forward.random else None
        return Pass(self, forward, replace(arguments, inputs=[]), arguments.batch_size, request.mode, rng), flat

    def without_samples(
        self, extensions: tuple[Extension, ...], arguments: Arguments, mode: Autocast
    ) -> tuple[Program, dict[str, Any]]:
        """(a program, field -> parameter name -> value) for an empty batch: zeros in the shapes of the program.

        Raises:
            ArgumentError: for products.
        """
        products = [type(e).__name__ for e in extensions if e.requires.of_vectors]
        if products:
            raise ArgumentError(f"the batch is empty, which {products[0]} cannot be of: pass at least one sample")
        if extensions not in self._shapes:
            self._shapes[extensions] = Programs(extensions, replace(OPTIONS, check=None), emitted, serves_one, Ready)
        with torch.no_grad(), _as_plain(self.model), torch.autocast(mode.device_type, enabled=False):
            # shapes do not depend on the loss: as many columns as the output has entries, or as are sampled
            program = self._shapes[extensions].like(_request(Subject(self.model, _squares), arguments, mode)).program
        return program, zeros_of(program, arguments)

    def _inputs(self, args: tuple, kwargs: dict) -> Any:
        if not kwargs:
            return args
        if not args:
            return kwargs
        plain: Any = type(self.model).plain  # type: ignore[attr-defined]
        return dict(inspect.signature(plain.forward).bind(self.model, *args, **kwargs).arguments)

    def run(self, forward: Forward, flat: list[Any]) -> tuple[list[Tensor], dict[str, Tensor], dict[int, Any]]:
        """(leaves of the output, new values of buffers, every value by number)."""
        placeholders = [n.meta["key"] for n in forward.program.graph.nodes if n.op == "placeholder"]
        leaves, mutations, made = forward.part.gm.forward(*flat)  # not called: it has no hooks
        values = {**dict(zip(placeholders, flat, strict=True)), **dict(zip(forward.part.keys, made, strict=True))}
        return leaves, dict(zip(forward.program.mutations, mutations, strict=True)), values

    def again(
        self, found: Pass, flat: list[Any], alias: Callable[[Tensor], Tensor]
    ) -> tuple[list[Tensor], dict[int, Any]]:
        """Run the same forward pass under autograd, for derivatives that the emitted parts do not give.

        alias: gives the tensor that stands for a parameter in it.
        """
        cuda = cuda_devices(leaves_only(flat))
        with torch.enable_grad(), torch.random.fork_rng(cuda, enabled=found.rng is not None):
            if found.rng is not None:
                _set_rng_state(found.rng)
            bound = zip(flat, found.template.inputs, strict=True)
            flat = [alias(t) if what.kind == "param" else t for t, what in bound]
            leaves, _, values = self.run(found.forward, flat)
        return leaves, values

    def backward(
        self,
        found: Pass,
        extensions: tuple[Extension, ...],
        leaves: list[Tensor],
        gs: Sequence[Any],
        values: dict,
        check: bool = False,
    ) -> dict[str, Any]:
        """field -> parameter name -> value: the gradient from cotangents `gs` of `leaves`, and the extensions.

        check: whether the first results of a backward part are compared with plain PyTorch's.
        """
        create_graph = torch.is_grad_enabled()
        if all(e.requires.first_order for e in extensions):
            ending = self._ending_of_model(found, extensions, create_graph)
            given = [torch.zeros_like(f) if g is None else g for f, g in zip(leaves, gs, strict=True)]
            cotangents = {Input("cotangent", index=k): g for k, g in enumerate(given)}
            results = _run(ending.backward, values, cotangents, create_graph)
            if check:
                self._check(found, ending, leaves, gs, values, results)
            return results
        calls = [c for c in found.calls if c.scale is not None]
        _check_calls(calls, extensions)
        key = tuple(c.key() for c in calls), extensions
        if key not in found.forward.with_loss:
            found.forward.with_loss[key] = LossParts(found.template, extensions)
        with _as_plain(self.model):
            results, ending = found.forward.with_loss[key].backward(found, calls, leaves, gs, values)
        if ending.backward.regularised:
            results["grad"] = self.backward(found, (), leaves, gs, values)["grad"]
        if check:
            self._check(found, ending, leaves, gs, values, results)
        return results

    def _check(
        self,
        found: Pass,
        ending: Ending,
        leaves: list[Tensor],
        gs: Sequence[Any],
        values: dict,
        results: dict[str, Any],
    ) -> None:
        """Compare the first results of a backward part with plain PyTorch's, unless the model has changed since the pass."""
        if ending.checked or found.forward.random or all(g is None for g in gs):
            return
        bound = found.bound(values)
        request = _request(Subject(self.model, None, watched=True), found.with_inputs(bound), found.mode)
        with _as_plain(self.model):
            if not self._programs.holds(found.forward, request):
                return
            flat = [bound[what] for what in found.template.inputs]
            try:
                PassCheck(found.template, ending.backward.program, request, flat, gs).compare(
                    (None, leaves, {}, results, {})
                )
            except SelfCheckError as error:
                self._refuse_changed(found, flat, leaves, error)
                raise
        ending.checked = True

    def _refuse_changed(self, found: Pass, flat: list[Any], leaves: list[Tensor], error: SelfCheckError) -> None:
        """Say so if numbers differ because what the forward pass read has been written to: it gives another output now.

        Raises:
            ArgumentError: if it does.
        """
        now = self.run(found.forward, [t.clone() if isinstance(t, Tensor) else t for t in flat])[0]
        if all(torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in zip(now, leaves, strict=True)):
            return
        raise ArgumentError(
            f"parameters, buffers or inputs of {type(self.model).__name__} have been written to between its forward and this "
            "backward pass, through .data perhaps, which autograd does not see: the forward pass gives another output now, so "
            "gradients would be of neither. Way out: change them after backward(), or run the forward pass again"
        ) from error

    def _ending_of_model(self, found: Pass, extensions: tuple[Extension, ...], create_graph: bool) -> Ending:
        """The backward part of the model alone that serves this pass."""
        n, made = found.samples, found.forward.backwards.setdefault((extensions, create_graph), [])
        for ending in made:
            if ending.program.serves(n):
                return ending
        covers = covered(self.model, None, extensions)[1]
        with torch.no_grad(), disable():
            backward = at_numbers_if_need_be(
                lambda program: cut.backward_of_model(program, extensions, covers, create_graph),
                cut.with_seams(found.template),
                lambda: cut.with_seams(found.template),
                n,
            )
        made.append(Ending(backward.program, backward))
        return made[-1]


@dataclass(eq=False)
class Ending:
    """A backward part.

    Attributes:
        verified: for which leaves without a cotangent the extended losses were seen to be all that reads the output.
        checked: whether its first results were compared with plain PyTorch's.
    """

    program: Program
    backward: cut.Backward
    verified: set[tuple[bool, ...]] = field(default_factory=set)
    checked: bool = False


def _make_ending(template: Program, program: Program, tell: Tell) -> Ending:
    return Ending(program, cut.backward_of_loss(program, template, program.batch.size))


class LossParts:
    """Backward parts of a model captured together with the losses that read its output, for a set of extensions.

    Args:
        template: the analysed program of the model alone.
    """

    def __init__(self, template: Program, extensions: tuple[Extension, ...]):
        self.extensions = extensions
        self._programs: Programs[Ending] = Programs(extensions, OPTIONS, partial(_make_ending, template))

    def backward(
        self, found: Pass, calls: list[LossCall], leaves: list[Tensor], gs: Sequence[Any], values: dict
    ) -> tuple[dict[str, Any], Ending]:
        """(the results of `ModelParts.backward`, the part that gave them)."""
        create_graph = torch.is_grad_enabled()
        of_inputs = found.with_inputs(found.bound(values))
        of_targets = flatten_arguments(tuple(of_inputs.inputs), targets_of(calls), 0)
        structure = of_inputs.structure[0], of_targets.structure[1]
        arguments = replace(
            of_inputs, targets=of_targets.targets, target_template=of_targets.target_template, structure=structure
        )
        loss = TotalLoss(calls)
        with torch.no_grad():
            ending = self._programs.find(
                _request(Subject(found.parts.model, loss), arguments, found.mode, create_graph)
            )
        backward = ending.backward
        given = _other_inputs(backward, loss, arguments, leaves[0].device)
        case = tuple(g is None for g in gs)
        if case not in ending.verified:
            self._verify(backward, calls, leaves, gs, values, given)
            ending.verified.add(case)
        return _run(backward, values, given, create_graph), ending

    def _verify(self, backward: cut.Backward, calls, leaves, gs, values, given) -> None:
        """Check that the cotangents of f are the gradient of the extended losses, and the conditions on values.

        Otherwise the Hessian of these losses would not be complete.
        """
        if not same_gradients(gradients(calls, leaves), gs):
            raise LossError(
                f"{self.extensions[0]}: the model's output also reaches the loss by another way than the extended loss module, "
                "whose Hessian is not all. Way out: put everything that reads the output into one loss module, and extend it."
            )
        if backward.check is not None:
            with torch.no_grad():
                holds = backward.check.gm.forward(*_arguments(backward.check, values, given))
            for held, error in zip(holds, backward.verdicts, strict=True):
                if not bool(held):
                    raise error()


def _squares(output: Any) -> Tensor:
    found = [nn.functional.mse_loss(f, torch.zeros_like(f), reduction="sum") for f in tensors_of(output)]
    return sum(found[1:], found[0])


@contextlib.contextmanager
def _as_plain(model: nn.Module) -> Iterator[None]:
    """The extended model as a plain one, without its own hooks: they run where the user calls it."""
    with no_hooks(model), disable():
        yield


def _request(subject: Subject, arguments: Arguments, mode: Autocast, create_graph: bool = False) -> Request:
    """A request with detached tensors: a trace has no use for autograd's graph behind them."""
    inputs, targets = ([t.detach() for t in tensors] for tensors in (arguments.inputs, arguments.targets))
    return Request(subject, replace(arguments, inputs=inputs, targets=targets), mode, create_graph)


def _other_inputs(
    backward: cut.Backward, loss: nn.Module, arguments: Arguments, device: torch.device
) -> dict[Input, Any]:
    """What the backward part reads beside values of the forward pass."""
    of_loss, targets = dict(tensors_in(loss)), arguments.split_targets()
    given: dict[Input, Any] = {}
    for part in filter(None, (backward.part, backward.check)):
        for what in part.given:
            if what.kind == "seed":
                given.setdefault(what, seed_tensor(None, None, device))
            elif what.kind == "target":
                given[what] = targets[what.index]
            else:
                own = of_loss.get(what.name.removeprefix("loss."))
                given[what] = backward.program.constants[what.name] if own is None else own
    return given


def _check_calls(calls: list[LossCall], extensions: tuple[Extension, ...]) -> None:
    if not calls or not all(c.known for c in calls):
        second = next(e for e in extensions if not e.requires.first_order)
        raise LossError(
            f"{second} needs the loss's Hessian at the model's output, and no extended loss read it (as it is, or its entries in "
            "another order or some of them, each sample's together and none twice). Way out: loss = "
            "extend(lossfunc)(extend(model)(x), y), or what is computed of the output as part of the model; or fxcurv.compile."
        )


def _arguments(part: cut.Part, values: dict[int, Any], given: dict[Input, Any]) -> list[Any]:
    return [values[k] for k in part.keys] + [given[what] for what in part.given]


def _run(backward: cut.Backward, values: dict[int, Any], given: dict[Input, Any], create_graph: bool) -> dict[str, Any]:
    inputs = _arguments(backward.part, values, given)
    results = cut.results_of(backward, backward.part.gm.forward(*inputs))
    return results if create_graph else _clone_shared(results, inputs, backward.program.borrowing)


def _clone_shared(results: dict[str, Any], inputs: list[Any], borrowing: set[str]) -> dict[str, Any]:
    """Clone results that share memory with inputs or others: autograd and optimizers write to gradients in place."""
    taken = {t.untyped_storage().data_ptr() for t in leaves_only(inputs)}
    out: dict[str, Any] = {}

    def own(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in taken else value

    for name in sorted(results, key=lambda name: name == "grad"):
        if name in borrowing:
            out[name] = results[name]
            continue
        out[name] = pytree.tree_map(own, results[name])
        if name != "grad":
            taken |= {t.untyped_storage().data_ptr() for t in leaves_only(out[name])}
    return out


def _rng_state(inputs: list[Tensor]) -> Any:
    cuda = cuda_devices(inputs)
    return torch.get_rng_state(), {k: torch.cuda.get_rng_state(k) for k in cuda}


def _set_rng_state(state: Any) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    for device, one in cuda.items():
        torch.cuda.set_rng_state(one, device)
