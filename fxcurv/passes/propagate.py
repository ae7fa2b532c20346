"""propagate: one reverse walk that carries the columns of every quantity.

A value's cotangent is a list of stacks, each one tensor [V, *value] for an ordered tuple of column groups. Where a
sample-free value (a parameter, or something computed from parameters only) enters a per-sample op, the walk leaves
a `Use`: the factors of P there. A use moves up to its parameter through ops that only move elements; through any
other op P is materialised and pulled back with a column per sample.

Columns beyond the memory budget wait, and go down in parts in sweeps of their own; a contraction over columns adds
up the parts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv._torch import pytree
from fxcurv.emit import emit
from fxcurv.errors import UnsupportedOpError, locate
from fxcurv.factors import Factor, Jacobian
from fxcurv.passes import births, curvature
from fxcurv.passes.budget import capacity, convenient, largest_batch, sizes
from fxcurv.passes.objective import ancestors, descendants
from fxcurv.placement import REPLICATE, Shard
from fxcurv.program import Program, is_active, place
from fxcurv.quantity import GRADIENT, Group, HessianFactors, groups_of
from fxcurv.rules.base import FAILURES, Rule, canonical_args, rule_of
from fxcurv.uses import Use, call_of, origin_of, outputs_of, place_of_outputs, pull_back, select_group


@dataclass(frozen=True)
class Stack:
    """Cotangents of several groups in one tensor: `groups[k]` takes `columns[k]` rows of `node` [V, *value]."""

    groups: tuple[Group, ...]
    columns: tuple[int, ...]
    node: Any
    per_sample: bool = False
    """Whether the leading axis holds V * N rows: the walk is in the sample-free part before a materialised P."""


@dataclass
class Walk:
    """The state of the reverse walk."""

    program: Program
    groups: list[Group]
    cotangents: dict[fx.Node, list[Stack]] = field(default_factory=dict)
    outputs: dict[fx.Node, dict[int, list[Stack]]] = field(default_factory=dict)
    uses: dict[fx.Node, list[Use]] = field(default_factory=dict)
    direct: dict[fx.Node, fx.Node] = field(default_factory=dict)
    wanted: dict[Group, frozenset[str]] = field(default_factory=dict)
    below: dict[frozenset[str], set[fx.Node]] = field(default_factory=dict)
    weights: dict[Group, fx.Node] = field(default_factory=dict)
    columns: dict[Group, int] = field(default_factory=dict)
    of_curvature: frozenset[str] = frozenset()
    curved: set[fx.Node] = field(default_factory=set)
    residuals: list[Group] = field(default_factory=list)
    capacity: int = 1 << 62
    convenient: int = 1 << 62
    carried: int = 0
    waiting: list[tuple[Group, int, Callable[[Group, int, int], None]]] = field(default_factory=list)
    parts: dict[Group, list[Group]] = field(default_factory=dict)

    def born(self, group: Group, count: int, send: Callable[[Group, int, int], None], divisible: bool = True) -> None:
        """Have `count` columns of `group` sent down: now, or in parts in later sweeps if they are too many.

        send: puts the columns from `start` to `stop` on the walk, called as `send(part of the group, start, stop)`.
        """
        if divisible and self.carried + count > min(self.capacity, self.convenient):
            self.waiting.append((group, count, send))
            return
        self.carried += count
        send(group, 0, count)

    def wants(self, group: Group, node: fx.Node) -> bool:
        """Whether an extension needs the columns of `group` at `node`: a parameter of it reaches `node`."""
        names = self.wanted.get(replace(group, part=0), frozenset())
        if names not in self.below:
            self.below[names] = descendants([self.program.params[n] for n in names])
        return node in self.below[names]

    def carries(self, group: Group, node: fx.Node) -> bool:
        """Whether the columns of `group` go to `node`; the gradient goes wherever a parameter is."""
        return group == GRADIENT or self.wants(group, node)

    def add(self, node: fx.Node, stack: Stack) -> None:
        self.cotangents.setdefault(node, []).append(stack)
        self.columns.update(zip(stack.groups, stack.columns, strict=True))


def propagate(program: Program) -> Program:
    """Fill `state["uses"]` (parameter name -> uses), `state["direct"]` (gradient past all samples) and column weights."""
    walk = Walk(program, [GRADIENT] if program.loss is not None else [])
    for e in program.extensions:
        curved = isinstance(e.requires, HessianFactors)
        for group in [*groups_of(program, e.requires), *([GRADIENT] if curved else [])]:
            walk.wanted[group] = walk.wanted.get(group, frozenset()) | {*program.names_of(e)}
        if curved:
            walk.of_curvature |= {*program.names_of(e)}
    walk.groups = list(dict.fromkeys([*walk.groups, *walk.wanted]))
    walk.curved = set(ancestors(program.heads)) & descendants([program.params[n] for n in walk.of_curvature])
    # a result that shows its columns holds them all anyway
    if not any(e.shows_columns for e in program.extensions):
        walk.capacity = capacity(program)
        if not any(e.holds_samples for e in program.extensions):
            walk.convenient = convenient(program)
    forward = list(program.graph.nodes)
    targets = [program.loss] if program.loss is not None else program.heads
    reached = set(ancestors(targets))
    _seed(walk)
    for node in reversed(forward):
        if node in reached:
            births.at(walk, node)
            if is_active(node) or node in walk.outputs:
                _visit(walk, node)
    widest = walk.carried
    sweeps = _sweeps(walk, len(reached))
    for sweep in sweeps:
        for group, start, stop, send in sweep:
            send(_part(walk, group), start, stop)
        widest = max(widest, sum(stop - start for _, start, stop, _ in sweep))
        for node in reversed(forward):
            if node in reached and (is_active(node) or node in walk.outputs):
                _visit(walk, node)
    if not any(e.shows_columns for e in program.extensions):
        program.largest = largest_batch(program, widest)
    program.state["uses"] = {name: walk.uses.get(node, []) for name, node in program.params.items()}
    program.state["direct"] = {n: walk.direct[p] for n, p in program.params.items() if p in walk.direct}
    program.state["weights"] = walk.weights
    program.state["columns"] = walk.columns
    program.state["residuals"] = walk.residuals
    program.state["parts"], program.state["sweeps"] = walk.parts, 1 + len(sweeps)
    return program


def _sweeps(walk: Walk, forward: int) -> list[list[tuple[Group, int, int, Callable[[Group, int, int], None]]]]:
    """The waiting columns, (group, start, stop, send), packed into sweeps of what can be carried."""
    sweeps: list[list] = []
    total = sum(count for _, count, _ in walk.waiting)
    size = sizes(total, walk.capacity, walk.convenient, forward) if total else 0
    room = 0
    for group, count, send in walk.waiting:
        start = 0
        while start < count:
            if not room:
                sweeps.append([])
                room = size
            stop = min(count, start + room)
            sweeps[-1].append((group, start, stop, send))
            room -= stop - start
            start = stop
    return sweeps


def _part(walk: Walk, group: Group) -> Group:
    """The next part of a group, on the walk."""
    parts = walk.parts.setdefault(group, [])
    part = replace(group, part=len(parts) + 1)
    parts.append(part)
    walk.groups.append(part)
    return part


def _seed(walk: Walk) -> None:
    program = walk.program
    if program.loss is None:
        return
    one = emit(program, _ones, program.loss, origin={"stage": "propagate", "op": "gradient of the loss"})
    walk.add(program.loss, Stack((GRADIENT,), (1,), one))


def _ones(loss: Tensor) -> Tensor:
    return torch.ones_like(loss).unsqueeze(0)


def _visit(walk: Walk, node: fx.Node) -> None:
    if node in walk.uses and node.op != "placeholder":
        _leave_uses(walk, node)
    if node.target is operator.getitem:
        for stack in walk.cotangents.pop(node, []):
            walk.outputs.setdefault(node.args[0], {}).setdefault(node.args[1], []).append(stack)
        return
    stacks = [merged(walk, node, s) for s in _by_kind(walk.cotangents.pop(node, []))]
    if node.op == "placeholder":
        _at_parameter(walk, node, stacks)
        return
    if node in walk.outputs:
        stacks = _tuple_stacks(walk, node)
    for stack in stacks:
        if node in walk.curved:
            curvature.at(walk, node, stack)
        _step(walk, node, stack)


def _by_kind(stacks: list[Stack]) -> list[list[Stack]]:
    kinds = [[s for s in stacks if s.per_sample], [s for s in stacks if not s.per_sample]]
    return [k for k in kinds if k]


def merged(walk: Walk, node: fx.Node, stacks: list[Stack]) -> Stack:
    """One stack of the sum of `stacks`, united by group."""
    first = stacks[0]
    origin = origin_of(node, "propagate")
    if len(stacks) == 1:
        return first
    if all(s.groups == first.groups for s in stacks):
        return Stack(
            first.groups,
            first.columns,
            emit(walk.program, _add, [s.node for s in stacks], origin=origin),
            first.per_sample,
        )
    groups = [g for g in walk.groups if any(g in s.groups for s in stacks)]
    columns = tuple(next(s.columns[s.groups.index(g)] for s in stacks if g in s.groups) for g in groups)
    parts = [[_slot(s, g) for s in stacks if g in s.groups] for g in groups]
    total = emit(walk.program, _unite, parts, origin=origin)
    return Stack(tuple(groups), columns, total, first.per_sample)


def _slot(stack: Stack, group: Group) -> tuple[fx.Node, int, int, int]:
    """(tensor, first, last, of): the rows of a group, counted in columns."""
    start = sum(stack.columns[: stack.groups.index(group)])
    width = stack.columns[stack.groups.index(group)]
    return stack.node, start, start + width, sum(stack.columns)


def _rows(t: Tensor, start: int, stop: int, of: int) -> Tensor:
    if (start, stop) == (0, of):
        return t
    return t.unflatten(0, (of, -1))[start:stop].flatten(0, 1)


def _add(tensors: list[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0])


def _unite(parts) -> Tensor:
    return torch.cat([_add([_rows(*slot) for slot in slots]) for slots in parts])


def _tuple_stacks(walk: Walk, node: fx.Node) -> list[Stack]:
    """Cotangents of an op with several outputs: zeros where an output is not read."""
    outputs = walk.outputs.pop(node)
    sides = [
        {k: [s for s in stacks if s.per_sample is side] for k, stacks in outputs.items()} for side in (True, False)
    ]
    return [
        stack
        for side in sides
        for stack in _joint({k: merged(walk, node, s) for k, s in side.items() if s}, walk, node)
    ]


def _joint(given: dict[int, Stack], walk: Walk, node: fx.Node) -> list[Stack]:
    if not given:
        return []
    first = next(iter(given.values()))
    if any(s.groups != first.groups for s in given.values()):
        return [Stack(s.groups, s.columns, _fill(walk, node, {k: s.node}), s.per_sample) for k, s in given.items()]
    return [
        Stack(first.groups, first.columns, _fill(walk, node, {k: s.node for k, s in given.items()}), first.per_sample)
    ]


def _narrowed(walk: Walk, stack: Stack, groups: tuple[Group, ...], node: fx.Node) -> Stack:
    """`stack` with the columns of `groups` only."""
    if groups == stack.groups:
        return stack
    columns = tuple(stack.columns[stack.groups.index(g)] for g in groups)

    def of(tensor: fx.Node) -> fx.Node:
        slots = [[(tensor, *_slot(stack, g)[1:])] for g in groups]
        return emit(walk.program, _unite, slots, origin=origin_of(node, "propagate"))

    rows = tuple(n if n is None else of(n) for n in stack.node) if isinstance(stack.node, tuple) else of(stack.node)
    return Stack(groups, columns, rows, stack.per_sample)


def _fill(walk: Walk, node: fx.Node, given: dict[int, fx.Node]) -> tuple:
    some = next(iter(given.values()))
    rule = rule_of(node.target, walk.program.rules)
    out = []
    for k, val in enumerate(node.meta["val"]):
        if k in given:
            out.append(given[k])
        elif type(rule).transpose is Rule.transpose and isinstance(val, Tensor) and val.is_floating_point():
            out.append(emit(walk.program, _zeros, some, outputs_of(walk.program, node)[k]))
    return tuple(out)


def _zeros(some: Tensor, like: Tensor) -> Tensor:
    return like.new_zeros(some.shape[0], *like.shape)


def _step(walk: Walk, node: fx.Node, stack: Stack) -> None:
    """Send one stack through the op at `node`, to its sharded and to its sample-free inputs."""
    program = walk.program
    sharded_output = isinstance(place_of_outputs(node), Shard)
    leaves = pytree.tree_leaves(canonical_args(node))
    active = [i for i, leaf in enumerate(leaves) if is_active(leaf)]
    kept = {i: tuple(g for g in stack.groups if walk.carries(g, leaves[i])) for i in active}
    active = [i for i in active if kept[i]]
    if not active:
        return
    free = [i for i in active if sharded_output and place(leaves[i]) == REPLICATE]
    stack = _narrowed(walk, stack, tuple(g for g in stack.groups if any(g in kept[i] for i in active)), node)
    rule, call = rule_of(node.target, program.rules), call_of(program, node)
    origin = origin_of(node, "propagate")
    try:
        wrt = tuple(i for i in active if i not in free)
        if wrt:
            for i, g in zip(wrt, emit(program, rule.transpose, call, wrt, stack.node, origin=origin), strict=True):
                there = Stack(stack.groups, stack.columns, g, stack.per_sample)
                walk.add(leaves[i], _narrowed(walk, there, kept[i], node))
        for i in free:
            here = _narrowed(walk, stack, kept[i], node)
            found = emit(program, rule.factors, call, i, here.node, origin=origin)
            use = Use(found, here.groups, here.columns, rule.name, (), node, leaves[i], here.node)
            walk.uses.setdefault(leaves[i], []).append(use)
    except (*FAILURES, TypeError) as error:
        raise UnsupportedOpError(
            f"{locate(node)}\nhas no rule, and the general fallback failed: {type(error).__name__}: {str(error)[:300]}\n"
            "Way out: pass rules={op: rule}, or write the op in other PyTorch ops."
        ) from error


def _leave_uses(walk: Walk, node: fx.Node) -> None:
    """Move the uses of a sample-free value past the op that made it."""
    uses = walk.uses.pop(node)
    rule = rule_of(node.target, walk.program.rules)
    active = [i for i in node.all_input_nodes if is_active(i)]
    if rule.index_map and len(active) == 1 and not _several_positions(node, active[0]):
        moved = [replace(u, path=(*u.path, node)) for u in uses]
        walk.uses.setdefault(active[0], []).extend(moved)
        return
    for group in [g for g in walk.groups if any(g in u.groups for u in uses)]:
        here = [u for u in uses if group in u.groups]
        columns = here[0].columns[here[0].groups.index(group)]
        if walk.wants(group, node):
            p = _total(walk, node, here, group, _materialised, "")
            rows = emit(walk.program, _flatten_rows, p, origin=origin_of(node, "propagate"))
            walk.add(node, Stack((group,), (columns,), rows, per_sample=True))
        else:
            walk.add(node, Stack((group,), (columns,), _total(walk, node, here, group, _summed, "n")))


def _total(walk: Walk, node: fx.Node, uses: list[Use], group: Group, fn, reduce: str) -> fx.Node:
    """The sum over uses of `fn` of their factors, moved to `node`."""
    parts = []
    for use in uses:
        origin = origin_of(node, "propagate")
        value = emit(walk.program, fn, select_group(walk.program, use, group, origin), origin=origin)
        parts.append(pull_back(walk.program, use, value, reduce))
    return emit(walk.program, _add, parts, origin=origin_of(node, "propagate"))


def _several_positions(node: fx.Node, source: fx.Node) -> bool:
    return sum(leaf is source for leaf in pytree.tree_leaves(canonical_args(node))) > 1


def _flatten_rows(p: Tensor) -> Tensor:
    return p.flatten(0, 1)


def _materialised(factor: Factor) -> Tensor:
    return factor.materialise()


def _summed(factor: Factor) -> Tensor:
    return factor.summed().unsqueeze(0)


def _at_parameter(walk: Walk, node: fx.Node, stacks: list[Stack]) -> None:
    for stack in stacks:
        if stack.per_sample:
            columns = sum(stack.columns)
            p = emit(walk.program, _unflatten_rows, stack.node, columns, origin=origin_of(node, "extract"))
            walk.uses.setdefault(node, []).append(Use(Jacobian(p), stack.groups, stack.columns, "pull-back"))
        elif stack.groups == (GRADIENT,):
            walk.direct[node] = stack.node


def _unflatten_rows(rows: Tensor, columns: int) -> Tensor:
    return rows.unflatten(0, (columns, -1))
