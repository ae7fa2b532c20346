"""Layers: parameters that are the weight [out, in] of a matrix product, or the bias that is added to its output.

Kronecker factors need more than P: which axes of the parameter are outputs and which inputs, the inputs `a` at the
shared positions, and the columns `b` there. Ops between the parameter and its layer that only move elements are
followed by the strides of a view, so a transposed weight or a slice of a joint projection is a layer as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.contractions.factors import Conv, Dense, Factor, Gather, positions
from fxcurv.contractions.sizes import size
from fxcurv.ir.graph import canonical_args
from fxcurv.ir.placement import Shard, samples_first
from fxcurv.kernels.patches import channels_last, windows
from fxcurv.kernels.syrk import FEW, syrk
from fxcurv.kernels.syrk_conv import syrk_conv
from fxcurv.kronecker import Arrangement
from fxcurv.rules.base import rule_of
from fxcurv.rules.traits import BIASES, WEIGHTS, convolution, plain_sum
from fxcurv.walks.uses import Use

aten = torch.ops.aten

# Patches with more elements are not written all at once: the C library's allocator keeps that much, in float32.
LARGE = 1 << 23


class NoLayer(Exception):
    """Why a parameter is no layer's weight or bias."""


@dataclass(frozen=True)
class Embed:
    """Where a slice's features are among all `total`: at start, start + step, ...; None stands for all features."""

    start: int
    step: int
    total: int

    def __call__(self, t: Tensor, dim: int) -> Tensor:
        """`t` at these features along `dim`, zeros elsewhere."""
        shape = list(t.shape)
        shape[dim] = self.total
        stop = self.start + self.step * (t.shape[dim] - 1) + 1
        return torch.slice_scatter(t.new_zeros(shape), t, dim, self.start, stop, self.step)


@dataclass(frozen=True)
class LayerUse:
    """One use of a layer: where its rows and columns are in the arrangement, and how `b` is read.

    `at`: (placement of the op's output, the axis of its features or None) if b is read from the columns there, which a
    layer's weight and bias then share; None if it is read from the factor.
    """

    use: Use
    rows: Embed | None
    columns: Embed | None
    at: tuple[Shard, int | None] | None

    @property
    def source(self) -> Any:
        """The value that `features` reads, [V, ...]."""
        if self.at is None:
            return self.use.factor.g
        c = self.use.cotangent
        return c[0] if isinstance(c, tuple) else c


@dataclass(frozen=True)
class Layer:
    """All uses of a parameter, which are all those of a weight or all those of a bias."""

    arrangement: Arrangement
    uses: tuple[LayerUse, ...]
    bias: bool

    @property
    def single_convolution(self) -> bool:
        """Whether it is used once, by a convolution without groups."""
        conv = convolution(self.uses[0].use.op)
        return len(self.uses) == 1 and conv is not None and conv.groups == 1


def read(shape: tuple[int, ...], uses: list[Use], rules: dict) -> Layer:
    """The layer of a parameter of this shape.

    Raises:
        NoLayer: with the reason.
    """
    if not prod(shape):
        raise NoLayer("it has no entries")
    channels = [_bias_channel(u) for u in uses]
    bias = all(c != () for c in channels)
    if not bias and not all(isinstance(u.factor, Dense | Conv | Gather) for u in uses):
        raise NoLayer("it is no weight of a matrix product, convolution or embedding")
    axes = [_axes(u, shape, bias, rules) for u in uses]
    arrangement, strides = _arrange(shape, axes)
    found = []
    for u, channel, (outs, ins, offset) in zip(uses, channels, axes, strict=True):
        rows = _embed(outs, offset, arrangement, strides, arrangement.outputs)
        columns = _embed(ins, offset, arrangement, strides, arrangement.inputs)
        if columns is not None and isinstance(u.factor, Gather):
            raise NoLayer("an embedding reads only part of it")
        found.append(LayerUse(u, rows, columns, _features_at(u, channel)))
    return Layer(arrangement, tuple(found), bias)


def _features_at(use: Use, channel: tuple) -> tuple[Shard, int | None] | None:
    if not channel:
        if use.op.target not in BIASES or not is_weight(use):
            return None
        channel = (WEIGHTS[use.op.target][1],)
    where = use.op.meta["place"]
    return where[0] if isinstance(where, list) else where, channel[0]


def is_weight(use: Use) -> bool:
    """Whether the op reads the parameter as its weight, and is one whose output's axis of features is known."""
    return use.op.target in WEIGHTS and canonical_args(use.op)[WEIGHTS[use.op.target][0]] is use.value


