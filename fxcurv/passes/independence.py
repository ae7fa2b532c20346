"""independence: where the samples are on every value, and which values depend on a trainable parameter.

A rule says the placement of its op's output. An op without a rule is probed at a small batch size: one sample's slices
are redrawn, and what moves is where that sample is. Constants (values that depend on no trainable parameter) may be
reduced and broadcast over the batch freely: only where their sample axis is matters.
"""

from __future__ import annotations

import operator
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcurv.errors import UnsupportedOpError, locate
from fxcurv.placement import MIXED, PARTIAL, REPLICATE, Placement, Shard, Site
from fxcurv.program import Program, specialise
from fxcurv.rules.base import canonical_args, invoke, rule_of

aten = torch.ops.aten

# Their derivative is zero or undefined: what they return is a constant.
CUTS = {aten.detach.default, aten.sign.default, aten.floor.default, aten.ceil.default, aten.round.default}
# These read nothing but the shape.
CUTS |= {aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}
CUTS |= {aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}


def independence(program: Program) -> Program:
    """Set `meta["place"]` and `meta["active"]` on every node."""
    if program.batch.symbols and program.fixed:
        program = specialise(program, program.batch.size)  # a rewrite fixed the batch size: then for all values alike
    params = set(program.params.values())
    bound = {}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    for node, what in zip(placeholders, program.inputs, strict=True):
        bound[node] = what
    for node in program.graph.nodes:
        if node.op == "placeholder":
            node.meta["active"] = node in params
            node.meta["place"] = _of_input(program, node, bound[node])
        elif node.op == "get_attr":
            node.meta["active"], node.meta["place"] = False, REPLICATE
        elif node.op == "call_function":
            _visit(program, node)
    return program


def _of_input(program: Program, node: fx.Node, what) -> Placement:
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or what.kind not in ("input", "target"):
        return REPLICATE
    dims = program.state["batch_dims"]
    if what.kind == "input":
        dim = dims[what.index]
        return REPLICATE if dim is None else Shard(dim)
    return structural(program, val)


def structural(program: Program, val: Any) -> Placement:
    """The placement of a constant, from its shape alone."""
    if not isinstance(val, Tensor):
        return REPLICATE
    n = program.batch.probe
    dims = [d for d, s in enumerate(program.batch.shape(val)) if s == n]
    if dims:
        return Shard(dims[0])
    merged = [d for d, s in enumerate(program.batch.shape(val)) if s and s % n == 0]
    return Shard(merged[0], 1, program.batch.shape(val)[merged[0]] // n) if merged and n > 1 else REPLICATE


def _visit(program: Program, node: fx.Node) -> None:
    if node.target is operator.getitem:
        source = node.args[0]
        place, index = source.meta["place"], node.args[1]
        node.meta["place"] = place[index] if isinstance(place, list) else place
        node.meta["active"] = source.meta["active"] and _differentiable(node.meta.get("val"))
        return
    val = node.meta.get("val")
    inputs = [n for n in node.all_input_nodes if n.meta.get("active")]
    active = bool(inputs) and node.target not in CUTS and any(map(_differentiable, pytree.tree_leaves(val)))
    node.meta["active"] = active
    vals = list(val) if isinstance(val, tuple | list) else [val]
    if inputs and any(isinstance(v, Tensor) and v.is_complex() for v in vals):
        raise UnsupportedOpError(
            f"{locate(node)}\ngives complex numbers, which are not supported between a trainable parameter and the loss. Way "
            "out: say it in real and imaginary parts, or detach it if nothing is to be learned through it."
        )
    places = [_place(program, node, v, active) for v in vals[:1]]
    for v in vals[1:]:
        same = isinstance(v, Tensor) and isinstance(vals[0], Tensor) and v.ndim == vals[0].ndim
        places.append(places[0] if same else structural(program, v))
    node.meta["place"] = places if isinstance(val, tuple | list) else places[0]


def _differentiable(val: Any) -> bool:
    return isinstance(val, Tensor) and val.is_floating_point()


def _place(program: Program, node: fx.Node, val: Any, active: bool) -> Placement:
    if not isinstance(val, Tensor):
        return REPLICATE
    found: Any = _by_rule(program, node, val)
    if found is None and active:
        found = _probe(program, node)
    if active:
        return found
    if found is None or found == MIXED:
        return structural(program, val)
    return REPLICATE if found == PARTIAL else found


def sites(program: Program, node: fx.Node) -> list[Site | None]:
    """What a placement rule sees of the flattened canonical arguments."""
    out: list[Site | None] = []
    for leaf in pytree.tree_leaves(canonical_args(node)):
        val = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
        if isinstance(val, Tensor):
            out.append(Site(program.batch.shape(val), leaf.meta["place"], leaf.meta["active"]))
        else:
            out.append(None)
    return out


def _by_rule(program: Program, node: fx.Node, val: Tensor) -> Placement | None:
    rule = rule_of(node.target, program.rules)
    n = program.batch.probe
    found = rule.place(sites(program, node), numeric_args(program, node, n), program.batch.shape(val), n)
    if found is not None:
        return found
    here = [s for s in sites(program, node) if s]
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        from fxcurv import placement

        return placement.pointwise(here, val.ndim, linear=False)
    # an op of sample-free values only is sample-free, whatever it is, or the same for every sample of a new axis
    return structural(program, val) if here and all(s.place == REPLICATE for s in here) else None


def numeric_args(program: Program, node: fx.Node, n: int) -> tuple:
    """Canonical arguments with sizes at batch size `n`; tensors stay nodes."""

    def number(leaf):
        val = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
        return program.batch.evaluate(val, n) if isinstance(val, torch.SymInt | int) else leaf

    return pytree.tree_map(number, canonical_args(node))


def _probe(program: Program, node: fx.Node) -> Placement:
    """Redraw one sample at a time and see which outputs move."""
    n = 3 if program.batch.symbols else program.batch.size
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        raise UnsupportedOpError(
            f"{locate(node)}\nis random and has no rule, so its derivative would draw again. Way out: draw the noise from "
            "the data (an input), use nn.Dropout, or pass rules={op: rule}."
        )
    leaves, spec = pytree.tree_flatten(numeric_args(program, node, n))
    generator = torch.Generator().manual_seed(0)
    values = [_draw(program, leaf, n, generator) for leaf in leaves]
    sharded = {
        i: leaf.meta["place"]
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("place"), Shard)
    }
    # what depends on no parameter may be reduced over the batch freely (a normaliser made of targets)
    shards = {i: p for i, p in sharded.items() if leaves[i].meta["active"]} or sharded

    def run(samples: tuple[int, ...]) -> Tensor:
        drawn = torch.Generator().manual_seed(1)
        new = list(values)
        for i, place in shards.items():
            new[i] = _redrawn(values[i], place, samples, n, drawn)
        try:
            out = pytree.tree_leaves(invoke(node.target, pytree.tree_unflatten(new, spec)))[0]
        except Exception as error:
            raise UnsupportedOpError(
                f"{locate(node)}\nhas no rule, and probing which samples it mixes failed: {error}\nWay out: pass "
                "rules={op: rule} with a `place` of its own."
            ) from error
        return out.nan_to_num()

    return _infer(run, n)


