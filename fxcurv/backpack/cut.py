"""A program cut at the model's output f: a forward part, and a backward part that takes over from there.

The backward part takes the values of the forward part that it reads as inputs: captured nodes keep their number,
`meta["key"]`, through all passes. There are two kinds of backward parts. One is made of the model alone and takes
cotangents of f (the loss of its program is the op `seam(f, g)`, whose derivative in f is g). The other is made of the
model captured together with the loss that turned out to read its output.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv import passes
from fxcurv.errors import LossError
from fxcurv.extensions import Extension
from fxcurv.ir.graph import canonical_args, is_tensor, pruned
from fxcurv.ir.origin import locate
from fxcurv.ir.placement import PARTIAL
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Input, Program, is_active
from fxcurv.ir.state import Options
from fxcurv.passes.average import average
from fxcurv.passes.extract import extract
from fxcurv.passes.finish import finish
from fxcurv.passes.objective import objective
from fxcurv.passes.products import products
from fxcurv.passes.propagate import propagate
from fxcurv.passes.schedule import schedule
from fxcurv.passes.select import select
from fxcurv.passes.shorten import shorten
from fxcurv.passes.simplify import simplify
from fxcurv.passes.sum_first import sum_first
from fxcurv.rules.loss import LossRule
from fxcurv.rules.traits import COPIES, random

aten = torch.ops.aten
# By number of dimensions, besides the contiguous one.
FORMATS = {4: (torch.channels_last,), 5: (torch.channels_last_3d,)}

BACKWARD = [propagate, average, products, extract]
FINISH = [simplify, select, simplify, sum_first, shorten, schedule, finish]


@torch.library.custom_op("fxcurv::seam", mutates_args=())
def seam(f: Tensor, g: Tensor) -> Tensor:
    """Stands for the loss, whose derivative in `f` is `g`."""
    return (f * g).sum()


@seam.register_fake
def _(f, g):
    return f.new_empty(())


class Seam(LossRule):
    """Passes the given cotangent on."""

    def transpose(self, call, wrt, g):
        return (g.view(-1, *[1] * call.args[1].ndim) * call.args[1],)


SEAM = Seam()  # a rule of cut programs only: no captured graph has the op


@dataclass(frozen=True)
class Part:
    """An emitted half: `gm` takes the values with the numbers `keys`, in order, then the inputs `given`."""

    gm: fx.GraphModule
    keys: tuple[int, ...]
    given: tuple[Input, ...] = ()


@dataclass(frozen=True)
class Backward:
    """The second half: from forward values and further inputs to results.

    Attributes:
        part: the GraphModule; it returns the flat leaves of `results`.
        check: the conditions on values that are verified at the first call; None if there are none.
        program: the finished program, for its `unpack`.
        regularised: whether the loss reads parameters beside the output, so that the gradient is not only what passes
            through the output.
    """

    part: Part
    check: Part | None
    program: Program
    regularised: bool = False

    @property
    def verdicts(self) -> list:
        """The errors that go with the conditions."""
        return self.program.verdicts


def forward_part(template: Program) -> Part:
    """The forward pass of an analysed program: returns (output leaves, new buffers, every value by key)."""
    graph = fx.Graph()
    env = _copy_nodes(template, graph)
    for key, node in enumerate(list(template.graph.nodes)[:-1]):
        node.meta["key"] = key
    made = [n for n in template.graph.nodes if n.op == "call_function"]
    leaves = [env[n] for n in template.output_leaves]
    mutations = [env[n] for n in template.mutations.values()]
    graph.output((leaves, mutations, [env[n] for n in made]))
    return Part(fx.GraphModule(template.gm, graph), tuple(n.meta["key"] for n in made))


def backward_of_model(
    program: Program, extensions: Sequence[Extension], covers: dict[Extension, list[str]], create_graph: bool
) -> Backward:
    """The gradient and first-order quantities from cotangents of the output's leaves, `Input("cotangent", index)`.

    Args:
        program: `with_seams` of the model alone.
        covers: names of the parameters of extensions that chose some.
        create_graph: whether only algorithms that autograd can follow are chosen.
    """
    program.extensions, program.covers = tuple(extensions), covers
    program.options = dataclasses.replace(program.options, create_graph=create_graph)
    return _finish_backward(objective(program))


def backward_of_loss(program: Program, template: Program, n: int) -> Backward:
    """The gradient and all quantities from the loss.

    Args:
        program: the analysed program of model and loss at `n` samples, with its extensions.
        template: the analysed program of the model alone, numbered by `forward_part`.

    Raises:
        LossError: if the loss draws random numbers: the backward part would draw other ones.
    """
    _number(program, template, n)
    past = [node for node in program.graph.nodes if node.op == "call_function" and "key" not in node.meta]
    read = {i for node in past for i in node.all_input_nodes if is_active(i) and "key" in i.meta}
    return _finish_backward(program, bool(read - set(program.heads)))


def results_of(backward: Backward, values: tuple) -> dict[str, Any]:
    """field -> parameter name -> value, from what the backward part returned."""
    _, _, _, results, extras = backward.program.unpack(values, lambda t: t)
    return {**results, **extras}


def _finish_backward(program: Program, regularised: bool = False) -> Backward:
    program = passes.run(program, BACKWARD)
    program.loss, program.output_leaves, program.mutations, program.observed = None, [], {}, []
    program = passes.run(program, FINISH)
    check = program.check_module
    return Backward(
        _without_forward(program.gm), _without_forward(check) if check is not None else None, program, regularised
    )


# ---- cotangents in place of a loss ------------------------------


def _copy_nodes(program: Program, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    env: dict[fx.Node, fx.Node] = {}
    for node in list(program.graph.nodes)[:-1]:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = dict(node.meta)
    return env


def with_seams(template: Program) -> Program:
    """A copy of `template` whose loss is the sum of a seam at every leaf that depends on a parameter.

    Args:
        template: the analysed program of the model alone, numbered by `forward_part`.
    """
    graph = fx.Graph()
    env = _copy_nodes(template, graph)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    losses = []
    for index, leaf in enumerate(template.output_leaves):
        if not is_active(leaf):
            continue
        with graph.inserting_after(last):
            last = graph.placeholder(f"cotangent_{index}")
        given = Input("cotangent", index=index)
        last.meta = {"val": leaf.meta["val"], "active": False, "place": leaf.meta["place"], "given": given}
        losses.append(graph.call_function(torch.ops.fxcurv.seam.default, (env[leaf], last)))
    loss = losses[0]
    for other in losses[1:]:
        losses.append(loss := graph.call_function(torch.ops.aten.add.Tensor, (loss, other)))
    for node in losses:
        with template.fake_mode:
            val = template.heads[0].meta["val"].new_empty(())
        node.meta = {"val": val, "active": True, "place": PARTIAL}
    graph.output(())
    gm = fx.GraphModule(template.gm, graph)
    now = dict(zip(graph.nodes, gm.graph.nodes, strict=True))  # a GraphModule copies the graph
    for old, new in now.items():
        new.meta = dict(old.meta)
    at = {old: now[new] for old, new in env.items()}
    return Program(
        gm, [], template.batch, {name: at[n] for name, n in template.params.items()}, template.shapes,
        [], [at[h] for h in template.heads], now[loss], {}, rules={**template.rules, torch.ops.fxcurv.seam.default: SEAM},
        fake_mode=template.fake_mode, options=Options(batch_dims=template.options.batch_dims),
    )  # fmt: skip


# ---- a loss that reads the model's output ------------------------------


def _number(program: Program, template: Program, n: int) -> None:
    """Give the nodes of `program` the keys of equal values in `template`, which has no loss.

    The two may have chosen other layouts for images. So a value is known whatever its layout, and `laid_out` says how it is
    to be copied if the template has it in another one.
    """
    numbers: dict[fx.Node, Any] = {}
    known: dict[Any, deque] = {}
    keys: dict[Any, Any] = {}
    for node, what in _nodes_with_inputs(template):
        if node.target in COPIES:
            numbers[node] = numbers[node.args[0]]  # type: ignore[index]
        else:
            numbers[node] = node.meta["key"]
            known.setdefault(_signature(node, what, template, n, numbers), deque()).append(node.meta["key"])
        keys.setdefault((numbers[node], _layout(node, template, n)), node.meta["key"])
    numbers = {}
    for node, what in _nodes_with_inputs(program):
        if node.target in COPIES:
            number = numbers[node.args[0]]  # type: ignore[index]
        else:
            same = known.get(_signature(node, what, program, n, numbers))
            number = node if not same else same.popleft() if random(node.target) else same[0]
        numbers[node] = number
        place = _layout(node, program, n)
        if (number, place) in keys:
            node.meta["key"] = keys[number, place]
        elif not isinstance(number, fx.Node) and isinstance(place, torch.memory_format):
            node.meta["key"], node.meta["laid_out"] = number, place
        elif random(node.target):
            raise LossError(
                f"{locate(node)}\ndraws random numbers past the model's output, and would draw other ones in the backward "
                "pass. Way out: draw them in the model, or pass them to the loss as an argument."
            )
        elif what is not None:
            node.meta["given"] = what


def _layout(node: fx.Node, program: Program, n: int) -> Any:
    """A memory format if the value of a node is in one, else its strides, at `n` samples; None unless it is one tensor."""
    if not is_tensor(node):
        return None
    val, at = node.meta["val"], program.batch
    try:
        strides = [at.evaluate(s, n) if isinstance(s, torch.SymInt) else s for s in val.stride()]
    except TypeError:
        return "an input's own strides"  # every n-th entry of a larger tensor: sizes do not say of how large a one
    like = torch.empty_strided(at.shape(val, n), strides, device="meta")
    formats = [torch.contiguous_format, *FORMATS.get(val.ndim, ())]
    return next((f for f in formats if like.is_contiguous(memory_format=f)), tuple(strides))


def _nodes_with_inputs(program: Program) -> list[tuple[fx.Node, Input | None]]:
    """Every node but the output, and what it is bound to if it is a placeholder."""
    bound = iter(program.inputs)
    nodes = list(program.graph.nodes)[:-1]
    return [(n, next(bound) if n.op == "placeholder" else None) for n in nodes]


def _signature(node: fx.Node, what: Input | None, program: Program, n: int, numbers: dict[fx.Node, Any]) -> Any:
    """Equal for equal computations of equal values, at `n` samples."""
    if what is not None and what.kind != "constant":
        return what
    if what is not None or node.op == "get_attr":
        value = program.constants[what.name] if what else getattr(node.graph.owning_module, node.target)
        return "constant", value.dtype, tuple(value.shape), tuple(value.flatten().tolist())

    def described(leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return type(leaf), str(leaf)
        val = leaf.meta.get("val")
        return program.batch.evaluate(val, n) if isinstance(val, torch.SymInt) else ("value", numbers[leaf])

    leaves, spec = pytree.tree_flatten((canonical_args(node), node.kwargs))
    numeric = [described(leaf) if not isinstance(leaf, int) else int(leaf) for leaf in leaves]
    return node.target, str(spec), tuple(numeric)


# ---- without the forward pass ------------------------------


def _without_forward(gm: fx.GraphModule) -> Part:
    """A finished program without its forward pass: numbered nodes become inputs."""
    graph = pruned(gm.graph)
    keyed = [n for n in graph.nodes if "key" in n.meta and n.op == "call_function"]
    first = next(iter(graph.nodes))
    saved: dict[Any, fx.Node] = {}  # one for each key: fx gives a second one of a name the name of another
    for node in keyed:
        key = node.meta["key"]
        if key not in saved:
            with graph.inserting_before(first):
                saved[key] = graph.placeholder(f"saved_{key}")
            saved[key].meta = dict(node.meta)
        value = saved[key]
        if "laid_out" in node.meta:
            with graph.inserting_before(node):
                value = graph.call_function(aten.clone.default, (value,), {"memory_format": node.meta["laid_out"]})
            value.meta = {kind: known for kind, known in node.meta.items() if kind != "key"}
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
    given = tuple(n.meta.get("given", Input("seed")) for n in ordered if "key" not in n.meta)
    graph.lint()
    return Part(fx.GraphModule(gm, graph), keys, given)
