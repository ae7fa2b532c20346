"""The emitted graph outside eager execution: under a backend of `torch.compile`, and exported whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.export import Dim, ExportedProgram

from fxcurv._torch import maybe_mark_dynamic, pytree
from fxcurv.arguments import Arguments
from fxcurv.dynamo import Step, named_tensors, parted
from fxcurv.errors import ArgumentError
from fxcurv.passes.recycle import functional
from fxcurv.product import Saved
from fxcurv.program import Program


@dataclass(frozen=True)
class Backend:
    """How `torch.compile` is called on the emitted graph; `name` "eager": not at all."""

    name: Any = "eager"
    mode: str | None = None
    dynamic: bool | None = None

    def __post_init__(self):
        if self.name == "eager" and (self.mode is not None or self.dynamic is not None):
            raise ArgumentError('mode= and dynamic= are for torch.compile: pass backend="inductor", or another one, too')
        if not isinstance(self.name, str) and not callable(self.name):
            raise ArgumentError(f'backend={self.name!r}: use "eager", "inductor" or another backend of torch.compile')

    def runner(self, program: Program) -> Callable[[Sequence[Any]], tuple]:
        """What computes `program` from its arguments but memory of earlier results."""
        module = torch.compile(
            functional(program), backend=self.name, mode=self.mode, dynamic=self.dynamic, fullgraph=True
        )
        symbolic = [] if program.fixed or self.dynamic is False else _symbolic(program)

        def run(flat: Sequence[Any]) -> tuple:
            given = list(flat)
            for k, dims in symbolic:
                given[k] = given[k].view_as(given[k])  # the mark is on the tensor, which is the user's
                maybe_mark_dynamic(given[k], dims)
            if self.mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            return module(*given)

        return run


def _symbolic(program: Program) -> list[tuple[int, list[int]]]:
    """(argument, its dimensions that follow the batch size)."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    kept = [n for n, i in zip(placeholders, program.inputs, strict=True) if i.kind != "memory"]
    found = []
    for k, node in enumerate(kept):
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            dims = [d for d, s in enumerate(val.shape) if isinstance(s, SymInt) and s.node.expr.free_symbols]
            found += [(k, dims)] if dims else []
    return found


class _Whole(nn.Module):
    """What is exported: a program with the parameters and buffers that it reads."""

    def __init__(self, model: nn.Module, loss: Any, step: Step):
        super().__init__()
        self.model, self.loss, self.step = model, loss, step

    def forward(self, inputs, targets, seed):
        named = named_tensors(self.model, self.loss)
        values = self.step(named, parted((inputs, targets))[1], seed)
        for name, k in self.step.writes.items():
            named[name].copy_(values[k])
        fields = self.step.fields(values)
        return {name: value if name == "output" else _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    """A field without classes of our own, which a loaded program does not know: factors become lists of tensors."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return value if isinstance(value, Tensor) else pytree.tree_leaves(value)


def export(
    model: nn.Module, loss: Any, program: Program, arguments: Arguments, inputs: Any, targets: tuple, seed: Tensor
) -> ExportedProgram:
    """See `Compiled.export`."""
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
    whole = _Whole(model, loss, Step(program, arguments))
    whole.train(model.training)
    with torch.no_grad():
        return torch.export.export(whole, (inputs, targets, seed), dynamic_shapes=shapes, strict=False)
