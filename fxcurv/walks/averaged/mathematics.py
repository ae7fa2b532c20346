"""The mathematics of KFRA's recursion: M <- (1/N) sum_n J_n^T M J_n through one op, as functions of tensors.

M is [D, D] over the entries of one sample's slice of a value, flattened. J_n is the op's Jacobian of sample n.

    `constant`     J_n is the same for all samples: the op's transpose on the rows of M, then on those of its transpose
    `diagonal`     J_n = diag d_n: M * (1/N) sum_n d_n d_n^T
    `max_pooled`   J_n selects: M at every pair of window offsets, times how often both are the maximum
    `per_sample`   any other: the op's transpose on both sides for every sample

A convolution's weight needs only the sums of M over positions, S M S^T. Through ops that act on every channel alone,
S J^T is a row of weights per channel, so that the first convolution of a network needs no M of its own (`summed`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv.ir.lengths import said
from fxcurv.ir.placement import Shard, samples_back, samples_first
from fxcurv.ir.private import pytree
from fxcurv.rules.base import Rule
from fxcurv.rules.call import Call
from fxcurv.rules.traits import APART

# Entries of an intermediate tensor that may live beside M.
ROOM = 2**27


@dataclass(frozen=True)
class Step:
    """One op on the chain, from its output number `output` to its argument `position` (-1: the chain ends at this op).

    x, y: the shapes of a sample's slice (`samples_first`) of argument and output.
    places: those of all the op's outputs.
    """

    output: int
    position: int
    place_x: Shard
    place_y: Shard
    places: tuple[Any, ...]
    x: tuple[int, ...]
    y: tuple[int, ...]


def summed_hessian(rule: Any, call: Call, c: Tensor) -> Tensor:
    """sum_n H_n of a loss op in closed form whose cotangent is `c`, [D, D]."""
    columns = samples_first(rule.exact(call, c[0].abs(), True), call.places[0], lead=1)
    rows = columns.flatten(2).flatten(0, 1)
    return rows.t() @ rows


def none(f: Tensor, place: Shard) -> Tensor:
    """sum_n H_n of a loss that is linear in `f`: zeros, [D, D]."""
    size = samples_first(f, place)[0].numel()
    return f.new_zeros(size, size)


def summed_general(h: Tensor) -> Tensor:
    """sum_n H_n, from [N, D, D]."""
    return h.sum(0)


def identity(m: Tensor, dtype: torch.dtype) -> Tensor:
    """Through an op that only reshapes."""
    return m.to(dtype)


def constant(rule: Rule, call: Call, step: Step, m: Tensor) -> Tensor:
    """Through an op whose Jacobian is the same for all samples."""
    one = _call_of_sample(call, step, 0)
    half = _rows_through(rule, one, step, m.unsqueeze(1)).squeeze(1)
    return _rows_through(rule, one, step, half.t().contiguous().unsqueeze(1)).squeeze(1)


def diagonal(rule: Rule, call: Call, step: Step, m: Tensor) -> Tensor:
    """Through an elementwise op."""
    d = _slopes(rule, call, step).flatten(1)
    return m * ((d / d.shape[0]).t() @ d)


def per_sample(rule: Rule, call: Call, step: Step, m: Tensor) -> Tensor:
    """Through any op: all samples at once where there is room, else one after the other."""
    n = samples_first(_output(call, step), step.place_y).shape[0]
    wide, deep = prod(step.x), prod(step.y)
    if n <= max(1, ROOM // (wide * max(wide, deep))):
        half = _rows_through(rule, call, step, m.unsqueeze(1).expand(deep, n, deep))
        return _rows_through(rule, call, step, half.permute(2, 1, 0)).mean(1)
    out = m.new_zeros(wide, wide)
    for k in range(int(n)):
        one = _call_of_sample(call, step, k)
        half = _rows_through(rule, one, step, m.unsqueeze(1)).squeeze(1)
        out = out + _rows_through(rule, one, step, half.t().contiguous().unsqueeze(1)).squeeze(1)
    return out / n


def _rows_through(rule: Rule, call: Call, step: Step, rows: Tensor) -> Tensor:
    """Rows r[v, n] over the output's slices -> r J_n over the argument's, [V, N, D]."""
    g = samples_back(rows.reshape(*rows.shape[:2], *step.y), step.place_y, 1)
    (gx,) = rule.transpose(call, (step.position,), _cotangent(rule, call, step, g))
    return samples_first(gx, step.place_x, 1).flatten(2)


def _cotangent(rule: Rule, call: Call, step: Step, g: Tensor) -> Any:
    if isinstance(call.y, Tensor):
        return g
    if type(rule).transpose is not Rule.transpose:
        return (g,)
    floats = [(k, t) for k, t in enumerate(call.y) if isinstance(t, Tensor) and t.is_floating_point()]
    unread = lambda t: None if call.op in APART else t.new_zeros(g.shape[0], *t.shape)  # noqa: E731
    return tuple(g if k == step.output else unread(t) for k, t in floats)


def _output(call: Call, step: Step) -> Tensor:
    return call.y if isinstance(call.y, Tensor) else call.y[step.output]


def _call_of_sample(call: Call, step: Step, k: int) -> Call:
    """The call on sample k alone."""
    leaves, spec = pytree.tree_flatten(call.args)
    sized = [said(s) if s is not None else leaf for s, leaf in zip(call.sizes, leaves, strict=True)]
    args = [_slice(leaf, place, k) for leaf, place in zip(sized, call.places, strict=True)]
    if isinstance(call.y, Tensor):
        y: Any = _slice(call.y, step.places[0], k)
    else:
        y = tuple(_slice(t, place, k) for t, place in zip(call.y, step.places, strict=True))
    return replace(call, args=pytree.tree_unflatten(args, spec), y=y)


def _slice(t: Any, place: Any, k: int) -> Any:
    if not isinstance(t, Tensor) or not isinstance(place, Shard):
        return t
    return samples_back(samples_first(t, place).narrow(0, k, 1), place)


def _slopes(rule: Rule, call: Call, step: Step) -> Tensor:
    """The diagonals d_n of an elementwise op's Jacobians, [N, *x]."""
    ones = torch.ones_like(_output(call, step)).unsqueeze(0)
    (d,) = rule.transpose(call, (step.position,), _cotangent(rule, call, step, ones))
    return samples_first(d.squeeze(0), step.place_x)


