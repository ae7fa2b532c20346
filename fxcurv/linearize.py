"""The walks that make a matrix-free product out of the forward graph.

A product with a matrix of second derivatives is linear in its vectors v. It is written in three walks, all over the
rules' `transpose`, the only derivative that an op has to know:

    gradient   backward:  g = dL/d(value), where an op's curvature needs it
    tangent    forward:   t = d(value)/d(parameters) v
    adjoint    backward:  u = sum of the ops' residuals R t, sent on to the parameters

    R = d^2 <g, op(x)> / dx^2          the residual of an op, over all its inputs together

With every residual this is the Hessian's product. With those of the loss as a function of f alone, it is the
Gauss-Newton's; with residuals made positive, that of the positive-curvature Hessian (Dangel et al. 2020).

The forward op enters by its values only, so that the joint graph holds every value of the forward pass once. Cotangents
and tangents carry one leading axis of size 1; several vectors go through the finished graph by `vmap`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcurv.emit import emit
from fxcurv.errors import UnsupportedOpError, locate
from fxcurv.factors import channels_last
from fxcurv.passes.objective import ancestors, descendants
from fxcurv.program import Program, is_active
from fxcurv.rules.base import FALLBACK, Call, Rule, canonical_args, rule_of
from fxcurv.uses import call_of, origin_of

aten = torch.ops.aten


# ---- ops whose own derivatives are not differentiable once more ------------------------------


def _batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    """Normalised by the batch's own statistics; they and the new running ones are returned beside y, as constants."""
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    centred = x - x.mean(dims, keepdim=True)
    rstd = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    y = centred * rstd
    y = y if weight is None else y * weight.view(shape)
    y = y if bias is None else y + bias.view(shape)
    return y, mean.detach(), rstd.detach().flatten(), mean.detach(), var.detach()


FORMULAS: dict[Callable, Callable] = {
    aten._native_batch_norm_legit_functional.default: _batch_norm,
}


@dataclass(frozen=True)
class Formula:
    """An op said by its rule's formula."""

    rule: Rule
    op: Callable

    def __call__(self, *args: Any) -> Any:
        return self.rule.formula(self.op, args)


# x z, or x z + b: their first three arguments are (x, z, b)
PRODUCTS = {
    aten.linear.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.convolution.default,
}  # fmt: skip


# ---- derivatives of one op, from its transpose ------------------------------


def outputs(rule: Rule, y: Any) -> list[int]:
    """Which outputs of an op with several carry derivatives."""
    if type(rule).transpose is not Rule.transpose:
        return [0]
    return [k for k, t in enumerate(y) if isinstance(t, Tensor) and t.is_floating_point()]


def _pulled(rule: Rule, call: Call, wrt: tuple[int, ...], g: Iterable[Tensor]) -> tuple[Tensor, ...]:
    g = tuple(g)
    return tuple(rule.transpose(call, wrt, g if isinstance(call.y, tuple) else g[0]))


def _ys(rule: Rule, call: Call) -> list[Tensor]:
    return [call.y[k] for k in outputs(rule, call.y)] if isinstance(call.y, tuple) else [call.y]


def transposed(rule: Rule, call: Call, wrt: tuple[int, ...], g: list[Tensor]) -> tuple[Tensor, ...]:
    """J^T g, [1, *arg] for the arguments `wrt`."""
    return _pulled(rule, call, wrt, g)


def tangent(rule: Rule, call: Call, wrt: tuple[int, ...], ts: list[Tensor]) -> tuple[Tensor, ...]:
    """J t, [*y]: the transpose's transpose."""
    zeros = [torch.zeros_like(y).unsqueeze(0) for y in _ys(rule, call)]
    _, back = torch.func.vjp(lambda *g: _pulled(rule, call, wrt, g), *zeros)
    return tuple(t.squeeze(0) for t in back(tuple(t.unsqueeze(0) for t in ts)))


