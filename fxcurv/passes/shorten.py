"""shorten: compute the same numbers by fewer ops.

One column needs no axis of its own, a chain of views is one view, a factor of ones is dropped: `rules.shorter` has the
forms, by what an op reads. Runs after every pass that asks for placements, on the graph that is about to be run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcurv.ir.private import disable_fake_tensor_cache
from fxcurv.ir.program import Program
from fxcurv.passes.simplify import refresh, simplify
from fxcurv.rules.shorter import shorter


def shorten(program: Program) -> Program:
    """See the module."""
    program.graph.eliminate_dead_code()
    stands: dict[fx.Node, fx.Node] = {}
    with disable_fake_tensor_cache(program.fake_mode), program.fake_mode, torch.no_grad():
        todo = [n for n in reversed(program.graph.nodes) if n.op == "call_function"]
        while todo:
            node = todo.pop()
            made: list[fx.Node] = []
            refresh(program, node)
            new = shorter(_maker(node, made), node)
            if new is not None:
                program.stand_in(node, new)
                program.graph.erase_node(node)
                stands[node] = new
                todo += reversed(made)
    program.rename({node: _last(stands, new) for node, new in stands.items()})
    return simplify(program)


def _maker(node: fx.Node, made: list[fx.Node]):
    """A function that makes nodes in front of `node`, with its origin, and adds them to `made`."""

    def make(op: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        with node.graph.inserting_before(node):
            new = node.graph.call_function(op, args, kwargs)
        val = op(*fx.node.map_arg(args, lambda a: a.meta["val"]), **kwargs) if like is None else like.meta["val"]
        new.meta["val"] = val
        new.meta["origin"] = {**node.meta.get("origin", {}), "own": str(op)}
        made.append(new)
        return new

    return make


def _last(stands: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    while node in stands:
        node = stands[node]
    return node
