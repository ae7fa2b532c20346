"""schedule: order the nodes so that memory dies early.

The forward pass and the walk keep their order. What only results need (contractions) runs as soon as its inputs are
there, so that a cotangent dies when the walk has passed it; what is needed late (a constant for a late use) runs late.
"""

from __future__ import annotations

from torch import fx

from fxcurv.ir.program import Program

SPINE = ("forward", "columns", "propagate")


def schedule(program: Program) -> Program:
    """See the module."""
    program.graph.eliminate_dead_code()  # a view that nobody reads, which simplify leaves, would have its input run early
    nodes = list(program.graph.nodes)
    position = {n: k for k, n in enumerate(nodes)}
    spine = {n for n in nodes if n.meta.get("origin", {}).get("stage", "forward") in SPINE or n.op == "placeholder"}
    ready = _as_soon_as_possible(nodes, position, spine)
    _as_late_as_possible(nodes, spine, ready)
    order = sorted((n for n in nodes if n.op not in ("placeholder", "output")), key=lambda n: (ready[n], position[n]))
    last = next((n for n in reversed(nodes) if n.op == "placeholder"), None)
    for node in order:
        if last is not None:
            last.append(node)
        last = node
    program.graph.lint()
    program.gm.recompile()
    return program


def _as_soon_as_possible(nodes: list[fx.Node], position: dict[fx.Node, int], spine: set[fx.Node]) -> dict[fx.Node, int]:
    ready: dict[fx.Node, int] = {}
    for node in nodes:
        latest = max((ready[i] for i in node.all_input_nodes), default=0)
        ready[node] = max(position[node], latest) if node in spine else latest
    return ready


def _as_late_as_possible(nodes: list[fx.Node], spine: set[fx.Node], ready: dict[fx.Node, int]) -> None:
    """What reads only the forward pass (an unfolded input) waits for its first user: its inputs live till then anyway."""
    forward = {n for n in spine if n.meta.get("origin", {}).get("stage", "forward") == "forward"}
    late: set[fx.Node] = set()
    for node in nodes:
        if node not in spine and all(i in forward or i in late for i in node.all_input_nodes):
            late.add(node)
    for node in reversed(nodes):
        users = [u for u in node.users if u.op != "output"]
        if node in late and users and len(users) == len(node.users):
            ready[node] = max(ready[node], min(ready[u] for u in users))
