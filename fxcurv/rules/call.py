"""An op call as a rule sees it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.ir.graph import canonical_args, is_continuous
from fxcurv.ir.origin import origin_of
from fxcurv.ir.placement import REPLICATE, Placement, Shard
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program, place


@dataclass(frozen=True)
class Call:
    """One op call as a traced rule sees it: canonical positional `args` and output `y` (tensors), placements (static).

    `places` and `sizes` are parallel to the flattened `args`; `sizes` holds the values at N = 1 of arguments that
    depend on the batch size, None for others. `place` is the placement of the first output with samples, `outs` are
    those of all floating-point outputs. `alone`: False if a trial has shown that the op on one sample's slices does
    not give that sample's outputs.
    """

    op: Callable
    args: tuple
    y: Any
    place: Any
    places: tuple[Any, ...]
    sizes: tuple[int | None, ...]
    outs: tuple[Any, ...] = ()
    alone: bool = True


def _flatten(call: Call):
    return [call.args, call.y], (call.op, call.place, call.places, call.sizes, call.outs, call.alone)


def _unflatten(values, context):
    op, *rest = context
    return Call(op, *values, *rest)  # type: ignore[call-arg]


pytree.register_pytree_node(Call, _flatten, _unflatten)


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
    """The placement of an op's output; of several outputs, the first with samples counts."""
    where = node.meta["place"]
    if not isinstance(where, list):
        return where
    return next((p for p in where if isinstance(p, Shard)), where[0])


def _places_of_floats(node: fx.Node) -> tuple[Placement, ...]:
    where, val = node.meta["place"], node.meta["val"]
    if not isinstance(where, list):
        return (where,)
    return tuple(p for p, v in zip(where, val, strict=True) if isinstance(v, Tensor) and is_continuous(v))


def _size_at_one(program: Program, leaf: Any) -> int | None:
    val = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
    return program.batch.evaluate(val, 1, program.batch.stand_ins) if isinstance(val, torch.SymInt) else None


def outputs_of(program: Program, node: fx.Node) -> tuple[fx.Node | None, ...]:
    """The outputs of an op with several outputs, as nodes (dead ones are removed later)."""
    read = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    vals = enumerate(node.meta["val"])
    return tuple(read.get(k) or (_make_item(program, node, k, v) if isinstance(v, Tensor) else None) for k, v in vals)


def _make_item(program: Program, node: fx.Node, k: int, val: Tensor) -> fx.Node:
    with program.graph.inserting_after(node):
        item = program.graph.call_function(operator.getitem, (node, k))
    item.meta = {"val": val, "origin": origin_of(node, "forward"), "active": True, "place": node.meta["place"][k]}
    return item
