"""Idioms: ops that are replaced by others because of the arguments they have (`rewrite` replaces every call of an op).

An idiom is a function (program, node) -> replacement, or None where the idiom does not apply. It is registered by op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import UnsupportedOpError
from fxcurv.ir.emit import emit
from fxcurv.ir.graph import canonical_args
from fxcurv.ir.origin import locate, origin_of
from fxcurv.ir.program import Program
from fxcurv.rules.base import REWRITES, rule_of
from fxcurv.rules.embedding import BY_FREQUENCY
from fxcurv.rules.traits import sliced

aten = torch.ops.aten

IDIOMS: dict[Callable, Callable[[Program, fx.Node], Any]] = {}


def idiom(op: Callable):
    """Decorator: register the function as the idiom of the op."""

    def add(fn):
        IDIOMS[op] = fn
        return fn

    return add


# x[arange(N), i]: in a general lookup, only the values show that every sample reads its own slice -------------------


@idiom(aten.index.Tensor)
def _own_slices(program: Program, node: fx.Node) -> fx.Node | None:
    x, indices = node.args
    if not _counts_samples(program, x, indices):  # type: ignore[arg-type]
        return None
    return emit(program, _index_own_slices, x, indices, origin=origin_of(node, "forward"), before=node)


def _counts_samples(program: Program, x: fx.Node, indices: list[fx.Node | None]) -> bool:
    """Whether all indices are integers, and the first is arange(len(x)) along the first axis of their common shape."""
    vals = [i.meta["val"] for i in indices if i is not None]
    if len(vals) < len(indices) or any(v.dtype in (torch.bool, torch.uint8) for v in vals):
        return False
    size, shape = program.batch.shape(x.meta["val"])[0], program.batch.shape(vals[0])
    if not shape or shape != (size, *[1] * (len(shape) - 1)) or any(v.ndim > len(shape) for v in vals):
        return False
    source: Any = indices[0]
    while source.op == "call_function" and (rule_of(source.target, {}).in_order or _takes_everything(source)):
        source = source.args[0]
    if source.target is aten.arange.start_step:
        return source.args[0] == 0 and source.args[2:] in ((), (1,))
    return source.target is aten.arange.default or (source.target is aten.arange.start and source.args[0] == 0)


def _takes_everything(node: fx.Node) -> bool:
    cut = sliced(node)
    return cut is not None and cut.everything


def _index_own_slices(x: Tensor, indices: list[Tensor]) -> Tensor:
    """y[n, *k, ...] = x[n, i[n, *k], j[n, *k], ...] for x [N, I, J, ...]."""
    first, *others = torch.broadcast_tensors(*indices)
    if not others:
        return x.reshape(*first.shape, *x.shape[1:])
    place = torch.zeros_like(others[0], dtype=torch.long)  # not of `first`, which counts samples
    for size, index in zip(x.shape[1:], others, strict=False):
        place = place * size + torch.where(index < 0, index + size, index)
    rest = x.shape[len(indices) :]
    place = place.long().reshape(x.shape[0], -1, *[1] * len(rest))
    slices = x.reshape(x.shape[0], -1, *rest)
    return slices.gather(1, place.expand(-1, -1, *rest)).reshape(*first.shape, *rest)


# x[mask] = one value: `where`, which does not need to know how many entries are written -----------------------------


def counts_places(shape: Sequence[Any], rest: int) -> bool:
    """Whether a value of this shape has one entry for each place where a mask is true, in front of `rest` other axes."""
    return len(shape) > rest and shape[-rest - 1] != 1


@idiom(aten.index_put.default)
def _masked_write(program: Program, node: fx.Node) -> fx.Node | None:
    x, indices, values, accumulate = canonical_args(node)
    masks = [i for i in indices if i is not None]
    if len(masks) != 1 or masks[0].meta["val"].dtype not in (torch.bool, torch.uint8):
        return None
    lead = indices.index(masks[0])
    mask, shape = masks[0].meta["val"], values.meta["val"].shape
    rest = x.meta["val"].ndim - lead - mask.ndim
    if counts_places(shape, rest):
        return None
    along = len(shape) - rest - 1  # the axis of `values` that counts the entries
    args = (x, masks[0], values, lead, rest, along, accumulate)
    return emit(program, _where_masked, *args, origin=origin_of(node, "forward"), before=node)


def _where_masked(x: Tensor, mask: Tensor, value: Tensor, lead: int, rest: int, along: int, accumulate: bool) -> Tensor:
    """x[:, .., mask] = value (or += value), with `lead` axes before the mask's axes and `rest` behind them."""
    mask = mask.to(torch.bool).reshape(*mask.shape, *[1] * rest)
    if along >= 0:  # this axis has one entry, which is broadcast
        ones = [1] * (mask.ndim - rest - 1)
        value = value.reshape(*value.shape[:along], *ones, *value.shape[along:])
    value = value.to(x.dtype)
    return torch.where(mask, x + value if accumulate else value, x)


# embedding_bag: lookups, and reductions of bags ----------------------------------------------------------------------


