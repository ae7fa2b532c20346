"""`emit`, the only maker of nodes: trace plain PyTorch on the nodes' values and splice the nodes in."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from fxcurv.ir import lengths, pieces
from fxcurv.ir.graph import layout, mutates
from fxcurv.ir.origin import locate
from fxcurv.ir.placement import Placement, Shard
from fxcurv.ir.private import (
    disable_fake_tensor_cache,
    dispatch_functionalize,
    enable_python_dispatcher,
    make_fx,
    pytree,
    without_layouts,
    without_vmap_warnings,
)
from fxcurv.ir.program import Input, Program

# Zero derivatives are tensors without memory, which nobody can keep: zeros with memory take their place.
MATERIALISED = {torch.ops.aten._efficientzerotensor.default: torch.zeros}


@dataclass(frozen=True)
class Piece:
    """A traced function: its graph, how its outputs are put together again, and what holds the constants that it reads."""

    graph: fx.Graph
    spec: pytree.TreeSpec
    constants: fx.GraphModule | None = None


def emit(program: Program, fn: Callable, *args: Any, origin: dict[str, Any] | None = None, before=None) -> Any:
    """Emit the nodes that compute `fn(*args)`, where `args` is a pytree with nodes for tensors.

    Args:
        program: the program whose graph grows.
        fn: plain PyTorch, a function of its arguments only.
        origin: provenance written on every new node (op, module, stack_trace, stage, extension).
        before: insert in front of this node (default: the end of the graph).

    Returns:
        what `fn` returns, with nodes for tensors.
    """
    leaves, spec = pytree.tree_flatten(args)
    key = _key(fn, leaves, spec)
    piece = program.pieces.get(key) if key is not None else None
    if piece is None:
        piece = _find_or_trace(program, key, fn, leaves, spec, origin)
        if key is not None:
            program.pieces[key] = piece
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    return _splice(
        program, piece, [*nodes, *_lengths(program, piece, len(nodes))], origin or {}, before or program.output
    )


def call(program: Program, target: Any, *args: Any, origin: dict[str, Any] | None = None) -> fx.Node:
    """One executable node `target(*args)` (a `contract` node): its `value` is known, its body is not traced yet."""
    with program.graph.inserting_before(program.output):
        node = program.graph.call_function(target, args)
    with program.fake_mode:
        node.meta["val"] = target.value(*fx.node.map_arg(args, lambda a: a.meta["val"]))
    node.meta["origin"] = dict(origin or {})
    return node


def substitute(program: Program, node: fx.Node, new: Any) -> None:
    """Replace a call by `new`, a tuple for an op of several outputs."""
    if isinstance(new, tuple | list):
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise AssertionError(f"{locate(user)} reads a tuple as a whole")
            program.replace(user, new[user.args[1]])
            program.graph.erase_node(user)
    else:
        program.replace(node, new)
    program.graph.erase_node(node)


def number_of_samples(x: Tensor, dim: int) -> Any:
    """The size of the samples' axis: the target of a single node, which is read wherever samples are counted."""
    return x.shape[dim]


def number_in_part(x: Tensor, dim: int) -> Any:
    """`number_of_samples` for this part of the batch alone."""
    return x.shape[dim]


def length(x: Tensor, dim: int) -> Any:
    """The size of an axis whose length is symbolic."""
    return x.shape[dim]


def _lengths(program: Program, piece: Piece, given: int) -> list[fx.Node | None]:
    """A node for each length that the traced function reads (through a placement), else None."""
    asked = [p for p in piece.graph.nodes if p.op == "placeholder"][given:]
    return [_length(program, k) if p.users else None for k, p in enumerate(asked)]


def _length(program: Program, k: int) -> fx.Node:
    found = [n for n in program.graph.find_nodes(op="call_function", target=length) if n.meta["length"] == k]
    if found:
        return found[0]
    node = _at_front(program, length, program.given(program.batch.lengths[k]), program.batch.lengths[k].dim)
    node.meta["length"] = k
    return node


