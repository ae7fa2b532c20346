"""The emitted parts of an extended model: one forward part per kind of input, and the backward parts that go with it."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.api import Compiled
from fxcurv.backpack import cut
from fxcurv.backpack.context import disable
from fxcurv.backpack.losses import LossCall, TotalLoss, gradients, leaves_only, same_gradients, targets_of
from fxcurv.errors import LossError
from fxcurv.extensions import Extension
from fxcurv.front.arguments import Arguments, flatten_arguments
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Input, Program
from fxcurv.runtime.call import seed_tensor
from fxcurv.runtime.keys import Key
from fxcurv.runtime.programs import Autocast, at_numbers_if_need_be, tensors_in
from fxcurv.runtime.progress import silent


@dataclass
class Pass:
    """One forward pass of an extended model, as the backward pass finds it.

    Attributes:
        template: the analysed program of the model alone.
        arguments: of the call, without their values.
        samples: the batch size.
        rng: the state of the generators before the pass, if it draws.
        calls: of extended losses on its output.
        twice: backward passes that differentiate results of an earlier backward pass.
    """

    parts: ModelParts
    template: Program
    arguments: Arguments
    samples: int
    mode: Autocast
    rng: Any = None
    calls: list[LossCall] = field(default_factory=list)
    twice: set[int] = field(default_factory=set)


class _Parts(Compiled):
    """Programs of a model that outlives them: an entry of a dictionary by models must not keep its model alive."""

    _as_written = True  # which extensions follow is not known yet
    _schedules = False  # both halves have to be programs of the same captured graph

    def __init__(self, model: nn.Module, extensions: tuple[Extension, ...] = ()):
        self._model = weakref.ref(model)
        super().__init__(None, None, extensions, 0, None, {}, True, False)

    @property
    def model(self) -> nn.Module:
        """The extended model, which is alive while one of its passes is."""
        return self._model()

    @model.setter
    def model(self, _: None) -> None:
        """`Compiled` would hold it."""

    def _analyse(
        self, arguments: Arguments, mode: Autocast, tell: Callable[[str], None] = silent, numbers: tuple = ()
    ) -> Program:
        # a trace has no use for the graphs that the values come from
        inputs, targets = ([t.detach() for t in tensors] for tensors in (arguments.inputs, arguments.targets))
        return super()._analyse(replace(arguments, inputs=inputs, targets=targets), mode, tell, numbers)


class ModelParts(_Parts):
    """The parts of one extended model."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._forwards: dict[int, cut.Part] = {}
        self._random: dict[int, bool] = {}
        self._backwards: dict[Any, list[cut.Backward]] = {}
        self._with_loss: dict[Any, LossParts] = {}

    def begin(self, args: tuple, kwargs: dict) -> tuple[Pass, list[Any]]:
        """A pass for this call, and what its program's placeholders are bound to."""
        arguments = flatten_arguments(self._inputs(args, kwargs), (), 0)
        mode = self._autocast()
        with torch.no_grad(), disable(), torch.autocast(mode.device_type, enabled=False):
            template = self._program(arguments, mode)
            flat = self._bind(template, arguments, None, None)
        rng = _rng_state(arguments.inputs) if self._random[id(template)] else None
        return Pass(self, template, replace(arguments, inputs=[]), arguments.batch_size, mode, rng), flat

    def _inputs(self, args: tuple, kwargs: dict) -> Any:
        if not kwargs:
            return args
        if not args:
            return kwargs
        return dict(inspect.signature(type(self.model).__mro__[2].forward).bind(self.model, *args, **kwargs).arguments)

    def _emitted(self, program: Program, create_graph: bool, tell: Callable[[str], None]) -> Program:
        """The analysed program, numbered; its forward part is emitted at once."""
        self._forwards[id(program)] = cut.forward_part(program)
        tags = [getattr(n.target, "tags", ()) for n in program.graph.nodes]
        self._random[id(program)] = any(torch.Tag.nondeterministic_seeded in t for t in tags)
        return program

    def forward(self, template: Program, flat: list[Any]) -> tuple[list[Tensor], dict[str, Tensor], dict[int, Any]]:
        """(leaves of the output, new values of buffers, every value by number)."""
        placeholders = [n.meta["key"] for n in template.graph.nodes if n.op == "placeholder"]
        part = self._forwards[id(template)]
        leaves, mutations, made = part.gm(*flat)
        values = {**dict(zip(placeholders, flat, strict=True)), **dict(zip(part.keys, made, strict=True))}
        return leaves, dict(zip(template.mutations, mutations, strict=True)), values

    def again(
        self, found: Pass, flat: list[Any], alias: Callable[[Tensor], Tensor]
    ) -> tuple[list[Tensor], dict[int, Any]]:
        """The same forward pass under autograd, for derivatives that the emitted parts do not give.

        alias: what stands for a parameter in it.
        """
        cuda = sorted({t.device.index or 0 for t in leaves_only(flat) if t.is_cuda})
        with torch.enable_grad(), torch.random.fork_rng(cuda, enabled=found.rng is not None):
            if found.rng is not None:
                _set_rng_state(found.rng)
            bound = zip(flat, found.template.inputs, strict=True)
            flat = [alias(t) if what.kind == "param" else t for t, what in bound]
            leaves, _, values = self.forward(found.template, flat)
        return leaves, values

    def backward(
        self, found: Pass, extensions: tuple[Extension, ...], leaves: list[Tensor], gs: Sequence[Any], values: dict
    ) -> dict[str, Any]:
        """field -> parameter name -> value: the gradient from cotangents `gs` of `leaves`, and the extensions."""
        create_graph = torch.is_grad_enabled()
        if all(e.requires.first_order for e in extensions):
            backward = self._of_model(found, extensions, create_graph)
            given = [torch.zeros_like(f) if g is None else g for f, g in zip(leaves, gs, strict=True)]
            cotangents = {Input("cotangent", index=k): g for k, g in enumerate(given)}
            return _run(backward, values, cotangents, create_graph)
        calls = [c for c in found.calls if c.scale is not None]
        _check_calls(calls, extensions)
        key = tuple(c.key() for c in calls), extensions
        if key not in self._with_loss:
            self._with_loss[key] = LossParts(self.model, extensions)
        with disable():
            results, whole = self._with_loss[key].backward(found, calls, leaves, gs, values)
        if not whole:
            results["grad"] = self.backward(found, (), leaves, gs, values)["grad"]
        return results

    def _of_model(self, found: Pass, extensions: tuple[Extension, ...], create_graph: bool) -> cut.Backward:
        """The backward part of the model alone that serves this pass."""
        n, made = found.samples, self._backwards.setdefault((id(found.template), extensions, create_graph), [])
        for backward in made:
            if backward.program.serves(n):
                return backward
        covers = self.covered(extensions)[1]
        with torch.no_grad(), disable():
            backward = at_numbers_if_need_be(
                lambda program: cut.backward_of_model(program, extensions, covers, create_graph),
                cut.with_seams(found.template),
                lambda: cut.with_seams(found.template),
                n,
            )
        made.append(backward)
        return backward