def _draw(program: Program, leaf: Any, n: int, generator: torch.Generator) -> Any:
    val = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
    if not isinstance(val, Tensor):
        return leaf
    shape = program.batch.shape(val, n)
    if val.is_floating_point():
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(val.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(val.dtype)


def _redrawn(value: Tensor, place: Shard, samples: tuple[int, ...], n: int, generator) -> Tensor:
    """`value` with the slices of `samples` drawn anew (the same ones whatever the other samples)."""
    if value.is_floating_point():
        other = torch.randn(value.shape, dtype=torch.float64, generator=generator).to(value.dtype)
    else:
        other = (1 - value.to(torch.long)).to(value.dtype)
    slots = torch.arange(value.shape[place.dim]).div(place.inner, rounding_mode="floor") % n
    chosen = torch.isin(slots, torch.tensor(samples, dtype=torch.long))
    chosen = chosen.view(-1, *[1] * (value.ndim - place.dim - 1))
    return torch.where(chosen, other, value)


def _infer(run, n: int) -> Placement:
    base = run(())
    singles = [run((k,)) for k in range(n)]
    moved = [single != base for single in singles]
    if not any(bool(m.any()) for m in moved):
        return REPLICATE
    for dim, (outer, inner) in product(range(base.ndim), _splits_of(base.shape, n)):
        if outer * n * inner != base.shape[dim]:
            continue
        slots = torch.arange(base.shape[dim]).div(inner, rounding_mode="floor") % n
        view = slots.view(-1, *[1] * (base.ndim - dim - 1))
        if all(not bool((m & (view != k)).any()) for k, m in enumerate(moved)):
            return Shard(dim, outer, inner)
    both = run(tuple(range(n)))
    total = base + sum(s - base for s in singles)
    return PARTIAL if torch.allclose(both, total, rtol=1e-6, atol=1e-8) else MIXED


def _splits_of(shape, n: int) -> list[tuple[int, int]]:
    sizes = {s // n for s in shape if s and s % n == 0}
    pairs = {(o, s // o) for s in sizes for o in range(1, s + 1) if s % o == 0}
    return sorted(pairs, key=lambda p: (p[0] * p[1], p[0]))
