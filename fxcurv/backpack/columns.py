"""Columns of the loss's Hessian at the model's output, from the loss module and its other arguments alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv import passes
from fxcurv.api import Autocast, Compiled, _doubled, _seed, _single, _tensors
from fxcurv.capture import Arguments, capture, flatten_arguments
from fxcurv.cut import EMPIRICAL, EXACT
from fxcurv.emit import emit
from fxcurv.errors import LossError
from fxcurv.extensions import Extension, SqrtGGNExact
from fxcurv.passes.codegen import codegen
from fxcurv.passes.propagate import Stack, Walk, _visit, births, merged
from fxcurv.passes.schedule import schedule
from fxcurv.passes.simplify import simplify
from fxcurv.program import Program, is_active
from fxcurv.quantity import GRADIENT, Group, SqrtGGN

aten = torch.ops.aten

# Their targets are probabilities, of which the model's output is no longer the logits.
PAST_THE_LOGITS = {aten.nll_loss_nd.default, aten.nll_loss.default, aten.binary_cross_entropy.default}


@dataclass(frozen=True)
class View:
    """How the loss's input is made of the model's output f: a permutation of its axes, or a new shape per sample."""

    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    @staticmethod
    def of(f: Tensor, z: Tensor) -> View | None:
        """The view that `z` is of `f`, None if it is another one than this class knows."""
        if z is f or (z.shape == f.shape and z.stride() == f.stride()):
            return View()
        if z.numel() != f.numel() or z.storage_offset() != f.storage_offset():
            return None
        if z.is_contiguous() and f.is_contiguous():
            return View(shape=_rescaled(z.shape, f.shape[0]))
        layout = list(zip(f.shape, f.stride(), strict=True))
        wanted = list(zip(z.shape, z.stride(), strict=True))
        if sorted(layout) != sorted(wanted) or len(set(layout)) < len(layout):
            return None
        return View(axes=tuple(layout.index(pair) for pair in wanted))


def _rescaled(shape: torch.Size, n: int) -> tuple[int, ...] | None:
    """`shape` with the axis that holds the samples, the first, left open."""
    return (-1, *shape[1:]) if shape and shape[0] % n == 0 else None


class _Viewed(nn.Module):
    def __init__(self, view: View):
        super().__init__()
        self.view = view

    def forward(self, f: Tensor) -> Tensor:
        if self.view.axes is not None:
            return f.permute(self.view.axes)
        return f.reshape(self.view.shape) if self.view.shape is not None else f.clone()


class _Scaled(nn.Module):
    """The loss times the cotangent that reaches it."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, z: Tensor, scale: Tensor, args: tuple, kwargs: dict) -> Tensor:
        return scale * self.loss(z, *args, **kwargs)


def kind_of(extension: Extension) -> int | None:
    """The kind of columns at f that an extension needs, None for the first order."""
    q = extension.requires
    if not isinstance(q, SqrtGGN):
        return None
    return EMPIRICAL if q.empirical else q.mc or EXACT


