"""normalize: one spelling per op.

Canonical positional arguments, composite ops said in ops that have rules, markers and asserts removed, f moved to
the logits where a log-softmax or a sigmoid stands in front of the loss, and a lookup at [arange(N), i] said as what it
is, a lookup in every sample's own slice.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import UnsupportedOpError
from fxcurv.ir.emit import emit
from fxcurv.ir.graph import canonical_args, invoke
from fxcurv.ir.origin import locate, origin_of
from fxcurv.ir.private import OpOverload, decomposes, free_unbacked_symbols
from fxcurv.ir.program import Program
from fxcurv.ir.specialise import propagate_values
from fxcurv.rules import REWRITES, RULES
from fxcurv.rules.traits import IN_ORDER

aten = torch.ops.aten

_ASSERTS = ("_assert", "sym_constrain", "_guards")


def normalize(program: Program) -> Program:
    """See the module."""
    _drop_markers(program)
    _refuse_counts_of_values(program)
    _logits(program)
    _own_slices(program)
    _even_bags(program)
    _masked_writes(program)
    for _ in range(10):  # a rewrite may give ops that have a rewrite themselves
        if not _rewrite_once(program):
            break
    _views_to_reshapes(program)
    # strides may have changed, and composite ops that export keeps may carry a wrong value (a loss without reduction)
    propagate_values(program)
    program.refresh_output()
    program.graph.eliminate_dead_code()
    _select_heads(program)
    return program


def _drop_markers(program: Program) -> None:
    for node in list(program.graph.nodes):
        name = str(getattr(node.target, "__name__", node.target))
        if node.op == "call_function" and node.target is torch.ops.fxcurv.head.default:
            program.replace(node, node.args[0])
            program.graph.erase_node(node)
        elif node.op == "call_function" and not node.users and any(name.startswith(a) for a in _ASSERTS):
            program.graph.erase_node(node)


_ITEMS = {aten.item.default, aten._local_scalar_dense.default}

_NUMBER = (
    "makes a number of Python's of a value, which is not known while tracing. Way out: leave it a tensor, as in "
    "x.abs().max().detach() for x.abs().max().item()."
)

_SIZE = (
    "makes a tensor whose size depends on values. Way out: keep all entries, as in torch.where(mask, f(x), x) for "
    "x[mask] = f(x[mask]), or (x * mask).sum() for x[mask].sum()."
)


def _refuse_counts_of_values(program: Program) -> None:
    """A size that counts values is no size of a sample's slice."""
    program.graph.eliminate_dead_code()
    for node in program.graph.nodes:
        if node.op == "call_function" and free_unbacked_symbols(node.meta.get("val")):
            raise UnsupportedOpError(f"{locate(node)}\n{_NUMBER if node.target in _ITEMS else _SIZE}")


def _views_to_reshapes(program: Program) -> None:
    """A captured view relies on strides that a rewrite may have changed."""
    for node in program.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def _rewrite_once(program: Program) -> bool:
    changed = False
    for node in list(program.graph.nodes):
        fn = _equation(node, program)
        if fn is None:
            continue
        args = canonical_args(node)
        fn = functools.partial(invoke, node.target, fn=fn)
        new = emit(program, fn, args, origin=origin_of(node, "forward"), before=node)
        _substitute(program, node, new)
        changed = True
    return changed


def _equation(node: fx.Node, program: Program):
    """The function that says `node`'s op in other ops, or None."""
    if node.op != "call_function" or node.target in program.rules or node.target in RULES:
        return None
    if node.target in REWRITES:
        return REWRITES[node.target]
    if isinstance(node.target, OpOverload) and decomposes(node.target) and _is_float(node):
        return node.target  # a trace decomposes it
    return None


def _is_float(node: fx.Node) -> bool:
    val = node.meta.get("val")
    vals = val if isinstance(val, tuple | list) else [val]
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in vals)


def _substitute(program: Program, node: fx.Node, new: Any) -> None:
    if isinstance(new, tuple | list):
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise AssertionError(f"{locate(user)} reads a tuple as a whole")
            program.replace(user, new[user.args[1]])
            program.graph.erase_node(user)
    else:
        program.replace(node, new)
    program.graph.erase_node(node)


def _logits(program: Program) -> None:
    """log_softmax into NLL is cross-entropy, sigmoid into BCE is BCE with logits: f is the logits."""
    for node in list(program.graph.nodes):
        source = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_function":
            continue
        if node.target is aten.nll_loss_nd.default and _log_softmax_over_classes(source):
            new = _cross_entropy(program, node, source.args[0])
        elif node.target is aten.binary_cross_entropy.default and source.target is aten.sigmoid.default:
            new = _bce_with_logits(program, node, source.args[0])
        else:
            continue
        program.replace(node, new)
        program.graph.erase_node(node)
        program.heads = [source.args[0] if h is source and _only_loss_reads(source) else h for h in program.heads]


def _only_loss_reads(node: fx.Node) -> bool:
    return all(u.op == "output" for u in node.users)


def _log_softmax_over_classes(source: fx.Node) -> bool:
    if source.target not in (aten.log_softmax.int, aten._log_softmax.default):
        return False
    ndim = source.meta["val"].ndim
    return source.args[1] % ndim == (1 if ndim > 1 else 0)


def _cross_entropy(program, node, z):
    _, target, weight, mode, ignore = canonical_args(node)
    args = (z, target, weight, mode, ignore, 0.0)
    return _one_op(program, node, aten.cross_entropy_loss.default, args)