# max-pooling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """The windows of a two-dimensional max-pooling, from its arguments."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, args: tuple) -> Windows:
        """From the canonical arguments of the op."""
        kernel, stride, padding, dilation = (_pair(a) for a in args[1:5])
        return cls(kernel, stride or kernel, padding or (0, 0), dilation or (1, 1))

    def entries(self, size: tuple[int, ...], out: tuple[int, ...], device: Any) -> Tensor:
        """The input entry at every offset of every window, [offsets, windows]; -1 outside the input."""
        where = []
        for o, k, s, p, d in zip(out, self.kernel, self.stride, self.padding, self.dilation, strict=True):
            start = torch.arange(o, device=device) * s - p
            where.append(torch.arange(k, device=device).unsqueeze(1) * d + start)
        rows, columns = where[0].unsqueeze(1).unsqueeze(3), where[1].unsqueeze(0).unsqueeze(2)
        inside = (rows >= 0) & (rows < size[0]) & (columns >= 0) & (columns < size[1])
        return torch.where(inside, rows * size[1] + columns, -1).reshape(prod(self.kernel), prod(out))

    def folded(self, t: Tensor, size: tuple[int, ...], out: tuple[int, ...]) -> Tensor:
        """The sum over all offsets of what falls on an entry: [B, planes * offsets, windows] -> [B, planes * entries]."""
        whole = [
            (o - 1) * s + (k - 1) * d + 1
            for o, s, k, d in zip(out, self.stride, self.kernel, self.dilation, strict=True)
        ]
        t = F.fold(t, whole, self.kernel, self.dilation, 0, self.stride)
        (low, left), (high, right) = (
            self.padding,
            (h + p - w for h, p, w in zip(size, self.padding, whole, strict=True)),
        )
        return F.pad(t, (-left, right, -low, high)).flatten(1)


def _pair(value: Any) -> Any:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * 2 if len(value) == 1 else value


