"""simplify: common subexpressions once, dead code never, views that change nothing away. Random ops are not merged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.ir.graph import layout
from fxcurv.ir.program import Program
from fxcurv.rules.custom import inline
from fxcurv.rules.traits import BEHIND, VIEWS

aten = torch.ops.aten


def simplify(program: Program) -> Program:
    """See the module."""
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
        if node.op not in ("call_function", "get_attr") or _random(node):
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
    """Columns of a view are a view of the columns: said so, a weight and a bias read the same columns of a stack."""
    for node in list(program.graph.nodes):
        while node.target is aten.slice.Tensor and node.args[1] == 0 and _is_behind(node.args[0]):
            view = node.args[0]
            source, *rest = view.args
            with program.graph.inserting_before(node):
                first = program.graph.call_function(aten.slice.Tensor, (source, *node.args[1:]))
            first.meta = dict(node.meta)
            if view.target in (aten.view.default, aten.reshape.default):
                rest = [[node.meta["val"].shape[0], *rest[0][1:]]]
            node.target, node.args = view.target, (first, *rest)
            with program.fake_mode, torch.no_grad():
                first.meta["val"] = aten.slice.Tensor(source.meta["val"], *first.args[1:])
            node = first
    program.graph.eliminate_dead_code()


def _is_behind(view: fx.Node) -> bool:
    """Whether a node views the axes behind the first, and does not copy."""
    if view.target not in BEHIND or not isinstance(view.args[0], fx.Node):
        return False
    after, before = view.meta["val"], view.args[0].meta["val"]
    if view.target in (aten.unsqueeze.default, aten.squeeze.dim) and view.args[1] in (0, -after.ndim, -before.ndim):
        return False
    same = isinstance(before, Tensor) and before.ndim and after.ndim and layout(before)[0][0] == layout(after)[0][0]
    return bool(same) and layout(before)[1][0] == layout(after)[1][0] and isinstance(after.shape[0], int)


def _drop_idle_views(program: Program) -> dict[fx.Node, fx.Node]:
    """A chain of views that ends in the sizes and strides of one of its members is that member."""
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
    """Give views the strides that they have now: what they view may have been replaced by a value of other strides."""
    with program.fake_mode, torch.no_grad():
        for node in program.graph.nodes if program.stale else ():
            if node.target in VIEWS and node in program.stale:
                before = _layout(node)
                _view_again(node)
                if _layout(node) != before:
                    program.stale.update(node.users)
    program.stale.clear()


def _view_again(node: fx.Node) -> None:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda a: a.meta["val"])
    try:
        node.meta["val"] = node.target(*args, **kwargs)
    except (RuntimeError, ValueError):  # no view of these strides
        node.target = aten.reshape.default
        node.meta["val"] = node.target(*args, **kwargs)


def _layout(node: fx.Node) -> tuple:
    return layout(node.meta["val"])


def _random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def _key(node: fx.Node) -> Any:
    if isinstance(node.meta.get("val"), torch.SymInt):
        return ("size", str(node.meta["val"]))  # wherever it is read, a size is a size
    return (node.op, node.target, _freeze(node.args), _freeze(node.kwargs))


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((k, _freeze(v)) for k, v in value.items()))
    if isinstance(value, tuple | list):
        return (type(value).__name__ == "slice", tuple(_freeze(v) for v in value))
    if isinstance(value, slice):
        return ("slice", _freeze((value.start, value.stop, value.step)))
    return (type(value), value) if not isinstance(value, fx.Node) else value
