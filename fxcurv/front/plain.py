"""Graphs that `torch.export` gives in functional form already: they are spared `run_decompositions`, a second trace.

That trace takes as long as the export. All it does to a graph without writes, regions and side effects is to replace
composite views (`chunk`, `flatten`, `unflatten`) by plain ones, and ops that may write (dropout, batch norm) by ops
that do not: `say_in_plain` does so with one trace per kind of call.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.export import ExportedProgram

from fxcurv.ir.emit import emit, signature, substitute
from fxcurv.ir.graph import canonical_args, invoke
from fxcurv.ir.origin import origin_of
from fxcurv.ir.private import (
    OpOverload,
    TorchDispatchMode,
    any_autocast,
    decomposes,
    enable_python_dispatcher,
    pytree,
    schema_of,
)
from fxcurv.ir.program import Program

aten = torch.ops.aten
_HIDDEN = torch.Tag.maybe_aliasing_or_mutating
_SIZE = aten.sym_size.int


def erase_detached(exported: ExportedProgram) -> None:
    """Erase the detaching of new constants (of `torch.tensor(0.5)`), the one write that many models have."""
    for node in exported.graph.find_nodes(op="call_function", target=aten.detach_.default):
        made = node.args[0]
        if isinstance(made, fx.Node) and made.target is aten.lift_fresh_copy.default:
            node.replace_all_uses_with(made)
            exported.graph.erase_node(node)


def is_plain(exported: ExportedProgram) -> bool:
    """Whether `say_in_plain` gives what a second trace would. Under autocast it does not: that trace has casts."""
    if any_autocast():
        return False
    known: dict[Any, bool] = {}
    return all(_is_plain(node, known) for node in exported.graph.nodes if node.op not in ("placeholder", "output"))


def _is_plain(node: fx.Node, known: dict[Any, bool]) -> bool:
    if node.op != "call_function":
        return False
    val = node.meta.get("val")
    if isinstance(val, SymInt):
        known_op = node.target is _SIZE or getattr(node.target, "__module__", "") == "_operator"
        return known_op and not val.node.expr.is_number
    if node.target is operator.getitem:
        return True
    schema = schema_of(node.target)
    if not isinstance(node.target, OpOverload) or schema is None or schema.is_mutable or not _is_of_tensors(node):
        return False
    if not _is_composite(node.target):
        return True
    key = node.target, tuple(map(signature, pytree.tree_leaves((node.args, node.kwargs))))
    if key not in known:
        known[key] = node.target.namespace == "aten" and not _writes(node)
    return known[key]


def _is_of_tensors(node: fx.Node) -> bool:
    return all(isinstance(v, Tensor | None) for v in pytree.tree_leaves(node.meta.get("val")))


def _is_composite(op: OpOverload) -> bool:
    """Whether a second trace decomposes an op: one with a decomposition that returns views or may write."""
    views = any(a.alias_info is not None for a in schema_of(op).arguments)
    return decomposes(op) and (views or _HIDDEN in op.tags)


class _Writes(TorchDispatchMode):
    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D105
        schema = schema_of(func)
        self.found |= schema is not None and schema.is_mutable
        return func(*args, **(kwargs or {}))


def _writes(node: fx.Node) -> bool:
    """Whether an op writes to a tensor; its schema may not show it, so the op runs on fake values."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    fake = next(v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)).fake_mode
    with fake, enable_python_dispatcher(), _Writes() as writes:
        node.target(*args, **kwargs)
    return writes.found


def say_in_plain(program: Program) -> None:
    """Replace composite views, and ops that may write, by the functional ops that they decompose into."""
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverload) and _is_composite(node.target):
            said = functools.partial(invoke, node.target)
            new = emit(program, said, canonical_args(node), origin=origin_of(node, "forward"), before=node)
            substitute(program, node, new)
    _sizes_of_inputs(program)


def _sizes_of_inputs(program: Program) -> None:
    """Read every symbolic size once, from the first input that has it."""
    placeholders, found = program.graph.find_nodes(op="placeholder"), {}
    for node in program.graph.find_nodes(op="call_function", target=_SIZE):
        size = node.meta["val"].node.expr
        given = ((p, d) for p in placeholders for d, s in enumerate(_sizes(p)) if s == size)
        if size not in found:
            where = next(given, None)
            if where is None:
                continue
            first = next(
                n for n in program.graph.nodes if n.op != "placeholder"
            )  # a size itself, which is erased, perhaps
            with program.graph.inserting_before(first):
                found[size] = program.graph.call_function(_SIZE, where)
            found[size].meta = dict(node.meta)
        node.replace_all_uses_with(found[size])
        program.graph.erase_node(node)


def _sizes(node: fx.Node) -> list[Any]:
    val = node.meta.get("val")
    return [s.node.expr if isinstance(s, SymInt) else None for s in val.shape] if isinstance(val, Tensor) else []
