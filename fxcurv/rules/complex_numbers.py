"""Complex numbers between a trained parameter and the loss: what leads from real tensors to real ones again is one op.

A spectrum is made of activations, and read again as real numbers: by its inverse, its magnitude, its real part. Columns, samples
and diagonals are all real there. So the ops in between become the body of one node, whose derivative is `torch.func`'s, by the
general rule: no other pass meets a complex cotangent. After the walk the node is its ops again.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor, fx

from fxcurv.errors import UnsupportedOpError
from fxcurv.ir.emit import emit, substitute
from fxcurv.ir.graph import ancestors, canonical_args, dependent, holds_complex, is_tensor, layout, size_of, to_reshape
from fxcurv.ir.origin import locate, origin_of
from fxcurv.ir.program import Program
from fxcurv.rules.base import Rule
from fxcurv.rules.custom import Custom
from fxcurv.rules.inplace import END, region
from fxcurv.rules.shape import copied
from fxcurv.rules.traits import random

aten = torch.ops.aten


class Spectral(Rule):
    """The general rule, of a part of the graph."""

    name = "complex"


class Region:
    """A part of the graph as the target of a node: real tensors and sizes in, a tuple of real tensors out.

    Attributes:
        rule: one of its own, by which pieces that were traced for this part are told from those of others.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.rule = module, Spectral()
        self.__name__ = self.__qualname__ = "complex_region"
        self.__module__ = "fxcurv.rules"

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        return tuple(self.module(*args))


def fold(program: Program) -> None:
    """Make one node of every part of the graph that computes with complex numbers of trained parameters.

    A part whose complex numbers leave it (the model's output) stays as it is.

    Raises:
        UnsupportedOpError: for a part that draws random numbers, which its derivative would draw again; and for one that calls
            a function with a backward of its own, which is followed through real numbers alone.
    """
    left: set[fx.Node] = set()
    while True:
        spectra = {n for n in program.graph.nodes if _is_complex(n)}
        spectra &= dependent(program.graph.nodes, program.params.values()) if spectra else set()
        first = next((n for n in program.graph.nodes if n in spectra and n not in left), None)
        if first is None:
            return
        inside = _closed(program, _around(first, spectra), spectra)
        _check([n for n in program.graph.nodes if n in inside])
        if any(_is_complex(n) for n in _read_outside(program, inside)):
            left.update(inside)
        else:
            _fuse(program, inside)


def _check(nodes: list[fx.Node]) -> None:
    """Refuse what has no derivative inside of a part."""
    for node in nodes:
        if random(node.target):
            raise UnsupportedOpError(
                f"{locate(node)}\ndraws random numbers between complex ones that depend on trained parameters. Way out: draw by "
                "sizes alone, as in torch.randn(z.shape) for torch.randn_like(z), and dropout on z.real and z.imag."
            )
        if isinstance(node.target, Custom):
            raise UnsupportedOpError(
                f"{locate(node)}\nhas a backward of its own, between complex numbers that depend on trained parameters. Way out: "
                "let it take and give real tensors (torch.view_as_real, and torch.view_as_complex inside of it)."
            )


def unfold(program: Program) -> None:
    """Replace the nodes by their ops."""
    for node in [n for n in program.graph.nodes if isinstance(n.target, Region)]:
        new = emit(program, node.target, *node.args, origin=origin_of(node, "forward"), before=node)
        substitute(program, node, new)
    if program.options.create_graph:  # results are differentiated through what the derivatives write, too
        for node in [n for n in program.graph.nodes if n.target in _EQUATIONS and _is_complex(n)]:
            equation, origin = _EQUATIONS[node.target], origin_of(node, "propagate")
            substitute(program, node, emit(program, equation, *canonical_args(node), origin=origin, before=node))


def _is_complex(node: fx.Node) -> bool:
    """Whether an op gives complex numbers."""
    return node.op == "call_function" and holds_complex(node)


def _around(node: fx.Node, spectra: set[fx.Node]) -> set[fx.Node]:
    """The ops that complex numbers of trained parameters connect with `node`, those that read them as real ones included."""
    found, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [i for i in node.all_input_nodes if i in spectra]
            stack += node.users if node in spectra else []
    return found


def _closed(program: Program, inside: set[fx.Node], spectra: set[fx.Node]) -> set[fx.Node]:
    """`inside`, and what lies on a way from it back to it; with the complex numbers of that, and so on."""
    while True:
        between = dependent(program.graph.nodes, list(inside)) & {*ancestors(list(inside))}
        wider = set().union(inside, between, *(_around(n, spectra) for n in between & spectra))
        if wider == inside:
            return inside
        inside = wider


def _read_outside(program: Program, inside: set[fx.Node]) -> list[fx.Node]:
    """The nodes of a part that others read, or that are results, in the graph's order."""
    roots = {*program.roots()}
    return [n for n in program.graph.nodes if n in inside and (n in roots or not inside.issuperset(n.users))]


