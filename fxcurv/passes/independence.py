"""independence: where the samples are on every value, and which values depend on a trainable parameter.

A rule says the placement of its op's output. An op without a rule is probed at a small batch size: one sample's slices
are redrawn, and what moves is where that sample is. Constants (values that depend on no trainable parameter) may be
reduced and broadcast over the batch freely: only where their sample axis is matters.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv import custom
from fxcurv._torch import OpOverload, pytree
from fxcurv.custom import Custom
from fxcurv.errors import UnsupportedOpError, locate
from fxcurv.placement import MIXED, PARTIAL, REPLICATE, Placement, Shard, Site, samples_first
from fxcurv.program import Program, specialise
from fxcurv.rules.base import canonical_args, invoke, rule_of

aten = torch.ops.aten

# Their derivative is zero or undefined: what they return is a constant.
CUTS = {
    aten.detach.default, aten.sign.default, aten.floor.default, aten.ceil.default, aten.round.default, aten.trunc.default,
    aten.fill.Scalar, aten.zero.default,
}  # fmt: skip
# These read nothing but the shape.
CUTS |= {aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}
CUTS |= {aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}


def independence(program: Program) -> Program:
    """Set `meta["place"]` and `meta["active"]` on every node."""
    if program.batch.symbols and program.fixed:
        program = specialise(program, program.batch.size)  # a rewrite fixed the batch size: then for all values alike
    try:
        return _placed(program)
    except _OneSize:
        return _placed(specialise(program, program.batch.size))


class _OneSize(Exception):
    """The placement of a value with a size that is a number, and happens to be the batch's."""


def _placed(program: Program) -> Program:
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
    leaves = pytree.tree_leaves(val)
    if inputs and node.target not in CUTS and any(isinstance(v, Tensor) and v.is_complex() for v in leaves):
        raise UnsupportedOpError(
            f"{locate(node)}\ngives complex numbers, which are not supported between a trainable parameter and the loss. Way "
            "out: say it in real and imaginary parts, or detach it if nothing is to be learned through it."
        )
    active = bool(inputs) and node.target not in CUTS and any(map(_differentiable, leaves))
    node.meta["active"] = active
    vals = list(val) if isinstance(val, tuple | list) else [val]
    places = _places(program, node, vals, active)
    node.meta["place"] = places if isinstance(val, tuple | list) else places[0]


def _differentiable(val: Any) -> bool:
    return isinstance(val, Tensor) and val.is_floating_point()


def _places(program: Program, node: fx.Node, vals: list[Any], active: bool) -> list[Placement]:
    """The placement of every output; a rule says it of the first only."""
    if isinstance(node.target, Custom):
        return custom.places(program, node, vals, _places)
    first = vals[0] if vals else None
    found: Any = _by_rule(program, node, first) if isinstance(first, Tensor) else REPLICATE
    if found is None and active:
        return _probe(program, node, vals)
    if not active:
        if found is None or found == MIXED:
            found = structural(program, first)
        found = REPLICATE if found == PARTIAL else found
    rest = vals[1:]
    alike = [isinstance(v, Tensor) and isinstance(first, Tensor) and v.ndim == first.ndim for v in rest]
    return [found, *(found if same else structural(program, v) for v, same in zip(rest, alike, strict=True))]


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
    if isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags:
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


def _probe(program: Program, node: fx.Node, vals: list[Any]) -> list[Placement]:
    """Redraw one sample at a time and see which outputs move."""
    if isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        raise UnsupportedOpError(
            f"{locate(node)}\nis random and has no rule, so its derivative would draw again. Way out: draw the noise from "
            "the data (an input), use nn.Dropout, or pass rules={op: rule}."
        )
    # small is quick; the batch's own size is what a size that happens to equal it asks for
    sizes = [3, program.batch.size] if program.batch.symbols else [program.batch.size]
    reason = ""
    for n, domain in product(dict.fromkeys(sizes), DOMAINS):
        trial = _Trial(program, node, n, domain)
        try:
            places = [_infer(program, functools.partial(trial.run, k), n, v) if isinstance(v, Tensor) else REPLICATE
                      for k, v in enumerate(vals)]  # fmt: skip
        except _Uninformative as error:
            reason = reason or str(error)
            continue
        node.meta["alone"] = trial.serves_alone(places)
        return places
    if not any(e.per_sample for e in program.extensions):
        return [MIXED for _ in vals]  # a gradient asks nobody
    raise UnsupportedOpError(
        f"{locate(node)}\nhas no rule, and probing which samples it mixes failed: {reason}\nWay out: pass "
        "rules={op: rule} with a `place` of its own."
    )


class _Uninformative(Exception):
    """Values at which an op fails, gives no numbers or does not vary say nothing of its samples."""


