"""Placements in a custom `torch.autograd.Function`, followed op by op through its forward and its backward."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxcurv.errors import UnsupportedOpError
from fxcurv.ir.origin import locate
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Placement, Shard
from fxcurv.ir.private import pytree, schema_of
from fxcurv.ir.program import Program, is_active

aten = torch.ops.aten

_OF_SHAPE = ("size_of", "empty", "zeros", "ones", "full", "sym_size", "arange")


def reads_shape(node: fx.Node) -> bool:
    """Whether an op reads only shapes."""
    name = str(getattr(node.target, "__name__", node.target)).removeprefix("new_")
    return name.startswith(_OF_SHAPE)


def places(program: Program, node: fx.Node, vals: list[Any], place_of: Callable) -> list[Placement]:
    """The placements of all outputs of a custom function's node; `Mixed` if samples interact in its backward.

    Args:
        place_of: `(program, node, vals, active) -> placements` of one op.
    """
    kind = node.target
    kind.trace(program, node)
    node.meta["alone"] = False  # on one sample, a mean over the batch in its backward would be another
    given = [_state_of(a) for a in node.args]
    assert kind.forward is not None
    try:
        found = _follow(program, kind.forward, given, place_of)
        if kind.backward is None:
            return [p for p, _ in found]
        ok = _gradients_fit(program, node, given, found, place_of)
    except UnsupportedOpError:
        ok = False
        found = [(MIXED, True) for _ in vals]
    _check_linear(program, node, found)
    return [p if ok else MIXED for p, _ in found]


Seen = tuple[Placement, bool]


def _state_of(leaf: Any) -> Seen:
    return (leaf.meta["place"], leaf.meta["active"]) if isinstance(leaf, fx.Node) else (REPLICATE, False)


def _follow(program: Program, gm: fx.GraphModule, given: list[Seen], place_of: Callable) -> list[Seen]:
    """(placement, whether it depends on an active input) of a graph's outputs; here, rounding keeps values active."""
    arguments = iter(given)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            node.meta["place"], node.meta["active"] = next(arguments)
        elif node.op == "get_attr":
            node.meta["place"], node.meta["active"] = REPLICATE, False
        elif node.target is operator.getitem:
            place, index = node.args[0].meta["place"], node.args[1]
            node.meta["place"] = place[index] if isinstance(place, list) else place
            node.meta["active"] = node.args[0].meta["active"]
        elif node.op == "call_function":
            val = node.meta.get("val")
            vals = list(val) if isinstance(val, tuple | list) else [val]
            node.meta["active"] = any(i.meta["active"] for i in node.all_input_nodes) and not reads_shape(node)
            if node.target is aten.detach.default:
                found = [node.args[0].meta["place"]]
            elif _moves_samples(program, node):
                found = [MIXED for _ in vals]
            else:
                found = place_of(program, node, vals, node.meta["active"])
            node.meta["place"] = found if isinstance(val, tuple | list) else found[0]
    out = pytree.tree_leaves(gm.graph.output_node().args[0], is_leaf=lambda n: n is None)
    return [_state_of(n) for n in out]


def _moves_samples(program: Program, node: fx.Node) -> bool:
    """Whether an op moves slices along the sample axis by an index. A trial cannot tell which sample they belong to."""
    name = str(schema_of(node.target) and schema_of(node.target).name).removeprefix("aten::")
    if not node.meta["active"] or not name.startswith(("index", "scatter", "gather", "take", "put", "masked_scatter")):
        return False
    if name.startswith(("take", "put", "masked_scatter")):
        return True
    values = [a for a in node.all_input_nodes if a.meta["active"] and isinstance(a.meta.get("place"), Shard)]
    if name in ("index", "index_put", "_index_put_impl"):
        along = [d for d, index in enumerate(node.args[1]) if index is not None]
        return any(v.meta["place"].dim in along for v in values)
    return any(v.meta["place"].dim == node.args[1] % v.meta["val"].ndim for v in values if v.meta["val"].ndim)


def _gradients_fit(program: Program, node: fx.Node, given: list[Seen], found: list[Seen], place_of: Callable) -> bool:
    """Whether each gradient has its argument's placement, or is a sum over samples if the argument has no samples."""
    kind = node.target
    if any(p == MIXED for p, _ in found):
        return False
    gs = [(REPLICATE if p == PARTIAL else p, True) for p, _ in found]
    back = iter(_follow(program, kind.backward, [*given, *given, *found, *gs], place_of))
    sharded = any(isinstance(p, Shard) for p, _ in found)
    for k in kind.tensor_tops:
        place, depends = next(back)
        where, active = given[k]
        allowed = [where] if isinstance(where, Shard) else [PARTIAL] if sharded else [REPLICATE]
        if active and depends and place not in allowed:
            return False
    return True


def _check_linear(program: Program, node: fx.Node, found: list[Seen]) -> None:
    """Refuse what a backward that is not linear in the cotangent, such as clipping, does not define.

    It defines the gradient only, and if an argument has no samples, the gradient is no sum of individual ones.
    """
    kind = node.target
    if not kind.nonlinear or not is_active(node):
        return
    more = [type(e).__name__ for e in program.extensions if not e.requires.of_gradients]
    free = any(is_active(a) and not isinstance(a.meta["place"], Shard) for a in node.args if isinstance(a, fx.Node))
    each = [type(e).__name__ for e in program.extensions if e.per_sample] if free else []
    names = ", ".join(dict.fromkeys([*more, *each]))
    sharded = any(isinstance(p, Shard) for p, _ in found)
    if not names and program.options.sample != "token" and not (free and sharded):
        return
    raise kind.refused(
        f"has a backward that {kind.nonlinear}, so {names or 'the gradient'} is not defined behind it",
        "ask for the gradient, and individual gradients where the function is applied to activations alone",
        f"{locate(node)}\n",
    )
