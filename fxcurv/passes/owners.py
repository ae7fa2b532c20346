"""Which rank gets the sums of a layer, where an extension assigns layers to ranks (`KFAC(assign="layers")`).

Parameters whose values share a tensor (a weight and a bias share the factor of their outputs) go to one rank. The
largest groups are assigned first, each to the rank that has least to invert so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import networkx as nx
from torch import fx

from fxcurv.ir.graph import is_tensor
from fxcurv.ir.placement import PARTIAL
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program


def owners(program: Program, size: int) -> dict[str, dict[str, int]]:
    """Field -> parameter name -> rank, for `size` ranks."""
    tables = dict(_tables(program))
    graph: nx.Graph = nx.Graph()
    for field, table in tables.items():
        for name, nodes in table.items():
            graph.add_edges_from(((field, name), node) for node in nodes)
    groups = [
        (_cost(part), min(str(k) for k in part if isinstance(k, tuple)), part)
        for part in nx.connected_components(graph)
    ]
    load, found = [0] * size, {field: {} for field in tables}  # type: ignore[var-annotated]
    for cost, _, part in sorted(groups, key=lambda group: (-group[0], group[1])):
        rank = load.index(min(load))
        load[rank] += cost
        for field, name in (k for k in part if isinstance(k, tuple)):
            found[field][name] = rank
    return found


def _tables(program: Program) -> Iterator[tuple[str, dict[str, list[fx.Node]]]]:
    for e in program.extensions:
        if getattr(e, "assign", "all") == "layers":
            values = program.results[e.savefield].items()
            yield e.savefield, {name: [n for n in pytree.tree_leaves(v) if is_tensor(n)] for name, v in values}


def _cost(part: set) -> int:
    """The operations of the eigendecompositions, up to a constant factor."""
    return sum(
        max(node.meta["val"].shape) ** 3 for node in part if isinstance(node, fx.Node) and node.meta["val"].ndim == 2
    )


def at_one_rank(
    program: Program,
    reduced: list[fx.Node],
    parts: Callable[[fx.Node], list[fx.Node]],
    found: dict[str, dict[str, int]],
) -> dict[fx.Node, int]:
    """Sum -> rank, for the sums that only results of one rank read."""
    where: dict[fx.Node, int] = {}
    for field, table in found.items():
        for name, rank in table.items():
            where |= dict.fromkeys(pytree.tree_leaves(program.results[field][name]), rank)
    others: set[Any] = set(
        pytree.tree_leaves([table for field, table in program.results.items() if field not in found])
    )
    others |= {*program.output_leaves, *program.heads, *program.mutations.values(), program.loss}
    others |= {*pytree.tree_leaves(program.extras), *(c.node for c in program.checks)}
    known = set(reduced)
    return {n: where[n] for n in reduced if n in where and n not in others and not _is_sum_read(n, known, parts)}


def _is_sum_read(node: fx.Node, reduced: set[fx.Node], parts: Callable[[fx.Node], list[fx.Node]]) -> bool:
    """Whether an op reads the sum of the term `node`."""
    for user in node.users:
        if user.op == "output":
            continue
        of_terms = user.meta["across"] == PARTIAL and user not in reduced and node in parts(user)
        if node in user.meta["complete"] or of_terms:
            return True
    return False