class LossColumns(Compiled):
    """One GraphModule from f [N, ...], the scale and the loss's arguments to columns [V, *f], one tensor per kind."""

    def __init__(self, loss: nn.Module, view: View, kinds: Sequence[int], extensions: Sequence[Extension]):
        asked = tuple(extensions) if any(e.needs_convex for e in extensions) else (*extensions, SqrtGGNExact())
        super().__init__(_Viewed(view), _Scaled(loss), asked, 0, None, {}, True, False)
        self.kinds = tuple(kinds)

    def __call__(self, f: Tensor, scale: Tensor, args: tuple, kwargs: dict, seed: Tensor) -> tuple[Tensor, list]:
        """The gradient of scale * loss at `f`, and columns of its Hessian, kind by kind."""
        arguments = flatten_arguments((f,), (scale, args, kwargs), 0)
        program = self._program(arguments, Autocast(f.device.type, None))
        flat = self._values(program, arguments, seed)
        if id(program) not in self._checked:
            self._check(program, flat)
        values = program.gm(*flat)
        given = dict(zip(program.output.args[0], values, strict=True))
        columns = [given[program.extras[f"columns_{k}"]] for k in range(len(self.kinds))]
        return given[program.extras["gradient"]], columns

    def _values(self, program: Program, arguments: Arguments, seed: Tensor) -> list[Any]:
        of_loss = dict(_tensors(self.loss))
        targets = arguments.split_targets()
        flat: list[Any] = []
        for bound in program.inputs:
            if bound.kind == "seed":
                flat.append(seed)
            elif bound.kind == "constant":
                flat.append(of_loss.get(bound.name.removeprefix("loss."), program.constants.get(bound.name)))
            else:
                flat.append((arguments.inputs if bound.kind == "input" else targets)[bound.index])
        return flat

    def _lower(self, arguments: Arguments, mode: Autocast, create_graph: bool) -> Program:
        single = arguments.batch_size == 1
        program = self._analyse(_doubled(arguments) if single else arguments, mode)
        if single:
            program = self._analyse(arguments, mode) if program.fixed else _single(program)
        _walk(program, self.kinds)
        return passes.run(program, [simplify, schedule, codegen])

    def _analyse(self, arguments: Arguments, mode: Autocast) -> Program:
        program = capture(self.model, self.loss, arguments)
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        bound = zip(placeholders, program.inputs, strict=True)
        program.params = {"output": next(n for n, b in bound if b.kind == "input")}
        if any(n.target in PAST_THE_LOGITS for n in program.graph.nodes):
            raise LossError(
                "the extended loss reads probabilities, and curvature is that of the logits, which it does not see. Way out: "
                "CrossEntropyLoss or BCEWithLogitsLoss on the logits, or fxcurv.compile(model, loss)."
            )
        program.extensions, program.state["batch_dims"] = self.extensions, arguments.batch_dims
        return passes.run(program, passes.ANALYSIS)


def _walk(program: Program, kinds: Sequence[int]) -> None:
    """Columns at the program's only differentiable input, as `extras`."""
    terms = program.state["terms"]
    groups = [[_group(kind, index, term.node is not None) for index, term in enumerate(terms)] for kind in kinds]
    flat = list(dict.fromkeys(g for several in groups for g in several))
    walk = Walk(program, [GRADIENT, *flat], wanted=set(flat))
    one = emit(program, _ones, program.loss, origin={"stage": "propagate"})
    walk.add(program.loss, Stack((GRADIENT,), (1,), one))
    f = program.params["output"]
    for node in reversed(list(program.graph.nodes)):
        if node is f:
            break
        births.at(walk, node)
        if is_active(node) or node in walk.outputs:
            _visit(walk, node)
    stack = merged(walk, f, walk.cotangents.pop(f))
    starts = {g: sum(stack.columns[:k]) for k, g in enumerate(stack.groups)}
    sizes = dict(zip(stack.groups, stack.columns, strict=True))
    at = starts[GRADIENT]
    program.extras["gradient"] = emit(program, _row, stack.node, at, origin={"stage": "columns"})
    for k, several in enumerate(groups):
        spans = [(starts[g], starts[g] + sizes[g]) for g in several]
        program.extras[f"columns_{k}"] = emit(program, _rows, stack.node, spans, origin={"stage": "columns"})
    program.loss, program.output_leaves, program.mutations = None, [], {}
    program.refresh_output()


def _ones(loss: Tensor) -> Tensor:
    return torch.ones_like(loss).unsqueeze(0)


def _row(stack: Tensor, k: int) -> Tensor:
    return stack[k]


def _rows(stack: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    return torch.cat([stack[a:b] for a, b in spans])


def _group(kind: int, index: int, closed: bool) -> Group:
    if kind == EMPIRICAL:
        return Group("empirical", index)
    if kind == EXACT:
        return Group("exact" if closed else "root", index)
    return Group("mc" if closed else "signs", index, kind)


def drawn(device: torch.device) -> Tensor:
    """A seed from the default generator."""
    return _seed(None, None, device)