def _hits(call: Call, step: Step, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which offset of a window is the maximum, 0 or 1 as [N, planes, offsets, windows], and the entry there (`entries`)."""
    planes, windows = prod(step.x[:-2]), prod(step.y[-2:])
    index = samples_first(call.y[1], step.places[1]).reshape(-1, planes, 1, windows)
    entries = Windows.of(call.args).entries(step.x[-2:], step.y[-2:], index.device)
    return (index == entries).to(dtype), entries


def max_pooled(call: Call, step: Step, m: Tensor) -> Tensor:
    """Through a two-dimensional max-pooling, by blocks of planes on and below the diagonal."""
    windows, size, out = Windows.of(call.args), step.x[-2:], step.y[-2:]
    hit = _hits(call, step, m.dtype)[0]
    planes, offsets, count = hit.shape[1:]
    pairs = m.reshape(planes, 1, count, planes, 1, count)
    at_once = max(1, ROOM // (offsets * count * hit[0].numel()))
    blocks = []
    for start in range(0, planes, at_once):
        stop = min(planes, start + at_once)
        often = (hit[:, start:stop] / hit.shape[0]).flatten(1).t() @ hit[:, start:].flatten(1)
        often = often.reshape(stop - start, offsets, count, planes - start, offsets, count)
        weighted = often * pairs[start:stop, :, :, start:]
        half = windows.folded(weighted.reshape(-1, (planes - start) * offsets, count), size, out)
        rows = half.t().reshape(-1, (stop - start) * offsets, count)
        blocks.append(F.pad(windows.folded(rows, size, out), (0, 0, start * prod(size), 0)))
    if len(blocks) == 1:
        return blocks[0]
    lower = torch.cat(blocks, 1)
    return lower.tril() + lower.tril(-1).t()


# what a parameter needs ---------------------------------------------------------------------------------------------


def of_features(m: Tensor, shape: tuple[int, ...], channel: int | None, both: bool) -> Tensor:
    """[O, O] from M over a slice of `shape`, features along `channel`: summed over pairs of positions, or over equal ones."""
    if channel is None:
        return (m.sum() if both else m.diagonal().sum()).reshape(1, 1)
    k, d = len(shape), channel % len(shape)
    order = [d, *(j for j in range(k) if j != d)]
    o = shape[d]
    t = m.reshape(*shape, *shape).permute(*order, *(k + j for j in order)).reshape(o, m.shape[0] // o, o, -1)
    if t.shape[1] == 1:
        return t.reshape(o, o)
    return t.sum((1, 3)) if both else t.diagonal(dim1=1, dim2=3).sum(-1)


def summed(tail: list[tuple[Rule, Call, Step, str]], shape: tuple[int, ...], by_offsets: bool, m: Tensor) -> Tensor:
    """The sum over pairs of positions of M below `tail`, [C, C], from M [D, D] above it.

    Args:
        tail: (rule, call, step, kind) of ops that act on every channel alone, the uppermost first.
        shape: of the slice below the tail, [1, C, *spatial].
        by_offsets: the uppermost op is a max-pooling, which enters by its averages over samples at pairs of window
            offsets, not with its samples paired with those of the other ops.
        m: over the slices of the uppermost op's output.
    """
    # t[n1, n2, ..] = J_uppermost .. J_lowest 1; every op whose Jacobian depends on the sample has its own samples
    t = m.new_ones(1, *shape)
    for rule, call, step, kind in reversed(tail[1:] if by_offsets else tail):
        if kind == "constant":
            t = _forward(rule, _call_of_sample(call, step, 0), step, t)
        elif kind == "diagonal":
            t = (t.unsqueeze(1) * _slopes(rule, call, step)).flatten(0, 1)
        else:
            t = _select_maxima(call, step, t)
    t = t.reshape(t.shape[0], shape[1], 1, -1)
    if not by_offsets:
        return _sum_by_channels([t], m)
    hit, entries = _hits(tail[0][1], tail[0][2], m.dtype)
    return _sum_by_channels([t[:, :, 0, entries.clamp(min=0)], hit], m)


def _forward(rule: Rule, call: Call, step: Step, t: Tensor) -> Tensor:
    """J t for rows t [V, *x] of a linear op, as the transpose of its transpose."""

    def back(g: Tensor) -> Tensor:
        return _rows_through(rule, call, step, g)

    zeros = t.new_zeros(t.shape[0], 1, prod(step.y))
    _, pull = torch.func.vjp(back, zeros)
    return pull(t.reshape(t.shape[0], 1, -1))[0].reshape(t.shape[0], *step.y)


def _select_maxima(call: Call, step: Step, t: Tensor) -> Tensor:
    """t [V, *x] through every sample's max-pooling, [V * N, *y]."""
    index = samples_first(call.y[1], step.places[1]).flatten(-2)
    flat = t.flatten(-2).unsqueeze(1).expand(-1, index.shape[0], *[-1] * (index.ndim - 1))
    return flat.gather(-1, index.expand(t.shape[0], *index.shape)).reshape(-1, *step.y)


def _sum_by_channels(averaged: list[Tensor], m: Tensor) -> Tensor:
    """sum over positions, by blocks of channels on and above the diagonal, of M times averages over rows, [C, C].

    B[c, d] = sum_{i,j} M[c i, d j] sum_{a,b} prod_t mean_r t[r, c, a, i] t[r, d, b, j], t [R, C, offsets, positions].
    """
    channels, offsets, size = averaged[0].shape[1:]
    m = m.reshape(channels, size, channels, size)
    width = max(1, min(-(-channels // 8), ROOM // ((offsets * size) ** 2 * channels)))
    rows = []
    for start in range(0, channels, width):
        stop = min(channels, start + width)
        means = [(t[:, start:stop] / t.shape[0]).flatten(1).t() @ t[:, start:].flatten(1) for t in averaged]
        weights = means[0] if len(means) == 1 else means[0] * means[1]
        if offsets > 1:
            weights = weights.reshape(stop - start, offsets, size, channels - start, offsets, size).sum((1, 4))
        part = weights.reshape(stop - start, size, channels - start, size) * m[start:stop, :, start:]
        rows.append(F.pad(part.sum((1, 3)), (start, 0)))
    upper = torch.cat(rows).triu()
    return upper + upper.triu(1).t()
