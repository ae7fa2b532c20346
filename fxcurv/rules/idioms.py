"""Idioms: ops that are said in others because of what they read, not for what they are (`rewrite` has equations for those).

An idiom is a function (program, node) -> what stands for the node, or None where it is not meant. It is registered by op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.ir.emit import emit
from fxcurv.ir.graph import canonical_args
from fxcurv.ir.origin import origin_of
from fxcurv.ir.program import Program
from fxcurv.rules.base import rule_of
from fxcurv.rules.traits import sliced

aten = torch.ops.aten

IDIOMS: dict[Callable, Callable[[Program, fx.Node], Any]] = {}


def idiom(op: Callable):
    """Decorator: the function serves the op."""

    def add(fn):
        IDIOMS[op] = fn
        return fn

    return add


# log_softmax into NLL is cross-entropy, sigmoid into BCE is BCE with logits: f is the logits ------------------------


@idiom(aten.nll_loss_nd.default)
def _cross_entropy(program: Program, node: fx.Node) -> fx.Node | None:
    source, target, weight, mode, ignore = canonical_args(node)
    if not _log_softmax_over_classes(source):
        return None
    args = (_logits(program, node, source), target, weight, mode, ignore, 0.0)
    return _one_op(program, node, aten.cross_entropy_loss.default, args)


@idiom(aten.binary_cross_entropy.default)
def _bce_with_logits(program: Program, node: fx.Node) -> fx.Node | None:
    source, target, weight, mode = canonical_args(node)
    if source.target is not aten.sigmoid.default:
        return None
    args = (_logits(program, node, source), target, weight, None, mode)
    return _one_op(program, node, aten.binary_cross_entropy_with_logits.default, args)


def _log_softmax_over_classes(source: fx.Node) -> bool:
    if source.target not in (aten.log_softmax.int, aten._log_softmax.default):
        return False
    ndim = source.meta["val"].ndim
    return source.args[1] % ndim == (1 if ndim > 1 else 0)  # type: ignore[operator]


def _logits(program: Program, node: fx.Node, source: fx.Node) -> Any:
    """What `source` reads; it is f where `source` was, and only this loss read it."""
    z, alone = source.args[0], all(user.op == "output" or user is node for user in source.users)
    program.heads = [z if head is source and alone else head for head in program.heads]  # type: ignore[misc]
    return z


def _one_op(program: Program, node: fx.Node, op, args) -> fx.Node:
    """A single composite op, kept whole (`emit` would trace through it)."""
    with program.graph.inserting_before(node):
        new = program.graph.call_function(op, args)
    new.meta = {**node.meta, "origin": origin_of(node, "forward")}
    return new


# x[arange(N), i]: as a lookup anywhere, whether it stays with its own sample would be a matter of values --------------


@idiom(aten.index.Tensor)
def _own_slices(program: Program, node: fx.Node) -> fx.Node | None:
    x, indices = node.args
    if not _counts_samples(program, x, indices):  # type: ignore[arg-type]
        return None
    return emit(program, _in_own_slice, x, indices, origin=origin_of(node, "forward"), before=node)


def _counts_samples(program: Program, x: fx.Node, indices: list[fx.Node | None]) -> bool:
    """Whether all indices are numbers, and the first is arange(len(x)) along the first axis of their common shape."""
    vals = [i.meta["val"] for i in indices if i is not None]
    if len(vals) < len(indices) or any(v.dtype in (torch.bool, torch.uint8) for v in vals):
        return False
    size, shape = program.batch.shape(x.meta["val"])[0], program.batch.shape(vals[0])
    if not shape or shape != (size, *[1] * (len(shape) - 1)) or any(v.ndim > len(shape) for v in vals):
        return False
    source: Any = indices[0]
    while source.op == "call_function" and (rule_of(source.target, {}).in_order or _is_all(source)):
        source = source.args[0]
    if source.target is aten.arange.start_step:
        return source.args[0] == 0 and source.args[2:] in ((), (1,))
    return source.target is aten.arange.default or (source.target is aten.arange.start and source.args[0] == 0)


def _is_all(node: fx.Node) -> bool:
    cut = sliced(node)
    return cut is not None and cut.everything


def _in_own_slice(x: Tensor, indices: list[Tensor]) -> Tensor:
    """y[n, *k, ...] = x[n, i[n, *k], j[n, *k], ...] for x [N, I, J, ...]."""
    first, *others = torch.broadcast_tensors(*indices)
    if not others:
        return x.reshape(*first.shape, *x.shape[1:])
    place = torch.zeros_like(first)
    for size, index in zip(x.shape[1:], others, strict=False):
        place = place * size + torch.where(index < 0, index + size, index)
    rest = x.shape[len(indices) :]
    place = place.long().reshape(x.shape[0], -1, *[1] * len(rest))
    slices = x.reshape(x.shape[0], -1, *rest)
    return slices.gather(1, place.expand(-1, -1, *rest)).reshape(*first.shape, *rest)


# x[mask] = one value: `where`, which needs no number of entries that are written --------------------------------------


@idiom(aten.index_put.default)
def _masked_write(program: Program, node: fx.Node) -> fx.Node | None:
    x, indices, values, accumulate = canonical_args(node)
    masks = [i for i in indices if i is not None]
    if len(masks) != 1 or masks[0].meta["val"].dtype not in (torch.bool, torch.uint8):
        return None
    lead = indices.index(masks[0])
    mask, shape = masks[0].meta["val"], values.meta["val"].shape
    rest = x.meta["val"].ndim - lead - mask.ndim
    along = len(shape) - rest - 1  # the axis of `values` that counts the entries
    if along >= 0 and shape[along] != 1:
        return None
    args = (x, masks[0], values, lead, rest, along, accumulate)
    return emit(program, _where_masked, *args, origin=origin_of(node, "forward"), before=node)


def _where_masked(x: Tensor, mask: Tensor, value: Tensor, lead: int, rest: int, along: int, accumulate: bool) -> Tensor:
    """x[:, .., mask] = value (or += value), with `lead` axes before the mask's and `rest` behind."""
    mask = mask.to(torch.bool).reshape(*mask.shape, *[1] * rest)
    if along >= 0:  # its one entry serves all
        ones = [1] * (mask.ndim - rest - 1)
        value = value.reshape(*value.shape[:along], *ones, *value.shape[along:])
    value = value.to(x.dtype)
    return torch.where(mask, x + value if accumulate else value, x)


