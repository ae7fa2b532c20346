"""The whole computation as an `ExportedProgram`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fxcurv.errors import ArgumentError
from fxcurv.front.arguments import Arguments
from fxcurv.front.observers import refuse_observers
from fxcurv.front.requests import Subject
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program
from fxcurv.operators import Saved
from fxcurv.runtime.stateless import Stateless, named_tensors, parted, refuse_packed


class Exported(nn.Module):
    """The module that is exported: a program with the parameters and buffers that it reads."""

    def __init__(self, model: nn.Module, loss: Any, step: Stateless):
        super().__init__()
        self.model, self.loss, self.step = model, loss, step

    def forward(self, inputs, targets, seed):
        named = named_tensors(self.model, self.loss)
        values = self.step(named, parted((inputs, targets))[1], seed)
        for name, k in self.step.writes.items():
            named[name].copy_(values[k])
        fields = self.step.fields(values)
        return {name: value if name == "output" else _without_classes(value) for name, value in fields.items()}


def _without_classes(value: Any) -> Any:
    """A field without fxcurv's classes, which a loaded program does not know: factors become lists of tensors."""
    if isinstance(value, dict):
        return {name: _without_classes(v) for name, v in value.items()}
    return value if isinstance(value, Tensor) else pytree.tree_leaves(value)


def export(
    subject: Subject, program: Program, arguments: Arguments, inputs: Any, targets: tuple, seed: Tensor
) -> ExportedProgram:
    """See `Compiled.export`."""
    refuse_packed(inputs)
    refuse_observers(program.observed, "an exported program")
    held = pytree.tree_leaves((program.results, program.extras), is_leaf=lambda value: isinstance(value, Saved))
    if any(isinstance(value, Saved) for value in held):
        raise ArgumentError(
            "products are callables, which an exported program cannot return: compile without GGNMP, HMP and PCHMP"
        )
    dims = iter([*arguments.batch_dims, *arguments.target_dims()])

    def spec(leaf: Any) -> Any:
        d = next(dims) if isinstance(leaf, Tensor) else None
        return {d: Dim.AUTO} if d is not None and not program.fixed else None

    shapes = {**dict(zip(("inputs", "targets"), pytree.tree_map(spec, (inputs, targets)), strict=True)), "seed": None}
    whole = Exported(subject.model, subject.loss, Stateless(program, arguments))
    # not `train()`, which would set all submodules, and each has a mode of its own
    whole.training = whole.step.training = subject.model.training
    with torch.no_grad():
        return torch.export.export(whole, (inputs, targets, seed), dynamic_shapes=shapes, strict=False)