def _bias_channel(use: Use) -> tuple:
    """(the output's axis along which a bias lies, or None for a single number,); () if the use is no bias."""
    if use.op is None or use.cotangent is None:
        return ()
    value, args = use.value.meta["val"], canonical_args(use.op)
    wide = [d for d, s in enumerate(value.shape) if s != 1]
    if use.op.target in BIASES:
        argument, channel = BIASES[use.op.target]
        return (channel,) if args[argument] is use.value and value.ndim == 1 else ()
    if not plain_sum(use.op) or len(wide) > 1:
        return ()
    if not wide:
        return (None,)
    y, channel = use.op.meta["val"], wide[0] - value.ndim
    if use.op.meta["place"].dim == channel + y.ndim:
        return ()
    return (channel,)


# arrangement -----------------------------------------------------------------------------------------------------

Axes = list[tuple[int, int]]  # (size, stride in the flattened parameter)


def _axes(use: Use, shape: tuple[int, ...], bias: bool, rules: dict) -> tuple[Axes, Axes, int]:
    """The axes of outputs and inputs at a use, and its offset."""
    view = torch.empty(shape, device="meta")
    try:
        for node in reversed(use.path):
            view = _follow(node, view, rules)
        sizes, outs, ins = _roles(use, tuple(view.shape), bias)
        view = view.view(sizes)
    except RuntimeError as error:  # of PyTorch: strides cannot express the view
        raise NoLayer("it is rearranged on the way to its op") from error
    pick = lambda axes: [(view.shape[d], view.stride(d)) for d in axes if view.shape[d] > 1]  # noqa: E731
    return pick(outs), pick(ins), view.storage_offset()


def _follow(node: fx.Node, view: Tensor, rules: dict) -> Tensor:
    found = rule_of(node.target, rules).restrided(view, canonical_args(node), node.meta["val"].shape)
    if found is None:
        raise NoLayer(f"it reaches its op through {node.target}")
    return found


