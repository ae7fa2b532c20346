"""recycle: large results are written into memory that an earlier result has given up.

Fresh pages are the slowest resource of a CPU: mapping and clearing them takes longer than computing individual
gradients. A result that is a view of one matrix product or elementwise product gets an extra input, the memory to write
to. `Storage` hands out the storage of the previous call's result when nobody else holds it, or of one that the caller
names (`out=`).

Runs last, so that modules made from the graph before (the checks) have no memory as input.
"""

from __future__ import annotations

import torch
from torch import fx

from fxcurv.contractions.sizes import size
from fxcurv.ir.program import Input, Memory, Program
from fxcurv.kernels.register import INTO
from fxcurv.passes.distribute import alone
from fxcurv.rules.traits import REARRANGED

# Smaller results come from memory that the allocator keeps anyway.
WORTHWHILE = 1 << 20


def recycle(program: Program) -> Program:
    """See the module."""
    if program.options.create_graph or any(p.meta["val"].device.type != "cpu" for p in program.params.values()):
        return program
    makers: dict[fx.Node, list[tuple[str, str]]] = {}
    for field, table in program.results.items():
        for name, node in table.items():
            if isinstance(node, fx.Node):
                makers.setdefault(_maker(node), []).append((field, name))
    last = [n for n in program.graph.nodes if n.op == "placeholder"][-1]
    for node in [m for m in program.graph.nodes if m in makers]:
        val = node.meta["val"]
        if (
            node.target not in INTO
            or val.element_size() * torch.Size(size(val)).numel() < WORTHWHILE
            or not val.is_contiguous()
        ):
            continue
        with program.graph.inserting_after(last):
            last = program.graph.placeholder(f"memory_{len(program.buffers)}")
        last.meta = {"val": val, "origin": {"stage": "recycle"}}
        program.inputs.append(Input("memory", index=len(program.buffers)))
        program.buffers.append(Memory(val, tuple(makers[node])))
        node.target, node.kwargs = INTO[node.target], {**node.kwargs, "out": last}
    program.gm.recompile()
    return program


def functional(program: Program) -> fx.GraphModule:
    """The graph as it was before this pass, and as one process runs it."""
    gm = without_memory(program)
    return alone(gm) if program.options.ranks else gm


def without_memory(program: Program) -> fx.GraphModule:
    """The graph as it was before this pass, all results in new memory."""
    values: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, values))
    plain = {out: op for op, out in INTO.items()}
    for node in list(graph.nodes):
        if isinstance(node.kwargs.get("out"), fx.Node):
            node.target, node.kwargs = plain[node.target], {k: v for k, v in node.kwargs.items() if k != "out"}
    for node in [
        n for n in graph.nodes if n.op == "placeholder" and n.meta.get("origin", {}).get("stage") == "recycle"
    ]:
        graph.erase_node(node)
    return fx.GraphModule(program.gm, graph)


def _maker(node: fx.Node) -> fx.Node:
    """The node that allocates what `node` is a view of."""
    while node.target in REARRANGED:
        node = node.args[0]
    return node
