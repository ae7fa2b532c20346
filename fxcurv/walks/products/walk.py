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

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.contractions.factors import channels_last
from fxcurv.ir.graph import canonical_args
from fxcurv.ir.private import pytree
from fxcurv.ir.program import is_active
from fxcurv.ir.traced import sum_of
from fxcurv.rules.base import Rule
from fxcurv.rules.call import Call
from fxcurv.rules.traits import PRODUCTS, convolution
from fxcurv.walks.products.derivatives import (
    emitted,
    op_of,
    outputs,
    residual,
    tangent,
    tangent_of_product,
    transposed,
)
from fxcurv.walks.products.joint import Adjoint, JointGraph
from fxcurv.walks.products.zeros import is_zero


def _contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def _drop_leading_axis(v: Tensor) -> Tensor:
    return v.squeeze(0)


# ---- the product ------------------------------


class Product:
    """The tangent and adjoint walks for vectors at some parameters.

    Args:
        joint: extended by the product's nodes.
        kind: "ggn", "hessian" or "pch".
        names: the parameters that have a vector.
    """

    def __init__(self, joint: JointGraph, kind: str, names: list[str]):
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
                out[name] = emitted(self.program, node, _drop_leading_axis, found[node])
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
        """Positions of the arguments that depend on a vector; past f, the Gauss-Newton sees f alone."""
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
            items = {k: t for k, t in zip(which, found, strict=True) if not is_zero(t)}
            if items:
                self.tangents[node] = items
        elif not is_zero(found[0]):
            self.tangents[node] = found[0]

    def _given(self, node: fx.Node, wrt: tuple[int, ...]) -> list[fx.Node]:
        """The tangents of an op's arguments; those of a convolution have channels first if its input has them first.

        The layout of its arguments decides the kernel: see `sound` in passes/channels_last.py.
        """
        leaves = pytree.tree_leaves(canonical_args(node))
        ts = [self.tangents[leaves[i]] for i in wrt]
        if convolution(node) is None or channels_last(leaves[0].meta["val"]):
            return ts
        return [emitted(self.program, node, _contiguous, t) for t in ts]

    def _tangent(self, node: fx.Node, rule: Rule, call: Call, wrt: tuple[int, ...], ts: list[fx.Node]) -> Any:
        own = node.target in self.program.rules  # the user's derivative may differ from the op's
        fn = tangent_of_product if node.target in PRODUCTS and not own else tangent
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
        return [(leaves[i], t) for i, t in zip(wrt, found, strict=True) if not is_zero(t)]

    def times_residual(self, node, rule, call, wrt, g, ts):
        """R t [1, *arg], as nodes."""
        direct, at_y = emitted(self.program, node, residual, rule, call, wrt, g, ts)
        if all(map(is_zero, at_y)):
            return direct
        through_y = emitted(self.program, node, transposed, rule, call, wrt, at_y)
        return [
            t if is_zero(d) else emitted(self.program, node, sum_of, [d, t])
            for d, t in zip(direct, through_y, strict=True)
        ]
