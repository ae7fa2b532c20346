"""normalize: one spelling per op.

Canonical positional arguments, composite ops rewritten in ops that have rules, markers and asserts removed, f moved to
the logits where a log-softmax or a sigmoid stands in front of the loss, and a lookup at [arange(N), i] rewritten as a
lookup in every sample's own slice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from fxcurv.errors import UnsupportedOpError
from fxcurv.ir.emit import emit, substitute
from fxcurv.ir.graph import canonical_args, invoke, to_reshape
from fxcurv.ir.origin import locate, origin_of
from fxcurv.ir.private import OpOverload, decomposes, free_unbacked_symbols, pytree
from fxcurv.ir.program import Program
from fxcurv.ir.specialise import propagate_values
from fxcurv.rules import REWRITES, RULES
from fxcurv.rules.base import SUMS, Refused
from fxcurv.rules.complex_numbers import fold
from fxcurv.rules.fused import FUSED
from fxcurv.rules.idioms import IDIOMS
from fxcurv.rules.logits import logits
from fxcurv.rules.registered import registered_as_functions
from fxcurv.rules.traits import ITEMS

_ASSERTS = ("_assert", "sym_constrain", "_guards")


def normalize(program: Program) -> Program:
    """See the module."""
    _drop_markers(program)
    _refuse_counts_of_values(program)
    _refuse_sparse(program)
    logits(program)
    _say_idioms(program)
    registered_as_functions(program, program.graph.nodes)
    fold(program)
    say_in_others(program)
    fold(program)  # of complex numbers inside of what was a composite op, too
    _select_heads(program)
    return program


def say_in_others(program: Program) -> None:
    """Replace ops without a rule by ops that have one, where there is a rewrite or a decomposition of PyTorch's."""
    for _ in range(10):  # a rewrite may give ops that have a rewrite themselves
        if not rewritten(program, program.graph.nodes):
            break
    for node in program.graph.nodes:
        to_reshape(node)
    # strides may have changed, and composite ops that export keeps may carry a wrong value (a loss without reduction)
    propagate_values(program)
    program.refresh_output()
    program.graph.eliminate_dead_code()


def _drop_markers(program: Program) -> None:
    for node in list(program.graph.nodes):
        name = str(getattr(node.target, "__name__", node.target))
        if node.op == "call_function" and node.target is torch.ops.fxcurv.head.default:
            program.replace(node, node.args[0])
            program.graph.erase_node(node)
        elif node.op == "call_function" and not node.users and any(name.startswith(a) for a in _ASSERTS):
            program.graph.erase_node(node)


_NUMBER = (
    "makes a number of Python's of a value, which is not known while tracing. Way out: leave it a tensor, as in "
    "x.abs().max().detach() for x.abs().max().item()."
)

_SIZE = (
    "makes a tensor whose size depends on values. Way out: keep all entries, as in torch.where(mask, f(x), x) for "
    "x[mask] = f(x[mask]), or (x * mask).sum() for x[mask].sum()."
)


NOT_SPARSE = (
    "which is not supported. Way out: a dense one, made dense outside of the model, or its entries and their indices (index_add, "
    "gather, EmbeddingBag)."
)


def _refuse_sparse(program: Program) -> None:
    """Refuse tensors of other layouts than strided ones, whose ops have no derivative sample by sample."""
    for node in program.graph.nodes:
        for value in (node, *node.all_input_nodes) if node.op == "call_function" else ():
            layouts = {t.layout for t in pytree.tree_leaves(value.meta.get("val")) if isinstance(t, Tensor)}
            for layout in layouts - {torch.strided}:
                raise UnsupportedOpError(
                    f"{locate(node)}\n{'gives' if value is node else 'reads'} a tensor of the layout {layout}, {NOT_SPARSE}"
                )


def _refuse_counts_of_values(program: Program) -> None:
    """Refuse sizes that depend on values: a sample's slice cannot have such a size."""
    program.graph.eliminate_dead_code()
    for node in program.graph.nodes:
        if node.op == "call_function" and free_unbacked_symbols(node.meta.get("val")):
            raise UnsupportedOpError(f"{locate(node)}\n{_NUMBER if node.target in ITEMS else _SIZE}")


def _say_idioms(program: Program) -> None:
    for node in list(program.graph.nodes):
        new = IDIOMS[node.target](program, node) if node.target in IDIOMS else None
        if new is not None:
            substitute(program, node, new)


def rewritten(program: Program, nodes: Iterable[fx.Node], inside: bool = False) -> bool:
    """Rewrite the composite ops among `nodes` in other ops; returns whether there were any.

    Args:
        inside: whether ops that have kernels for both directions are rewritten too, for a derivative of their derivative.
    """
    changed = False
    for node in list(nodes):
        fn = _equation(node, program, inside)
        if fn is None:
            continue
        args = canonical_args(node)
        fn = functools.partial(invoke, node.target, fn=fn)
        try:
            new = emit(program, fn, args, origin=origin_of(node, "forward"), before=node)
        except Refused as error:
            raise UnsupportedOpError(f"{locate(node)}\n{error}") from None
        substitute(program, node, new)
        changed = True
    return changed


def _equation(node: fx.Node, program: Program, inside: bool):
    """The function that computes `node`'s op by other ops, or None."""
    if program.options.ranks and node.target in SUMS and node.target not in program.rules:
        return SUMS[node.target]
    if inside and may_stay(node, program) and node.target in REWRITES:
        return REWRITES[node.target]
    if node.op != "call_function" or node.target in program.rules or node.target in RULES:
        return None
    if node.target in REWRITES:
        return REWRITES[node.target]
    if isinstance(node.target, OpOverload) and decomposes(node.target) and _is_float(node):
        return node.target  # a trace decomposes it
    return None


def may_stay(node: fx.Node, program: Program) -> bool:
    """Whether an op has kernels of PyTorch's for both directions, and no rule of the user's."""
    return node.target in FUSED and node.target not in program.rules


def _is_float(node: fx.Node) -> bool:
    val = node.meta.get("val")
    vals = val if isinstance(val, tuple | list) else [val]
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in vals)


def _select_heads(program: Program) -> None:
    """Keep as f the marked leaves that the loss reads directly."""
    heads = list(dict.fromkeys(program.heads))
    if program.loss is None:
        program.heads = heads
        return
    reached, stack = set(), [program.loss]
    while stack:
        node = stack.pop()
        if node in reached:
            continue
        reached.add(node)
        if node not in heads:
            stack.extend(node.all_input_nodes)
    program.heads = [h for h in heads if h in reached]