class LossParts(_Parts):
    """Backward parts of a model captured together with the losses that read its output, for a set of extensions."""

    def __init__(self, model: nn.Module, extensions: tuple[Extension, ...]):
        super().__init__(model, extensions)
        self._backwards: dict[Any, cut.Backward] = {}
        self._verified: set[Any] = set()
        self._found: Pass | None = None

    def backward(
        self, found: Pass, calls: list[LossCall], leaves: list[Tensor], gs: Sequence[Any], values: dict
    ) -> tuple[dict[str, Any], bool]:
        """(see `ModelParts.backward`, whether the gradient is that through the output)."""
        create_graph = torch.is_grad_enabled()
        placeholders = [n for n in found.template.graph.nodes if n.op == "placeholder"]
        bound = {what: values[n.meta["key"]] for n, what in zip(placeholders, found.template.inputs, strict=True)}
        inputs = [bound[what] for what in sorted(bound, key=lambda what: what.index) if what.kind == "input"]
        of_inputs = replace(found.arguments, inputs=inputs)
        of_targets = flatten_arguments(tuple(inputs), targets_of(calls), 0)
        structure = of_inputs.structure[0], of_targets.structure[1]
        arguments = replace(
            of_inputs, targets=of_targets.targets, target_template=of_targets.target_template, structure=structure
        )
        self.loss, self._found = TotalLoss(calls), found
        try:
            with torch.no_grad():
                program = self._program(arguments, found.mode, create_graph)
        finally:
            self._found = None
        backward = self._backwards[id(program)]
        given = self._given(backward, arguments, leaves[0].device)
        case = id(program), tuple(g is None for g in gs)
        if case not in self._verified:
            self._verify(backward, calls, leaves, gs, values, given)
            self._verified.add(case)
        return _run(backward, values, given, create_graph), not backward.regularised

    def _key(self, arguments: Arguments) -> Key:
        key = super()._key(arguments)
        return key._replace(structure=(id(self._found.template), key.structure))

    def _emitted(self, program: Program, create_graph: bool, tell: Callable[[str], None]) -> Program:
        program.options = dataclasses.replace(program.options, create_graph=create_graph)
        n = self._found.samples
        self._backwards[id(program)] = cut.backward_of_loss(program, self._found.template, n)
        return program

    def _given(self, backward: cut.Backward, arguments: Arguments, device: torch.device) -> dict[Input, Any]:
        """What the backward part reads besides values of the forward pass."""
        of_loss, targets = dict(tensors_in(self.loss)), arguments.split_targets()
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

    def _verify(self, backward: cut.Backward, calls, leaves, gs, values, given) -> None:
        """What reaches f is the gradient of the extended losses, so that their Hessian is all of it; and the checks."""
        if not same_gradients(gradients(calls, leaves), gs):
            raise LossError(
                f"{self.extensions[0]}: the model's output also reaches the loss by another way than the extended loss module, "
                "whose Hessian is not all. Way out: put everything that reads the output into one loss module, and extend it."
            )
        if backward.check is not None:
            with torch.no_grad():
                holds = backward.check.gm(*_arguments(backward.check, values, given))
            for held, error in zip(holds, backward.verdicts, strict=True):
                if not bool(held):
                    raise error()