@idiom(aten.embedding_bag.padding_idx)
@idiom(aten.embedding_bag.default)
def _embedding_bag(program: Program, node: fx.Node) -> tuple[fx.Node, ...] | None:
    """Lookups and reductions, unless the gradient is scaled by frequency or another output than the first is read.

    For indices [N, K], the offsets are arange(0, N * K, K), so that a bag is a row.
    """
    weight, indices, offsets, by_frequency, mode, _, scale, with_last, padding = (*canonical_args(node), None)[:9]
    sizes = [program.batch.shape(i.meta["val"]) for i in (indices, offsets)]
    step = offsets.args[2] if offsets.target is aten.arange.start_step and len(offsets.args) > 2 else 0
    even = isinstance(step, int) and step > 0 and offsets.args[0] == 0 and sizes[0] == (sizes[1][0] * step,)
    even = even and not with_last
    read = {user.args[1] for user in node.users if user.users}
    if by_frequency and weight in program.params.values():
        raise UnsupportedOpError(f"{locate(node)}\n{BY_FREQUENCY}")
    if not read <= {0} or by_frequency:
        return None
    args = (weight, indices, scale, step if even else (offsets, with_last), mode, padding)
    return (emit(program, _even_bags if even else _bags, *args, origin=origin_of(node, "forward"), before=node),) * 4


_MEAN, _MAXIMUM = 1, 2


def _even_bags(
    weight: Tensor, indices: Tensor, scale: Tensor | None, size: int, mode: int, padding: int | None
) -> Tensor:
    """y [N, D]: the sum (mode 0), mean (1) or maximum (2) of W[i] over a sample's K indices, without padding."""
    rows, kept = _rows(weight, indices, scale, padding, -torch.inf if mode == _MAXIMUM else 0.0)
    rows = rows.reshape(-1, size, rows.shape[-1])
    if kept is None:
        return rows.max(1).values if mode == _MAXIMUM else rows.mean(1) if mode == _MEAN else rows.sum(1)
    count = kept.reshape(-1, size).sum(1).unsqueeze(1)
    if mode == _MAXIMUM:
        return rows.max(1).values.masked_fill(count == 0, 0.0)
    return rows.sum(1) / count.clamp(min=1) if mode == _MEAN else rows.sum(1)


def _bags(weight: Tensor, indices: Tensor, scale: Tensor | None, bags: tuple, mode: int, padding: int | None) -> Tensor:
    """`_even_bags` for bags that begin at the given offsets; an empty bag is zero."""
    offsets, with_last = bags
    begins = offsets[: offsets.shape[0] - int(with_last)]
    bag = (
        torch.searchsorted(
            begins, torch.arange(indices.shape[0], device=indices.device, dtype=begins.dtype), right=True
        )
        - 1
    )
    rows, kept = _rows(weight, indices, scale, padding, -torch.inf if mode == _MAXIMUM else 0.0)
    if mode == _MAXIMUM:
        rows = rows.where(_first_largest(rows.detach(), bag, begins.shape[0]), 0.0)
    y = rows.new_zeros(begins.shape[0], rows.shape[1]).index_add(0, bag, rows)
    if mode != _MEAN:
        return y
    ones = torch.ones_like(indices) if kept is None else kept.to(indices.dtype)
    return y / ones.new_zeros(begins.shape[0]).index_add(0, bag, ones).clamp(min=1).unsqueeze(1)


def _first_largest(rows: Tensor, bag: Tensor, bags: int) -> Tensor:
    """Mask [L, D] of the largest entry in each bag and column; of equal ones the first, as in PyTorch."""
    where, count = bag.unsqueeze(1).expand_as(rows), rows.shape[0]
    largest = rows.new_full((bags, rows.shape[1]), -torch.inf).scatter_reduce(0, where, rows, "amax")
    at = torch.arange(count, device=rows.device).unsqueeze(1)
    at = torch.where((rows == largest[bag]) & (rows > -torch.inf), at, count)
    first = torch.full_like(largest, count, dtype=at.dtype).scatter_reduce(0, where, at, "amin")
    return (at == first[bag]) & (at < count)


def _rows(weight: Tensor, indices: Tensor, scale: Tensor | None, padding: int | None, fill: float):
    """(rows [L, D], scaled and with `fill` at the padding; mask of the indices that are no padding, None if all are).

    The padding's row is masked before it is scaled: its values must have no effect, even if they are not finite.
    """
    rows = aten.embedding.default(weight, indices)
    kept = None if padding is None else indices != padding % weight.shape[0]
    rows = rows if kept is None else rows.masked_fill(~kept.unsqueeze(1), fill)
    return rows if scale is None else rows * scale.unsqueeze(1), kept


# RReLU in place: the op of which the slopes are an output too; a rewrite would meet the slopes' own op again -------------


@idiom(aten.rrelu_with_noise_functional.default)
def _slopes_apart(program: Program, node: fx.Node) -> tuple[fx.Node, ...]:
    x, _, lower, upper, training = canonical_args(node)[:5]
    return emit(program, _rrelu, x, lower, upper, training, origin=origin_of(node, "forward"), before=node)


def _rrelu(x: Tensor, lower: float, upper: float, training: bool) -> tuple[Tensor, ...]:
    return (REWRITES[aten.rrelu.default](x, lower, upper, training),)


# ifft(x).real: PyTorch's own run leaves a conjugation to be done, which export's graph does not say -----------------------


@idiom(aten.view_as_real.default)
def _conjugated(program: Program, node: fx.Node) -> fx.Node | None:
    x = node.args[0]
    if not x.meta["val"].is_conj():  # type: ignore[union-attr]
        return None
    return emit(program, _resolved, x, origin=origin_of(node, "forward"), before=node)


def _resolved(x: Tensor) -> Tensor:
    return torch.view_as_real(x.clone())
