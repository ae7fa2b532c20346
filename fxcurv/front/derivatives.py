"""Derivatives that a model or loss takes of its own values.

While the model is traced, `torch.autograd.grad` becomes one op, `fxcurv::derivative`. `expand` replaces it in the
lifted graph: a reverse walk from its outputs to its inputs applies the rules' transposes, node after node. Derivatives
are expanded in the graph's order, so a derivative of a derivative finds the inner one expanded. Nothing is computed
twice, dropout's mask included, and every new node carries the source line of the op that it transposes.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import CaptureError, FxcurvError
from fxcurv.ir.emit import emit
from fxcurv.ir.graph import ancestors, canonical_args, dependent, has_floats, holds_complex
from fxcurv.ir.origin import locate, origin_of, running_line
from fxcurv.ir.placement import REPLICATE
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program
from fxcurv.ir.traced import sum_of, zeros_behind
from fxcurv.passes.normalize import rewritten
from fxcurv.rules.base import AGAIN, FAILURES, FALLBACK, Rule, rule_of
from fxcurv.rules.call import Call
from fxcurv.rules.custom import Custom
from fxcurv.rules.registered import registered_as_functions
from fxcurv.rules.traits import APART, CUTS, random


@torch.library.custom_op("fxcurv::derivative", mutates_args=())
def derivative(outputs: list[Tensor], cotangents: list[Tensor], inputs: list[Tensor], several: bool) -> list[Tensor]:
    """The gradients of `outputs` in `inputs`, while a model is captured.

    Args:
        several: whether cotangents are [V, *output], and gradients [V, *input].
    """
    raise NotImplementedError


@derivative.register_fake
def _(outputs, cotangents, inputs, several):
    lead = cotangents[0].shape[:1] if several else ()
    return [x.new_empty((*lead, *x.shape)) for x in inputs]


derivative.register_autograd(lambda ctx, *grads: None)  # so that what it returns requires a gradient, as in PyTorch


WAY_OUT = "Way out: write the op in other PyTorch ops, or the derivative as a formula."

# ---- while the model is traced ------------------------------


def gradients(
    outputs: Any, inputs: Any, grad_outputs: Any = None, retain_graph: bool | None = None, create_graph: bool = False,
    only_inputs: bool = True, allow_unused: bool | None = None, is_grads_batched: bool = False, materialize_grads: bool = False,
) -> Any:  # fmt: skip
    """`torch.autograd.grad` of traced tensors."""
    outputs, wrt = _tuple(outputs), _tuple(inputs)
    if not all(isinstance(t, Tensor) for t in (*outputs, *wrt)):
        raise CaptureError(
            f"torch.autograd.grad of gradient edges is not kept\n{running_line()}Way out: pass the tensors."
        )
    given = _tuple(grad_outputs) if grad_outputs is not None else (None,) * len(outputs)
    pairs = [(y, g) for y, g in zip(outputs, given, strict=True) if y.requires_grad]
    if not pairs or not all(x.requires_grad for x in wrt):
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    if create_graph and not torch.is_grad_enabled():
        raise CaptureError(
            f"torch.autograd.grad(create_graph=True) under no_grad is not kept\n{running_line()}Way out: torch.enable_grad()."
        )
    for y, g in pairs:
        if g is None and y.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
    ys = [y for y, _ in pairs]
    gs = [torch.ones_like(y) if g is None else g for y, g in pairs]
    reached = _reached_inputs(ys, wrt)
    some = [x for x, r in zip(wrt, reached, strict=True) if r]
    found = iter(torch.ops.fxcurv.derivative(ys, gs, some, is_grads_batched) if some else ())
    result = tuple([next(found) if r else None for r in reached])
    if materialize_grads:
        result = tuple([torch.zeros_like(x) if g is None else g for g, x in zip(result, wrt, strict=True)])
    elif not allow_unused and not all(reached):
        raise RuntimeError("One of the differentiated Tensors appears to not have been used in the graph")
    if not create_graph:
        result = tuple([g if g is None else g.detach() for g in result])
    return dict(zip(inputs, result, strict=True)) if isinstance(inputs, Mapping) else result


def _tuple(value: Any) -> tuple:
    if isinstance(value, Mapping):
        return tuple(value.values())
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _reached_inputs(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[bool]:
    """For each input, whether autograd's graph leads to it from the outputs."""
    edge = torch.autograd.graph.get_gradient_edge
    stack: list[Any] = [edge(y)[:2] for y in outputs]
    seen: set[Any] = set()
    visited: set[Any] = set()
    while stack:
        node, number = stack.pop()
        if (node, number) in seen or node is None:
            continue
        if node not in visited:
            stack += node.next_functions
        visited.add(node)
        seen.add((node, number))
    return [tuple(edge(x)[:2]) in seen for x in inputs]