def _check_calls(calls: list[LossCall], extensions: tuple[Extension, ...]) -> None:
    if not calls or not all(c.known for c in calls):
        second = next(e for e in extensions if not e.requires.first_order)
        raise LossError(
            f"{second} needs the loss's Hessian at the model's output, and no extended loss read it (a reshape or a "
            "permutation of it at most). Way out: loss = extend(lossfunc)(extend(model)(x), y), or fxcurv.compile."
        )


def _arguments(part: cut.Part, values: dict[int, Any], given: dict[Input, Any]) -> list[Any]:
    return [values[k] for k in part.keys] + [given[what] for what in part.given]


def _run(backward: cut.Backward, values: dict[int, Any], given: dict[Input, Any], create_graph: bool) -> dict[str, Any]:
    inputs = _arguments(backward.part, values, given)
    results = cut.results_of(backward, backward.part.gm(*inputs))
    return results if create_graph else _owned(results, inputs, backward.program.borrowing)


def _owned(results: dict[str, Any], inputs: list[Any], borrowing: set[str]) -> dict[str, Any]:
    """Results in memory of their own: autograd and optimizers write to gradients in place."""
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
    cuda = sorted({t.device.index or 0 for t in inputs if t.is_cuda})
    return torch.get_rng_state(), {k: torch.cuda.get_rng_state(k) for k in cuda}


def _set_rng_state(state: Any) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    for device, one in cuda.items():
        torch.cuda.set_rng_state(one, device)