def _roles(use: Use, shape: tuple[int, ...], bias: bool) -> tuple[tuple[int, ...], list[int], list[int]]:
    """(sizes to view the used value in, its axes of outputs, of inputs)."""
    f: Any = use.factor
    if bias:
        return shape, list(range(len(shape))), []
    if isinstance(f, Gather):
        return shape, [1], [0]
    if isinstance(f, Conv) and f.transposed:
        sizes = (f.groups, shape[0] // f.groups, *shape[1:])
        return sizes, [0, 2], [1, *range(3, len(sizes))]
    if isinstance(f, Conv):
        return shape, [0], list(range(1, len(shape)))
    *_, groups, outputs = f.g.meta["val"].shape
    of_core = [prod(f.arrange.sizes[:d]) < groups * outputs for d in range(len(f.arrange.sizes))]
    place = [f.arrange.order.index(d) for d in range(len(of_core))]
    outs, ins = ([p for p, out in zip(place, of_core, strict=True) if out is side] for side in (True, False))
    return tuple(f.arrange.sizes[d] for d in f.arrange.order), outs, ins


def _arrange(shape: tuple[int, ...], axes: list[tuple[Axes, Axes, int]]) -> tuple[Arrangement, list[int]]:
    """The arrangement in which all uses are matrices, and the strides of its sizes."""
    contiguous = [prod(shape[d + 1 :]) for d, s in enumerate(shape) if s > 1]
    used = [t for outs, ins, _ in axes for _, t in (*outs, *ins)]
    strides = sorted({*contiguous, *used}, reverse=True)
    bounds = [prod(shape), *strides]
    if any(a % b for a, b in zip(bounds, strides, strict=False)):
        raise NoLayer("it is cut into pieces that do not fit its shape")
    sizes = tuple(a // b for a, b in zip(bounds, strides, strict=False))

    def covered(of_uses: list[Axes]) -> list[int]:
        seen = [d for own in of_uses for n, t in own for d, s in enumerate(strides) if t <= s < n * t]
        return list(dict.fromkeys(seen))

    outs, ins = covered([o for o, _, _ in axes]), covered([i for _, i, _ in axes])
    if set(outs) & set(ins):
        raise NoLayer("its uses differ in what is an input and what an output")
    outs = [d for d in range(len(sizes)) if d not in outs and d not in ins] + outs
    return Arrangement(tuple(shape), sizes, tuple(outs), tuple(ins)), strides


def _embed(axes: Axes, offset: int, whole: Arrangement, strides: list[int], dims: tuple[int, ...]) -> Embed | None:
    """Where the features that `axes` run over lie among those of `dims`."""
    flat = torch.full((), offset)
    for length, stride in axes:
        flat = flat.unsqueeze(-1) + stride * torch.arange(length)
    flat, index = flat.flatten(), 0
    for d in dims:
        index = index * whole.sizes[d] + flat // strides[d] % whole.sizes[d]
    index, total = torch.as_tensor(index).expand(flat.shape), prod(whole.sizes[d] for d in dims)
    start, step = int(index[0]), int(index[1] - index[0]) if len(index) > 1 else 1
    if step < 1 or not torch.equal(index, start + step * torch.arange(len(index))):
        raise NoLayer("its uses order its elements in different ways")
    return None if (start, step, len(index)) == (0, 1, total) else Embed(start, step, total)


# inputs and columns, in traced functions ---------------------------------------------------------------------------


def inputs(factor: Dense | Conv) -> Tensor:
    """a, [N, S, K, I]."""
    if isinstance(factor, Conv) and factor.transposed:
        return positions(scattered(factor), factor.place, 0, factor.groups)
    dense: Any = factor.dense()
    return dense.a


def scattered(f: Conv) -> Tensor:
    """The inputs of a transposed convolution at each position of its output, [B, C * prod(kernel), prod(out)]."""
    channels, kernel = f.a.shape[1], prod(f.kernel)
    each = torch.eye(kernel, dtype=f.a.dtype, device=f.a.device).reshape(1, kernel, *f.kernel)
    each = each.repeat(channels, *[1] * (each.ndim - 1))
    conv = (list(f.stride), list(f.padding), list(f.dilation), True, list(f.output_padding), channels)
    # channels first, as one channel per group fills no vector: see `sound` in passes/channels_last.py
    return aten.convolution.default(f.a.contiguous(), each, None, *conv).flatten(2)


def second_moment(factor: Dense | Conv) -> Tensor:
    """sum_{n,s} a a^T with a averaged over groups, [I, I]."""
    if isinstance(factor, Conv) and not factor.transposed and factor.groups == 1:
        f, out = factor, list(factor.g.shape[3:])
        window = [list(f.kernel), list(f.stride), list(f.padding), list(f.dilation)]
        if prod(size(f.a)[:2]) * prod(f.kernel) * prod(out) > LARGE:
            return syrk_conv(f.a, out, *window)
        return _moment_of_patches(f.a, out, window)
    return gram(averaged(inputs(factor)).flatten(0, 1))


def first_moment(factor: Dense | Conv) -> tuple[Tensor, Tensor]:
    """(sum_{n,s} a with a averaged over groups, [I]; the number of positions of all samples, 0-dim)."""
    samples = factor.a[(slice(None), *[0] * (factor.a.ndim - 1))]
    if isinstance(factor, Conv):
        out, f = list(factor.g.shape[3:]), factor
        count = torch.ones_like(samples).sum() * prod(out)
        if not f.transposed and f.groups == 1:
            patches = windows(f.a, out, list(f.kernel), list(f.stride), list(f.padding), list(f.dilation))
            return patches.sum([0, *range(2, 2 + len(out))]).flatten(), count
    else:
        count = torch.ones_like(samples).sum() * factor.a.shape[1]
    return averaged(inputs(factor)).sum((0, 1)), count


def _moment_of_patches(x: Tensor, out: Sequence[int], window: Sequence[Sequence[int]]) -> Tensor:
    """`second_moment` of a convolution: all patches written at once, in the order that copies the longest runs."""
    dims, kernel, channels = len(out), prod(window[0]), x.shape[1]
    outs, kernels = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    patches = windows(x, out, *window)
    if not channels_last(x):
        return gram(patches.permute(1, *kernels, 0, *outs).reshape(channels * kernel, -1).t())
    moment = gram(patches.permute(0, *outs, *kernels, 1).reshape(-1, kernel * channels))
    return moment.reshape(2 * (kernel, channels)).permute(1, 0, 3, 2).reshape(2 * (channels * kernel,))


def gram(rows: Tensor) -> Tensor:
    """rows^T rows; only one triangle is computed, where it is large enough for blocks of products."""
    return syrk(rows.t()) if rows.shape[1] >= FEW else rows.t() @ rows


def averaged(a: Tensor) -> Tensor:
    """[N, S, K, I] -> [N, S, I], the mean over groups."""
    return a.squeeze(2) if a.shape[2] == 1 else a.mean(2)


def features(factor: Factor, source: Tensor, at: tuple[Shard, int | None] | None) -> Tensor:
    """b, [V, N, O, S], from `source`: the factor's `g`, or the columns [V, *y] at an op's output."""
    if at is None:
        factor = factor.with_g(source)
        g = factor.masked() if isinstance(factor, Gather) else source.flatten(3)
        return g.transpose(2, 3)
    place, channel = at
    t = samples_first(source, place, lead=1)
    t = t.unsqueeze(2) if channel is None else t.movedim(channel % (source.ndim - 1) + 2, 2)
    return t.flatten(3)
