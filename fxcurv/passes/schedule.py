"""schedule: order the nodes so that memory dies early.

The forward pass and the walk keep their order. What only results need (contractions) runs as soon as its inputs are
there, so that a cotangent dies when the walk has passed it; what is needed late (a constant for a late use) runs late.
Under `mesh=`, a collective begins when its values are there, and is waited for where its sums are read, so that it
overlaps with the walk.
"""

from __future__ import annotations

from torch import fx

from fxcurv.ir.program import Program
from fxcurv.ir.ranks import across
from fxcurv.rules.traits import over_ranks

SPINE = ("forward", "columns", "propagate")


def schedule(program: Program) -> Program:
    """See the module."""
    program.graph.eliminate_dead_code()  # an unread view, which simplify leaves, would make its input run early
    nodes = list(program.graph.nodes)
    position = {n: k for k, n in enumerate(nodes)}
    ready = as_soon_as_possible(program)
    _as_late_as_possible(nodes, _spine(nodes), ready)
    if across(program.options.ranks):
        _wait_late(nodes, _spine(nodes), ready)
    order = sorted((n for n in nodes if n.op not in ("placeholder", "output")), key=lambda n: (ready[n], position[n]))
    last = next((n for n in reversed(nodes) if n.op == "placeholder"), None)
    for node in order:
        if last is not None:
            last.append(node)
        last = node
    program.graph.lint()
    program.gm.recompile()
    return program


def _spine(nodes: list[fx.Node]) -> set[fx.Node]:
    return {n for n in nodes if n.meta.get("origin", {}).get("stage", "forward") in SPINE or n.op == "placeholder"}


def as_soon_as_possible(program: Program) -> dict[fx.Node, int]:
    """Node -> place in the graph of the node of the forward pass or the walk that it is, or can run behind."""
    nodes = list(program.graph.nodes)
    spine, ready = _spine(nodes), dict[fx.Node, int]()
    for place, node in enumerate(nodes):
        latest = max((ready[i] for i in node.all_input_nodes), default=0)
        ready[node] = max(place, latest) if node in spine else latest
    return ready


def _wait_late(nodes: list[fx.Node], spine: set[fx.Node], ready: dict[fx.Node, int]) -> None:
    """Move waits, and what is computed from sums, to their first reader, or to the end.

    A sum in shards is waited for at the latest where the next one begins, since its terms stay in memory till then.
    """
    made: set[fx.Node] = set()
    for node in nodes:
        follows = node not in spine and not over_ranks(node) and any(i in made for i in node.all_input_nodes)
        if over_ranks(node) in ("wait", "replicas") or follows:
            made.add(node)
    scatters = sorted(ready[n] for n in nodes if over_ranks(n) == "scatter")
    for node in reversed(nodes):
        if node in made:
            last = min((ready[u] for u in node.users if u.op != "output"), default=len(nodes))
            begun = [ready[i] for i in node.all_input_nodes if over_ranks(i) == "scatter"]
            following = [k for k in scatters if begun and k > begun[0]]
            ready[node] = max(ready[node], min([last, *following[:1]]))


def _as_late_as_possible(nodes: list[fx.Node], spine: set[fx.Node], ready: dict[fx.Node, int]) -> None:
    """Move what reads only the forward pass (an unfolded input) to its first user: its inputs live till then anyway.

    A collective begins as soon as it can.
    """
    forward = {n for n in spine if n.meta.get("origin", {}).get("stage", "forward") == "forward"}
    late: set[fx.Node] = set()
    for node in nodes:
        if node not in spine and not over_ranks(node) and all(i in forward or i in late for i in node.all_input_nodes):
            late.add(node)
    for node in reversed(nodes):
        users = [u for u in node.users if u.op != "output"]
        if node in late and users and len(users) == len(node.users):
            ready[node] = max(ready[node], min(ready[u] for u in users))
