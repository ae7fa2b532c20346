"""A copy of the forward graph, with the gradients that curvature needs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.ir.emit import emit
from fxcurv.ir.graph import ancestors, canonical_args, descendants
from fxcurv.ir.origin import origin_of
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program, is_active
from fxcurv.ir.traced import sum_of
from fxcurv.rules.call import call_of
from fxcurv.walks.loss import past
from fxcurv.walks.products.derivatives import emitted, op_of, outputs, transposed
from fxcurv.walks.products.zeros import is_zero


def _ones(loss: Tensor) -> Tensor:
    return torch.ones_like(loss).unsqueeze(0)


def _zeros(y: Tensor) -> Tensor:
    return torch.zeros_like(y).unsqueeze(0)


# ---- the joint graph ------------------------------


@dataclass
class JointGraph:
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

    def copy(self) -> JointGraph:
        """A copy that can be extended; nodes keep `meta["key"]`, their number in the original."""
        program, env = _copy_program(self.program, list(self.program.graph.nodes)[:-1])
        gradients = {env[n]: fx.node.map_arg(g, env.__getitem__) for n, g in self.gradients.items()}
        forward, heads = ([env[n] for n in nodes] for nodes in (self.forward, self.heads))
        program.heads = heads
        return JointGraph(program, forward, heads, {env[n] for n in self.past}, gradients)


def joint_of(program: Program, kind: str) -> tuple[JointGraph, dict[int, fx.Node]]:
    """The joint graph for "ggn", "hessian" or "pch", and where its nodes are in `program`: key -> node."""
    nodes = ancestors([program.loss])
    child, env = _copy_program(program, nodes)
    forward, heads = [env[n] for n in nodes], [env[h] for h in program.heads]
    child.heads = heads
    joint = JointGraph(child, forward, heads, past(child) & descendants(heads), {})
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


def _copy_program(program: Program, nodes: list[fx.Node]) -> tuple[Program, dict[fx.Node, fx.Node]]:
    """A program of these nodes alone (closed under inputs)."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, Any] = {}
    for node in nodes:
        new = graph.node_copy(node, env.__getitem__)
        new.meta = dict(node.meta)
        if node.op == "get_attr":  # numbered, so that names which `emit` adds later do not clash
            name = f"_constant{len(attributes)}"
            attributes[name] = getattr(program.gm, node.target)
            new.target = name
        env[node] = new
    graph.output(())
    params = {name: env[n] for name, n in program.params.items() if n in env}
    child = Program(
        fx.GraphModule(attributes, graph), [], program.batch, params, program.shapes, [], [], env[program.loss], {},
        extensions=program.extensions, rules=program.rules, options=program.options,
        fake_mode=program.fake_mode, pieces=program.pieces,
    )  # fmt: skip
    copies = dict(zip(graph.nodes, child.graph.nodes, strict=True))
    child.params = {name: copies[n] for name, n in params.items()}
    child.loss = copies[child.loss]
    return child, {old: copies[new] for old, new in env.items()}


def _gradients(joint: JointGraph, kind: str) -> None:
    """The cotangents dL/d(value) where an op's residual needs them: past f for the Gauss-Newton, else everywhere."""
    program = joint.program
    region = joint.past if kind == "ggn" else {n for n in joint.forward if n.op != "placeholder"}

    def positions(node: fx.Node) -> tuple[int, ...]:
        leaves = pytree.tree_leaves(canonical_args(node))
        return tuple(i for i, leaf in enumerate(leaves) if is_active(leaf) and leaf in region)

    seed = emit(program, _ones, program.loss, origin=origin_of(program.loss, "extract"))
    nodes = [n for n in joint.forward if n in region]
    joint.gradients = Adjoint(program, positions).run(nodes, {program.loss: [seed]})


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
        """The cotangent that arrives at each of `nodes`, from `cotangents` that are given at some of them."""
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
        return given[0] if len(given) == 1 else emitted(self.program, node, sum_of, given)

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
        return [(leaves[i], t) for i, t in zip(wrt, found, strict=True) if not is_zero(t)]
