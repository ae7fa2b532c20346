"""Logits: NLL of a log_softmax becomes cross-entropy, BCE of a sigmoid becomes BCE with logits, and f the logits.

Ops that only move entries, such as views, may stand between the two. They are applied to the logits instead.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.ir.emit import emit
from fxcurv.ir.graph import canonical_args, invoke
from fxcurv.ir.origin import origin_of
from fxcurv.ir.private import OpOverload, schema_of
from fxcurv.ir.program import Program
from fxcurv.ir.traced import in_dtype
from fxcurv.rules.traits import CUTS

aten = torch.ops.aten

LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default)


def logits(program: Program) -> None:
    """Rewrite the losses, and move f to the logits where only the loss reads the squashed values."""
    before: dict[fx.Node, fx.Node] = {}  # value computed from squashed values -> the same of the logits
    for node in list(program.graph.nodes):
        if node.target is aten.nll_loss_nd.default:
            source, moves = _find_squash(node.args[0], LOG_SOFTMAX)
            if source is None or not _softmax_along_classes(program, source, moves):
                continue
            make = _cross_entropy
        elif node.target is aten.binary_cross_entropy.default:
            source, moves = _find_squash(node.args[0], (aten.sigmoid.default,))
            make = _bce_with_logits
        else:
            continue
        if source is not None:
            program.replace(node, make(program, node, _move_logits(program, source, moves, before)))
            for old in (node, *reversed(moves)):
                if not old.users:
                    program.graph.erase_node(old)
            program.heads = [before[h] if h in before and _only_loss_reads(h) else h for h in program.heads]


def _find_squash(node: fx.Node, ops: tuple) -> tuple[fx.Node | None, list[fx.Node]]:
    """(the node of one of `ops` that `node` gets its entries from, the nodes between, in order), or (None, [])."""
    moves: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.target not in ops:
        if not _moves_entries(node):
            return None, []
        moves.insert(0, node)
        node = node.args[0]  # type: ignore[assignment]
    return (node, moves) if isinstance(node, fx.Node) else (None, [])


def _moves_entries(node: fx.Node) -> bool:
    if node.target is operator.getitem or node.target in (aten.clone.default, aten._unsafe_view.default):
        return True
    if not isinstance(node.target, OpOverload) or node.target in CUTS or node.target is aten.view.dtype:
        return False
    schema = schema_of(node.target)
    views = [a for a in schema.arguments if a.alias_info is not None and not a.alias_info.is_write]
    return len(views) == 1 and not schema.is_mutable and all(r.alias_info is not None for r in schema.returns)


def _softmax_along_classes(program: Program, source: fx.Node, moves: list[fx.Node]) -> bool:
    """Whether the axis of `source`'s softmax stays whole and becomes the class axis of the loss.

    The moves run on C numbers along that axis, expanded along all others: strides then show where the axis goes.
    """
    shape = program.batch.shape(source.meta["val"], program.batch.size)
    axis = source.args[1] % len(shape)  # type: ignore[operator]
    count = [shape[axis] if d == axis else 1 for d in range(len(shape))]
    value: Any = torch.empty(shape[axis], device="meta").view(count).expand(shape)
    for node in moves:
        args = [_number(program, a) for a in canonical_args(node)]
        op = aten.reshape.default if node.target in (aten.view.default, aten._unsafe_view.default) else node.target
        value = value if op is aten.clone.default else invoke(op, [value, *args[1:]])
        if any(_axis(v, shape[axis]) is None for v in (value if isinstance(value, list | tuple) else [value])):
            return False
    return _axis(value, shape[axis]) == (1 if value.ndim > 1 else 0)


def _axis(value: Tensor, count: int) -> int | None:
    """The one axis with a stride, if it has `count` numbers in order; else None."""
    found = [d for d, size in enumerate(value.shape) if size > 1 and value.stride(d)]
    whole = len(found) == 1 and (value.shape[found[0]], value.stride(found[0])) == (count, 1)
    return found[0] if whole and value.storage_offset() == 0 else None


def _number(program: Program, arg: Any) -> Any:
    """An argument, sizes as numbers at the captured batch size."""
    if isinstance(arg, list | tuple):
        return [_number(program, a) for a in arg]
    val = arg.meta["val"] if isinstance(arg, fx.Node) else arg
    return program.batch.evaluate(val, program.batch.size) if isinstance(val, torch.SymInt) else val


def _move_logits(program: Program, source: fx.Node, moves: list[fx.Node], before: dict[fx.Node, fx.Node]) -> fx.Node:
    """The logits of `source`, with `moves` applied."""
    if source not in before:
        z: Any = source.args[0]
        dtype = source.meta["val"].dtype
        if z.meta["val"].dtype != dtype:  # log_softmax(z, 1, dtype=...)
            z = emit(program, in_dtype, z, dtype, origin=origin_of(source, "forward"), before=source)
        before[source] = z
    for node in moves:
        if node not in before:
            with program.graph.inserting_after(node):
                before[node] = program.graph.node_copy(node, lambda a: before.get(a, a))
            before[node].meta = {**node.meta, "origin": origin_of(node, "forward")}
    return before[(source, *moves)[-1]]


def _only_loss_reads(node: fx.Node) -> bool:
    return all(u.op == "output" for u in node.users)


def _cross_entropy(program: Program, node: fx.Node, z: fx.Node) -> fx.Node:
    _, target, weight, mode, ignore = canonical_args(node)
    args = (z, target, weight, mode, ignore, 0.0)
    return _one_op(program, node, aten.cross_entropy_loss.default, args)


def _bce_with_logits(program: Program, node: fx.Node, z: fx.Node) -> fx.Node:
    _, target, weight, mode = canonical_args(node)
    return _one_op(program, node, aten.binary_cross_entropy_with_logits.default, (z, target, weight, None, mode))


def _one_op(program: Program, node: fx.Node, op, args) -> fx.Node:
    """A node of one composite op, which `emit` would decompose."""
    with program.graph.inserting_before(node):
        new = program.graph.call_function(op, args)
    new.meta = {**node.meta, "origin": origin_of(node, "forward")}
    return new