def _anywhere(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _positive(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Positive numbers; square matrices are positive definite, triangular or not."""
    x = torch.rand(shape, dtype=torch.float64, generator=generator)
    square = len(shape) > 1 and shape[-1] == shape[-2]
    return 0.1 * x / shape[-1] + torch.eye(shape[-1], dtype=x.dtype) if square else 0.1 + 0.8 * x


@dataclass(frozen=True)
class _Domain:
    """Where values are drawn: `floats(shape, generator)`, and integers, any of 0 and 1 or one number."""

    floats: Callable[[tuple[int, ...], torch.Generator], Tensor]
    integer: int | None = None


DOMAINS = (_Domain(_anywhere), _Domain(_positive, 1), _Domain(_positive, 0))


class _Trial:
    """An op on random values in a batch of `n`."""

    def __init__(self, program: Program, node: fx.Node, n: int, domain: _Domain):
        self.program, self.node, self.n, self.domain = program, node, n, domain
        self.leaves, self.spec = pytree.tree_flatten(numeric_args(program, node, n))
        generator = torch.Generator().manual_seed(0)
        self.values = [self._draw(leaf, generator) for leaf in self.leaves]
        self.sharded = {
            i: leaf.meta["place"]
            for i, leaf in enumerate(self.leaves)
            if isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("place"), Shard)
        }

    def run(self, k: int, samples: tuple[int, ...]) -> Tensor:
        """Output `k`, with the slices of the given samples drawn anew."""
        # what depends on no parameter may be reduced over the batch freely (a normaliser made of targets)
        moving = {i: p for i, p in self.sharded.items() if self.leaves[i].meta["active"]} or self.sharded
        drawn = torch.Generator().manual_seed(1)
        new = list(self.values)
        for i, place in moving.items():
            new[i] = _redrawn(self.values[i], place, samples, self.n, self.domain, drawn)
        try:
            out = self._outputs(new)[k]
        except Exception as error:
            raise _Uninformative(str(error)) from error
        if self.domain is DOMAINS[0] and out.isnan().any():
            raise _Uninformative("it gives no numbers")
        with torch.enable_grad():
            return out.nan_to_num()

    def serves_alone(self, places: list[Placement]) -> bool:
        """Whether the op on one sample's slices gives that sample's slices of the outputs."""
        single = pytree.tree_leaves(numeric_args(self.program, self.node, 1))
        values = [v if isinstance(v, Tensor) else s for v, s in zip(self.values, single, strict=True)]
        try:
            whole = self._outputs(self.values)
            pairs = [(k, samples_first(whole[k], p)) for k, p in enumerate(places) if isinstance(p, Shard)]
            owns = [{i: samples_first(self.values[i], p)[n] for i, p in self.sharded.items()} for n in range(self.n)]
            outs = [self._outputs([own.get(i, v) for i, v in enumerate(values)]) for own in owns]
        except Exception:  # whatever an op raises at arguments that it does not take
            return False
        for n, out in enumerate(outs):
            if any(o.shape != y.shape or not torch.allclose(o, y, 1e-5, equal_nan=True) for o, y in
                   ((out[k], y[n]) for k, y in pairs)):  # fmt: skip
                return False
        return True

    def _outputs(self, values: list[Any]) -> list[Any]:
        with torch.enable_grad():
            out = invoke(self.node.target, pytree.tree_unflatten(values, self.spec))
            out = list(out) if isinstance(out, tuple | list) else [out]
            return [o if not isinstance(o, Tensor) or o.is_floating_point() else o.double() for o in out]

    def _draw(self, leaf: Any, generator: torch.Generator) -> Any:
        val = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
        if not isinstance(val, Tensor):
            return leaf
        shape = self.program.batch.shape(val, self.n)
        if val.is_floating_point():
            return self.domain.floats(shape, generator).to(val.dtype).requires_grad_(leaf.meta["active"])
        if self.domain.integer is not None:
            return torch.full(shape, self.domain.integer, dtype=val.dtype)
        return torch.randint(0, 2, shape, generator=generator).to(val.dtype)


def _redrawn(value: Tensor, place: Shard, samples: tuple[int, ...], n: int, domain: _Domain, generator) -> Tensor:
    """`value` with the slices of `samples` drawn anew (the same ones whatever the other samples)."""
    if value.is_floating_point():
        other = domain.floats(tuple(value.shape), generator).to(value.dtype)
    else:
        other = (1 - value.to(torch.long)).to(value.dtype)
    slots = torch.arange(value.shape[place.dim]).div(place.inner, rounding_mode="floor") % n
    chosen = torch.isin(slots, torch.tensor(samples, dtype=torch.long))
    chosen = chosen.view(-1, *[1] * (value.ndim - place.dim - 1))
    return torch.where(chosen, other, value)


def _infer(program: Program, run: Callable[[tuple[int, ...]], Tensor], n: int, val: Tensor) -> Placement:
    base = run(())
    singles = [run((k,)) for k in range(n)]
    moved = [single != base for single in singles]
    if not any(bool(m.any()) for m in moved):
        if base.requires_grad:  # unlike that of an op that reads only a value's shape
            raise _Uninformative("its output is the same wherever it was tried")
        return structural(program, val)
    for dim, (outer, inner) in product(range(base.ndim), _splits_of(base.shape, n)):
        if outer * n * inner != base.shape[dim]:
            continue
        one_size = outer * program.batch.probe * inner != program.batch.shape(val)[dim]
        if one_size and n != program.batch.size:
            continue
        slots = torch.arange(base.shape[dim]).div(inner, rounding_mode="floor") % n
        view = slots.view(-1, *[1] * (base.ndim - dim - 1))
        if all(not bool((m & (view != k)).any()) for k, m in enumerate(moved)):
            if one_size:
                raise _OneSize
            return Shard(dim, outer, inner)
    both = run(tuple(range(n)))
    total = base + sum(s - base for s in singles)
    return PARTIAL if torch.allclose(both, total, rtol=1e-6, atol=1e-8) else MIXED


def _splits_of(shape, n: int) -> list[tuple[int, int]]:
    sizes = {s // n for s in shape if s and s % n == 0}
    pairs = {(o, s // o) for s in sizes for o in range(1, s + 1) if s % o == 0}
    return sorted(pairs, key=lambda p: (p[0] * p[1], p[0]))