def _fuse(program: Program, inside: set[fx.Node]) -> None:
    nodes, out = [n for n in program.graph.nodes if n in inside], _read_outside(program, inside)
    given = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside))
    sizes = _sizes(given)
    given = [n for n in given if n not in sizes]
    body = _body(given, sizes, nodes, out)
    origin = origin_of(next(n for n in nodes if _is_complex(n)), "forward")
    args = [_as_real(program, n, nodes) for n in given]
    _move_behind(nodes[-1], dependent(program.graph.nodes, out) - inside)
    with program.graph.inserting_after(nodes[-1]):
        fused = program.graph.call_function(Region(fx.GraphModule(program.gm, body)), tuple(args))
    fused.meta = {"val": tuple(n.meta["val"] for n in out), "origin": origin}
    for k, node in reversed([*enumerate(out)]):
        with program.graph.inserting_after(fused):
            one = program.graph.call_function(operator.getitem, (fused, k))
        one.meta = {**node.meta}
        program.replace(node, one)
    for node in reversed(nodes):
        program.graph.erase_node(node)


def _sizes(given: list[fx.Node]) -> dict[fx.Node, tuple[fx.Node, int]]:
    """(tensor, axis) for every size among `given` that is one of a given tensor's: so the part serves one sample alone, too."""
    known = {s: (n, d) for n in given if is_tensor(n) for d, s in enumerate(layout(n.meta["val"])[0])}
    asked = {n: n.meta["val"].node.expr for n in given if isinstance(n.meta["val"], SymInt)}
    return {n: known[s] for n, s in asked.items() if s in known}


def _body(
    given: list[fx.Node], sizes: dict[fx.Node, tuple[fx.Node, int]], nodes: list[fx.Node], out: list[fx.Node]
) -> fx.Graph:
    """The graph of `nodes`; complex numbers of the data come as pairs of real ones."""
    body = fx.Graph()
    env = {node: body.placeholder(f"x{k}") for k, node in enumerate(given)}
    for node in given:
        if holds_complex(node):
            env[node] = body.call_function(torch.view_as_complex, (env[node],))
    env |= {node: body.call_function(size_of, (env[n], d)) for node, (n, d) in sizes.items()}
    for node in nodes:
        env[node] = body.node_copy(node, env.__getitem__)
        to_reshape(env[node])
        if node.target in _EQUATIONS and _is_complex(node):
            env[node].args = fx.node.map_arg(canonical_args(node), env.__getitem__)
            env[node].target, env[node].kwargs = _EQUATIONS[node.target], {}
    body.output(tuple(env[n] for n in out))
    return body


def _slice(x: Tensor, source: Tensor, dim: int, start: int | None, end: int | None, step: int) -> Tensor:
    """By copies between the slices of `source` and zeros around them: `cat` and `index_copy` fix a symbolic size under `vmap`."""
    if (start or 0, step) == (0, 1) and (end is None or end >= END):
        return source
    dim %= x.ndim
    size, others = x.shape[dim], [0, 0] * (x.ndim - dim - 1)
    start, end = region(size, start, end, step)
    at = torch.arange(size, device=x.device)
    written = (at >= start) & (at < end) & ((at - start) % step == 0)
    spread = source.unsqueeze(dim + 1).expand(*[-1] * (dim + 1), step, *[-1] * (x.ndim - dim - 1)).flatten(dim, dim + 1)
    spread = F.pad(spread, (*others, start, size - start - spread.shape[dim]))
    return torch.where(written.view(-1, *[1] * (x.ndim - dim - 1)), spread, x)


def _selected(x: Tensor, source: Tensor, dim: int, at: int) -> Tensor:
    return _slice(x, source.unsqueeze(dim), dim, at, at + 1 or None, 1)


# Writes, which PyTorch does not differentiate for complex numbers.
_EQUATIONS: dict[Any, Callable] = {
    aten.copy.default: copied, aten.slice_scatter.default: _slice, aten.select_scatter.default: _selected,
}  # fmt: skip


def _move_behind(last: fx.Node, readers: set[fx.Node]) -> None:
    """Move those of `readers` that stand in front of `last` behind it, in their order."""
    before = itertools.takewhile(lambda n: n is not last, last.graph.nodes)
    for node in [n for n in before if n in readers]:
        last.append(node)
        last = node


def _as_real(program: Program, node: fx.Node, nodes: list[fx.Node]) -> fx.Node:
    """What the part of `nodes` gets of a value from outside of it."""
    if not holds_complex(node):
        return node
    first = next(n for n in nodes if node in n.all_input_nodes)
    return emit(program, torch.view_as_real, node, origin=origin_of(node, "forward"), before=first)
