"""A program cut at the model's output f: a forward part, and a backward part that takes over from a cotangent of f.

The loss of the cut program is one op, `seam(f, g, columns, kinds)`, whose derivative in f is g and whose columns are
those that are handed in. So the passes see a loss in closed form, and know nothing of the cut. Values of the forward
part that the backward part reads are its inputs: the captured nodes keep their number, `meta["key"]`, all the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv import passes
from fxcurv.errors import ExtensionError
from fxcurv.extensions import Extension
from fxcurv.passes.codegen import codegen
from fxcurv.passes.extract import extract
from fxcurv.passes.objective import objective
from fxcurv.passes.propagate import propagate
from fxcurv.passes.schedule import schedule
from fxcurv.passes.select import select
from fxcurv.passes.simplify import simplify
from fxcurv.placement import PARTIAL, Placement, Shard
from fxcurv.program import Program, _pruned
from fxcurv.quantity import Nothing
from fxcurv.rules.loss import LossRule

EXACT, EMPIRICAL = 0, -1  # kinds of columns; a positive kind is a number of sampled ones


@torch.library.custom_op("fxcurv::seam", mutates_args=())
def seam(f: Tensor, g: Tensor, columns: list[Tensor], kinds: list[int]) -> Tensor:
    """Stands for the loss: its derivative in `f` is `g`, the columns [V, *f] of its Hessian's root are `columns`."""
    return (f * g).sum()


@seam.register_fake
def _(f, g, columns, kinds):
    return f.new_empty(())


class Seam(LossRule):
    """Hands on what it was given; the cotangent of the seam itself is 1."""

    def transpose(self, call, wrt, g):
        return (call.args[1].unsqueeze(0),)

    def exact(self, call, c, few=False):
        return _columns(call, EXACT)

    def sampled(self, call, c, seed, draw):
        return _columns(call, draw.columns)

    def empirical(self, call, c):
        return _columns(call, EMPIRICAL)


SEAM = Seam()  # a rule of cut programs only: no captured graph has the op


def _columns(call, kind: int) -> Tensor:
    _, _, columns, kinds = call.args
    return columns[list(kinds).index(kind)]


@dataclass(frozen=True)
class Part:
    """An emitted half: `gm(*values)` of what `keys` number, in order, and then of its further inputs."""

    gm: fx.GraphModule
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Backward:
    """The second half: from forward values, g [*f], columns and a seed to results.

    Attributes:
        part: the GraphModule; it returns the flat leaves of `results`.
        given: names of the inputs after the forward values: "g", "columns_<k>" or "seed".
        program: the finished program, for its `unpack`.
    """

    part: Part
    given: tuple[str, ...]
    program: Program


def forward_part(template: Program) -> Part:
    """The forward pass of an analysed program: returns (f, new buffers, every value by key)."""
    graph = fx.Graph()
    env = _copy_nodes(template, graph)
    for key, node in enumerate(list(template.graph.nodes)[:-1]):
        node.meta["key"] = key
    made = [n for n in template.graph.nodes if n.op == "call_function"]
    head = env[template.output_leaves[0]]
    mutations = [env[n] for n in template.mutations.values()]
    graph.output((head, mutations, [env[n] for n in made]))
    return Part(fx.GraphModule(template.gm, graph), tuple(n.meta["key"] for n in made))


def backward_part(
    template: Program, extensions: Sequence[Extension], kinds: Sequence[int], counts: Sequence[int]
) -> Backward:
    """The gradient and all quantities from a cotangent of f and its columns.

    Args:
        template: the analysed program of the model alone, numbered by `forward_part`.
        kinds: which columns are given; counts: how many of each.

    Raises:
        ExtensionError: for products, which need the loss itself.
    """
    refused = [e for e in extensions if isinstance(e.requires, Nothing)]
    if refused:
        raise ExtensionError(
            f"{refused[0]} needs the loss as part of the program: use fxcurv.compile(model, loss, [{refused[0]}])"
        )
    program = _joined(template, kinds, counts)
    program.extensions = tuple(extensions)
    for step in (objective, propagate, extract):
        program = step(program)
    program.loss, program.output_leaves, program.mutations, program.checks = None, [], {}, []
    program = passes.run(program, [simplify, select, simplify, schedule, codegen])
    return _detached(program)


def _copy_nodes(program: Program, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    env: dict[fx.Node, fx.Node] = {}
    for node in list(program.graph.nodes)[:-1]:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = dict(node.meta)
    return env


def _joined(template: Program, kinds: Sequence[int], counts: Sequence[int]) -> Program:
    """A copy of `template` with the seam as its loss."""
    graph = fx.Graph()
    env = _copy_nodes(template, graph)
    head = env[template.heads[0]]
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    val = head.meta["val"]
    given = []
    with template.fake_mode:
        shapes = [tuple(val.shape), *((v, *val.shape) for v in counts)]
        for name, shape in zip(["g", *(f"columns_{k}" for k in range(len(kinds)))], shapes, strict=True):
            with graph.inserting_after(last):
                last = graph.placeholder(f"given_{name}")
            last.meta = {"val": val.new_empty(shape), "active": False, "place": _place(head, name), "given": name}
            given.append(last)
        loss = graph.call_function(torch.ops.fxcurv.seam.default, (head, given[0], given[1:], list(kinds)))
        loss.meta = {"val": val.new_empty(()), "active": True, "place": PARTIAL}
    graph.output(())
    gm = fx.GraphModule(template.gm, graph)
    now = dict(zip(graph.nodes, gm.graph.nodes, strict=True))  # a GraphModule copies the graph
    for old, new in now.items():
        new.meta = dict(old.meta)
    at = {old: now[new] for old, new in env.items()}
    return Program(
        gm, [], template.batch, {name: at[n] for name, n in template.params.items()}, template.shapes,
        [], [at[h] for h in template.heads], now[loss], {}, rules={**template.rules, torch.ops.fxcurv.seam.default: SEAM},
        state={k: template.state[k] for k in ("fake_mode", "batch_dims")},
    )  # fmt: skip


def _place(head: fx.Node, name: str) -> Placement:
    """Where the samples are on g [*f], and on columns [V, *f]."""
    place = head.meta["place"]
    return dataclasses.replace(place, dim=place.dim + 1) if name != "g" and isinstance(place, Shard) else place


def _detached(program: Program) -> Backward:
    """The finished program without its forward pass: numbered nodes become inputs."""
    graph = _pruned(program.graph)
    keyed = [n for n in graph.nodes if "key" in n.meta and n.op == "call_function"]
    first = next(iter(graph.nodes))
    for node in keyed:
        with graph.inserting_before(first):
            value = graph.placeholder(f"saved_{node.meta['key']}")
        value.meta = dict(node.meta)
        node.replace_all_uses_with(value)
    for node in reversed(keyed):  # also what dead code elimination keeps: random ops, which would draw again
        graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    ordered = [n for n in inputs if "key" in n.meta] + [n for n in inputs if "key" not in n.meta]
    for node in ordered[::-1]:
        next(iter(graph.nodes)).prepend(node)
    keys = tuple(n.meta["key"] for n in ordered if "key" in n.meta)
    given = tuple(n.meta.get("given", "seed") for n in ordered if "key" not in n.meta)
    graph.lint()
    return Backward(Part(fx.GraphModule(program.gm, graph), keys), given, program)


def results_of(backward: Backward, values: tuple) -> dict[str, Any]:
    """field -> parameter name -> value, from what the backward part returned."""
    _, _, _, results, extras = backward.program.unpack(values, lambda t: t)
    return {**results, **extras}
