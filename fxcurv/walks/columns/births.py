"""Births of column groups: what each quantity puts on the walk, and at which node."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcurv.errors import ExtensionError, LossError
from fxcurv.ir.emit import emit
from fxcurv.ir.noise import uniform
from fxcurv.ir.origin import at_loss, origin_of
from fxcurv.ir.placement import Shard, samples_back, samples_first
from fxcurv.ir.precision import widened
from fxcurv.ir.program import Input, Program
from fxcurv.quantity import GRADIENT, TOKEN, Group, Term
from fxcurv.rules.base import rule_of
from fxcurv.rules.call import Call, call_of
from fxcurv.rules.loss import Draw, separate
from fxcurv.walks.columns.stack import Stack, Walk, merged
from fxcurv.walks.loss import check_convex, check_positive, hessian_of_loss, root_of, signed_pairs


def at(walk: Walk, node: fx.Node) -> None:
    """Add to the cotangents what is born when the walk reaches `node`."""
    program = walk.program
    groups = [g for g in walk.groups if g != GRADIENT]
    terms: list[Term] = program.analysis.terms
    for index, term in enumerate(terms):
        here = [g for g in groups if g.term == index and g.kind not in ("identity", "token")]
        if term.node is node:
            _closed_form(walk, term, here)
        elif here and term.node is None and node is _latest(program.heads):
            _general(walk, here)
    if Group("identity") in groups and node is _latest(program.heads):
        _identity(walk, node)
    if TOKEN in groups and node is _latest(program.heads):
        _by_position(walk, node)


def _latest(heads: list[fx.Node]) -> fx.Node:
    """The head that the reverse walk meets first: all cotangents past the heads are known there."""
    order = {n: k for k, n in enumerate(heads[0].graph.nodes)}
    return max(heads, key=order.__getitem__)


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


def _closed_form(walk: Walk, term: Term, groups: list[Group]) -> None:
    program, node = walk.program, term.node
    stack = merged(walk, node, walk.cotangents[node])
    walk.cotangents[node] = [stack]
    program.walked.arrivals[node] = stack.node
    rule, call = rule_of(node.target, program.rules), call_of(program, node)
    origin = origin_of(node, "columns")
    check_positive(program, node, stack.node)
    for group in groups:
        weights = None
        if group.kind == "exact":
            few = not any(e.shows_columns for e in program.extensions)
            columns = emit(program, _exact, rule, call, stack.node, few, origin=origin)
            if not any(e.needs_convex for e in program.extensions):
                weights = emit(program, _sign, stack.node, origin=origin)
        elif group.kind == "empirical":
            columns = emit(program, _empirical, rule, call, stack.node, origin=origin)
        else:
            draw = Draw(group.draws, group.term)
            columns = emit(program, _sampled, rule, call, stack.node, seed_node(program), draw, origin=origin)
        _born(walk, group, [term.prediction], [columns], weights, origin)


def _born(walk: Walk, group: Group, heads: list[fx.Node], columns: list[fx.Node], weights, origin: dict) -> None:
    """Columns [V, *head] of `group`, and weights [V or 1, ...], come to `heads`, now or in parts in later sweeps."""
    def send(part: Group, start: int, stop: int) -> None:
        for head, stack in zip(heads, columns, strict=True):
            rows = emit(walk.program, _rows, stack, start, stop, origin=origin)
            walk.add(head, Stack((part,), (stop - start,), rows))
        if weights is not None:
            walk.weights[part] = emit(walk.program, _rows, weights, start, stop, origin=origin)

    walk.born(group, int(columns[0].meta["val"].shape[0]), send)


def _rows(t: Tensor, start: int, stop: int) -> Tensor:
    """Some columns; what holds for all of them ([1, ...]) and all of them are what they are."""
    return t if t.shape[0] in (1, stop - start) else t[start:stop]


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


def _identity(walk: Walk, head: fx.Node) -> None:
    program = walk.program
    if len(program.heads) != 1:
        raise ExtensionError(
            f"Jacobian needs one output, the model has {len(program.heads)}: pass split='module.path', or return one tensor"
        )
    origin = origin_of(head, "columns")
    columns = emit(program, _eye, head, head.meta["place"], origin=origin)
    _born(walk, Group("identity"), [head], [columns], None, origin)


def _by_position(walk: Walk, head: fx.Node) -> None:
    """The gradient in f, apart by positions."""
    stack = merged(walk, head, walk.cotangents[head])
    walk.cotangents[head] = [stack]
    start = sum(stack.columns[: stack.groups.index(GRADIENT)])
    origin, (_, classes) = origin_of(head, "columns"), walk.program.analysis.positions or (0, None)
    columns = emit(walk.program, _apart, stack.node, start, head.meta["place"], classes, origin=origin)
    _born(walk, TOKEN, [head], [columns], None, origin)


def _apart(g: Tensor, start: int, place: Shard, classes: int | None) -> Tensor:
    return separate(g[start : start + 1], place, classes)


def _eye(f: Tensor, place: Shard) -> Tensor:
    return separate(torch.ones_like(f).unsqueeze(0), place, None)


def _general(walk: Walk, groups: list[Group]) -> None:
    """Columns of the per-sample Hessian of the whole loss in f, for a loss without a closed form."""
    program = walk.program
    if any(g.kind == "empirical" for g in groups):
        raise LossError(
            f"{at_loss(program.loss)}"
            'fisher="empirical" needs a loss in closed form (cross-entropy, squares, binary cross-entropy with logits), '
            'whose scale per sample is known. Way out: fisher="mc".'
        )
    heads = program.heads
    places = tuple(h.meta["place"] for h in heads)
    origin = {"stage": "columns", "op": "Hessian of the loss", "module": ""}
    h = hessian_of_loss(program)
    check_convex(program, h)
    for group in groups:
        weights = None
        if group.kind == "signed":
            joint, weights = emit(program, signed_pairs, h, origin=origin)
        elif program.options.create_graph:
            raise ExtensionError(
                f"{at_loss(program.loss)}"
                "create_graph=True with a root of a loss that has no closed form: the derivative of an eigendecomposition is "
                "not defined at repeated eigenvalues. Way out: a diagonal (DiagGGNExact), or cross-entropy, squares or BCE."
            )
        elif group.kind == "root":
            joint = emit(program, root_of, h, origin=origin)
        else:
            joint = emit(program, _signs, h, seed_node(program), group.term, group.draws, origin=origin)
        columns = emit(program, _split, joint, places, [*heads], origin=origin)
        _born(walk, group, heads, list(columns), weights, origin)


def _signs(h: Tensor, seed: Tensor, stream: int, draws: int) -> Tensor:
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