def samples(program: Program) -> Any:
    """The number of samples of the quantities: a node, for functions that divide by it, or a number."""
    if program.fixed:
        return program.batch.samples
    found = program.graph.find_nodes(op="call_function", target=number_of_samples)
    return found[0] if found else _at_front(program, number_of_samples, *_an_input(program))


def part_samples(program: Program) -> fx.Node:
    """The number of samples in this program's tensors: a part of the batch's, where that is split."""
    found = program.graph.find_nodes(op="call_function", target=number_in_part)
    return found[0] if found else _at_front(program, number_in_part, *_an_input(program))


def first_sample(program: Program) -> fx.Node:
    """One node for the number of the batch's first sample, from which noise counts: zero, or an argument of a call."""
    found = [n for n in program.graph.nodes if "first" in n.meta]
    if found:
        return found[0]
    device = next(iter(program.params.values())).meta["val"].device
    node = _at_front(program, torch.ops.aten.full.default, [], 0, dtype=torch.long, device=device)
    if program.options.counted:
        with program.graph.inserting_before(node):
            given = program.graph.placeholder("first")
        given.meta = dict(node.meta)
        program.inputs.append(Input("first"))
        program.graph.erase_node(node)
        node = given
    node.meta["first"] = True
    return node


def _an_input(program: Program) -> tuple[fx.Node, int]:
    """A placeholder with an axis of samples alone, and that dimension: a cotangent, if there is one."""
    given = program.graph.find_nodes(op="placeholder")
    places = ((n, n.meta.get("place")) for n in reversed(given))
    return next((n, p.dim) for n, p in places if isinstance(p, Shard) and p.outer * p.inner == 1)


