"""The emitted graph outside eager execution: under a backend of `torch.compile`, and exported whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor

from fxcurv.errors import ArgumentError
from fxcurv.ir.private import maybe_mark_dynamic
from fxcurv.ir.program import Program
from fxcurv.passes.recycle import without_memory


@dataclass(frozen=True)
class Backend:
    """How `torch.compile` is called on the emitted graph; `name` "eager": not at all."""

    name: Any = "eager"
    mode: str | None = None
    dynamic: bool | None = None

    def __post_init__(self):
        if self.name == "eager" and (self.mode is not None or self.dynamic is not None):
            raise ArgumentError(
                'mode= and dynamic= are for torch.compile: pass backend="inductor", or another one, too'
            )
        if not isinstance(self.name, str) and not callable(self.name):
            raise ArgumentError(f'backend={self.name!r}: use "eager", "inductor" or another backend of torch.compile')

    def runner(self, program: Program) -> Callable[[Sequence[Any]], tuple]:
        """A function that runs `program`, compiled, on its arguments without memory of earlier results."""
        module = torch.compile(
            without_memory(program), backend=self.name, mode=self.mode, dynamic=self.dynamic, fullgraph=True
        )
        symbolic = [] if program.fixed or self.dynamic is False else _symbolic_dims(program)

        def run(flat: Sequence[Any]) -> tuple:
            given = list(flat)
            for k, dims in symbolic:
                given[k] = given[k].view_as(given[k])  # the mark is set on the tensor object: not on the user's
                maybe_mark_dynamic(given[k], dims)
            if self.mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            return module(*given)

        return run


def _symbolic_dims(program: Program) -> list[tuple[int, list[int]]]:
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
