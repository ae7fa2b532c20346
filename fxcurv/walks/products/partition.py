"""Cutting a joint graph in two: what the first part saves for the second, and the second as a program of its own.

Which values are saved and which are computed again from saved ones is a minimum cut with sizes as capacities, as in
PyTorch's own partitioner of forward and backward graphs; matrix products, convolutions and random ops are never
repeated.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from math import prod

import networkx as nx
import torch
from torch import SymInt, Tensor, fx

from fxcurv.errors import InternalError
from fxcurv.ir.graph import ancestors, closure, copied, dependent, is_view
from fxcurv.ir.placement import PARTIAL
from fxcurv.ir.program import Program
from fxcurv.rules.traits import CHEAP, plain_sum, pointwise, random

aten = torch.ops.aten


def repeatable(node: fx.Node) -> bool:
    """Whether an op may run again in the product: it is deterministic and costs little more than its memory traffic."""
    if node.op == "get_attr" or node.target is operator.getitem or not isinstance(node.meta.get("val"), Tensor):
        return not isinstance(node.meta.get("val"), tuple | list)
    if random(node.target):
        return False
    return pointwise(node.target) or is_view(node) or node.target in CHEAP


def size_of(program: Program, node: fx.Node) -> int | None:
    """What saving a value costs; None if it cannot be saved."""
    val = node.meta.get("val")
    if isinstance(val, SymInt | int):
        return 1
    if not isinstance(val, Tensor) or node.op != "placeholder" and (is_view(node) or node.op == "get_attr"):
        return None
    if node.op == "placeholder" and node.meta.get("lives"):
        return 1
    return 2 + prod(program.batch.shape(val, program.batch.size)) * val.element_size()


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
        # a sum over ranks is not repeated either
        if node.op == "placeholder" or not repeatable(node) or node.meta.get("across") == PARTIAL:
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


def restrict(gm: fx.GraphModule, vectors: list[int], keep: int, result: int) -> fx.GraphModule:
    """One block of a product: the result number `result` for the vector at placeholder `keep`, all other vectors zero.

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
        elif plain_sum(node) and any(i in zero for i in inputs):
            (env[node],) = [value(i) for i in node.args if i not in zero]
        else:
            env[node] = graph.node_copy(node, value)
    graph.output((value(nodes[-1].args[0][result]),))
    graph.eliminate_dead_code()
    return fx.GraphModule(gm, graph)