# embedding_bag of indices [N, K]: its offsets are arange(0, N * K, K), so a bag is a slice -----------------------------


@idiom(aten.embedding_bag.padding_idx)
def _even_bags(program: Program, node: fx.Node) -> tuple[fx.Node, ...] | None:
    weight, indices, offsets, by_frequency, mode, _, scale, with_last, padding = canonical_args(node)
    sizes = [program.batch.shape(i.meta["val"]) for i in (indices, offsets)]
    step = offsets.args[2] if offsets.target is aten.arange.start_step and len(offsets.args) > 2 else 0
    even = isinstance(step, int) and step > 0 and offsets.args[0] == 0 and sizes[0] == (sizes[1][0] * step,)
    read = {user.args[1] for user in node.users if user.users}
    if not even or not read <= {0} or by_frequency or with_last or padding not in (None, -1):
        return None
    return (emit(program, _bags, weight, indices, scale, step, mode, origin=origin_of(node, "forward"), before=node),) * 4


def _bags(weight: Tensor, indices: Tensor, scale: Tensor | None, size: int, mode: int) -> Tensor:
    """y [N, D]: the sum (mode 0), mean (1) or maximum (2) of W[i] over the K indices of a sample."""
    y = aten.embedding.default(weight, indices.reshape(-1, size))
    if scale is not None:
        y = y * scale.reshape(-1, size, 1)
    return y.max(1).values if mode == 2 else y.mean(1) if mode == 1 else y.sum(1)
