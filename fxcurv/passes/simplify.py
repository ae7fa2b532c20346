"""simplify: common subexpressions once, dead code never. Random ops are not merged."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcurv.program import Program


def simplify(program: Program) -> Program:
    """See the module."""
    program.refresh_output()
    program.graph.eliminate_dead_code()
    seen: dict[Any, fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op not in ("call_function", "get_attr") or _random(node):
            continue
        key = _key(node)
        if key in seen:
            program.replace(node, seen[key])
            program.graph.erase_node(node)
        else:
            seen[key] = node
    program.refresh_output()
    return program


def _random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def _key(node: fx.Node) -> Any:
    return (node.op, node.target, _freeze(node.args), _freeze(node.kwargs))


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((k, _freeze(v)) for k, v in value.items()))
    if isinstance(value, tuple | list):
        return (type(value).__name__ == "slice", tuple(_freeze(v) for v in value))
    if isinstance(value, slice):
        return ("slice", _freeze((value.start, value.stop, value.step)))
    return (type(value), value) if not isinstance(value, fx.Node) else value
