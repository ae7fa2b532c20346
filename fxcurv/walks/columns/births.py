"""Births of column groups: what each kind of columns puts on the walk, and at which node.

A kind is one function, registered by `born`. When the walk reaches the node where a group of the kind is born, the
function gets the walk and the group, and sends the columns down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import ExtensionError, LossError
from fxcurv.ir.emit import emit, first_sample
from fxcurv.ir.noise import Seed, uniform
from fxcurv.ir.origin import at_loss, origin_of
from fxcurv.ir.placement import Shard, samples_back, samples_first
from fxcurv.ir.precision import widened
from fxcurv.ir.program import Input, Program
from fxcurv.quantity import GRADIENT, IDENTITY, TOKEN, Group, Term, kind
from fxcurv.rules.base import rule_of
from fxcurv.rules.call import Call, call_of
from fxcurv.rules.loss import Draw, separate
from fxcurv.walks.columns.stack import Stack, Walk, merged, some, width
from fxcurv.walks.loss import check_convex, check_positive, hessian_of_loss, pairs_of, root_of


@dataclass(frozen=True)
class Birth:
    """The node where a group is born (`at`), and what sends its columns down from there (`give`)."""

    at: Callable[[Program, Group], fx.Node]
    give: Callable[[Walk, Group], None]


BIRTHS: dict[str, Birth] = {}


def born(name: str, at: Callable[[Program, Group], fx.Node], title: str = "", by_class: bool = False):
    """Register how columns of a kind are made: a decorator of a function (walk, group), which calls `carry`.

    Args:
        name: of the kind.
        at: (program, group) -> the node that the columns are born at.
        title: of a new kind, what the report calls its columns.
        by_class: of a new kind, see `quantity.Kind`.

    Raises:
        ValueError: if a new kind has the name of another one.
    """

    def add(give: Callable[[Walk, Group], None]):
        BIRTHS[kind(name, title, by_class=by_class) if title else name] = Birth(at, give)
        return give

    return add


def plan(walk: Walk) -> dict[fx.Node, list[Group]]:
    """Node -> the groups that are born there, but for those of ops, which are born on the walk."""
    found: dict[fx.Node, list[Group]] = {}
    for group in walk.groups:
        if group.kind in BIRTHS:
            found.setdefault(BIRTHS[group.kind].at(walk.program, group), []).append(group)
    return found


def at(walk: Walk, node: fx.Node, planned: dict[fx.Node, list[Group]]) -> None:
    """Add to the cotangents what is born when the walk reaches `node`."""
    for term in walk.program.analysis.terms:
        if term.node is node:
            _record_arrival(walk, node)
    for group in planned.get(node, []):
        BIRTHS[group.kind].give(walk, group)


def at_term(program: Program, group: Group) -> fx.Node:
    """The loss op of a group's term, or the output where the whole loss is the term."""
    return program.analysis.terms[group.term].node or at_output(program)


def at_output(program: Program, group: Group | None = None) -> fx.Node:
    """The head that the reverse walk meets first: all cotangents past the heads are known there."""
    order = {n: k for k, n in enumerate(program.graph.nodes)}
    return max(program.heads, key=order.__getitem__)


def seed_node(program: Program) -> fx.Node:
    """The placeholder of the noise's seed, made when the first sampled column needs it."""
    if program.seed is None:
        first = next(n for n in program.graph.nodes if n.op != "placeholder")
        with program.graph.inserting_before(first):
            program.seed = program.graph.placeholder("seed")
        with program.fake_mode:
            device = next(iter(program.params.values())).meta["val"].device
            program.seed.meta = {"val": torch.zeros((), dtype=torch.long, device=device)}
        program.inputs.append(Input("seed"))
    return program.seed


def noise_seed(program: Program) -> tuple[fx.Node, fx.Node]:
    """What noise is made of: the seed, and the number of the first sample."""
    return seed_node(program), first_sample(program)


# ---- of a loss in closed form ------------------------------


def _record_arrival(walk: Walk, node: fx.Node) -> None:
    """Record the cotangent at a loss op, whether or not columns are born there."""
    stack = merged(walk, node, walk.cotangents[node])
    walk.cotangents[node] = [stack]
    walk.program.walked.arrivals[node] = stack.node
    check_positive(walk.program, node, stack.node)


