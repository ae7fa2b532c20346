"""The emitted graph as a function that calls its ops directly, for calls that are repeated.

The graph's own code looks every op up by four attributes, and calls it through a layer of Python. Here a line is
`v7 = f3(v1, v5)`, where f3 is PyTorch's own binding of the op if it has one. Values are dropped after their last use,
as in the graph's own code. Small values that depend on no argument are computed once, if no result can lie in their
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.ir.private import schema_of
from fxcurv.rules.bindings import BINDINGS, of_no_value
from fxcurv.rules.traits import borrows, random

# Most entries of a value that is kept from call to call.
SMALL = 1 << 10


def direct(gm: fx.GraphModule) -> Callable[..., tuple]:
    """A function of the graph's placeholders, which returns what the graph does."""
    names = {node: f"v{k}" for k, node in enumerate(gm.graph.nodes)}
    bound: dict[str, Any] = {names[n]: value for n, value in constants(gm.graph).items()}
    last = {arg: node for node in gm.graph.nodes for arg in node.all_input_nodes}
    given, lines = [], []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            given.append(names[node])
        elif node.op == "get_attr":
            bound[names[node]] = _attribute(gm, node.target)
        elif node.op == "output":
            lines.append(f"return {_text(node.args[0], names, bound)}")
        elif names[node] not in bound:
            op = _bind(BINDINGS.get(node.target, node.target), bound)
            args = [_text(a, names, bound) for a in node.args]
            args += [f"{key}={_text(a, names, bound)}" for key, a in node.kwargs.items()]
            lines.append(f"{names[node]} = {op}({', '.join(args)})")
            dead = [
                names[a] for a in (*node.all_input_nodes, node) if last.get(a, node) is node and names[a] not in bound
            ]
            lines += [f"del {', '.join(dead)}"] if dead else []
    exec(f"def forward({', '.join(given)}):\n    " + "\n    ".join(lines), bound)
    return bound["forward"]


def constants(graph: fx.Graph) -> dict[fx.Node, Tensor]:
    """Values that are the same at every call."""
    found: dict[fx.Node, Tensor] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            of_none = of_no_value(node)
            if not of_none and not (node.all_input_nodes and all(n in found for n in node.all_input_nodes)):
                continue
            if _is_pure(node.target) and not node.meta.get("symbolic") and _is_small(node.meta.get("val")):
                if of_none:
                    made = _evaluate(node, lambda n: _empty_like(n.meta["val"]))
                    if made.shape == node.meta["val"].shape:  # else it reads symbols that stand for numbers
                        found[node] = made
                else:
                    found[node] = _evaluate(node, found.__getitem__)
    returned = next(iter(reversed(graph.nodes))).all_input_nodes
    return {n: value for n, value in found.items() if not any(borrows(r, {n}) for r in returned)}


def _is_small(val: Any) -> bool:
    return isinstance(val, Tensor) and all(isinstance(s, int) for s in val.shape) and val.numel() <= SMALL


def _is_pure(op: Any) -> bool:
    schema = schema_of(op)
    return schema is not None and not schema.is_mutable and not random(op)


def _evaluate(node: fx.Node, value: Callable[[fx.Node], Tensor]) -> Tensor:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _empty_like(val: Tensor) -> Tensor:
    """A tensor for an op that reads no values: of a fake tensor's sizes, or empty where these are symbolic."""
    sizes = val.shape if all(isinstance(s, int) for s in val.shape) else [0]
    return torch.empty(sizes, dtype=val.dtype, device=val.device)


def _attribute(gm: fx.GraphModule, target: Any) -> Any:
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _text(value: Any, names: dict[fx.Node, str], bound: dict[str, Any]) -> str:
    """An argument as an expression; what has no literal is bound to a name."""
    if isinstance(value, fx.Node):
        return names[value]
    if value is None or type(value) in (bool, int, str):
        return repr(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        inner = "".join(f"{_text(v, names, bound)}, " for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return _bind(value, bound)


def _bind(value: Any, bound: dict[str, Any]) -> str:
    name = f"k{len(bound)}"
    bound[name] = value
    return name
