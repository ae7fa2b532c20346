"""The loss as the source of curvature: its terms, their Hessians and roots, and checks of convexity."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from fxcurv.errors import LossError, UnsupportedOpError
from fxcurv.ir.emit import emit
from fxcurv.ir.graph import Subgraph, ancestors, canonical_args, descendants
from fxcurv.ir.origin import at_loss, locate
from fxcurv.ir.placement import Shard, Whole, samples_back, samples_first
from fxcurv.ir.precision import widened
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Check, Program
from fxcurv.quantity import Term
from fxcurv.rules.base import Rule, rule_of


def check_positive(program: Program, node: fx.Node, c: fx.Node) -> None:
    """Add a check that the cotangent `c` of the loss op at `node` is not negative."""
    asked = ", ".join(type(e).__name__ for e in program.extensions if e.needs_convex)
    if not asked:
        return

    def error():
        return LossError(
            f"{locate(node)}\nenters the loss with a negative sign, so the loss is not convex in the model's output and {asked} "
            "(a square root of the loss Hessian) does not exist. Way out: a positive factor, or Hessian quantities."
        )

    program.checks.append(Check(emit(program, _nonnegative, c, origin={"stage": "check"}), error))


def _nonnegative(c: Tensor) -> Tensor:
    return ~(c < 0).any()  # NaN passes, since it shows in the results


def hessian_of_loss(program: Program) -> fx.Node:
    """The Hessian in f per sample, [N, D, D], of the whole loss, which is a sum over samples."""
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
            f"{at_loss(program.loss)}the loss has no second derivative: {str(error)[:300]}\n"
            "Way out: write it in differentiable ops."
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


def pairs_of(h: Tensor) -> Tensor:
    """Columns [2D, N, D] that are pairs with sum_i u_i v_i^T = H: e_i and H_i, scaled to equal length.

    Exact and differentiable: needs no eigendecomposition. h: [N, D, D], symmetric.
    """
    rows = h.movedim(1, 0)
    size = rows.norm(dim=2, keepdim=True)
    alpha = torch.where(size > 0, size, 1).sqrt()
    eye = torch.eye(h.shape[1], dtype=h.dtype, device=h.device).unsqueeze(1)
    return torch.cat([eye * alpha, rows / alpha])


def root_of(h: Tensor) -> Tensor:
    """The symmetric root, [D, N, D]."""
    values, vectors = torch.linalg.eigh(h)
    return ((vectors * values.clamp(min=0).sqrt().unsqueeze(1)) @ vectors.mT).movedim(1, 0)


def check_convex(program: Program, h: fx.Node) -> None:
    """Add a check that the Hessians `h` [N, D, D] are positive semi-definite."""
    asked = ", ".join(type(e).__name__ for e in program.extensions if e.needs_convex)
    if not asked:
        return

    def error():
        return LossError(
            f"{at_loss(program.loss)}"
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


class _General(Exception):
    """The loss is no linear map of known terms."""


def past(program: Program) -> set[fx.Node]:
    """The nodes that compute the loss from f (and from constants, and parameters that the loss reads)."""
    found, stack = set(), [program.loss]
    while stack:
        node = stack.pop()
        if node not in found and node not in program.heads:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def find_terms(program: Program) -> list[Term]:
    """The loss terms, or one general term."""
    dependent = descendants(program.heads)
    if program.loss not in dependent:
        raise LossError(
            f"{at_loss(program.loss)}the loss does not read the model's output, so it has no Gauss-Newton.\nWay out: compute it "
            "from what the model returns, or ask for the gradient or the Hessian's products."
        )
    _check_reads_outputs_only(program, dependent)
    terms: dict[fx.Node, Term] = {}
    try:
        _visit(program, program.loss, dependent, terms)
    except _General:
        return [Term()]
    return list(terms.values())


def _check_reads_outputs_only(program: Program, dependent: set[fx.Node]) -> None:
    """Refuse a loss that reads an activation beside the model's output: f would leave it out."""
    for node in dependent & past(program):
        for source in node.all_input_nodes:
            if source.meta.get("active") and source not in dependent and isinstance(source.meta["place"], Shard):
                inside = [a for a in ancestors([source]) if a in program.params.values()]
                if inside and any(isinstance(i.meta.get("place"), Shard) for i in source.all_input_nodes):
                    raise LossError(
                        f"{locate(source)}\nis an activation that the loss reads without it being an output of the model, so "
                        "the Gauss-Newton is not defined.\nWay out: return it from the model as an output."
                    )


def _positions(node: fx.Node, dependent: set[fx.Node]) -> list[int]:
    return [i for i, leaf in enumerate(pytree.tree_leaves(canonical_args(node))) if leaf in dependent]


def _visit(program: Program, node: fx.Node, dependent: set[fx.Node], terms: dict[fx.Node, Term]) -> None:
    if node in program.heads or node not in dependent or node in terms:
        return
    if node.target is operator.getitem:
        return _visit(program, node.args[0], dependent, terms)
    rule, positions = rule_of(node.target, program.rules), _positions(node, dependent)
    if rule.is_loss:
        prediction = node.args[0]
        signed = node.meta["val"].ndim > 0 and not any(e.needs_convex for e in program.extensions)
        general = signed or positions != [0] or _is_one_position(prediction, rule)
        general = general or _is_wider_than_f(program, prediction)
        if general or not _has_closed_form(node) or not _is_linear_map(program, prediction, dependent):
            raise _General
        terms[node] = Term(node, prediction)
    elif rule.linear(positions):
        for source in node.all_input_nodes:
            _visit(program, source, dependent, terms)
    else:
        raise _General


def _is_wider_than_f(program: Program, prediction: fx.Node) -> bool:
    """Whether a result shows columns, and a prediction has more numbers than f (all pairs of samples, say)."""
    shown, batch = any(e.shows_columns for e in program.extensions), program.batch
    return shown and batch.per_sample(prediction.meta["val"]) > sum(
        batch.per_sample(h.meta["val"]) for h in program.heads
    )


def _is_one_position(prediction: fx.Node, rule: Rule) -> bool:
    """Whether the prediction is a single number, or the batch as one sample along the axis of classes."""
    ndim, place = prediction.meta["val"].ndim, prediction.meta["place"]
    return not ndim or isinstance(place, Whole) and place.dim == rule.class_axis(ndim)


def _has_closed_form(node: fx.Node) -> bool:
    """Whether the closed form holds: for constant targets that are class indices or have the prediction's shape."""
    prediction, target = (a.meta["val"] for a in node.args[:2])
    matches = not target.is_floating_point() or [str(s) for s in target.shape] == [str(s) for s in prediction.shape]
    others = [a for a in node.all_input_nodes if a is not node.args[0]]
    return matches and not any(o.meta.get("active") for o in others) and isinstance(prediction, Tensor)


def _is_linear_map(program: Program, node: fx.Node, dependent: set[fx.Node]) -> bool:
    """Whether `node` is a linear map of f."""
    if node in program.heads or node not in dependent:
        return True
    if node.target is operator.getitem:
        return _is_linear_map(program, node.args[0], dependent)
    rule = rule_of(node.target, program.rules)
    if not rule.linear(_positions(node, dependent)):
        return False
    return all(_is_linear_map(program, source, dependent) for source in node.all_input_nodes)
