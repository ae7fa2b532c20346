"""Recognise zeros by how they are made, and drop them."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxcurv.ir.program import Program
from fxcurv.rules.traits import KEEP_ZERO, ZERO_FACTOR, makes_zeros, plain_sum


def is_zero(node: Any) -> bool:
    """Whether a value is known to be zero by the ops that make it."""
    if not isinstance(node, fx.Node):
        return False
    if "zero" not in node.meta:
        node.meta["zero"] = _makes_zero(node)
    return node.meta["zero"]


def _makes_zero(node: fx.Node) -> bool:
    if node.target in KEEP_ZERO:
        return is_zero(node.args[0])
    if node.target in ZERO_FACTOR:
        return any(map(is_zero, node.args))
    if plain_sum(node):
        return all(map(is_zero, node.args))
    return makes_zeros(node)


def drop_zeros(program: Program) -> None:
    """Replace x + 0 by x."""
    for node in list(program.graph.nodes):
        if not plain_sum(node):
            continue
        for term, other in (node.args, node.args[::-1]):
            if is_zero(other) and isinstance(term, fx.Node) and _is_alike(term, node):
                program.replace(node, term)
                program.graph.erase_node(node)
                break


def _is_alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and [str(s) for s in x.shape] == [str(s) for s in y.shape]
