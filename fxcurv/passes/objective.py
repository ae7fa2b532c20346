"""objective: what kind of function of f the loss is, and where its curvature is born.

A loss that is a linear map of terms in closed form (cross-entropy, squares, BCE) after a linear map of f has a root at
each term. Any other loss is one general term: its Hessian per sample.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx

from fxcurv._torch import pytree
from fxcurv.errors import LossError, MixedSamplesError, locate
from fxcurv.passes.ends import check_ends
from fxcurv.placement import MIXED, PARTIAL, Shard, Whole
from fxcurv.program import Program, is_tensor
from fxcurv.quantity import HessianFactors, SqrtGGN, Term
from fxcurv.rules import LossRule
from fxcurv.rules.base import canonical_args, rule_of


class _General(Exception):
    """The loss is no linear map of known terms."""


def objective(program: Program) -> Program:
    """Check the loss and find its terms (`state["terms"]`)."""
    extensions = program.extensions
    if program.loss is not None:
        _check_loss(program)
    of_output = [e for e in extensions if isinstance(e.requires, SqrtGGN) and not isinstance(e.requires, HessianFactors)]
    if of_output:
        check_ends(program, ", ".join(type(e).__name__ for e in of_output))
    if any(e.per_sample for e in extensions) and not program.batch.whole:
        _check_independence(program)
    if any(isinstance(e.requires, SqrtGGN) for e in extensions):
        if program.loss is None:
            names = ", ".join(type(e).__name__ for e in extensions if isinstance(e.requires, SqrtGGN))
            raise LossError(f"{names} needs a loss: pass one to fxcurv.compile(model, loss, ...)")
        program.state["terms"] = find_terms(program)
        _check_sampled(program)
        _check_empirical(program)
    return program


def _check_loss(program: Program) -> None:
    if not program.loss.meta.get("active"):
        raise LossError(
            "the loss does not depend on any trainable parameter: check requires_grad, .detach() and no_grad in the model, and "
            "that the loss is computed from the model's output by differentiable ops"
        )


def _check_independence(program: Program) -> None:
    asked = [e for e in program.extensions if e.per_sample]
    reason = mixing(program)
    if reason is None:
        return
    names = ", ".join(type(e).__name__ for e in [e for e in asked if not e.whole_batch] or asked)
    raise MixedSamplesError(reason.format(asked=names))


def mixing(program: Program) -> str | None:
    """Where samples interact, as the message for quantities per sample, `{asked}`; None where they do not."""
    targets = [program.loss] if program.loss is not None else program.heads
    for node in ancestors(targets):
        place = node.meta.get("place")
        if node.meta.get("active") and any(p == MIXED for p in (place if isinstance(place, list) else [place])):
            if of_reduced_loss(program, node):
                return (
                    f"{_literal(locate(node))}\nis a non-linear function of the reduced loss, for which {{asked}} is not "
                    "defined.\nWay out: a loss that is a sum or mean over samples, or ask for the gradient or products."
                )
            return (
                f"{_literal(locate(node))}\nmixes samples, so {{asked}} (per sample) does not exist for the parameters before "
                "it.\nWay out: model.eval() or GroupNorm in place of batch norm in training mode; batch_dim= if the batch "
                "is not dimension 0; a loss that is a sum or mean over samples; or ask for what the whole batch has: the "
                "gradient, DiagGGNExact, DiagHessian, products."
            )
    for head in program.heads:
        if head.meta.get("active") and not isinstance(head.meta["place"], Shard):
            return (
                f"{_literal(locate(head))}\nis a model output without a sample axis, so {{asked}} (per sample) does not exist. "
                "Return one slice per sample, and reduce in the loss."
            )
    if program.loss is not None and program.loss.meta["place"] != PARTIAL:
        return f"{_literal(locate(program.loss))}\nis no sum over samples, so {{asked}} does not exist for it."
    return None


def of_reduced_loss(program: Program, node: fx.Node) -> bool:
    """Whether `node` reads nothing of the model but one number that the loss has summed over samples, as in `loss**2`."""
    sources = [i for i in node.all_input_nodes if i.meta.get("active")]
    summed = all(i.meta["place"] == PARTIAL and is_tensor(i) and not i.meta["val"].ndim for i in sources)
    return summed and node not in ancestors(program.heads) and all(isinstance(h.meta["place"], Shard) for h in program.heads)


def _literal(text: str) -> str:
    """The user's own line may have braces."""
    return text.replace("{", "{{").replace("}", "}}")


def _check_sampled(program: Program) -> None:
    """Columns are sampled from the likelihood that a loss in closed form has; a loss that couples samples has none."""
    sampled = ", ".join(type(e).__name__ for e in program.extensions if getattr(e.requires, "mc", None))
    if program.batch.whole and sampled and any(term.node is None for term in program.state["terms"]):
        raise MixedSamplesError(program.state["mixing"].format(asked=sampled))