def tangent_of_product(rule: Rule, call: Call, wrt: tuple[int, ...], ts: list[Tensor]) -> tuple[Tensor, ...]:
    """J t, [*y], of x z + b: the same op on a tangent."""
    terms = []
    for i, t in zip(wrt, ts, strict=True):
        if i < 2:
            args = replaced(list(call.args), (i,), [t])
            args[2:3] = [None] if len(args) > 2 else []
            terms.append(call.op(*args))
        else:
            terms += tangent(rule, call, (i,), [t])
    return (_sum(terms),)


def residual(rule: Rule, call: Call, wrt: tuple[int, ...], g: list[Tensor], ts: list[Tensor]):
    """R t in two parts: [*arg] for the arguments `wrt`, and [*y], to be sent on by the op's transpose.

    R is symmetric, so R t is the derivative of <J(x)^T g, t>; what the transpose reads of y is one more argument.
    """
    leaves, spec = pytree.tree_flatten(call.args)
    ys = _ys(rule, call)

    def pull(xs, ys):
        args = pytree.tree_unflatten(replaced(leaves, wrt, xs), spec)
        return _pulled(rule, dataclasses.replace(call, args=args, y=_with(call, rule, ys)), wrt, g)

    _, back = torch.func.vjp(pull, [leaves[i] for i in wrt], ys)
    direct, at_y = back(tuple(t.unsqueeze(0) for t in ts))
    return [t.unsqueeze(0) for t in direct], [t.unsqueeze(0) for t in at_y]


def replaced(leaves: list[Any], positions: tuple[int, ...], values: Iterable[Any]) -> list[Any]:
    """A copy of `leaves` with `values` at `positions`."""
    new = list(leaves)
    for i, value in zip(positions, values, strict=True):
        new[i] = value
    return new


def _with(call: Call, rule: Rule, ys: list[Tensor]) -> Any:
    if not isinstance(call.y, tuple):
        return ys[0]
    new = dict(zip(outputs(rule, call.y), ys, strict=True))
    return tuple(new.get(k, t) for k, t in enumerate(call.y))


def _sum(tensors: list[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0])


def _ones(loss: Tensor) -> Tensor:
    return torch.ones_like(loss).unsqueeze(0)


def _contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def _plain(v: Tensor) -> Tensor:
    return v.squeeze(0)


def _zeros(y: Tensor) -> Tensor:
    return torch.zeros_like(y).unsqueeze(0)


_ZEROS = {aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default}
_KEEP_ZERO = {
    aten.unsqueeze.default, aten.squeeze.dim, aten.view.default, aten.reshape.default, aten.expand.default,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.neg.default, aten.sum.dim_IntList,
}  # fmt: skip
_ZERO_FACTOR = {aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.mul.Scalar}


def _is_zero(node: Any) -> bool:
    """Whether a value is zero by its making."""
    if not isinstance(node, fx.Node):
        return False
    if "zero" not in node.meta:
        node.meta["zero"] = _makes_zero(node)
    return node.meta["zero"]


def _makes_zero(node: fx.Node) -> bool:
    if node.target in _KEEP_ZERO:
        return _is_zero(node.args[0])
    if node.target in _ZERO_FACTOR:
        return any(map(_is_zero, node.args))
    if node.target is aten.add.Tensor:
        return all(map(_is_zero, node.args))
    return node.target in _ZEROS or (node.target is aten.full.default and node.args[1] == 0)