# ---- in the lifted graph ------------------------------


def expand(program: Program) -> None:
    """Replace every derivative by other ops, in the graph's order.

    Raises:
        CaptureError: where an op on the way cannot be differentiated.
    """
    for node in [n for n in program.graph.nodes if n.target is torch.ops.fxcurv.derivative.default]:
        for user, new in zip(_items(node), _differentiate(program, node), strict=True):
            if user is not None:
                program.replace(user, new)
                program.graph.erase_node(user)
        program.graph.erase_node(node)
    program.refresh_output()
    program.graph.eliminate_dead_code()


def _items(node: fx.Node) -> list[fx.Node | None]:
    users = {u.args[1]: u for u in node.users}
    return [users.get(k) for k in range(len(node.meta["val"]))]


def _differentiate(program: Program, node: fx.Node) -> list[fx.Node]:
    while rewritten(program, _nodes_between(program, node), inside=True):
        pass
    registered_as_functions(program, _nodes_between(program, node))
    outputs, cotangents, inputs, several = node.args
    inputs, between = [_strip_mark(x) for x in inputs], _nodes_between(program, node)
    walk = _Walk(program, node, between)
    for y, g in zip(outputs, cotangents, strict=True):
        walk.add(y, g if several else walk.emit(_add_column_axis, g))
    found = {}
    for value in reversed([n for n in program.graph.nodes if n in between]):
        if value in inputs:  # its cotangent goes on as well: another input may be before it
            found[value] = walk.total(value)
        walk.visit(value)
    return [_result(walk, x, found.get(x), cotangents[0], several) for x in inputs]


def _nodes_between(program: Program, node: fx.Node) -> set[fx.Node]:
    """The values on the way from a derivative's inputs to its outputs, both included."""
    outputs, _, inputs, _ = node.args
    return dependent(program.graph.nodes, [_strip_mark(x) for x in inputs]) & set(ancestors(list(outputs)))


def _result(walk: _Walk, x: fx.Node, g: fx.Node | None, some: fx.Node, several: bool) -> fx.Node:
    if g is None:
        return walk.emit(zeros_behind if several else torch.zeros_like, *((some, x) if several else (x,)))
    return g if several else walk.emit(_drop_column_axis, g)


def _strip_mark(node: fx.Node) -> fx.Node:
    """The value behind the mark on a leaf of the model's output: the outputs may be computed from the value itself."""
    return node.args[0] if node.target is torch.ops.fxcurv.head.default else node


