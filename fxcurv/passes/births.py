"""Births of column groups: what each quantity puts on the walk, and at which node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxcurv.emit import emit
from fxcurv.errors import ExtensionError, LossError, UnsupportedOpError
from fxcurv.noise import uniform
from fxcurv.passes.objective import ancestors, descendants, past
from fxcurv.placement import Shard, samples_back, samples_first
from fxcurv.precision import widened
from fxcurv.program import Check, Input, Program
from fxcurv.quantity import GRADIENT, TOKEN, Group, Term
from fxcurv.rules.base import Call, rule_of
from fxcurv.rules.loss import Draw, separate
from fxcurv.uses import Subgraph, call_of, origin_of

if TYPE_CHECKING:
    from fxcurv.passes.propagate import Walk


def at(walk: Walk, node: fx.Node) -> None:
    """Add to the cotangents what is born when the walk reaches `node`."""
    program = walk.program
    groups = [g for g in walk.groups if g != GRADIENT]
    terms: list[Term] = program.state.get("terms", [])
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
    from fxcurv.passes.propagate import merged

    program, node = walk.program, term.node
    stack = merged(walk, node, walk.cotangents[node])
    walk.cotangents[node] = [stack]
    program.state.setdefault("arrivals", {})[node] = stack.node
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
    from fxcurv.passes.propagate import Stack

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


def check_positive(program: Program, node: fx.Node, c: fx.Node) -> None:
    """Have it checked that the cotangent `c` of the loss op at `node` is not negative."""
    asked = ", ".join(type(e).__name__ for e in program.extensions if e.needs_convex)
    if not asked:
        return

    def error():
        return LossError(
            f"the loss decreases with its {node.target}, so it is not convex in the model's output and {asked} (a square root "
            "of the loss Hessian) does not exist. Way out: a positive factor, or Hessian quantities."
        )

    program.checks.append(Check(emit(program, _nonnegative, c, origin={"stage": "check"}), error))


def _nonnegative(c: Tensor) -> Tensor:
    return ~(c < 0).any()  # NaN passes: it is not hidden, it shows in the results


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
    from fxcurv.passes.propagate import merged

    stack = merged(walk, head, walk.cotangents[head])
    walk.cotangents[head] = [stack]
    start = sum(stack.columns[: stack.groups.index(GRADIENT)])
    origin, classes = origin_of(head, "columns"), walk.program.state["positions"][1]
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
        elif program.state.get("create_graph"):
            raise ExtensionError(
                "create_graph=True with a root of a loss that has no closed form: the derivative of an eigendecomposition is "
                "not defined at repeated eigenvalues. Way out: a diagonal (DiagGGNExact), or cross-entropy, squares or BCE."
            )
        elif group.kind == "root":
            joint = emit(program, _root, h, origin=origin)
        else:
            joint = emit(program, _signs, h, seed_node(program), group.term, group.draws, origin=origin)
        columns = emit(program, _split, joint, places, [*heads], origin=origin)
        _born(walk, group, heads, list(columns), weights, origin)


def hessian_of_loss(program: Program) -> fx.Node:
    """The Hessian of the whole loss in f per sample, [N, D, D] (the loss being a sum over samples)."""
    heads = program.heads
    places = tuple(h.meta["place"] for h in heads)
    between = past(program) & descendants(heads)
    inner = [n for n in ancestors([program.loss]) if n in between]
    outside = list(dict.fromkeys(i for n in inner for i in n.all_input_nodes if i not in inner and i not in heads))
    loss = Subgraph(tuple(inner), tuple(heads), tuple(outside), program.loss)
    origin = {"stage": "columns", "op": "Hessian of the loss", "module": ""}
    try:
        return emit(program, _hessian, loss, places, [*heads], [*outside], origin=origin)
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedOpError(
            f"the loss has no second derivative: {error}. Way out: write it in differentiable ops"
        ) from error


def _hessian(loss: Subgraph, places, heads: list[Tensor], outside: list[Tensor]) -> Tensor:
    """H[n], [N, D, D]: the derivative of dL/df in direction e_i, for all samples at once, for every i."""
    slices = [samples_first(h, p) for h, p in zip(heads, places, strict=True)]
    widths = [s[0].numel() for s in slices]
    joint = torch.cat([s.reshape(s.shape[0], -1) for s in slices], 1)

    def value(flat):
        parts = torch.split(flat, widths, 1)
        args = [samples_back(p.reshape(s.shape), place) for p, s, place in zip(parts, slices, places, strict=True)]
        return loss(args, outside)

    _, pull = torch.func.vjp(torch.func.grad(value), joint)
    n, d = joint.shape
    eye = torch.eye(d, dtype=joint.dtype, device=joint.device).unsqueeze(1).expand(d, n, d)
    columns = torch.vmap(pull)(eye)[0]
    h = widened(columns.movedim(0, 1))  # there is no eigendecomposition in half precision
    return (h + h.mT) / 2


def signed_pairs(h: Tensor) -> tuple[Tensor, Tensor]:
    """Columns u [2D, N, D] and weights w [2D, 1] with sum w u u^T = H: the pairs e_i +- H_i, scaled to equal length.

    Exact and differentiable: needs no eigendecomposition. h: [N, D, D], symmetric.
    """
    d = h.shape[1]
    rows = h.movedim(1, 0)
    size = rows.norm(dim=2, keepdim=True)
    alpha = torch.where(size > 0, size, 1).sqrt()
    eye = torch.eye(d, dtype=h.dtype, device=h.device).unsqueeze(1) * alpha
    columns = torch.cat([eye + rows / alpha, eye - rows / alpha])
    weights = torch.cat([h.new_full((d,), 0.25), h.new_full((d,), -0.25)])
    return columns, weights.unsqueeze(1)


def _root(h: Tensor) -> Tensor:
    """The symmetric root, [D, N, D]."""
    values, vectors = torch.linalg.eigh(h)
    return ((vectors * values.clamp(min=0).sqrt().unsqueeze(1)) @ vectors.mT).movedim(1, 0)


def _signs(h: Tensor, seed: Tensor, stream: int, draws: int) -> Tensor:
    """The root times random signs: sampled columns for any loss, [M, N, D]."""
    root = _root(h).movedim(0, 1)
    u = uniform(seed, stream, draws, h[:, 0], Shard(0))
    signs = torch.where(u < 0.5, -1.0, 1.0).to(h.dtype)
    return torch.einsum("mnd,nde->mne", signs, root) * draws**-0.5


def _split(columns: Tensor, places, heads: list[Tensor]) -> list[Tensor]:
    slices = [samples_first(h, p) for h, p in zip(heads, places, strict=True)]
    parts = torch.split(columns, [s[0].numel() for s in slices], 2)
    v = columns.shape[0]
    parts = [p.reshape(v, *s.shape).to(s.dtype) for p, s in zip(parts, slices, strict=True)]
    return [samples_back(p, place, 1) for p, place in zip(parts, places, strict=True)]


def check_convex(program: Program, h: fx.Node) -> None:
    """Have it checked that the Hessians `h` [N, D, D] are positive semi-definite."""
    asked = ", ".join(type(e).__name__ for e in program.extensions if e.needs_convex)
    if not asked:
        return

    def error():
        return LossError(
            f"the loss is not convex in the model's output: its Hessian has a negative eigenvalue, so {asked} does not exist. "
            "Way out: a convex loss, or Hessian quantities."
        )

    eps = max(torch.finfo(head.meta["val"].dtype).eps for head in program.heads)
    program.checks.append(Check(emit(program, _convex, h, eps, origin={"stage": "check"}), error))


def _convex(h: Tensor, eps: float) -> Tensor:
    values = torch.linalg.eigvalsh(h.nan_to_num())
    scale = values.abs().amax() if values.numel() else values.sum()
    tolerance = h.shape[1] * 8 * eps
    return (values >= -tolerance * scale).all()