def _carry_from_op(walk: Walk, group: Group, fn: Callable, *args: Any, weights: Callable | None = None) -> None:
    """Carry `fn(rule, call, c, *args)`, weighted by `weights(c)`, to the term's prediction; c: the op's cotangent."""
    program = walk.program
    term: Term = program.analysis.terms[group.term]
    rule, call, origin = (
        rule_of(term.node.target, program.rules),
        call_of(program, term.node),
        origin_of(term.node, "columns"),
    )
    c = program.walked.arrivals[term.node]
    columns = emit(program, fn, rule, call, c, *args, origin=origin)
    real = emit(program, weights, c, origin=origin) if weights is not None else None
    carry(walk, group, [term.prediction], [columns], real, origin)


@born("exact", at_term, "exact", by_class=True)
def _give_exact(walk: Walk, group: Group) -> None:
    extensions = walk.program.extensions
    few = not any(e.shows_columns for e in extensions)
    _carry_from_op(walk, group, _exact, few, weights=None if any(e.needs_convex for e in extensions) else _sign)


@born("empirical", at_term, "empirical")
def _give_empirical(walk: Walk, group: Group) -> None:
    if walk.program.analysis.terms[group.term].node is None:
        raise LossError(
            f"{at_loss(walk.program.loss)}"
            'fisher="empirical" needs a loss in closed form (cross-entropy, squares, binary cross-entropy with logits), '
            'whose scale per sample is known. Way out: fisher="mc".'
        )
    _carry_from_op(walk, group, _empirical)


@born("mc", at_term, "sampled")
def _give_sampled(walk: Walk, group: Group) -> None:
    _carry_from_op(walk, group, _sampled, noise_seed(walk.program), Draw(group.draws, group.term))


