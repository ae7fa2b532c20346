"""recycle: large results are written into memory that an earlier result has given up.

Fresh pages are the slowest resource of a CPU: mapping and clearing them takes longer than computing individual
gradients. A result that is a view of one matrix product or elementwise product gets an extra input, the memory to
write to. `Pool` hands out the storage of the previous call's result when nobody else holds it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from fxcurv.candidates import size
from fxcurv.passes.simplify import VIEWS
from fxcurv.program import Input, Program

aten = torch.ops.aten

OUT = {aten.bmm.default: aten.bmm.out, aten.mul.Tensor: aten.mul.out}

# Smaller results come from memory that the allocator keeps anyway.
WORTHWHILE = 1 << 20


def recycle(program: Program) -> Program:
    """See the module."""
    if program.state.get("create_graph") or any(p.meta["val"].device.type != "cpu" for p in program.params.values()):
        return program
    results = {n for table in program.results.values() for n in table.values() if isinstance(n, fx.Node)}
    makers = dict.fromkeys(_maker(node) for node in results)
    last = [n for n in program.graph.nodes if n.op == "placeholder"][-1]
    for node in [m for m in program.graph.nodes if m in makers]:
        val = node.meta["val"]
        if (
            node.target not in OUT
            or val.element_size() * torch.Size(size(val)).numel() < WORTHWHILE
            or not val.is_contiguous()
        ):
            continue
        with program.graph.inserting_after(last):
            last = program.graph.placeholder(f"memory_{len(program.buffers)}")
        last.meta = {"val": val, "origin": {"stage": "recycle"}}
        program.inputs.append(Input("memory", index=len(program.buffers)))
        program.buffers.append(val)
        node.target, node.kwargs = OUT[node.target], {**node.kwargs, "out": last}
    return program


def functional(program: Program) -> fx.GraphModule:
    """The graph as it was before this pass: all results in new memory."""
    values: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, values))
    plain = {out: op for op, out in OUT.items()}
    for node in list(graph.nodes):
        if isinstance(node.kwargs.get("out"), fx.Node):
            node.target, node.kwargs = plain[node.target], {k: v for k, v in node.kwargs.items() if k != "out"}
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.meta.get("origin", {}).get("stage") == "recycle"]:
        graph.erase_node(node)
    return fx.GraphModule(program.gm, graph)


def _maker(node: fx.Node) -> fx.Node:
    """The node that allocates what `node` is a view of."""
    while node.target in VIEWS:
        node = node.args[0]
    return node


class Pool:
    """The memory of earlier results, by program and buffer."""

    def __init__(self):
        self._kept: dict[tuple[int, int], Tensor] = {}
        # evaluating a symbolic shape takes longer than a small problem's kernels
        self._shapes: dict[tuple[int, int, int], tuple[int, ...]] = {}

    def take(self, program: Program, index: int, n: int) -> Tensor:
        """Memory for buffer `index` of `program` at batch size `n`: kept if nobody else holds it, else new."""
        key, val = (id(program), index), program.buffers[index]
        shape = self._shapes.get((*key, n))
        if shape is None:
            shape = self._shapes[*key, n] = program.batch.shape(val, n)
        kept, numel = self._kept.get(key), math.prod(shape)
        if kept is None or kept.numel() < numel or not _ours_alone(kept):
            kept = self._kept[key] = torch.empty(numel, dtype=val.dtype)
        return kept[:numel].view(shape)

    def clear(self) -> None:
        """Give all memory back."""
        self._kept.clear()


def _ours_alone(kept: Tensor) -> bool:
    storage = kept.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) <= _HELD


def _held() -> int:
    """How often a storage is counted when only one tensor (and the object that asks) holds it."""
    probe = torch.empty(1)
    return torch._C._storage_Use_Count(probe.untyped_storage()._cdata)


_HELD = _held()
