"""counts: let all numbers of samples that values are computed with come from one node, `emit.number_of_samples`.

In a part of a batch, sizes of tensors are the part's own, but a value is divided by the number of all samples. A mean
over samples hides that division, so it becomes a sum and a division. Runs before `placements` in a program that is
split.
"""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor, fx

from fxcurv.ir.emit import emit, number_of_samples, samples
from fxcurv.ir.graph import canonical_args
from fxcurv.ir.origin import origin_of
from fxcurv.ir.private import OpOverload, schema_of
from fxcurv.ir.program import Program
from fxcurv.rules.split import ARANGE, CONSTANT
from fxcurv.rules.traits import MEANS, WEIGHED

aten = torch.ops.aten
MEAN, SUM = 1, 2


def counts(program: Program) -> Program:
    """See the module. Where the batch size is a number, there is nothing to do."""
    if program.fixed:
        return program
    for node in list(program.graph.nodes):
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            _spell_out(program, node)
    of_all = _Counts(program)
    for node in list(program.graph.nodes):
        if node.op == "call_function" and isinstance(node.target, OpOverload) and node.target not in ARANGE:
            of_all.replace(node)
    program.refresh_output()
    return program


def _spell_out(program: Program, node: fx.Node) -> None:
    """Replace a mean over samples by a sum and a division."""
    names = [a.name for a in schema_of(node.target).arguments]
    args = canonical_args(node)
    if node.target in MEANS:
        x, dims, keep = args[0], args[1] if len(args) > 2 else None, bool(len(args) > 2 and args[2])
        if _is_over_samples(program, x, dims):
            _replace(program, node, _mean, x, list(dims or range(x.meta["val"].ndim)), keep)
    elif "reduction" in names and args[names.index("reduction")] == MEAN:
        at = names.index("reduction")
        summed = (*args[:at], SUM, *args[at + 1 :])
        if node.target in WEIGHED:
            _spell_out_weighted(program, node, summed)
        elif "total_weight" not in names:
            x = args[names.index("self")]
            if _is_over_samples(program, x, None):
                _replace(program, node, _over_entries, node.target, summed, x)
    elif node.target in WEIGHED and args[names.index("reduction")] == SUM:
        _count_early(program, node, args)


def _is_over_samples(program: Program, x: fx.Node, dims: Any) -> bool:
    """Whether a mean over these axes is one over samples."""
    shape = x.meta["val"].shape
    size = prod(shape[d] for d in (dims if dims else range(len(shape))))
    return isinstance(size, SymInt) and program.batch.evaluate(size, 2) != program.batch.evaluate(size, 3)


def _replace(program: Program, node: fx.Node, fn: Any, *args: Any) -> None:
    new = emit(program, fn, *args, origin=node.meta.get("origin"), before=node)
    program.replace(node, new)
    program.graph.erase_node(node)


def _mean(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return x.sum(dims, keepdim=keep) / prod(x.shape[d] for d in dims)


def _over_entries(op: Any, args: tuple, x: Tensor) -> Tensor:
    return op(*args) / x.numel()


def _spell_out_weighted(program: Program, node: fx.Node, args: tuple) -> None:
    """Let the op give (sum of the losses, sum of the weights), and divide the first by the second where it is read."""
    node.args, node.kwargs = args, {}
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            with program.graph.inserting_after(user):
                total = program.graph.call_function(operator.getitem, (node, 1))
            total.meta = {**user.meta, "val": node.meta["val"][1]}
            with program.graph.inserting_after(total):
                new = program.graph.call_function(aten.div.Tensor, (user, total))
            new.meta = dict(user.meta)
            program.stand_in(user, new)
            new.args = (user, total)
            program.rename({user: new})
    _count_early(program, node, args)


def _count_early(program: Program, node: fx.Node, args: tuple) -> None:
    """Compute the sum of the targets' weights without logits: it travels while the model runs.

    It counts as none of the forward pass, which keeps its order, so that `schedule` puts it first.
    """
    _, target, weight, _, ignored = args
    like, origin = node.meta["val"][1].dtype, origin_of(node, "distribute")
    count = emit(program, _weights, target, weight, ignored, like, origin=origin, before=node)
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 1:
            program.replace(user, count)
            program.graph.erase_node(user)


def _weights(target: Tensor, weight: Tensor | None, ignored: int, dtype: torch.dtype) -> Tensor:
    counted = target != ignored
    if weight is None:
        return counted.to(dtype).sum()
    return torch.where(counted, weight[torch.where(counted, target, 0)], 0).sum()


class _Counts:
    """Rewrites the sizes that values are computed with in terms of the one node."""

    def __init__(self, program: Program):
        self.program, self.made = program, {}  # type: ignore[var-annotated]
        self.node = samples(program)
        self.node.meta["of_all"] = True  # a part's own size is the same expression, unmarked

    def replace(self, node: fx.Node) -> None:
        """Let the numbers that an op on tensors reads be of all samples."""
        if not isinstance(node.meta.get("val"), Tensor | tuple | list):
            return
        schema = schema_of(node.target).arguments
        numbers = {
            a.name for a in schema if str(a.type) in ("number", "Tensor", "Optional[Tensor]", "Optional[number]")
        }
        if node.target in CONSTANT:
            numbers &= {"fill_value", "s"}
        node.args = tuple(self._for_all(a) if schema[k].name in numbers else a for k, a in enumerate(node.args))
        node.kwargs = {name: self._for_all(a) if name in numbers else a for name, a in node.kwargs.items()}

    def _for_all(self, value: Any) -> Any:
        """The same number for all samples."""
        val = value.meta.get("val") if isinstance(value, fx.Node) else None
        if not isinstance(val, SymInt | SymFloat) or value.target is number_of_samples:
            return value
        if value not in self.made:
            self.made[value] = self._made(value)
        return self.made[value]

    def _made(self, value: fx.Node) -> fx.Node:
        leaf = isinstance(value.target, OpOverload) or value.op == "placeholder"  # a size; the rest is Python's
        with self.program.graph.inserting_after(value):
            if not leaf:
                new = self.program.graph.call_function(value.target, tuple(map(self._for_all, value.args)))
            else:
                per = self.program.batch.evaluate(value.meta["val"], 1)
                new = self.node if per == 1 else self.program.graph.call_function(operator.mul, (self.node, per))
        if new is not self.node:
            new.meta = {**value.meta}
        new.meta["of_all"] = True
        return new
