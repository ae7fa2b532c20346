"""Cutting a joint graph in two: what the first part saves for the second, and the second as a program of its own.

Which values are saved and which are computed again from saved ones is a minimum cut, sizes being capacities, as in
PyTorch's own partitioner of forward and backward graphs; matrix products, convolutions and random ops are never repeated.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from math import prod

import networkx as nx
import torch
from torch import SymInt, Tensor, fx

from fxcurv._torch import schema_of
from fxcurv.errors import InternalError
from fxcurv.passes.objective import ancestors
from fxcurv.program import Program

aten = torch.ops.aten


# ---- what is saved ------------------------------

# Cheap beside the pointwise ops and views, which say so by their tags and schemas.
_CHEAP = {
    aten.clone.default, aten._to_copy.default, aten.cat.default, aten.where.self, aten.gather.default,
    aten.scatter.value, aten.scatter.src, aten.scatter_add.default, aten.embedding.default, aten.index.Tensor,
    aten.constant_pad_nd.default, aten.slice_backward.default, aten.select_backward.default, aten.layer_norm.default,
    aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.amax.default, aten.amin.default,
    aten._softmax.default, aten._log_softmax.default, aten.softmax.int, aten.log_softmax.int, aten._safe_softmax.default,
    aten._softmax_backward_data.default, aten._log_softmax_backward_data.default, aten.reshape.default,
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default, aten.zeros.default,
    aten.ones.default, aten.full.default, aten.arange.default, aten.arange.start_step, aten.eye.default,
}  # fmt: skip


def _is_view(node: fx.Node) -> bool:
    schema = schema_of(node.target)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def repeatable(node: fx.Node) -> bool:
    """Whether an op may run again in the product: it is deterministic and costs little more than its memory traffic."""
    if node.op == "get_attr" or node.target is operator.getitem or not isinstance(node.meta.get("val"), Tensor):
        return not isinstance(node.meta.get("val"), tuple | list)
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    return torch.Tag.pointwise in tags or _is_view(node) or node.target in _CHEAP


def size_of(program: Program, node: fx.Node) -> int | None:
    """What saving a value costs; None if it cannot be saved."""
    val = node.meta.get("val")
    if isinstance(val, SymInt | int):
        return 1
    if not isinstance(val, Tensor) or node.op != "placeholder" and (_is_view(node) or node.op == "get_attr"):
        return None
    if node.op == "placeholder" and node.meta.get("lives"):
        return 1
    return 2 + prod(program.batch.shape(val, program.batch.size)) * val.element_size()


def dependent(nodes: Iterable[fx.Node], sources: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that depend on `sources`, and these."""
    found = set(sources)
    for node in nodes:
        if any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def saved_values(program: Program, vectors: Iterable[fx.Node], results: list[fx.Node]) -> list[fx.Node]:
    """The values that a product keeps, in the graph's order: a minimum cut between captured values and the vectors' part."""
    moving = dependent(program.graph.nodes, vectors)
    needed = ancestors(results)
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_nodes_from(("source", "sink"))
    for node in needed:
        if node in moving:
            continue
        size = size_of(program, node)
        flow.add_edge((node, "in"), (node, "out"), **({} if size is None else {"capacity": size}))
        if node.op == "placeholder" or not repeatable(node):
            flow.add_edge("source", (node, "in"))
    for node in needed:
        for source in node.all_input_nodes:
            if source not in moving:
                flow.add_edge((source, "out"), "sink" if node in moving else (node, "in"))
    _, (before, _) = nx.minimum_cut(flow, "source", "sink", flow_func=nx.algorithms.flow.boykov_kolmogorov)
    return [n for n in needed if n not in moving and (n, "in") in before and (n, "out") not in before]


# ---- graphs ------------------------------


def split(program: Program, saved: list[fx.Node], vectors: list[fx.Node], results: list[fx.Node]) -> fx.GraphModule:
    """The product program, (*saved, *vectors) -> results; what is neither is computed from the saved values."""
    graph, env, attributes = fx.Graph(), {}, {}
    for k, node in enumerate([*saved, *vectors]):
        env[node] = graph.placeholder(f"saved_{k}" if k < len(saved) else f"vector_{k - len(saved)}")
        env[node].meta = {"val": node.meta["val"]}
    for node in closure(results, set(env)):
        if node in env:
            continue
        if node.op == "placeholder":
            raise InternalError(f"a product needs {node.name}, which was not saved")
        if node.op == "get_attr":
            attributes[node.target] = getattr(program.gm, node.target)
        env[node] = copied(graph, node, env)
    graph.output(tuple(env[r] for r in results))
    return fx.GraphModule(attributes, graph)


def copied(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    """A copy of `node` in `graph`. A traced view relies on strides, which a zero left out may change: it becomes a reshape."""
    new = graph.node_copy(node, env.__getitem__)
    if node.target in (aten.view.default, aten._unsafe_view.default):
        new.target = aten.reshape.default
    return new


def closure(results: list[fx.Node], stop: set[fx.Node]) -> list[fx.Node]:
    """What `results` are computed from, not past the nodes in `stop`, in the graph's order."""
    found, stack = set(), list(results)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes if node not in stop else [])
    return [n for n in results[0].graph.nodes if n in found] if results else []


def restrict(gm: fx.GraphModule, vectors: list[int], keep: int, result: int) -> fx.GraphModule:
    """One block of a product: the vector at placeholder `keep` alone, the others in `vectors` being zero; one result.

    Every value that depends on the vectors is linear in them, so what reads zeros alone is zero.
    """
    nodes = list(gm.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    moving = dependent(nodes, [placeholders[k] for k in vectors])
    zero = {placeholders[k] for k in vectors if k != keep}
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}

    def value(node: fx.Node) -> fx.Node:
        """The new node; a zero that an op needs as a value is computed from a zero vector."""
        if node not in env and node.op == "placeholder":
            val = node.meta["val"]
            env[node] = graph.call_function(
                aten.zeros.default, (list(val.shape),), {"dtype": val.dtype, "device": val.device}
            )
            env[node].meta = {"val": val}
        elif node not in env:
            env[node] = graph.node_copy(node, value)
        return env[node]

    for node in nodes[:-1]:
        if node in zero:
            continue
        inputs = [i for i in node.all_input_nodes if i in moving]
        if inputs and all(i in zero for i in inputs):
            zero.add(node)
        elif node.target is aten.add.Tensor and not node.kwargs and any(i in zero for i in inputs):
            (env[node],) = [value(i) for i in node.args if i not in zero]
        else:
            env[node] = graph.node_copy(node, value)
    graph.output((value(nodes[-1].args[0][result]),))
    graph.eliminate_dead_code()
    return fx.GraphModule(gm, graph)