def carry(walk: Walk, group: Group, heads: list[fx.Node], columns: list[fx.Node], weights, origin: dict) -> None:
    """Send columns [V, *head] of `group`, with weights [V or 1, ...], to `heads`, now or in parts in later sweeps."""

    def send(part: Group, start: int, stop: int) -> None:
        for head, stack in zip(heads, columns, strict=True):
            rows = emit(walk.program, some, stack, start, stop, part.paired, origin=origin)
            walk.add(head, Stack((part,), ((stop - start) * width(part),), rows))
        if weights is not None:
            walk.weights[part] = emit(walk.program, _weights, weights, start, stop, origin=origin)

    walk.born(group, int(columns[0].meta["val"].shape[0]) // width(group), send)


def _weights(t: Tensor, start: int, stop: int) -> Tensor:
    """The weights of the columns from `start` to `stop`; [1, ...] holds for all columns."""
    return t if t.shape[0] == 1 else t[start:stop]


def _exact(rule, call, c, few):
    return _in_dtype(rule.exact(widened(call), widened(c[0].abs()), few), call)


def _sign(c):
    """The sign of a scalar cotangent, as weights that broadcast to [V, N]."""
    return c.sign().unsqueeze(1)


def _empirical(rule, call, c):
    return _in_dtype(rule.empirical(widened(call), widened(c)), call)


def _sampled(rule, call, c, seed, draw):
    return _in_dtype(rule.sampled(widened(call), widened(c[0]), seed, draw), call)


def _in_dtype(columns: Tensor, call: Call) -> Tensor:
    """Columns that were computed in float32, in the prediction's dtype."""
    return columns.to(call.args[0].dtype)


# ---- at the output ------------------------------


@born(IDENTITY.kind, at_output)
def _give_identity(walk: Walk, group: Group) -> None:
    program = walk.program
    if len(program.heads) != 1:
        raise ExtensionError(
            f"Jacobian needs one output, the model has {len(program.heads)}: pass split='module.path', or return one tensor"
        )
    (head,) = program.heads
    origin = origin_of(head, "columns")
    columns = emit(program, _eye, head, head.meta["place"], origin=origin)
    carry(walk, group, [head], [columns], None, origin)


@born(TOKEN.kind, at_output)
def _give_positions(walk: Walk, group: Group) -> None:
    """The gradient in f, a column per position."""
    head = at_output(walk.program)
    stack = merged(walk, head, walk.cotangents[head])
    walk.cotangents[head] = [stack]
    start = sum(stack.columns[: stack.groups.index(GRADIENT)])
    origin, (_, classes) = origin_of(head, "columns"), walk.program.analysis.positions or (0, None)
    if walk.program.analysis.rows:
        columns = emit(walk.program, _by_row, stack.node, start, origin=origin)
    else:
        columns = emit(walk.program, _separate_positions, stack.node, start, head.meta["place"], classes, origin=origin)
    carry(walk, group, [head], [columns], None, origin)


def _separate_positions(g: Tensor, start: int, place: Shard, classes: int | None) -> Tensor:
    return separate(g[start : start + 1], place, classes)


def _by_row(g: Tensor, start: int) -> Tensor:
    """A column per row of f [N, *]: the gradient there, and zero elsewhere, [N, N, *]."""
    rows = g.shape[1]
    eye = torch.eye(rows, dtype=g.dtype, device=g.device)
    return g[start : start + 1] * eye.reshape(rows, rows, *[1] * (g.ndim - 2))


def _eye(f: Tensor, place: Shard) -> Tensor:
    return separate(torch.ones_like(f).unsqueeze(0), place, None)


# ---- of any other loss ------------------------------


def _carry_from_hessian(walk: Walk, group: Group, fn: Callable, *args: Any) -> None:
    """Carry `fn(h, *args)` to the output; h: the Hessian of the whole loss in f per sample."""
    program = walk.program
    places = tuple(h.meta["place"] for h in program.heads)
    origin = {"stage": "columns", "op": "Hessian of the loss", "module": ""}
    if walk.hessian is None:
        walk.hessian = hessian_of_loss(program)
        check_convex(program, walk.hessian)
    joint = emit(program, fn, walk.hessian, *args, origin=origin)
    columns = emit(program, _split, joint, places, [*program.heads], origin=origin)
    carry(walk, group, program.heads, list(columns), None, origin)


def _refuse_create_graph(walk: Walk) -> None:
    if walk.program.options.create_graph:
        raise ExtensionError(
            f"{at_loss(walk.program.loss)}"
            "create_graph=True with a root of a loss that has no closed form: the derivative of an eigendecomposition is "
            "not defined at repeated eigenvalues. Way out: a diagonal (DiagGGNExact), or cross-entropy, squares or BCE."
        )


@born("signed", at_term, "pairs (of the loss's Hessian)")
def _give_pairs(walk: Walk, group: Group) -> None:
    _carry_from_hessian(walk, group, pairs_of)


@born("root", at_term, "root (of the loss's Hessian)")
def _give_root(walk: Walk, group: Group) -> None:
    _refuse_create_graph(walk)
    _carry_from_hessian(walk, group, root_of)


@born("signs", at_term, "root times random signs")
def _give_signs(walk: Walk, group: Group) -> None:
    _refuse_create_graph(walk)
    _carry_from_hessian(walk, group, _signs, noise_seed(walk.program), group.term, group.draws)


def _signs(h: Tensor, seed: Seed, stream: int, draws: int) -> Tensor:
    """The root times random signs: sampled columns for any loss, [M, N, D]."""
    root = root_of(h).movedim(0, 1)
    u = uniform(seed, stream, draws, h[:, 0], Shard(0))
    signs = torch.where(u < 0.5, -1.0, 1.0).to(h.dtype)
    return torch.einsum("mnd,nde->mne", signs, root) * draws**-0.5


def _split(columns: Tensor, places, heads: list[Tensor]) -> list[Tensor]:
    slices = [samples_first(h, p) for h, p in zip(heads, places, strict=True)]
    parts = torch.split(columns, [s[0].numel() for s in slices], 2)
    v = columns.shape[0]
    parts = [p.reshape(v, *s.shape).to(s.dtype) for p, s in zip(parts, slices, strict=True)]
    return [samples_back(p, place, 1) for p, place in zip(parts, places, strict=True)]
