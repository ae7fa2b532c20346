"""Which results of sharded parameters stay in shards: sums over ranks, and what is computed from them entry by entry.

A variance is computed from two sums, entry by entry, hence from their shards. A sum that anything else reads whole is
made whole.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx

from fxcurv.ir.graph import is_tensor
from fxcurv.ir.graph import layout as laid_out
from fxcurv.ir.placement import PARTIAL
from fxcurv.ir.program import Program
from fxcurv.ir.shards import Cut, Dtypes
from fxcurv.rules.traits import pointwise

Layout = tuple[Cut, str, str, Dtypes]  # how a value is cut, its group, that of its replicas, and its dtypes


def layouts(program: Program) -> dict[str, Layout]:
    """Parameter name -> layout."""
    return {
        name: (cut, bucket.group, bucket.replicas, bucket.dtypes)
        for bucket in program.options.sharded
        for name, cut in zip(bucket.names, bucket.cuts, strict=True)
    }


def in_shards(
    program: Program, reduced: list[fx.Node], parts: Callable[[fx.Node], list[fx.Node]]
) -> dict[fx.Node, Layout]:
    """Value -> layout, for values that are needed only in shards: sums that travel, and what is computed from them.

    Args:
        reduced: the values whose sums travel.
        parts: the arguments that a node reads as this rank's terms.
    """
    found: dict[fx.Node, Layout] = {}
    ends = _ends(program, layouts(program))
    refused: set[fx.Node] = set()
    while True:
        found = {}
        for end, layout in ends.items():
            cone: set[fx.Node] = set()
            if layout is not None and end not in refused and _cone(end, layout, set(reduced), cone):
                if all(found.get(n, layout) == layout for n in cone):
                    found |= dict.fromkeys(cone, layout)
                else:
                    refused.add(end)
        bad = {n for n in found if not _can_stay(n, found, ends, set(reduced), parts)}
        if not bad:
            return found
        for end, layout in ends.items():
            cone = set()
            if layout is not None and _cone(end, layout, set(reduced), cone) and cone & bad:
                refused.add(end)


def _ends(program: Program, known: dict[str, Layout]) -> dict[fx.Node, Layout | None]:
    """Returned value -> the layout that it may have, None if it has to be whole."""
    ends: dict[fx.Node, Layout | None] = {}
    for table in program.results.values():
        for name, node in table.items():
            if isinstance(node, fx.Node):
                layout = known.get(name)
                fits = layout is not None and _has_shape_of(node, layout[0])
                same = node not in ends or ends[node] == layout
                ends[node] = layout if fits and same else None
    tables = {n for table in program.results.values() for n in table.values() if isinstance(n, fx.Node)}
    return {**dict.fromkeys(r for r in program.roots() if r not in tables), **ends}


def _cone(node: fx.Node, layout: Layout, reduced: set[fx.Node], found: set[fx.Node]) -> bool:
    """Whether a value can be computed from sums in shards; adds all values that are then in shards to `found`."""
    if node in found:
        return True
    if not _has_shape_of(node, layout[0]):
        return False
    found.add(node)
    if node in reduced:
        return True
    if node.op != "call_function" or not pointwise(node.target) or not any(map(is_tensor, node.all_input_nodes)):
        return False
    return all(_cone(a, layout, reduced, found) for a in node.all_input_nodes if not _is_number(a))


def _has_shape_of(node: fx.Node, cut: Cut) -> bool:
    """Whether a value has a parameter's shape; layouts are compared, since comparing a symbolic size would fix it."""
    return is_tensor(node) and laid_out(node.meta["val"])[0] == cut.shape


def _is_number(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return not isinstance(val, Tensor) or not val.ndim


def _can_stay(
    node: fx.Node, found: dict, ends: dict[fx.Node, Layout | None], reduced: set[fx.Node], parts: Callable
) -> bool:
    """Whether nothing needs a value whole, or, if it is this rank's term, its sum."""
    if node in ends and ends[node] != found[node]:
        return False
    terms = node.meta["across"] == PARTIAL
    for user in node.users:
        if user.op == "output" or user in found and user not in reduced:
            continue
        if not terms or node in user.meta.get("complete", ()):
            return False
        if user not in reduced and node in parts(user) and user.meta["across"] == PARTIAL:
            return False
    return True
