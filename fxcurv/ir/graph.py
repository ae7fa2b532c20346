"""Questions about graphs, and copies of their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from fxcurv.ir.private import OpOverload, pytree, schema_of

aten = torch.ops.aten


def is_view(node: fx.Node) -> bool:
    """Whether an op's output shares memory with its input."""
    schema = schema_of(node.target)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def dependent(nodes: Iterable[fx.Node], sources: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that depend on `sources`, and these."""
    found = set(sources)
    for node in nodes:
        if any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def to_reshape(node: fx.Node) -> None:
    """Make a view by sizes a reshape, which copies where it must: a traced view relies on strides that may be others."""
    if node.target in (aten.view.default, aten._unsafe_view.default):
        node.target = aten.reshape.default


def takes_strides(node: fx.Node) -> bool:
    """Whether a view is given strides, so that it has to be traced on values that are laid out as they will be."""
    return is_view(node) and any(a.name == "stride" for a in schema_of(node.target).arguments)


def copied(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    """A copy of `node` in `graph`, a view as a reshape: zeros that are left out may change strides."""
    new = graph.node_copy(node, env.__getitem__)
    to_reshape(new)
    return new


def closure(results: list[fx.Node], stop: set[fx.Node]) -> list[fx.Node]:
    """`results` and the nodes they are computed from, back to those in `stop`, in the graph's order."""
    found, stack = set(), list(results)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes if node not in stop else [])
    return [n for n in results[0].graph.nodes if n in found] if results else []


def ancestors(nodes: list[fx.Node]) -> list[fx.Node]:
    """`nodes` and everything they are computed from, in the graph's order."""
    found, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return [n for n in nodes[0].graph.nodes if n in found] if nodes else []


def descendants(nodes: list[fx.Node]) -> set[fx.Node]:
    """`nodes` and every differentiable value computed from them."""
    found = set(nodes)
    for node in nodes[0].graph.nodes if nodes else []:
        if node.op == "call_function" and node.meta.get("active") and any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def layout(val: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Sizes and strides, symbolic ones as expressions: equal where tensors are laid out alike."""
    plain = lambda s: s.node.expr if isinstance(s, SymInt) else s  # noqa: E731
    return tuple(map(plain, val.shape)), tuple(map(plain, val.stride()))


def size_of(x: Tensor, d: int) -> int | SymInt:
    """The size of an axis: a target for nodes, which works under `vmap`."""
    return x.shape[d]


def is_tensor(node: Any) -> bool:
    """Whether a node's value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def is_continuous(t: Tensor) -> bool:
    """Whether a tensor holds floating-point or complex numbers, which have derivatives."""
    return t.is_floating_point() or t.is_complex()


def has_floats(node: fx.Node) -> bool:
    """Whether a node's value holds numbers that have derivatives."""
    vals = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(v, Tensor) and is_continuous(v) for v in vals)


def holds_complex(node: fx.Node) -> bool:
    """Whether a node's value holds complex tensors."""
    return any(isinstance(v, Tensor) and v.is_complex() for v in pytree.tree_leaves(node.meta.get("val")))


def mutates(node: fx.Node) -> bool:
    """Whether an op writes to an argument."""
    schema = schema_of(node.target)
    return schema is not None and schema.is_mutable


def replaced(leaves: Sequence[Any], positions: Sequence[int], values: Iterable[Any]) -> list[Any]:
    """A copy of `leaves` with `values` at `positions`."""
    new = list(leaves)
    for i, value in zip(positions, values, strict=True):
        new[i] = value
    return new


def pruned(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` without dead code."""
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    new.eliminate_dead_code()
    return new


def canonical_args(node: fx.Node) -> tuple:
    """All arguments of an op in the order of its schema, defaults filled in."""
    if not isinstance(node.target, OpOverload):
        return tuple(node.args)
    args = list(node.args)
    for argument in schema_of(node.target).arguments[len(args) :]:
        args.append(node.kwargs.get(argument.name, argument.default_value))
    return tuple(args)


def invoke(op: Callable, args: Sequence[Any], fn: Callable | None = None) -> Any:
    """Call `op` (or `fn` in its place) on canonical arguments, keyword-only ones by their names."""
    if not isinstance(op, OpOverload):
        return (fn or op)(*args)
    schema = schema_of(op).arguments
    positional = sum(not a.kwarg_only for a in schema)
    keywords = {a.name: v for a, v in zip(schema[positional:], args[positional:], strict=True)}
    return (fn or op)(*args[:positional], **keywords)


class Subgraph:
    """A part of the graph as a function of `heads` and of the values from `outside` it."""

    def __init__(self, nodes, heads, outside, result):
        self.nodes, self.heads, self.outside, self.result = nodes, heads, outside, result

    def __call__(self, heads: list[Tensor], outside: list[Tensor]) -> Tensor:
        env: dict[fx.Node, Any] = dict(zip((*self.heads, *self.outside), (*heads, *outside), strict=True))
        for node in self.nodes:
            args, kwargs = pytree.tree_map(lambda a: env[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
            env[node] = node.target(*args, **kwargs)
        return env[self.result]
