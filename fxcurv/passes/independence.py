"""independence: where the samples are on every value, and which values depend on a trainable parameter.

A rule says the placement of its op's output. An op without a rule is tried at a small batch size (`trial`): slices of
some samples are drawn anew, and the output slices that change hold these samples. Constants (values that depend on no
trainable parameter) may be reduced and broadcast over the batch freely: only where their sample axis is matters.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from fxcurv.errors import UnsupportedOpError
from fxcurv.ir import placement
from fxcurv.ir.origin import locate
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Placement, Shard
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program
from fxcurv.ir.specialise import specialise
from fxcurv.rules.base import rule_of
from fxcurv.rules.registered import refuse_without_derivative
from fxcurv.rules.sites import numeric_args, sites, structural
from fxcurv.rules.traits import CUTS, STATE, pointwise, random, takes_sizes
from fxcurv.rules.trial import OneSize, Uninformative, try_op


def independence(program: Program) -> Program:
    """Set `meta["place"]` and `meta["active"]` on every node."""
    if program.batch.symbols and program.fixed:
        program = specialise(program, program.batch.size)  # a rewrite fixed the batch size: so for all values
    try:
        return _place_all(program)
    except OneSize:
        return _place_all(specialise(program, program.batch.size))


def _place_all(program: Program) -> Program:
    params = set(program.params.values())
    bound = {}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    for node, what in zip(placeholders, program.inputs, strict=True):
        bound[node] = what
    for node in program.graph.nodes:
        if node.op == "placeholder":
            node.meta["active"] = node in params
            node.meta["place"] = _place_of_input(program, node, bound[node])
        elif node.op == "get_attr":
            node.meta["active"], node.meta["place"] = False, REPLICATE
        elif node.op == "call_function":
            visit(program, node)
    return program


def _place_of_input(program: Program, node: fx.Node, what) -> Placement:
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or what.kind not in ("input", "target"):
        return REPLICATE
    dims = program.options.batch_dims
    if what.kind == "input":
        dim = dims[what.index]
        return REPLICATE if dim is None else Shard(dim)
    return structural(program, val)


def visit(program: Program, node: fx.Node) -> None:
    """Set both on a call whose arguments have them."""
    if node.target is operator.getitem:
        source = node.args[0]
        place, index = source.meta["place"], node.args[1]
        node.meta["place"] = place[index] if isinstance(place, list) else place
        constant = index in STATE.get(source.target, ())
        node.meta["active"] = source.meta["active"] and not constant and _differentiable(node.meta.get("val"))
        return
    val = node.meta.get("val")
    inputs = [n for n in node.all_input_nodes if n.meta.get("active")]
    leaves = pytree.tree_leaves(val)
    if inputs and node.target not in CUTS and any(isinstance(v, Tensor) and v.is_complex() for v in leaves):
        raise UnsupportedOpError(
            f"{locate(node)}\ngives complex numbers, which are not supported between a trainable parameter and the loss. Way "
            "out: say it in real and imaginary parts, or detach it if nothing is to be learned through it."
        )
    active = bool(inputs) and node.target not in CUTS and any(map(_differentiable, leaves))
    node.meta["active"] = active
    if active:
        refuse_without_derivative(node, program)
    vals = list(val) if isinstance(val, tuple | list) else [val]
    places = _places(program, node, vals, active)
    node.meta["place"] = places if isinstance(val, tuple | list) else places[0]


def _differentiable(val: Any) -> bool:
    return isinstance(val, Tensor) and val.is_floating_point()


def _places(program: Program, node: fx.Node, vals: list[Any], active: bool) -> list[Placement]:
    """The placement of every output; a rule says that of the first only."""
    followed = rule_of(node.target, program.rules).places(program, node, vals, _places)
    if followed is not None:
        return followed
    first = vals[0] if vals else None
    found: Any = _place_by_rule(program, node, first) if isinstance(first, Tensor) else REPLICATE
    if found is None and active:
        return _probe(program, node, vals)
    if not active:
        if found is None or found == MIXED:
            found = structural(program, first)
        found = REPLICATE if found == PARTIAL else found
    rest = vals[1:]
    alike = [isinstance(v, Tensor) and isinstance(first, Tensor) and v.ndim == first.ndim for v in rest]
    return [found, *(found if same else structural(program, v) for v, same in zip(rest, alike, strict=True))]


def _place_by_rule(program: Program, node: fx.Node, val: Tensor) -> Placement | None:
    rule = rule_of(node.target, program.rules)
    n = program.batch.stand_in
    found = rule.place(sites(program, node), numeric_args(program, node, n), program.batch.shape(val), n)
    if found is not None:
        return found
    here = [s for s in sites(program, node) if s]
    if pointwise(node.target):
        return placement.pointwise(here, val.ndim, linear=False)
    if not here or any(s.place != REPLICATE for s in here):
        return None
    # any op of sample-free values is sample-free, but one that takes sizes may have slices, all alike
    return structural(program, val) if takes_sizes(node.target) else REPLICATE


def _probe(program: Program, node: fx.Node, vals: list[Any]) -> list[Placement]:
    """Try an op on random values, and see which outputs change with which samples."""
    if program.options.alone:
        return [MIXED for _ in vals]  # there is no other sample; `whole_batch` places the value
    if random(node.target):
        raise UnsupportedOpError(
            f"{locate(node)}\nis random and has no rule, so its derivative would draw again. Way out: draw the noise from "
            "the data (an input), use nn.Dropout, or pass rules={op: rule}."
        )
    try:
        found = try_op(program, node, len(vals))
        node.meta["alone"] = found.alone
        return [structural(program, v) if p is None else p for p, v in zip(found.places, vals, strict=True)]
    except Uninformative as error:
        reason = str(error)
    if not any(e.per_sample for e in program.extensions):
        return [MIXED for _ in vals]  # a gradient needs no independence
    raise UnsupportedOpError(
        f"{locate(node)}\nhas no rule, and probing which samples it mixes failed: {reason}\nWay out: pass "
        "rules={op: rule} with a `place` of its own."
    )