def _at_front(program: Program, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    first = next(n for n in program.graph.nodes if n.op != "placeholder")
    with program.graph.inserting_before(first):
        node = program.graph.call_function(target, args, kwargs)
    with program.fake_mode:
        node.meta["val"] = target(*fx.node.map_arg(args, lambda a: a.meta["val"]), **kwargs)
    node.meta["origin"] = {"stage": "columns", "op": "samples", "module": ""}
    return node


def declare(node: Any, place: Placement | list[Placement], sources: Any) -> None:
    """Declare where the samples are on an emitted value; it holds unless samples are mixed on its `sources`.

    For placements that the ops inside a traced function do not show (see `rules.split`).
    """
    if isinstance(node, fx.Node):
        given = tuple(n for n in pytree.tree_leaves(sources) if isinstance(n, fx.Node))
        node.meta.setdefault("declared", (place, given))


@contextlib.contextmanager
def tracing(program: Program, origin: dict[str, Any] | None):
    """Run on fake values, and note the origin if a symbolic size (batch or length) becomes a number.

    The Python dispatcher takes the decompositions that keep sizes symbolic where a C++ kernel would fix them. Equal
    pieces are traced once, so the fake mode's own cache would be filled for nothing, which takes as long as tracing.
    """
    before = program.fixed, program.fixed_lengths
    with (
        disable_fake_tensor_cache(program.fake_mode),
        program.fake_mode,
        torch.enable_grad(),  # under no_grad the backward of some ops (det, solve) takes a way that has no derivative
        enable_python_dispatcher(),
        without_layouts(),
        without_vmap_warnings(),
    ):
        yield
    if (program.fixed, program.fixed_lengths) != before:
        program.fixed_by = origin or {}


def _find_or_trace(program: Program, key: Any, fn: Callable, leaves: list[Any], spec: pytree.TreeSpec, origin) -> Piece:
    """A piece that was kept from another program, or a newly traced one."""
    lasting = pieces.lasting(program, key, fn, leaves)
    found = pieces.kept(program, lasting) if lasting is not None else None
    if found is not None:
        return Piece(*found)
    before = pieces.assumptions(program)
    piece = _trace(program, fn, leaves, spec, origin)
    if lasting is not None and before == pieces.assumptions(program):
        pieces.keep(lasting, piece.graph, piece.spec)
    return piece


def in_order() -> contextlib.AbstractContextManager[None]:
    """Let `torch.einsum` contract from left to right: opt_einsum would turn symbolic sizes into numbers."""
    return torch.backends.opt_einsum.flags(enabled=False)


def _trace(program: Program, fn: Callable, leaves: list[Any], spec: pytree.TreeSpec, origin) -> Piece:
    out_spec = None

    def flat(*vals):
        nonlocal out_spec
        it = iter(vals)
        full = [next(it) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        with lengths.at(tuple(it)):
            out, out_spec = pytree.tree_flatten(fn(*pytree.tree_unflatten(full, spec)))
        return out

    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    with tracing(program, origin), warnings.catch_warnings(), in_order():
        warnings.simplefilter("ignore")
        # nodes of one traced piece share their values, and a trace tells its inputs apart by identity
        vals = [*_distinct_values(program, [node.meta["val"] for node in nodes]), *program.length_values()]
        gm = make_fx(flat, MATERIALISED)(*vals)
        if any(mutates(node) for node in gm.graph.nodes):
            gm = _without_writes(flat, vals)
    gm.graph.eliminate_dead_code()
    return Piece(gm.graph, out_spec, gm)


def _without_writes(fn: Callable, vals: list[Any]) -> fx.GraphModule:
    try:
        return make_fx(dispatch_functionalize(fn), MATERIALISED)(*vals)
    except AssertionError as error:  # PyTorch's, of an op that checks values (LAPACK's) beside one that writes
        raise RuntimeError(f"its derivative writes to memory: {error}") from error


def _distinct_values(program: Program, vals: list[Any]) -> list[Any]:
    """Values of the same kinds, no two of which are the same tensor."""
    kinds = [pieces.Kind.of(val) if isinstance(val, Tensor) else None for val in vals]
    return [
        val if kind is None else pieces.like(program, val, kinds[:k].count(kind))
        for k, (val, kind) in enumerate(zip(vals, kinds, strict=True))
    ]


def _splice(program: Program, piece: Piece, nodes: list[fx.Node], origin: dict[str, Any], before: fx.Node) -> Any:
    env: dict[fx.Node, Any] = {}
    given = iter(nodes)
    graph = program.graph
    with graph.inserting_before(before):
        for node in piece.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "output":
                out = pytree.tree_map(lambda a: env[a] if isinstance(a, fx.Node) else a, node.args[0])
            elif node.op == "get_attr":
                env[node] = constant(program, getattr(piece.constants, node.target))
            else:
                new = graph.node_copy(node, env.__getitem__)
                new.meta = {"val": node.meta.get("val"), "origin": {**origin, "own": str(node.target)}}
                env[node] = new
    return pytree.tree_unflatten(list(out), piece.spec)


def constant(program: Program, value: Tensor) -> fx.Node:
    """A node for a tensor that the program owns, at the graph's insertion point."""
    taken = {name for name, _ in program.gm.named_buffers()}
    name = next(f"_constant{k}" for k in itertools.count() if f"_constant{k}" not in taken)
    program.gm.register_buffer(name, value, persistent=False)
    node = program.graph.get_attr(name)
    node.meta["val"] = program.fake_mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value
    return node


def _key(fn: Callable, leaves: list[Any], spec: pytree.TreeSpec):
    base, bound = fn, None
    if isinstance(fn, functools.partial):  # two partials are never equal, what they bind may be
        base, bound = fn.func, (fn.args, tuple(fn.keywords.items()))  # type: ignore[assignment]
    closure = getattr(base, "__closure__", None) and not inspect.ismethod(base)  # a method's closure is its class
    if closure or "<lambda>" in getattr(base, "__qualname__", ""):
        return None
    key = (base, bound, str(spec), tuple(signature(leaf) for leaf in leaves))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def signature(leaf: Any) -> Any:
    """What a trace depends on in an argument: of a node the kind of its value, of anything else everything."""
    if not isinstance(leaf, fx.Node):
        return (type(leaf), leaf)
    val = leaf.meta["val"]
    if isinstance(val, Tensor):
        return ("tensor", val.dtype, val.device, layout(val))
    return ("sym", val.node.expr) if isinstance(val, SymInt) else ("node", leaf)
