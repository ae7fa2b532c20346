"""A call under `mesh=` inside `torch.compile`: one op of the step, which makes the same call as outside of it.

The op talks to other ranks, so Dynamo does not trace into it, and only knows the shapes that the program returns. The
program is made when the step is traced, which every rank does at the first call of a kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import ArgumentError
from fxcurv.ir.private import pytree, tracing
from fxcurv.result import Result
from fxcurv.rules.traits import over_ranks
from fxcurv.runtime.bind import seed_tensor
from fxcurv.runtime.programs import Ready
from fxcurv.runtime.stateless import fields_of, parted, refuse_packed
from fxcurv.runtime.step import STEPS, Steps, filled_in


@dataclass
class Form:
    """How the op `on_ranks` returns the fields of a result.

    Attributes:
        ready: the program.
        spec: the fields' structure; `nodes`: what the program returns for each leaf.
        samples: (which tensor, its dimension, rows per sample) that say how many samples there are.
    """

    ready: Ready
    spec: Any
    nodes: list[fx.Node]
    samples: tuple[int, int, int]

    def shapes(self, tensors: Sequence[Tensor]) -> list[tuple[list[int], torch.dtype, torch.device]]:
        """(shape, dtype, device) of every leaf, for these inputs and targets."""
        which, dim, rows = self.samples
        n, batch = int(tensors[which].shape[dim]) // rows, self.ready.program.batch
        vals = [node.meta["val"] for node in self.nodes]
        return [([batch.evaluate(s, n) for s in val.shape], val.dtype, val.device) for val in vals]


def call_in_step_on_ranks(steps: Steps, inputs: Any, targets: tuple, seed: int | Tensor | None) -> Result:
    """`Compiled.__call__` under `mesh=`, where Dynamo traces it.

    Raises:
        ArgumentError: for products, buffers that a call writes, sharded parameters, factors at one rank each, pairs of samples,
            and autocast.
    """
    refuse_packed(inputs)
    subject = steps.subject
    skeleton, tensors = parted((inputs, targets))
    modes = [m.training for root in subject.roots() for m in root.modules()]
    key = form_for(steps.name, skeleton, modes, *tensors)
    named = [p.detach() for _, p in subject.named_parameters()]
    drawn = None if seed is None else seed_tensor(seed, None, torch.device("cpu"))
    values = on_ranks(steps.name, key, named, [t.detach() for t in tensors], drawn)
    fields = pytree.tree_unflatten(values, getattr(steps.forms, key).spec)
    return Result(fields, steps.programs.extensions, subject.holder)


@torch.compiler.assume_constant_result
def form_for(name: str, skeleton: Any, modes: list[bool], *tensors: Tensor) -> str:
    """The name of the form of a call with arguments of this structure. Dynamo calls this with real tensors."""
    inputs, targets = filled_in(skeleton, tensors)
    with tracing(None):
        steps = STEPS[name]
        key = f"form_{len(vars(steps.forms))}"
        request = steps.programs.request(steps.subject, inputs, targets, steps.subject.autocast())
        if request.mode.dtype is not None:
            raise ArgumentError("mesh= inside torch.compile under autocast is not supported: call it outside")
        with request.apart():
            ready = steps.programs.held(request)
        if ready is None or not ready.checked:
            ready = steps.call(inputs, targets, prepare=True)
        program = ready.program
        others = {
            "products": program.borrowing, "new values of buffers (batch norm in training mode)": program.mutations,
            "assign='layers'": program.spread.owners,
            "pairs of samples": [n for n in program.graph.nodes if over_ranks(n) == "rows"],
        }  # fmt: skip
        for what in [what for what, found in others.items() if found]:
            raise ArgumentError(f"mesh= inside torch.compile with {what} is not supported: call it outside")
        nodes, spec = pytree.tree_flatten(fields_of(program, lambda n: n))
        given = request.arguments
        samples = next((k, d, given.rows[k] or 1) for k, d in enumerate(given.batch_dims) if d is not None)
        form = Form(ready, spec, nodes, samples)
        steps.skeletons[key] = skeleton
        setattr(steps.forms, key, form)
        return key


@torch.library.custom_op("fxcurv::on_ranks", mutates_args=())
def on_ranks(name: str, form: str, named: list[Tensor], tensors: list[Tensor], seed: Tensor | None) -> list[Tensor]:
    """The leaves of a result's fields.

    Args:
        name, form: the names of the `Steps` and of the `Form`.
        named: the parameters; `tensors`: inputs, then targets.
    """
    steps = STEPS[name]
    inputs, targets = filled_in(steps.skeletons[form], tensors)
    values = {n: t for (n, _), t in zip(steps.subject.named_parameters(), named, strict=True)}
    result = steps.call(inputs, targets, seed=None if seed is None else int(seed), values=values)
    known = getattr(steps.forms, form)
    fields = {field: value for field, value in result._fields.items() if field != "sizes"}
    leaves = pytree.tree_leaves(fields)
    shapes = known.shapes(tensors)
    if [list(t.shape) for t in leaves] != [shape for shape, *_ in shapes]:
        raise ArgumentError(
            "inside torch.compile, the model is not what the step was compiled for: compile the step again"
        )
    return [t.clone() for t in leaves]


@on_ranks.register_fake
def _(name: str, form: str, named: list[Tensor], tensors: list[Tensor], seed: Tensor | None) -> list[Tensor]:
    shapes = getattr(STEPS[name].forms, form).shapes(tensors)
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in shapes]
