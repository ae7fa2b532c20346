"""simplify: merge common subexpressions, delete dead code, drop views that change nothing. Random ops are not merged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.ir.graph import layout, to_reshape
from fxcurv.ir.program import Program
from fxcurv.rules.complex_numbers import unfold
from fxcurv.rules.custom import inline
from fxcurv.rules.traits import REARRANGED, UNSAID_VIEWS, VIEWS, on_rows, random, sliced


def simplify(program: Program) -> Program:
    """See the module."""
    unfold(program)
    inline(program)
    program.refresh_output()
    program.graph.eliminate_dead_code()
    _slice_first(program)
    program.rename(_drop_idle_views(program))
    program.rename(_merge_equals(program))
    program.refresh_output()
    return program


def _merge_equals(program: Program) -> dict[fx.Node, fx.Node]:
    """Erase nodes that compute what an earlier one computes; returns each with the node that stays."""
    seen: dict[Any, fx.Node] = {}
    merged = {}
    for node in list(program.graph.nodes):
        if node.op not in ("call_function", "get_attr") or random(node.target):
            continue
        key = _key(node)
        if key in seen:
            merged[node] = seen[key]
            program.stand_in(node, seen[key])
            program.graph.erase_node(node)
        else:
            seen[key] = node
    return merged


def _slice_first(program: Program) -> None:
    """Move slices of columns in front of views: a weight and a bias then read the same slice of a stack."""
    for node in list(program.graph.nodes):
        while (cut := sliced(node)) and cut.dim == 0 and _keeps_first_axis(cut.x):
            source, rest = cut.x.args[0], on_rows(cut.x, node.meta["val"].shape[0]) or ()
            with program.graph.inserting_before(node):
                first = program.graph.call_function(node.target, (source, *node.args[1:]))
            first.meta = dict(node.meta)
            with program.fake_mode, torch.no_grad():
                first.meta["val"] = node.target(source.meta["val"], *first.args[1:])
            node.target, node.args = cut.x.target, (first, *rest)
            node = first
    program.graph.eliminate_dead_code()


def _keeps_first_axis(view: fx.Node) -> bool:
    """Whether a node is a view, not a copy, that leaves the first axis as it is."""
    if view.op != "call_function" or on_rows(view, 0) is None or not isinstance(view.args[0], fx.Node):
        return False
    after, before = view.meta["val"], view.args[0].meta["val"]
    same = isinstance(before, Tensor) and before.ndim and after.ndim and layout(before)[0][0] == layout(after)[0][0]
    return bool(same) and layout(before)[1][0] == layout(after)[1][0] and isinstance(after.shape[0], int)


def _drop_idle_views(program: Program) -> dict[fx.Node, fx.Node]:
    """Replace a chain of views by its first member that has the sizes and strides of its end."""
    _refresh_views(program)
    dropped = {}
    for node in list(program.graph.nodes):
        same, source = None, node
        while source.target in VIEWS and isinstance(source.args[0], fx.Node):
            source = source.args[0]
            same = source if _layout(source) == _layout(node) else same
        if same is not None:
            dropped[node] = same
            program.stand_in(node, same)
            program.graph.erase_node(node)
    return dropped


def _refresh_views(program: Program) -> None:
    """Recompute the strides of all views whose input was replaced by a value of other strides."""
    with program.fake_mode, torch.no_grad():
        for node in program.graph.nodes if program.stale else ():
            refresh(program, node)
    program.stale.clear()


def refresh(program: Program, node: fx.Node) -> None:
    """Recompute the strides of a view whose input was replaced by a value of other strides, under the program's fake mode.

    Views of one value are told apart by their strides, so all of them have to be of its present ones.
    """
    if node in program.stale and node.target in REARRANGED | UNSAID_VIEWS:
        before = _layout(node)
        _recompute_view(node)
        if _layout(node) != before:
            program.stale.update(node.users)


def _recompute_view(node: fx.Node) -> None:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda a: a.meta["val"])
    try:
        node.meta["val"] = node.target(*args, **kwargs)
    except (RuntimeError, ValueError):  # these strides allow no view
        to_reshape(node)
        node.meta["val"] = node.target(*args, **kwargs)


def _layout(node: fx.Node) -> tuple:
    return layout(node.meta["val"])


def _key(node: fx.Node) -> Any:
    if isinstance(node.meta.get("val"), torch.SymInt):
        return ("size", str(node.meta["val"]), "of_all" in node.meta)  # equal sizes are one, wherever they are read
    return (node.op, node.target, _freeze(node.args), _freeze(node.kwargs))


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((k, _freeze(v)) for k, v in value.items()))
    if isinstance(value, tuple | list):
        return (type(value).__name__ == "slice", tuple(_freeze(v) for v in value))
    if isinstance(value, slice):
        return ("slice", _freeze((value.start, value.stop, value.step)))
    return (type(value), value) if not isinstance(value, fx.Node) else value
