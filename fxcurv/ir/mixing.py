"""Where samples interact, in words."""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxcurv.ir.graph import ancestors, is_tensor
from fxcurv.ir.origin import locate
from fxcurv.ir.placement import MIXED, PARTIAL, Shard, places_of
from fxcurv.ir.program import Program

PLACES_OF_MASK = {torch.ops.aten.nonzero_static.default}
SORT = {torch.ops.aten.sort.default, torch.ops.aten.sort.stable}
# batch norm by the batch's own statistics, in evaluation mode as well
NO_STATISTICS = torch.ops.aten._native_batch_norm_legit.no_stats


def mixing(program: Program) -> str | None:
    """Where samples interact, as the message for quantities per sample, `{asked}`; None where they do not."""
    targets = [program.loss] if program.loss is not None else program.heads
    for node in _differentiated(targets):
        if MIXED in places_of(node.meta.get("place")):
            if of_reduced_loss(program, node):
                return (
                    f"{literal(locate(node))}\nis a non-linear function of the reduced loss, for which {{asked}} is not "
                    "defined.\nWay out: a loss that is a sum or mean over samples, or ask for the gradient or products."
                )
            first = _meeting_op(node)
            how = "" if first is node else f" ({literal(_describe(first, node))} makes more of its result than a sum)"
            return (
                f"{literal(locate(first))}\nmixes samples{how}, so {{asked}} (per sample) does not exist for the parameters "
                f"before it.\nWay out: {_instead(first)}batch_dim= if the batch is not dimension 0 (extended "
                "models have it first: batch_first=True); a loss that is a sum or mean over samples; or ask for what the whole "
                "batch has: the gradient, DiagGGNExact, DiagHessian, products."
            )
    for head in program.heads:
        if head.meta.get("active") and not isinstance(head.meta["place"], Shard):
            return (
                f"{literal(locate(head))}\nis a model output without a sample axis, so {{asked}} (per sample) does not exist. "
                "Return one slice per sample, and reduce in the loss."
            )
    if program.loss is not None and program.loss.meta["place"] != PARTIAL:
        return f"{literal(locate(program.loss))}\nis no sum over samples, so {{asked}} does not exist for it."
    return None


def _instead(node: fx.Node) -> str:
    """The way out that an op has of its own."""
    if any(_is_of(PLACES_OF_MASK, i) for i in node.all_input_nodes):
        return (
            "torch.where(m.unsqueeze(-1), f(h), h) for h[m] = f(h[m]), (loss * m).sum() / m.sum() for loss[m].mean(), and "
            "ignore_index for cross_entropy(f[m], y[m]), which keep every sample in its row; "
        )
    if any(_is_of(SORT, i) for i in node.all_input_nodes):
        return "samples in the order given (pack_padded_sequence has enforce_sorted=False); "
    if "batch_norm" not in locate(node):
        return ""
    if node.target is NO_STATISTICS:
        return "GroupNorm in place of batch norm without running statistics; "
    return "model.eval() or GroupNorm in place of batch norm in training mode; "


def _is_of(ops: set, node: fx.Node) -> bool:
    """Whether a value is made of what one of these ops returns, and of nothing else."""
    while node.op == "call_function" and node.target not in ops and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node.target in ops


def _differentiated(targets: list[fx.Node]) -> list[fx.Node]:
    """The nodes that derivatives of `targets` pass: not those detached since (a maximum over the batch, say)."""
    found: set[fx.Node] = set()
    stack = [t for t in targets if t.meta.get("active")]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(i for i in node.all_input_nodes if i.meta.get("active"))
    return [n for n in targets[0].graph.nodes if n in found]


def _meeting_op(node: fx.Node) -> fx.Node:
    """Where the samples that `node` mixes meet: `node`, or an op before it that sums over samples or takes some."""
    found: list[fx.Node] = []
    seen, stack = {node}, [node]
    while stack:
        here = stack.pop()
        active = [i for i in here.all_input_nodes if i.meta.get("active")]
        summed = [i for i in active if i.meta["place"] == PARTIAL or here.target is operator.getitem]
        if not summed and here.op == "call_function":
            found.append(here)
        stack.extend(i for i in summed if i not in seen)
        seen.update(summed)
    return min(found, default=node)


def _describe(first: fx.Node, node: fx.Node) -> str:
    """`node` in words, after `first`: with its source line only if that is another."""
    name, *line = locate(node).splitlines()
    return ",".join([name, *(part for part in line if part not in locate(first))])


def of_reduced_loss(program: Program, node: fx.Node) -> bool:
    """Whether `node` reads nothing of the model but one number that the loss has summed over samples, as in `loss**2`."""
    sources = [i for i in node.all_input_nodes if i.meta.get("active")]
    summed = all(i.meta["place"] == PARTIAL and is_tensor(i) and not i.meta["val"].ndim for i in sources)
    return (
        summed
        and node not in ancestors(program.heads)
        and all(isinstance(h.meta["place"], Shard) for h in program.heads)
    )


def literal(text: str) -> str:
    """`text` with its braces escaped: a line of the user's may have some."""
    return text.replace("{", "{{").replace("}", "}}")
