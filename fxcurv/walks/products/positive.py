"""The positive-curvature Hessian: the Hessian's product, with every op's residual made positive.

    H = sum over ops of J^T R J        J: from a parameter to the op's inputs,  R: the op's residual there
    P = sum over ops of J^T R+ J       R+: the eigenvalues of R clipped at 0, or their absolute values

R is taken over the inputs that depend on the parameter, jointly: a matrix product with only one such factor has none. R
is block diagonal, and each block is decomposed by itself: entry by entry for elementwise ops (which act on their
broadcast arguments), position by position for a softmax or a layer norm, sample by sample for any other op that keeps
samples apart. A product x z has R = [[0, g], [g^T, 0]], whose absolute value comes from a singular value decomposition
of g. The loss is one op, a function of f.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.ir.graph import Subgraph, canonical_args, replaced
from fxcurv.ir.placement import PARTIAL, Shard, samples_back, samples_first
from fxcurv.ir.precision import widened
from fxcurv.ir.private import pytree
from fxcurv.rules.base import Rule
from fxcurv.rules.call import Call
from fxcurv.rules.pointwise import unbroadcast
from fxcurv.rules.traits import ALONG_AXIS, ALONG_LAST_AXES, MATRIX_PRODUCTS, pointwise
from fxcurv.walks.loss import find_terms
from fxcurv.walks.products.derivatives import emitted, residual, transposed
from fxcurv.walks.products.joint import JointGraph
from fxcurv.walks.products.walk import Product


class PositiveProduct(Product):
    """The walks of the positive-curvature Hessian for one parameter.

    Args:
        modify: "clip" or "abs".
    """

    def __init__(self, joint: JointGraph, name: str, modify: str):
        super().__init__(joint, "pch", [name])
        self.modify = modify
        terms = find_terms(joint.program)
        self.whole_loss = any(term.node is None for term in terms)

    def curvature(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """The residual of one op; for a loss without closed form, of all that lies between f and the loss."""
        if not self.whole_loss or node not in self.joint.past:
            return super().curvature(node)
        return self._loss_curvature() if node is self.program.loss else []

    def _loss_curvature(self) -> list[tuple[fx.Node, fx.Node]]:
        inner = [n for n in self.joint.forward if n in self.joint.past]
        read = list(dict.fromkeys(i for n in inner for i in n.all_input_nodes if i not in self.joint.past))
        moving = [i for i in read if i in self.tangents]
        outside = [i for i in read if i not in moving]
        places = [i.meta["place"] for i in moving]
        apart = self.program.loss.meta["place"] == PARTIAL and all(isinstance(p, Shard) for p in places)
        layouts = tuple(("samples", p) if apart else ("whole",) for p in places)
        loss = Subgraph(tuple(inner), tuple(moving), tuple(outside), self.program.loss)
        ts = [self.tangents[i] for i in moving]
        found = emitted(
            self.program, self.program.loss, _function_blocks, loss, moving, outside, ts, self.modify, layouts
        )
        return list(zip(moving, found, strict=True))

    def times_residual(self, node, rule, call, wrt, g, ts):
        """R+ t [1, *arg], as nodes."""
        args = rule, call, wrt, g, ts
        if rule.is_loss:
            (c,) = g
            c = emitted(self.program, node, _positive, c, self.modify)
            return super().times_residual(node, rule, call, wrt, [c], ts)
        if pointwise(node.target) and isinstance(node.meta["val"], Tensor):
            return emitted(self.program, node, _entries, *args, self.modify)
        if node.target in MATRIX_PRODUCTS and node.target not in self.program.rules:
            return emitted(self.program, node, _matrix_product, *args, self.modify)
        return emitted(self.program, node, _blocks, *args, self.modify, self._layouts(node, wrt))

    def _layouts(self, node: fx.Node, wrt: tuple[int, ...]) -> tuple:
        """How the residual of the op at `node` falls into blocks, for each of the arguments `wrt`."""
        args = canonical_args(node)
        if wrt == (0,) and node.target in ALONG_AXIS and isinstance(args[1], int):
            return (("axis", args[1] % max(1, node.meta["val"].ndim)),)
        if wrt == (0,) and node.target in ALONG_LAST_AXES:
            return (("trailing", len(args[1])),)
        leaves = pytree.tree_leaves(args)
        where = node.meta["place"]
        where = where[0] if isinstance(where, list) else where
        places = [leaves[i].meta["place"] for i in wrt]
        apart = all(isinstance(p, Shard) for p in [where, *places])
        return tuple(("samples", p) if apart else ("whole",) for p in places)


def _positive(values: Tensor, modify: str) -> Tensor:
    return values.clamp(min=0) if modify == "clip" else values.abs()


def _times_unmodified(rule: Rule, call: Call, wrt, g, ts) -> list[Tensor]:
    """R t, [1, *arg]."""
    direct, at_y = residual(rule, call, wrt, g, ts)
    return [d + t for d, t in zip(direct, transposed(rule, call, wrt, at_y), strict=True)]


def _entries(rule: Rule, call: Call, wrt, g, ts, modify: str) -> list[Tensor]:
    """R+ t of an elementwise op: R is a number per entry for one argument, a small matrix for several."""
    leaves, spec = pytree.tree_flatten(call.args)
    shape = call.y.shape
    shapes = [leaves[i].shape for i in wrt]
    xs, ts = ([t.expand(shape) for t in part] for part in ([leaves[i] for i in wrt], ts))
    call = dataclasses.replace(call, args=pytree.tree_unflatten(replaced(leaves, wrt, xs), spec))
    if len(wrt) == 1:
        (diagonal,) = _times_unmodified(rule, call, wrt, g, [torch.ones_like(xs[0])])
        out = [_positive(diagonal, modify) * ts[0]]
    else:
        out = _blocks(rule, call, wrt, g, ts, modify, tuple(("entries",) for _ in wrt))
    return [unbroadcast(t, s) for t, s in zip(out, shapes, strict=True)]


def _matrix_product(rule: Rule, call: Call, wrt, g, ts, modify: str) -> list[Tensor]:
    """y = x z: |R| (s, t) = ((g g^T)^(1/2) s, t (g^T g)^(1/2)); a bias adds nothing."""
    out = _times_unmodified(rule, call, wrt, g, ts)
    both = {i: t for i, t in zip(wrt, ts, strict=True) if i < 2}
    if len(both) < 2:
        return out
    joined = MATRIX_PRODUCTS[call.op]  # z is given by rows, and all leading axes of x are rows
    cotangent = g[0].squeeze(0)
    cotangent = cotangent.reshape(-1, cotangent.shape[-1]) if joined else cotangent
    s = both[0].reshape(-1, both[0].shape[-1]) if joined else both[0]
    t = both[1].mT if joined else both[1]
    u, sigma, vh = (t.to(s.dtype) for t in torch.linalg.svd(widened(cotangent), full_matrices=False))
    left = (u * sigma.unsqueeze(-2)) @ (u.mT @ s)
    right = ((t @ vh.mT) * sigma.unsqueeze(-2)) @ vh
    absolute = {0: left.reshape(both[0].shape).unsqueeze(0), 1: (right.mT if joined else right).unsqueeze(0)}
    if modify == "abs":
        return [absolute.get(i, o) for i, o in zip(wrt, out, strict=True)]
    return [(o + absolute[i]) / 2 if i in absolute else o for i, o in zip(wrt, out, strict=True)]


def _blocks(rule: Rule, call: Call, wrt, g, ts, modify: str, layouts: tuple) -> list[Tensor]:
    """R+ t from the eigenvalues of each block."""

    def apply(parts: list[Tensor]) -> list[Tensor]:
        return [t.squeeze(0) for t in _times_unmodified(rule, call, wrt, g, parts)]

    leaves = pytree.tree_leaves(call.args)
    return _apply_by_blocks(apply, [leaves[i] for i in wrt], ts, modify, layouts)


def _function_blocks(loss: Subgraph, moving: list[Tensor], outside: list[Tensor], ts, modify: str, layouts: tuple):
    """R+ t for the loss as a function of what it reads."""
    _, pull = torch.func.vjp(torch.func.grad(lambda xs: loss(xs, outside)), moving)
    return _apply_by_blocks(lambda parts: pull(parts)[0], moving, ts, modify, layouts)


def _apply_by_blocks(apply, xs: list[Tensor], ts: list[Tensor], modify: str, layouts: tuple) -> list[Tensor]:
    """R+ t, [1, *x]; `apply` multiplies by R, whose blocks come from unit vectors of all blocks at once."""
    flat = [_to_blocks(x, layout) for x, layout in zip(xs, layouts, strict=True)]
    widths = [f.shape[1] for f in flat]
    count, width = flat[0].shape[0], sum(widths)

    def column(e: Tensor) -> Tensor:
        parts = torch.split(e, widths, 1)
        parts = [_from_blocks(p, x, layout) for p, x, layout in zip(parts, xs, layouts, strict=True)]
        return torch.cat([_to_blocks(t, layout) for t, layout in zip(apply(parts), layouts, strict=True)], 1)

    eye = torch.eye(width, dtype=flat[0].dtype, device=flat[0].device)
    columns = torch.vmap(column)(eye.unsqueeze(1).expand(width, count, width))
    r = columns.movedim(0, 1)
    values, vectors = (t.to(r.dtype) for t in torch.linalg.eigh(widened((r + r.mT) / 2)))
    t = torch.cat([_to_blocks(t, layout) for t, layout in zip(ts, layouts, strict=True)], 1).unsqueeze(2)
    out = (vectors @ (_positive(values, modify).unsqueeze(2) * (vectors.mT @ t))).squeeze(2)
    parts = torch.split(out, widths, 1)
    return [_from_blocks(p, x, layout).unsqueeze(0) for p, x, layout in zip(parts, xs, layouts, strict=True)]


def _to_blocks(x: Tensor, layout: tuple[Any, ...]) -> Tensor:
    """[*x] -> [blocks, entries of a block]."""
    kind = layout[0]
    if kind == "samples":
        x = samples_first(x, layout[1])
        return x.reshape(x.shape[0], -1)
    if kind == "axis":
        return x.movedim(layout[1], -1).reshape(-1, x.shape[layout[1]])
    if kind == "trailing":
        return x.flatten(x.ndim - layout[1]).reshape(-1, x.shape[x.ndim - layout[1] :].numel())
    return x.reshape(-1, 1) if kind == "entries" else x.reshape(1, -1)


def _from_blocks(b: Tensor, x: Tensor, layout: tuple[Any, ...]) -> Tensor:
    """The inverse of `_to_blocks`, for a value of the shape of `x`."""
    kind = layout[0]
    if kind == "samples":
        return samples_back(b.reshape(samples_first(x, layout[1]).shape), layout[1])
    if kind == "axis":
        return b.reshape(x.movedim(layout[1], -1).shape).movedim(-1, layout[1])
    return b.reshape(x.shape)