def drop_zeros(program: Program) -> None:
    """x + 0 is x."""
    for node in list(program.graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        for term, other in (node.args, node.args[::-1]):
            if _is_zero(other) and isinstance(term, fx.Node) and _same(term, node):
                program.replace(node, term)
                program.graph.erase_node(node)
                break


def _same(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and [str(s) for s in x.shape] == [str(s) for s in y.shape]


# ---- the joint graph ------------------------------


@dataclass
class Joint:
    """The forward part of a program, copied, with the gradients that curvature needs.

    Attributes:
        program: a program of its own, whose graph the walks extend.
        forward: the captured nodes, in order.
        heads: f.
        past: the nodes by which the loss is computed from f.
        gradients: node -> [1, *value], or a tuple of them for an op of several outputs.
    """

    program: Program
    forward: list[fx.Node]
    heads: list[fx.Node]
    past: set[fx.Node]
    gradients: dict[fx.Node, Any]

    def copy(self) -> Joint:
        """A copy that can be extended; nodes keep `meta["key"]`, their number in the original."""
        program, env = _copied(self.program, list(self.program.graph.nodes)[:-1])
        gradients = {env[n]: fx.node.map_arg(g, env.__getitem__) for n, g in self.gradients.items()}
        forward, heads = ([env[n] for n in nodes] for nodes in (self.forward, self.heads))
        program.heads = heads
        return Joint(program, forward, heads, {env[n] for n in self.past}, gradients)


def joint_of(program: Program, kind: str) -> tuple[Joint, dict[int, fx.Node]]:
    """The joint graph for "ggn", "hessian" or "pch", and where its nodes are in `program`: key -> node."""
    nodes = ancestors([program.loss])
    child, env = _copied(program, nodes)
    forward, heads = [env[n] for n in nodes], [env[h] for h in program.heads]
    child.heads = heads
    joint = Joint(child, forward, heads, _past(child.loss, heads), {})
    for node in forward:
        if isinstance(node.meta.get("val"), tuple | list):
            call_of(child, node)  # makes a node for every output
    _gradients(joint, kind)
    origins = {new: old for old, new in env.items()}
    where = {}
    for key, node in enumerate(list(child.graph.nodes)[:-1]):
        node.meta["key"] = key
        if node in origins:
            where[key] = origins[node]
    return joint, where


def _copied(program: Program, nodes: list[fx.Node]) -> tuple[Program, dict[fx.Node, fx.Node]]:
    """A program of these nodes alone (closed under inputs)."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, Any] = {}
    for node in nodes:
        new = graph.node_copy(node, env.__getitem__)
        new.meta = dict(node.meta)
        if node.op == "get_attr":  # counted names: what `emit` adds later must not meet one of them
            name = f"_constant{len(attributes)}"
            attributes[name] = getattr(program.gm, node.target)
            new.target = name
        env[node] = new
    graph.output(())
    params = {name: env[n] for name, n in program.params.items() if n in env}
    child = Program(
        fx.GraphModule(attributes, graph), [], program.batch, params, program.shapes, [], [], env[program.loss], {},
        extensions=program.extensions, rules=program.rules,
        state={"fake_mode": program.fake_mode, "pieces": program.state.setdefault("pieces", {})},
    )  # fmt: skip
    copies = dict(zip(graph.nodes, child.graph.nodes, strict=True))
    child.params = {name: copies[n] for name, n in params.items()}
    child.loss = copies[child.loss]
    return child, {old: copies[new] for old, new in env.items()}


def _past(loss: fx.Node, heads: list[fx.Node]) -> set[fx.Node]:
    """What lies between f and the loss."""
    reached, stack = set(), [loss]
    while stack:
        node = stack.pop()
        if node not in reached and node not in heads:
            reached.add(node)
            stack.extend(node.all_input_nodes)
    return reached & descendants(heads)


def _gradients(joint: Joint, kind: str) -> None:
    """The cotangents dL/d(value) where an op's residual needs them: past f for the Gauss-Newton, else everywhere."""
    program = joint.program
    region = joint.past if kind == "ggn" else {n for n in joint.forward if n.op != "placeholder"}

    def positions(node: fx.Node) -> tuple[int, ...]:
        leaves = pytree.tree_leaves(canonical_args(node))
        return tuple(i for i, leaf in enumerate(leaves) if is_active(leaf) and leaf in region)

    seed = emit(program, _ones, program.loss, origin=origin_of(program.loss, "extract"))
    nodes = [n for n in joint.forward if n in region]
    joint.gradients = Adjoint(program, positions).run(nodes, {program.loss: [seed]})


def op_of(program: Program, node: fx.Node) -> tuple[Rule, Call]:
    """The rule and the call at `node`, said so that they can be differentiated again."""
    rule, call = rule_of(node.target, program.rules), call_of(program, node)
    if type(rule).formula is not Rule.formula:
        return FALLBACK, dataclasses.replace(call, op=Formula(rule, node.target))
    if rule is FALLBACK and node.target in FORMULAS:
        return FALLBACK, dataclasses.replace(call, op=FORMULAS[node.target])
    return rule, call


def emitted(program: Program, node: fx.Node, fn: Callable, *args: Any) -> Any:
    """Emit a derivative of the op at `node`."""
    try:
        return emit(program, fn, *args, origin=origin_of(node, "extract"))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UnsupportedOpError(
            f"{locate(node)}\nhas no second derivative: {type(error).__name__}: {str(error)[:300]}\n"
            "Way out: pass rules={op: rule} with a transpose made of differentiable ops, or write the op in other PyTorch ops."
        ) from error


@dataclass
class Adjoint:
    """A walk backward over captured nodes.

    Attributes:
        positions: node -> positions of the (flattened) arguments that the walk goes on to.
        curvature: node -> cotangents that are born there, for nodes that it reads.
    """

    program: Program
    positions: Callable[[fx.Node], tuple[int, ...]]
    curvature: Callable[[fx.Node], list[tuple[fx.Node, fx.Node]]] = lambda node: []

    def run(self, nodes: list[fx.Node], cotangents: dict[fx.Node, list[fx.Node]]) -> dict[fx.Node, Any]:
        """What arrives at each of `nodes`, from what is given at some of them."""
        found: dict[fx.Node, Any] = {}
        items: dict[fx.Node, dict[int, list[fx.Node]]] = {}
        for node in reversed(nodes):
            given = cotangents.pop(node, [])
            if node.target is operator.getitem:
                if given:
                    items.setdefault(node.args[0], {}).setdefault(node.args[1], []).extend(given)
                continue
            for leaf, g in self.curvature(node):
                cotangents.setdefault(leaf, []).append(g)
            if node in items:
                found[node] = self._tuple(node, items.pop(node))
            elif given:
                found[node] = self._sum(node, given)
            if node in found and node.op != "placeholder":
                for leaf, g in self._step(node, found[node]):
                    cotangents.setdefault(leaf, []).append(g)
        return found

    def _sum(self, node: fx.Node, given: list[fx.Node]) -> fx.Node:
        return given[0] if len(given) == 1 else emitted(self.program, node, _sum, given)

    def _tuple(self, node: fx.Node, given: dict[int, list[fx.Node]]) -> tuple[fx.Node, ...]:
        """Cotangents of all outputs that carry derivatives, zeros where none arrives."""
        rule, call = op_of(self.program, node)
        return tuple(
            self._sum(node, given[k]) if k in given else emitted(self.program, node, _zeros, call.y[k])
            for k in outputs(rule, [y.meta["val"] if isinstance(y, fx.Node) else y for y in call.y])
        )

    def _step(self, node: fx.Node, g: Any) -> list[tuple[fx.Node, fx.Node]]:
        wrt = self.positions(node)
        if not wrt:
            return []
        rule, call = op_of(self.program, node)
        leaves = pytree.tree_leaves(canonical_args(node))
        found = emitted(self.program, node, transposed, rule, call, wrt, list(g) if isinstance(g, tuple) else [g])
        return [(leaves[i], t) for i, t in zip(wrt, found, strict=True) if not _is_zero(t)]


# ---- the product ------------------------------


class Product:
    """The tangent and adjoint walks for vectors at some parameters.

    Args:
        joint: extended by the product's nodes.
        kind: "ggn", "hessian" or "pch".
        names: the parameters that have a vector.
    """

    def __init__(self, joint: Joint, kind: str, names: list[str]):
        self.joint, self.kind, self.program = joint, kind, joint.program
        self.names = [n for n in names if n in self.program.params]
        self.tangents: dict[fx.Node, Any] = {}

    def run(self) -> tuple[dict[str, fx.Node], dict[str, fx.Node]]:
        """(vector placeholders, results), by parameter name; no result where the product is zero."""
        vectors = {name: self._vector(name) for name in self.names}
        for node in self.joint.forward:
            if node.op == "call_function" and is_active(node):
                self._forward(node)
        nodes = [n for n in self.joint.forward if n in self.tangents]
        found = Adjoint(self.program, self.positions, self.curvature).run(nodes, {})
        out = {}
        for name in self.names:
            node = self.program.params[name]
            if node in found:
                out[name] = emitted(self.program, node, _plain, found[node])
        return vectors, out

    def _vector(self, name: str) -> fx.Node:
        param = self.program.params[name]
        first = next(n for n in self.program.graph.nodes if n.op != "placeholder")
        with self.program.graph.inserting_before(first):
            node = self.program.graph.placeholder(f"vector_{len(self.tangents)}")
        val = param.meta["val"]
        with self.program.fake_mode:
            node.meta = {"val": torch.empty(val.shape, dtype=val.dtype, device=val.device)}
        self.tangents[param] = node
        return node

    def positions(self, node: fx.Node) -> tuple[int, ...]:
        """The arguments that depend on a vector; past f, the Gauss-Newton sees f alone."""
        leaves = pytree.tree_leaves(canonical_args(node))
        here = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node) and leaf in self.tangents]
        if self.kind == "ggn" and node in self.joint.past:
            here = [i for i in here if leaves[i] in self.joint.past or leaves[i] in self.joint.heads]
        return tuple(here)

    def _forward(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            items = self.tangents.get(node.args[0], {})
            if node.args[1] in items:
                self.tangents[node] = items[node.args[1]]
            return
        wrt = self.positions(node)
        if not wrt:
            return
        rule, call = op_of(self.program, node)
        found = self._tangent(node, rule, call, wrt, self._given(node, wrt))
        if isinstance(call.y, tuple):
            which = outputs(rule, [y.meta["val"] if isinstance(y, fx.Node) else y for y in call.y])
            items = {k: t for k, t in zip(which, found, strict=True) if not _is_zero(t)}
            if items:
                self.tangents[node] = items
        elif not _is_zero(found[0]):
            self.tangents[node] = found[0]

    def _given(self, node: fx.Node, wrt: tuple[int, ...]) -> list[fx.Node]:
        """The tangents of an op's arguments; those of a convolution have their channels first where its input has them first.

        The kernel is chosen by the layout of what it reads: see `sound` in passes/layout.py.
        """
        leaves = pytree.tree_leaves(canonical_args(node))
        ts = [self.tangents[leaves[i]] for i in wrt]
        if node.target is not aten.convolution.default or channels_last(leaves[0].meta["val"]):
            return ts
        return [emitted(self.program, node, _contiguous, t) for t in ts]

    def _tangent(self, node: fx.Node, rule: Rule, call: Call, wrt: tuple[int, ...], ts: list[fx.Node]) -> Any:
        fn = tangent_of_product if node.target in PRODUCTS else tangent
        return emitted(self.program, node, fn, rule, call, wrt, ts)

    def curvature(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """The residual of the op at `node` times the tangents there."""
        if self.kind == "ggn" and node not in self.joint.past or node not in self.joint.gradients:
            return []
        if node.op == "placeholder" or node.target is operator.getitem:
            return []
        rule, call = op_of(self.program, node)
        wrt = self.positions(node)
        if rule.linear(wrt) or rule.piecewise_linear:
            return []
        leaves = pytree.tree_leaves(canonical_args(node))
        g = self.joint.gradients[node]
        gs = list(g) if isinstance(g, tuple) else [g]
        found = self.times_residual(node, rule, call, wrt, gs, self._given(node, wrt))
        return [(leaves[i], t) for i, t in zip(wrt, found, strict=True) if not _is_zero(t)]

    def times_residual(self, node, rule, call, wrt, g, ts):
        """R t [1, *arg], as nodes."""
        direct, at_y = emitted(self.program, node, residual, rule, call, wrt, g, ts)
        if all(map(_is_zero, at_y)):
            return direct
        through_y = emitted(self.program, node, transposed, rule, call, wrt, at_y)
        return [
            t if _is_zero(d) else emitted(self.program, node, _sum, [d, t])
            for d, t in zip(direct, through_y, strict=True)
        ]