def _check_empirical(program: Program) -> None:
    """The empirical column is of a likelihood, which a loss that is linear in f does not have."""
    asked = ", ".join(type(e).__name__ for e in program.extensions if getattr(e.requires, "empirical", False))
    if asked and not program.state["terms"]:
        raise LossError(
            f'{asked}(fisher="empirical") needs a loss in closed form (cross-entropy, squares, binary cross-entropy with '
            'logits), and this one is linear in the model\'s output. Way out: fisher="mc", which is zero.'
        )


def ancestors(nodes: list[fx.Node]) -> list[fx.Node]:
    """`nodes` and everything they are computed from, in the graph's order."""
    found, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return [n for n in nodes[0].graph.nodes if n in found] if nodes else []


def descendants(nodes: list[fx.Node]) -> set[fx.Node]:
    """`nodes` and every differentiable value computed from them."""
    found = set(nodes)
    for node in nodes[0].graph.nodes if nodes else []:
        if node.op == "call_function" and node.meta.get("active") and any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def past(program: Program) -> set[fx.Node]:
    """What the loss is computed by from f (and from constants, and parameters of its own)."""
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
        raise LossError("the loss does not read the model's output, so it has no Gauss-Newton: check the loss function")
    _check_reads_outputs_only(program, dependent)
    terms: dict[fx.Node, Term] = {}
    try:
        _visit(program, program.loss, dependent, terms)
    except _General:
        return [Term()]
    return list(terms.values())


def _check_reads_outputs_only(program: Program, dependent: set[fx.Node]) -> None:
    """An activation that reaches the loss past the model's output would be left out of f."""
    for node in dependent & past(program):
        for source in node.all_input_nodes:
            if source.meta.get("active") and source not in dependent and isinstance(source.meta["place"], Shard):
                inside = [a for a in ancestors([source]) if a in program.params.values()]
                if inside and any(isinstance(i.meta.get("place"), Shard) for i in source.all_input_nodes):
                    raise LossError(
                        f"{locate(source)}\nis an activation that the loss reads without it being an output of the model, so "
                        "the Gauss-Newton is not defined. Return it from the model as an output."
                    )


def _positions(node: fx.Node, dependent: set[fx.Node]) -> list[int]:
    return [i for i, leaf in enumerate(pytree.tree_leaves(canonical_args(node))) if leaf in dependent]


def _visit(program: Program, node: fx.Node, dependent: set[fx.Node], terms: dict[fx.Node, Term]) -> None:
    if node in program.heads or node not in dependent or node in terms:
        return
    if node.target is operator.getitem:
        return _visit(program, node.args[0], dependent, terms)
    rule, positions = rule_of(node.target, program.rules), _positions(node, dependent)
    if isinstance(rule, LossRule):
        prediction = node.args[0]
        signed = node.meta["val"].ndim > 0 and not any(e.needs_convex for e in program.extensions)
        alone = signed or positions != [0] or _one_position(prediction, rule)
        if alone or not _closed_form(node) or not _linear(program, prediction, dependent):
            raise _General
        terms[node] = Term(node, prediction)
    elif rule.linear(positions):
        for source in node.all_input_nodes:
            _visit(program, source, dependent, terms)
    else:
        raise _General


def _one_position(prediction: fx.Node, rule: LossRule) -> bool:
    """Whether the batch as one sample is a single number, or lies along the axis of classes."""
    ndim, place = prediction.meta["val"].ndim, prediction.meta["place"]
    return not ndim or isinstance(place, Whole) and place.dim == rule.class_axis(ndim)


def _closed_form(node: fx.Node) -> bool:
    """The formulas know targets that are constants and, where entries correspond, of the prediction's shape."""
    prediction, target = (a.meta["val"] for a in node.args[:2])
    matches = not target.is_floating_point() or [str(s) for s in target.shape] == [str(s) for s in prediction.shape]
    others = [a for a in node.all_input_nodes if a is not node.args[0]]
    return matches and not any(o.meta.get("active") for o in others) and isinstance(prediction, Tensor)


def _linear(program: Program, node: fx.Node, dependent: set[fx.Node]) -> bool:
    """Whether `node` is a linear map of f."""
    if node in program.heads or node not in dependent:
        return True
    if node.target is operator.getitem:
        return _linear(program, node.args[0], dependent)
    rule = rule_of(node.target, program.rules)
    if not rule.linear(_positions(node, dependent)):
        return False
    return all(_linear(program, source, dependent) for source in node.all_input_nodes)
