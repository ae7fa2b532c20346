"""One stack of cotangents through one op."""

from __future__ import annotations

import operator
from dataclasses import replace

from torch import Tensor, fx

from fxcurv.contractions.factors import Explicit, Factor, declare_factor, materialised
from fxcurv.errors import UnsupportedOpError
from fxcurv.ir.emit import declare, emit
from fxcurv.ir.graph import canonical_args
from fxcurv.ir.origin import locate, origin_of
from fxcurv.ir.placement import REPLICATE, Shard, shifted
from fxcurv.ir.private import pytree
from fxcurv.ir.program import is_active, place
from fxcurv.ir.traced import in_dtype, sum_of, zeros_behind
from fxcurv.quantity import GRADIENT, Group
from fxcurv.rules.base import FAILURES, Refused, Rule, failure, rule_of
from fxcurv.rules.call import Call, call_of, outputs_of, place_of_outputs
from fxcurv.rules.traits import APART
from fxcurv.walks.columns import residuals as curvature
from fxcurv.walks.columns.stack import Stack, Walk, merged, narrowed
from fxcurv.walks.uses import Use, pull_back, select_group


def visit(walk: Walk, node: fx.Node) -> None:
    """Carry the stack at a node to the node's arguments and parameters."""
    if node in walk.uses and node.op != "placeholder":
        _move_uses(walk, node)
    if node.target is operator.getitem:
        for stack in walk.cotangents.pop(node, []):
            walk.outputs.setdefault(node.args[0], {}).setdefault(node.args[1], []).append(stack)
        return
    stacks = [merged(walk, node, s) for s in _by_kind(walk.cotangents.pop(node, []))]
    if node.op == "placeholder":
        _arrive_at_parameter(walk, node, stacks)
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


def _tuple_stacks(walk: Walk, node: fx.Node) -> list[Stack]:
    """Cotangents of an op with several outputs: zeros, or None, where an output is not read."""
    outputs = walk.outputs.pop(node)
    sides = [
        {k: [s for s in stacks if s.per_sample is side] for k, stacks in outputs.items()} for side in (True, False)
    ]
    return [
        stack
        for side in sides
        for stack in _join_outputs({k: merged(walk, node, s) for k, s in side.items() if s}, walk, node)
    ]


def _join_outputs(given: dict[int, Stack], walk: Walk, node: fx.Node) -> list[Stack]:
    if not given:
        return []
    first = next(iter(given.values()))
    if any(s.groups != first.groups for s in given.values()):
        return [Stack(s.groups, s.columns, _fill(walk, node, {k: s.node}), s.per_sample) for k, s in given.items()]
    return [
        Stack(first.groups, first.columns, _fill(walk, node, {k: s.node for k, s in given.items()}), first.per_sample)
    ]


def _fill(walk: Walk, node: fx.Node, given: dict[int, fx.Node]) -> tuple:
    some = next(iter(given.values()))
    rule = rule_of(node.target, walk.program.rules)
    out = []
    for k, val in enumerate(node.meta["val"]):
        if k in given:
            out.append(given[k])
        elif type(rule).transpose is Rule.transpose and isinstance(val, Tensor) and val.is_floating_point():
            y = outputs_of(walk.program, node)[k]
            out.append(None if node.target in APART else emit(walk.program, zeros_behind, some, y))
    return tuple(out)


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
    stack = narrowed(walk, stack, tuple(g for g in stack.groups if any(g in kept[i] for i in active)), node)
    rule, call = rule_of(node.target, program.rules), call_of(program, node)
    origin = origin_of(node, "propagate")
    try:
        wrt = tuple(i for i in active if i not in free)
        if wrt:
            for i, g in zip(wrt, emit(program, rule.transpose, call, wrt, stack.node, origin=origin), strict=True):
                if g.meta["val"].dtype != leaves[i].meta["val"].dtype:  # the op promoted its argument
                    g = emit(program, in_dtype, g, leaves[i].meta["val"].dtype, origin=origin)
                _declare_cotangent(node, stack, leaves[i], g, call)
                there = Stack(stack.groups, stack.columns, g, stack.per_sample)
                walk.add(leaves[i], narrowed(walk, there, kept[i], node))
        for i in free:
            here = narrowed(walk, stack, kept[i], node)
            found = emit(program, rule.factors, call, i, here.node, origin=origin)
            declare_factor(found, (node, call, here.node))
            use = Use(found, here.groups, here.columns, rule.name, (), node, leaves[i], here.node)
            walk.uses.setdefault(leaves[i], []).append(use)
    except Refused as error:
        raise UnsupportedOpError(f"{locate(node)}\n{error}") from None
    except (*FAILURES, TypeError) as error:
        raise UnsupportedOpError(
            f"{locate(node)}\nhas no rule, and the general fallback failed: {failure(error)}\n"
            "Way out: pass rules={op: rule}, or write the op in other PyTorch ops."
        ) from error


def _declare_cotangent(node: fx.Node, stack: Stack, leaf: fx.Node, g: fx.Node, call: Call) -> None:
    """Declare the placement of a cotangent: that of its value, behind the columns."""
    at = place(leaf)
    if stack.per_sample:
        declare(g, Shard(0, sum(stack.columns)), (node, call, stack.node))
    elif isinstance(at, Shard) and isinstance(place_of_outputs(node), Shard):
        declare(g, shifted(at), (node, call, stack.node))


def _move_uses(walk: Walk, node: fx.Node) -> None:
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
            p = _total(walk, node, here, group, materialised, "")
            rows = emit(walk.program, _flatten_rows, p, origin=origin_of(node, "propagate"))
            walk.add(node, Stack((group,), (columns,), rows, per_sample=True))
        else:
            walk.add(node, Stack((group,), (columns,), _total(walk, node, here, group, _summed, "n")))


def _total(walk: Walk, node: fx.Node, uses: list[Use], group: Group, fn, reduce: str) -> fx.Node:
    """The sum over uses of `fn` of their factors, moved to `node`."""
    parts = []
    for use in uses:
        origin = origin_of(node, "propagate")
        factor = select_group(walk.program, use, group, origin)
        value = emit(walk.program, fn, factor, origin=origin)
        if not reduce:
            declare(value, Shard(1), factor)
        parts.append(pull_back(walk.program, use, value, reduce))
    return emit(walk.program, sum_of, parts, origin=origin_of(node, "propagate"))


def _several_positions(node: fx.Node, source: fx.Node) -> bool:
    return sum(leaf is source for leaf in pytree.tree_leaves(canonical_args(node))) > 1


def _flatten_rows(p: Tensor) -> Tensor:
    return p.flatten(0, 1)


def _summed(factor: Factor) -> Tensor:
    return factor.summed().unsqueeze(0)


def _arrive_at_parameter(walk: Walk, node: fx.Node, stacks: list[Stack]) -> None:
    for stack in stacks:
        if stack.per_sample:
            columns = sum(stack.columns)
            p = emit(walk.program, _unflatten_rows, stack.node, columns, origin=origin_of(node, "extract"))
            walk.uses.setdefault(node, []).append(Use(Explicit(p), stack.groups, stack.columns, "pull-back"))
        elif stack.groups == (GRADIENT,):
            walk.direct[node] = stack.node


def _unflatten_rows(rows: Tensor, columns: int) -> Tensor:
    return rows.unflatten(0, (columns, -1))
