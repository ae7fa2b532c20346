"""Uses of a parameter: where its per-sample cotangents P arise, and how results move from there to the parameter."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv._torch import pytree
from fxcurv.emit import emit
from fxcurv.errors import in_loss, module_path
from fxcurv.factors import Factor
from fxcurv.placement import REPLICATE, Placement, Shard
from fxcurv.precision import widened
from fxcurv.program import Program, is_active, place
from fxcurv.quantity import Group
from fxcurv.rules.base import Call, canonical_args, rule_of


def origin_of(node: fx.Node, stage: str, **more: Any) -> dict[str, Any]:
    """Provenance for nodes that a pass makes out of `node`."""
    known = node.meta.get("origin", {})
    return {
        "op": known.get("op") or str(node.target),
        "module": known.get("module") or module_path(node),
        "stack_trace": known.get("stack_trace") or node.meta.get("stack_trace", ""),
        "in_loss": known.get("in_loss") or in_loss(node),
        "stage": stage,
        **more,
    }


@dataclass(frozen=True)
class Use:
    """One per-sample use of a sample-free value: `factor` of P, and the ops between parameter and value, outermost last.

    `op` reads `value`, and `cotangent` [V, *y] are the columns at its output (None after a pull-back).
    """

    factor: Factor
    groups: tuple[Group, ...]
    columns: tuple[int, ...]
    rule: str
    path: tuple[fx.Node, ...] = ()
    op: Any = None
    value: Any = None
    cotangent: Any = None


def call_of(program: Program, node: fx.Node) -> Call:
    """The op call at `node`, with nodes for tensors."""
    args = canonical_args(node)
    leaves = pytree.tree_leaves(args)
    places = tuple(place(leaf) if isinstance(leaf, fx.Node) else REPLICATE for leaf in leaves)
    sizes = tuple(_size_at_one(program, leaf) for leaf in leaves)
    y = outputs_of(program, node) if isinstance(node.meta["val"], tuple | list) else node
    alone = node.meta.get("alone", True)
    return Call(node.target, args, y, place_of_outputs(node), places, sizes, _places_of_floats(node), alone)


def place_of_outputs(node: fx.Node) -> Placement:
    """The placement of an op's output; of several, that of the first with samples."""
    where = node.meta["place"]
    if not isinstance(where, list):
        return where
    return next((p for p in where if isinstance(p, Shard)), where[0])


def _places_of_floats(node: fx.Node) -> tuple[Placement, ...]:
    where, val = node.meta["place"], node.meta["val"]
    if not isinstance(where, list):
        return (where,)
    return tuple(p for p, v in zip(where, val, strict=True) if isinstance(v, Tensor) and v.is_floating_point())


def _size_at_one(program: Program, leaf: Any) -> int | None:
    val = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
    return program.batch.evaluate(val, 1) if isinstance(val, torch.SymInt) else None


def outputs_of(program: Program, node: fx.Node) -> tuple[fx.Node | None, ...]:
    """The outputs of an op with several, as nodes (dead ones are removed later)."""
    read = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    vals = enumerate(node.meta["val"])
    return tuple(read.get(k) or (_item(program, node, k, v) if isinstance(v, Tensor) else None) for k, v in vals)


def _item(program: Program, node: fx.Node, k: int, val: Tensor) -> fx.Node:
    with program.graph.inserting_after(node):
        item = program.graph.call_function(operator.getitem, (node, k))
    item.meta = {"val": val, "origin": origin_of(node, "forward"), "active": True, "place": node.meta["place"][k]}
    return item


def select_group(program: Program, use: Use, group: Group, origin: dict[str, Any]) -> Factor:
    """`use.factor` with the columns of `group` only."""
    g = columns_of(program, use, group, use.factor.g, origin)
    return use.factor if g is use.factor.g else use.factor.with_g(g)


def columns_of(program: Program, use: Use, group: Group, stacked: fx.Node, origin: dict[str, Any]) -> fx.Node:
    """The rows of `group` in `stacked`, [V, ...] for all groups of `use`."""
    if use.groups == (group,):
        return stacked
    start = sum(use.columns[: use.groups.index(group)])
    stop = start + use.columns[use.groups.index(group)]
    return emit(program, _columns, stacked, start, stop, origin=origin)


def _columns(g: Tensor, start: int, stop: int) -> Tensor:
    return g[start:stop]


def pull_back(program: Program, use: Use, value: fx.Node, reduce: str) -> fx.Node:
    """Move a contraction's result, [*lead, *value], from the value a use is at to its parameter, [*lead, *param]."""
    lead = len([axis for axis in "vn" if axis not in reduce])
    for node in use.path:
        rule, call = rule_of(node.target, program.rules), call_of(program, node)
        (wrt,) = [i for i, leaf in enumerate(pytree.tree_leaves(canonical_args(node))) if is_active(leaf)]
        value = emit(program, _through, rule.transpose, call, wrt, value, lead, origin=origin_of(node, "extract"))
    return value


def _through(transpose, call: Call, wrt: int, value: Tensor, lead: int) -> Tensor:
    flat = value.flatten(0, lead - 1) if lead > 1 else value if lead else value.unsqueeze(0)
    if flat.dtype == torch.float32:
        call = widened(call)  # squares of half precision stay precise on their way
    (out,) = transpose(call, (wrt,), flat)
    return out.reshape((*value.shape[:lead], *out.shape[1:]))


class Subgraph:
    """A part of the graph as a function of `heads` and of the values from `outside` it."""

    def __init__(self, nodes, heads, outside, result):
        self.nodes, self.heads, self.outside, self.result = nodes, heads, outside, result

    def __call__(self, heads: list[Tensor], outside: list[Tensor]) -> Tensor:
        env: dict[fx.Node, Any] = dict(zip((*self.heads, *self.outside), (*heads, *outside), strict=True))
        for node in self.nodes:
            args, kwargs = pytree.tree_map(lambda a: env[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
            env[node] = node.target(*args, **kwargs)
        return env[self.result]