class _Walk:
    """Cotangents [V, *value] of the values between a derivative's inputs and its outputs."""

    def __init__(self, program: Program, node: fx.Node, between: set[fx.Node]):
        self.program, self.node, self.between = program, node, between
        self.stacks: dict[fx.Node, list[fx.Node]] = {}

    def emit(self, fn: Any, *args: Any, of: fx.Node | None = None) -> Any:
        return emit(self.program, fn, *args, origin=origin_of(of or self.node, "forward"), before=self.node)

    def add(self, value: fx.Node, g: fx.Node) -> None:
        if value in self.between:
            self.stacks.setdefault(value, []).append(g)

    def total(self, value: fx.Node) -> fx.Node | None:
        """The sum of the cotangents that have arrived so far, as one node."""
        parts = self.stacks.get(value, [])
        if len(parts) > 1:
            self.stacks[value] = parts = [self.emit(sum_of, parts, of=value)]
        return parts[0] if parts else None

    def visit(self, value: fx.Node) -> None:
        """Pass the cotangent of a value on to the arguments of its op."""
        outputs = self._outputs(value)
        gs = [self.total(n) if n is not None else None for n in outputs]
        if value.op != "call_function" or value.target is operator.getitem or value.target in CUTS or not any(gs):
            return
        leaves = pytree.tree_leaves(canonical_args(value))
        wrt = tuple(
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, fx.Node) and leaf in self.between and has_floats(leaf)
        )
        if not wrt:
            return
        if value.target is torch.ops.fxcurv.head.default:
            self.add(leaves[0], gs[0])
            return
        for i, g in zip(wrt, self._transpose(value, wrt, outputs, gs), strict=True):
            self.add(leaves[i], g)

    def _outputs(self, value: fx.Node) -> list[fx.Node | None]:
        val = value.meta.get("val")
        if not isinstance(val, tuple | list):
            return [value]
        users = {u.args[1]: u for u in value.users if u.target is operator.getitem}
        return [users.get(k) for k in range(len(val))]

    def _transpose(self, value: fx.Node, wrt: tuple[int, ...], outputs: list, gs: list) -> Sequence[fx.Node]:
        rule = rule_of(value.target, AGAIN | self.program.rules)  # what it gives is differentiated once more
        if any(map(holds_complex, (value, *value.all_input_nodes))):  # rules are formulas of real numbers
            rule = value.target.rule if isinstance(value.target, Custom) else FALLBACK
        general = type(rule).transpose is Rule.transpose
        if isinstance(value.target, Custom):
            self._trace(value)
        if general and random(value.target):
            raise CaptureError(f"{self._describe_place(value)}which draws random numbers, and has no rule. {WAY_OUT}")
        y, g = value, gs[0]
        if isinstance(value.meta["val"], tuple | list):
            y = tuple([self._item(value, k, n) for k, n in enumerate(outputs)])
            g = self._fill_zeros(value, y, gs) if general else tuple(gs)
        try:
            return self.emit(rule.transpose, _call(value, y), wrt, g, of=value)
        except FxcurvError:
            raise
        except (*FAILURES, TypeError) as error:
            what = f"{type(error).__name__}: {str(error)[:300]}"
            raise CaptureError(
                f"{self._describe_place(value)}which cannot be differentiated: {what}\n{WAY_OUT}"
            ) from error

    def _trace(self, value: fx.Node) -> None:
        """Trace a custom function's backward, which is differentiated later: refuse one without a derivative."""
        kind: Custom = value.target
        value.meta["active"] = True
        kind.trace(self.program, value)
        if kind.backward is not None and (kind.once or kind.keeps_inside):
            why = "is differentiated by the model or the loss itself, and PyTorch does not know the derivative of its backward"
            raise kind.refused(why, where=self._describe_place(value))

    def _fill_zeros(self, value: fx.Node, outputs: Sequence[fx.Node | None], gs: Sequence[fx.Node | None]) -> tuple:
        """Cotangents of all outputs with floating-point values, zeros (or None) where none arrived."""
        some = next(g for g in gs if g is not None)
        pairs = [(n, g) for n, g in zip(outputs, gs, strict=True) if n is not None and has_floats(n)]
        if value.target in APART:
            return tuple([g for _, g in pairs])
        return tuple([self.emit(zeros_behind, some, n) if g is None else g for n, g in pairs])

    def _item(self, value: fx.Node, k: int, known: fx.Node | None) -> fx.Node | None:
        val = value.meta["val"][k]
        if known is not None or not isinstance(val, Tensor):
            return known
        with self.program.graph.inserting_after(value):
            item = self.program.graph.call_function(operator.getitem, (value, k))
        item.meta = {"val": val, "origin": origin_of(value, "forward")}
        return item

    def _describe_place(self, value: fx.Node) -> str:
        return f"{locate(self.node).replace(str(self.node.target), 'torch.autograd.grad')}\nis a derivative of\n{locate(value)}\n"


def _call(node: fx.Node, y: Any) -> Call:
    args = canonical_args(node)
    nothing = (None,) * len(pytree.tree_leaves(args))
    return Call(node.target, args, y, REPLICATE, tuple(REPLICATE for _ in nothing), nothing)


def _add_column_axis(g: Tensor) -> Tensor:
    return g.unsqueeze(0)


def _drop_column_axis(g: Tensor) -> Tensor:
    return g.squeeze(0)