def _bce_with_logits(program, node, z):
    _, target, weight, mode = canonical_args(node)
    return _one_op(program, node, aten.binary_cross_entropy_with_logits.default, (z, target, weight, None, mode))


def _one_op(program: Program, node: fx.Node, op, args) -> fx.Node:
    """A single composite op, kept whole (`emit` would trace through it)."""
    with program.graph.inserting_before(node):
        new = program.graph.call_function(op, args)
    new.meta = {**node.meta, "origin": origin_of(node, "forward")}
    return new


def _own_slices(program: Program) -> None:
    """x[arange(N), i]: as a lookup anywhere, whether it stays with its own sample would be a matter of values."""
    for node in list(program.graph.nodes):
        if node.target is aten.index.Tensor and _counts_samples(program, *node.args):
            new = emit(program, _in_own_slice, *node.args, origin=origin_of(node, "forward"), before=node)
            _substitute(program, node, new)


MOST = 2**63 - 1  # the end of a slice without one


def _counts_samples(program: Program, x: fx.Node, indices: list[fx.Node | None]) -> bool:
    """Whether all indices are numbers, and the first is arange(len(x)) along the first axis of their common shape."""
    vals = [i.meta["val"] for i in indices if i is not None]
    if len(vals) < len(indices) or any(v.dtype in (torch.bool, torch.uint8) for v in vals):
        return False
    size, shape = program.batch.shape(x.meta["val"])[0], program.batch.shape(vals[0])
    if not shape or shape != (size, *[1] * (len(shape) - 1)) or any(v.ndim > len(shape) for v in vals):
        return False
    source: Any = indices[0]
    while source.target in IN_ORDER or _is_all(source):
        source = source.args[0]
    if source.target is aten.arange.start_step:
        return source.args[0] == 0 and source.args[2:] in ((), (1,))
    return source.target is aten.arange.default or (source.target is aten.arange.start and source.args[0] == 0)


def _is_all(node: fx.Node) -> bool:
    """Whether a slice takes everything, as in x[:, None]."""
    return node.target is aten.slice.Tensor and node.args[2:] in ((), (0, MOST), (0, MOST, 1), (None, None))


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


def _masked_writes(program: Program) -> None:
    """x[mask] = one value: `where`, which needs no number of entries that are written."""
    for node in list(program.graph.nodes):
        if node.target is not aten.index_put.default:
            continue
        x, indices, values, accumulate = canonical_args(node)
        masks = [i for i in indices if i is not None]
        if len(masks) != 1 or masks[0].meta["val"].dtype not in (torch.bool, torch.uint8):
            continue
        lead = indices.index(masks[0])
        mask, shape = masks[0].meta["val"], values.meta["val"].shape
        rest = x.meta["val"].ndim - lead - mask.ndim
        along = len(shape) - rest - 1  # the axis of `values` that counts the entries
        if along < 0 or shape[along] == 1:
            args = (x, masks[0], values, lead, rest, along, accumulate)
            _substitute(program, node, emit(program, _where_masked, *args, origin=origin_of(node, "forward"), before=node))


def _where_masked(x: Tensor, mask: Tensor, value: Tensor, lead: int, rest: int, along: int, accumulate: bool) -> Tensor:
    """x[:, .., mask] = value (or += value), with `lead` axes before the mask's and `rest` behind."""
    mask = mask.to(torch.bool).reshape(*mask.shape, *[1] * rest)
    if along >= 0:  # its one entry serves all
        ones = [1] * (mask.ndim - rest - 1)
        value = value.reshape(*value.shape[:along], *ones, *value.shape[along:])
    value = value.to(x.dtype)
    return torch.where(mask, x + value if accumulate else value, x)


def _even_bags(program: Program) -> None:
    """embedding_bag of indices [N, K]: its offsets are arange(0, N * K, K), so a bag is a slice."""
    for node in list(program.graph.nodes):
        if node.target is not aten.embedding_bag.padding_idx:
            continue
        weight, indices, offsets, by_frequency, mode, _, scale, with_last, padding = canonical_args(node)
        sizes = [program.batch.shape(i.meta["val"]) for i in (indices, offsets)]
        step = offsets.args[2] if offsets.target is aten.arange.start_step and len(offsets.args) > 2 else 0
        even = isinstance(step, int) and step > 0 and offsets.args[0] == 0 and sizes[0] == (sizes[1][0] * step,)
        read = {user.args[1] for user in node.users if user.users}
        if even and read <= {0} and not by_frequency and not with_last and padding in (None, -1):
            args = (weight, indices, scale, step, mode)
            new = emit(program, _bags, *args, origin=origin_of(node, "forward"), before=node)
            _substitute(program, node, (new,) * 4)


def _bags(weight: Tensor, indices: Tensor, scale: Tensor | None, size: int, mode: int) -> Tensor:
    """y [N, D]: the sum (mode 0), mean (1) or maximum (2) of W[i] over the K indices of a sample."""
    y = aten.embedding.default(weight, indices.reshape(-1, size))
    if scale is not None:
        y = y * scale.reshape(-1, size, 1)
    return y.max(1).values if mode == 2 else y.mean(1) if mode == 1 else y.sum(1)


def _select_heads(program: Program) -> None:
    """f: the marked leaves that the loss reads directly."""
    heads = list(dict.fromkeys(program.heads))
    if program.loss is None:
        program.heads = heads
        return
    reached, stack = set(), [program.loss]
    while stack:
        node = stack.pop()
        if node in reached:
            continue
        reached.add(node)
        if node not in heads:
            stack.extend(node.all_input_nodes)
    program.heads = [h for h in heads if h in reached]
