"""schedule: order the nodes so that memory dies early.

The forward pass and the walk keep their order. What only results need (contractions) runs as soon as its inputs are
there, so that a cotangent dies when the walk has passed it; what is needed late (a constant for a late use) runs late.
"""

from __future__ import annotations

from torch import fx

from fxcurv.program import Program


def schedule(program: Program) -> Program:
    """See the module."""
    nodes = list(program.graph.nodes)
    spine = {n for n in nodes if n.meta.get("origin", {}).get("stage", "forward") in ("forward", "columns", "propagate")}
    position = {n: k for k, n in enumerate(nodes)}
    ready: dict[fx.Node, int] = {}
    for node in nodes:
        latest = max((ready[i] for i in node.all_input_nodes), default=0)
        ready[node] = max(position[node], latest) if node in spine or node.op == "placeholder" else latest
    order = sorted((n for n in nodes if n.op not in ("placeholder", "output")), key=lambda n: (ready[n], position[n]))
    last = next((n for n in reversed(nodes) if n.op == "placeholder"), None)
    for node in order:
        if last is not None:
            last.append(node)
        last = node
    program.graph.lint()
    program.gm.recompile()
    return program
