"""Placements of all values if the batch is split into parts, each of which has some samples and runs the same graph.

`Shard` is then the part's own samples, `Replicate` the same in every part, `Partial` a term of the sum over all parts.
An op that is not linear in a `Partial` argument reads the complete sum, which is `Replicate`. A value is `Mixed` if it
needs the samples of other parts other than through a sum. Unlike in `passes.independence`, constants count: the number
of entries in a mask, for example, is a sum over samples too.

Most ops are placed by their own rules. The tables here are for ops that occur only in emitted graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from fxcurv.contractions.contract import Contract
from fxcurv.ir import placement
from fxcurv.ir.graph import canonical_args
from fxcurv.ir.origin import stage_of
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Alike, Placement, Shard, Site, places_of
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program
from fxcurv.rules.base import rule_of
from fxcurv.rules.traits import ZEROS, pointwise, random

aten = torch.ops.aten

Sites = Sequence[Site | None]
Found = Placement | list[Placement]


@dataclass(frozen=True)
class Lies:
    """The placement of an op's output (a list for several), and the arguments whose complete sum it reads."""

    place: Found
    complete: tuple[fx.Node, ...] = ()


class Split:
    """The placements of a program's values across the parts, node by node, in `across`."""

    def __init__(self, program: Program):
        self.program, self.n = program, program.batch.stand_in
        self.across: dict[fx.Node, Found] = {}
        self.sizes: dict[Any, int] = {}

    def size(self, value: int | SymInt) -> int:
        """A size as a number, at the batch size `n`."""
        if not isinstance(value, SymInt):
            return int(value)
        key = value.node.expr
        if key not in self.sizes:
            self.sizes[key] = self.program.batch.evaluate(value, self.n)
        return self.sizes[key]

    def shape(self, val: Tensor) -> tuple[int, ...]:
        return tuple(self.size(s) for s in val.shape)

    def place(self, node: fx.Node) -> Placement:
        """The placement of a node with one output; `Mixed` for several."""
        found = self.across[node]
        return found if not isinstance(found, list) else MIXED

    def visit(self, node: fx.Node) -> Lies:
        """The placement of a call's outputs, from those of its arguments, which were visited before."""
        vals = node.meta.get("val")
        several = isinstance(vals, tuple | list)
        outs = [self.shape(v) if isinstance(v, Tensor) else None for v in (vals if several else [vals])]
        if all(s is None for s in outs):
            return Lies([REPLICATE] * len(outs) if several else REPLICATE)
        leaves = pytree.tree_leaves(canonical_args(node))
        sites: list[Site | None] = []
        for leaf in leaves:
            val = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
            place = self.place(leaf) if isinstance(val, Tensor) else None
            sites.append(Site(self.shape(val), place, place != REPLICATE) if place is not None else None)
        partial = [i for i, s in enumerate(sites) if s and s.place == PARTIAL]
        if node.target in CONSTANT:
            return Lies(self._sound(self._constant(outs[0] or (), sites[:1]), outs[0]))
        if partial and self._linear(node, leaves, sites, partial, outs):
            return Lies([PARTIAL] * len(outs) if several else PARTIAL)
        for i in partial:
            sites[i] = Site(sites[i].shape, REPLICATE, False)  # type: ignore[union-attr]
        said = self._place_call(node, leaves, sites, outs)
        each = said if isinstance(said, list) else [self._place_other_output(said, outs[0], s) for s in outs]
        each = [self._sound(p, s) for p, s in zip(each, outs, strict=True)]
        found: Found = each if several else each[0]
        if MIXED in each:
            found = self._declared(node, found)
        return Lies(found, tuple(dict.fromkeys(leaves[i] for i in partial)))

    # ---- one call ------------------------------

    def _place_call(self, node: fx.Node, leaves: list, sites: list[Site | None], outs: list) -> Found:
        here = [s for s in sites if s]
        if any(s.place == MIXED for s in here):
            return MIXED
        if isinstance(node.target, Contract):
            return self._contraction(node, sites)
        if node.target in ARANGE:
            return _arange(outs[0], self.n, emitted=stage_of(node) != "forward")
        draws = random(node.target)
        if all(s.place == REPLICATE for s in here):
            if draws:
                return MIXED  # every part draws other numbers
            return self._constant(outs[0], []) if node.target in REPEATED else REPLICATE
        if outs[0] is None and node.target not in PLACES:
            return MIXED
        alike = not draws and all(isinstance(s.place, Alike) for s in here if isinstance(s.place, Shard))
        found = self._by_rule(node, leaves, _sites_for_rules(sites), outs)
        if alike and isinstance(found, Shard):
            return Alike(found.dim, found.outer, found.inner)
        return found

    def _by_rule(self, node: fx.Node, leaves: list, sites: list[Site | None], outs: list) -> Found:
        if node.target in INTO and leaves[0].target not in ZEROS:
            return MIXED
        args = pytree.tree_map(self._number, canonical_args(node))
        if node.target in PLACES:
            return PLACES[node.target](sites, args, outs)
        found = rule_of(node.target, self.program.rules).place(sites, args, outs[0], self.n)
        if found is not None:
            return found
        if pointwise(node.target):
            return placement.pointwise([s for s in sites if s], len(outs[0]), linear=False)
        return self._tried(node, leaves, sites)

    def _tried(self, node: fx.Node, leaves: list, sites: list[Site | None]) -> Placement:
        """The placement found by trying the op at capture, if the arguments still have the same placements."""
        tried = node.meta.get("active") and all(_same_place(a, s) for a, s in zip(leaves, sites, strict=True))
        return node.meta["place"] if tried else MIXED

    def _number(self, leaf: Any) -> Any:
        val = leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf
        return self.size(val) if isinstance(val, SymInt) else leaf

    def _sound(self, place: Placement, shape: tuple[int, ...] | None) -> Placement:
        """`place`, if the sizes agree: the size of the sample axis, and of no other, is a multiple of N."""
        if shape is None:
            return REPLICATE
        of_samples = [d for d, size in enumerate(shape) if size and size % self.n == 0]
        if not isinstance(place, Shard):
            return MIXED if of_samples else place
        fits = of_samples == [place.dim] and shape[place.dim] == place.outer * place.inner * self.n
        return place if fits or 0 in shape else MIXED

    def _place_other_output(self, found: Placement, first: tuple | None, shape: tuple | None) -> Placement:
        """The placement of another output, from that of the first, which is all that a rule gives."""
        if shape is None or (0 in shape and shape is not first):
            return REPLICATE
        if not isinstance(found, Shard):
            return found
        same = first is not None and len(shape) == len(first) and shape[found.dim] == first[found.dim]
        return found if same else MIXED

    def _constant(self, shape: tuple[int, ...], like: Sites) -> Placement:
        """The placement of a value of this shape that depends on no sample."""
        for s in like:
            if s and isinstance(s.place, Shard) and s.shape == shape:
                return Alike(s.place.dim, s.place.outer, s.place.inner)
        dims = [d for d, size in enumerate(shape) if size and size % self.n == 0]
        if not dims:
            return REPLICATE
        return Alike(dims[0], shape[dims[0]] // self.n) if len(dims) == 1 else MIXED

    def _contraction(self, node: fx.Node, sites: list[Site | None]) -> Placement:
        """The placement of a `contract` node: `Partial` if it sums over samples, else they follow kept columns."""
        factors, weights = node.target.parts(sites)  # type: ignore[union-attr]
        spec = node.target.spec  # type: ignore[union-attr]
        for factor in factors:
            for name, place in zip(factor.tensors, factor.places(), strict=True):
                site = getattr(factor, name)
                if not isinstance(site.place, Alike) and site.place != place or site.place.dim != place.dim:
                    return MIXED
        if weights is not None and weights.place not in (REPLICATE, Shard(1), Alike(1)):
            return MIXED
        if "n" in spec.reduce:
            return PARTIAL
        return Shard(0 if "v" in spec.reduce else 1) if spec.samples is None else MIXED

    def _linear(self, node: fx.Node, leaves: list, sites: list, partial: list[int], outs: list) -> bool:
        """Whether the outputs are sums over the parts, given that the arguments `partial`, and no others, are."""
        if any(s and s.place != REPLICATE for i, s in enumerate(sites) if i not in partial):
            return False
        if any(size and size % self.n == 0 for s in outs for size in s or ()):
            return False  # expanded to all samples, a sum would be sent once for each
        vals = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
        floats = [leaves[i].meta["val"].is_floating_point() for i in partial]
        if any(floats) and not all(isinstance(v, Tensor) and v.is_floating_point() for v in vals):
            return False
        tensors = [i for i, s in enumerate(sites) if s]
        if node.target in OF_ALL:
            return partial == tensors and all(isinstance(a, fx.Node) for a in leaves[: OF_ALL[node.target]])
        if node.target in OF_ONE:
            return partial == tensors[:1] == [0]
        biased = node.target is aten.linear.default and len(tensors) > 2
        return node.target in OF_EITHER and len(partial) == 1 and not biased

    def _declared(self, node: fx.Node, found: Found) -> Found:
        """The placement declared by the function that emitted the value, if none of the value's sources is `Mixed`."""
        if "declared" not in node.meta:
            return found
        place, sources = node.meta["declared"]
        return place if all(MIXED not in places_of(self.across.get(s, REPLICATE)) for s in sources) else found


def _sites_for_rules(sites: list[Site | None]) -> list[Site | None]:
    """Sites without `Alike`, which rules do not know: outer and inner then come from an argument with real samples."""
    own = {s.place for s in sites if s and isinstance(s.place, Shard) and not isinstance(s.place, Alike)}
    kinds = {(p.outer, p.inner) for p in own}
    out = [_without_alike(s) for s in sites]
    if len(kinds) != 1:
        return out
    ((outer, inner),) = kinds
    for k, (site, given) in enumerate(zip(out, sites, strict=True)):
        if site and given and isinstance(given.place, Alike) and given.place.outer * given.place.inner == outer * inner:
            out[k] = replace(site, place=Shard(given.place.dim, outer, inner))
    return out


def _without_alike(site: Site | None) -> Site | None:
    """The site with `Shard` in place of `Alike`."""
    if site is None or not isinstance(site.place, Alike):
        return site
    return replace(site, place=Shard(site.place.dim, site.place.outer, site.place.inner))


def _same_place(leaf: Any, site: Site | None) -> bool:
    return site is None or leaf.meta.get("place") == site.place


def _arange(shape: tuple[int, ...], n: int, emitted: bool) -> Placement:
    """`arange` in an emitted graph counts the part's own samples; a model's `arange` means those of the whole batch."""
    (size,) = shape
    if not size or size % n:
        return REPLICATE
    return Shard(0, 1, size // n) if emitted else MIXED


# ---- ops ------------------------------

# They read only shapes.
CONSTANT = {
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_empty.default, aten.new_full.default, aten.zeros.default, aten.ones.default,
    aten.full.default, aten.empty.memory_format, aten.scalar_tensor.default, aten.fill.Scalar,
    aten.new_empty_strided.default, aten.empty_strided.default,
}  # fmt: skip

# They give a value without samples a sample axis.
REPEATED = {aten.expand.default, aten.repeat.default}

# They add to their first argument, which has to be zero.
INTO = {aten.index_add.default}

ARANGE = {aten.arange.default, aten.arange.start, aten.arange.start_step}

# Ops that are linear and homogeneous: in all tensors jointly (value: how many of the first arguments must be tensors),
OF_ALL = {aten.add.Tensor: 2, aten.sub.Tensor: 2, aten.cat.default: 1, aten.stack.default: 1}

# in their first argument,
OF_ONE = {
    aten.div.Tensor, aten.div.Scalar, aten.mul.Scalar, aten.neg.default, aten.sum.default, aten.sum.dim_IntList,
    aten.mean.default, aten.mean.dim, aten.view.default, aten.reshape.default, aten._unsafe_view.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.clone.default,
    aten.alias.default, aten._to_copy.default, aten.slice_backward.default, aten.select_backward.default,
    aten.diagonal.default, aten.detach.default, aten.flip.default, aten.unbind.int, aten.split.Tensor,
    aten.split_with_sizes.default,
}  # fmt: skip

# in either of two arguments.
OF_EITHER = {aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.mv.default, aten.linear.default}


def _mixing_along(sites: Sites, axis: int | None, ndim: int) -> Placement:
    """An op on aligned arguments that mixes the entries along `axis` (None: along no axis), and no others."""
    place = placement.pointwise([s for s in sites if s], ndim, linear=False)
    return MIXED if axis is not None and isinstance(place, Shard) and place.dim == axis % max(ndim, 1) else place


def _elementwise(sites: Sites, args: tuple, outs: list) -> Found:
    return _mixing_along(sites, None, len(outs[0]))


def _along_argument(position: int) -> Callable[[Sites, tuple, list], Found]:
    def place(sites: Sites, args: tuple, outs: list) -> Found:
        return _mixing_along(sites, args[position], len(outs[0]))

    return place


def _gather(sites: Sites, args: tuple, outs: list) -> Found:
    """gather(x, dim, index): along the sample axis only if x has no samples, such as a table of classes."""
    x, index = [s for s in sites if s]
    axis = args[1] % max(len(outs[0]), 1)
    if x.place == REPLICATE and isinstance(index.place, Shard) and index.place.dim == axis:
        return index.place
    return _mixing_along(sites, axis, len(outs[0]))


def _reduction(sites: Sites, args: tuple, outs: list) -> Found:
    (site,) = [s for s in sites if s]
    dims = args[1] if len(args) > 1 and args[1] is not None else ()
    dims = tuple(dims) if isinstance(dims, list | tuple) else (dims,)
    return placement.reduction(site, dims, len(args) > 2 and bool(args[2]), linear=False)


def _transform(position: int) -> Callable[[Sites, tuple, list], Found]:
    """A Fourier transform along an axis, or several, of another number of frequencies than entries."""

    def transformed(sites: Sites, args: tuple, outs: list) -> Found:
        place: Any = sites[0].place  # type: ignore[union-attr]
        axes = args[position] if isinstance(args[position], list | tuple) else [args[position]]
        return MIXED if None in axes or place.dim in {d % len(outs[0]) for d in axes} else place

    return transformed


def _pairs(sites: Sites, args: tuple, outs: list) -> Found:
    """Complex numbers as pairs of real ones, on a last axis of their own, and back."""
    return sites[0].place  # type: ignore[union-attr]


def _images(sites: Sites, args: tuple, outs: list) -> Found:
    """An op on a batch of images: every argument with samples has them in dimension 0."""
    places = {s.place for s in sites if s and s.place != REPLICATE}
    (place,) = places if len(places) == 1 else (MIXED,)
    return place if isinstance(place, Shard) and place.dim == 0 else MIXED


def _max_pool_columns(sites: Sites, args: tuple, outs: list) -> Found:
    g, *others = [s.place for s in sites if s]
    return g if g == Shard(1) and all(p == Shard(0) for p in others) else MIXED


def _convolution_backward(sites: Sites, args: tuple, outs: list) -> Found:
    g, x, weight = sites[:3]
    wanted = args[-1]
    if weight and weight.place != REPLICATE or not (g and isinstance(g.place, Shard) and g.place.dim == 0):
        return MIXED
    together = x is not None and (x.place == g.place or not wanted[1])
    return [g.place, PARTIAL if together else MIXED, PARTIAL] if together else MIXED


def _unfold(sites: Sites, args: tuple, outs: list) -> Found:
    place: Any = sites[0].place  # type: ignore[union-attr]
    return MIXED if place.dim == args[1] % (len(outs[0]) - 1) else place


def _slice_backward(sites: Sites, args: tuple, outs: list) -> Found:
    place: Any = sites[0].place  # type: ignore[union-attr]
    return MIXED if place.dim == args[2] % len(outs[0]) else place


def _select_backward(sites: Sites, args: tuple, outs: list) -> Found:
    place: Any = sites[0].place  # type: ignore[union-attr]
    return Shard(place.dim + (args[2] % len(outs[0]) <= place.dim), place.outer, place.inner)


def _nll(sites: Sites, args: tuple, outs: list) -> Found:
    """Predictions [rows, C] or [N, C, *positions]: samples along any axis but C, which targets do not have."""
    z, target, weight = sites[:3]
    if (
        not z
        or not target
        or not isinstance(z.place, Shard)
        or z.place.dim == 1
        or (weight and weight.place != REPLICATE)
    ):
        return MIXED
    where = replace(z.place, dim=max(z.place.dim - 1, 0))
    if target.place != where:
        return MIXED
    return [where if args[3] == 0 else PARTIAL, PARTIAL]


def _nll_backward(sites: Sites, args: tuple, outs: list) -> Found:
    """nll_loss_backward(g, z, target, weight, ...), with one g per target or one for all."""
    g, z, target, weight = sites[:4]
    each = _nll((z, target, weight), (None, None, None, 0), outs)
    same = isinstance(each, list) and g is not None and g.place in (REPLICATE, each[0])
    return z.place if same and z else MIXED


def _loss_backward(sites: Sites, args: tuple, outs: list) -> Found:
    """The derivative of a loss has the placement of the prediction, if all arguments with samples have it."""
    aligned = {s.place for s in sites if s and isinstance(s.place, Shard)}
    return aligned.pop() if len(aligned) == 1 and sites[1] and isinstance(sites[1].place, Shard) else MIXED


def _reduced_loss(sites: Sites, args: tuple, outs: list) -> Found:
    place = placement.pointwise([s for s in sites if s], max(len(s.shape) for s in sites if s), linear=False)
    return PARTIAL if outs[0] == () and isinstance(place, Shard) else place


def _embedding_backward(sites: Sites, args: tuple, outs: list) -> Found:
    g, index = sites[:2]
    return PARTIAL if g and index and g.place == index.place and not args[4] else MIXED


def _index(sites: Sites, args: tuple, outs: list) -> Found:
    """x[indices] with indices for adjacent axes: the axes of the indices take the place of these."""
    x, *rest = [s for s in sites if s]
    axes = [d for d, index in enumerate(args[1]) if index is not None]
    if axes != list(range(axes[0], axes[-1] + 1)):
        return MIXED
    ndim = max(len(s.shape) for s in rest)
    where = placement.pointwise(rest, ndim, linear=False)
    if x.place == REPLICATE and isinstance(where, Shard):
        return Shard(axes[0] + where.dim, where.outer, where.inner)
    before = isinstance(x.place, Shard) and x.place.dim < axes[0]
    return x.place if before and where == REPLICATE else MIXED


def _index_select(sites: Sites, args: tuple, outs: list) -> Found:
    """index_select(x, dim, index)."""
    x, index = [s for s in sites if s]
    dim = args[1] % len(outs[0])
    if x.place == REPLICATE and isinstance(index.place, Shard):
        return Shard(dim, index.place.outer, index.place.inner)
    return x.place if index.place == REPLICATE and isinstance(x.place, Shard) and x.place.dim != dim else MIXED


def _split_or_unbind(sites: Sites, args: tuple, outs: list) -> Found:
    """split(x, sizes, dim), or unbind(x, dim), which drops the axis: along any axis but that of the samples."""
    (site,) = [s for s in sites if s]
    where: Any = site.place
    dim = args[-1] % len(site.shape)
    drops = len(outs[0]) < len(site.shape) and dim < where.dim
    return [MIXED if dim == where.dim else replace(where, dim=where.dim - drops)] * len(outs)


def _stack(sites: Sites, args: tuple, outs: list) -> Found:
    place = _mixing_along(sites, None, len(outs[0]) - 1)
    return replace(place, dim=place.dim + (args[1] % len(outs[0]) <= place.dim)) if isinstance(place, Shard) else place


def _index_add(sites: Sites, args: tuple, outs: list) -> Found:
    """index_add(zeros, dim, index, source)."""
    into, index, source = [s for s in sites if s]
    if not isinstance(source.place, Shard) or into.place != REPLICATE:
        return MIXED
    along = source.place.dim == args[1] % len(outs[0])
    if along and isinstance(index.place, Shard):
        return PARTIAL
    return source.place if not along and index.place == REPLICATE else MIXED


def _syrk(sites: Sites, args: tuple, outs: list) -> Found:
    """x x^T."""
    place: Any = sites[0].place  # type: ignore[union-attr]
    return PARTIAL if place.dim == 1 else MIXED


def _syrk_conv(sites: Sites, args: tuple, outs: list) -> Found:
    return PARTIAL if sites[0] and isinstance(sites[0].place, Shard) and sites[0].place.dim == 0 else MIXED


def _eigh(sites: Sites, args: tuple, outs: list) -> Found:
    site = next(s for s in sites if s)
    place: Any = site.place
    return [place] * len(outs) if place.dim < len(site.shape) - 2 else MIXED


def _searchsorted(sites: Sites, args: tuple, outs: list) -> Found:
    """searchsorted: row by row, all arguments aligned."""
    here = {s.place for s in sites if s}
    place = here.pop()
    return place if not here and isinstance(place, Shard) and place.dim < len(outs[0]) - 1 else MIXED


def _layer_norm_backward(sites: Sites, args: tuple, outs: list) -> Found:
    """native_layer_norm_backward(g, x, shape, mean, rstd, weight, bias, mask)."""
    g = sites[0]
    axes = len(args[2])
    if not g or not isinstance(g.place, Shard) or g.place.dim >= len(g.shape) - axes:
        return MIXED
    same = all(s.place in (g.place, REPLICATE) for s in sites if s)
    return [g.place, PARTIAL, PARTIAL] if same else MIXED


def _attention(sites: Sites, args: tuple, outs: list) -> Found:
    """Samples along the batch or the heads, in every tensor with these axes; a mask may have none."""
    places = {s.place for s in sites if s}
    place = next(iter(places - {REPLICATE}))
    inputs = [s for s in sites if s and len(s.shape) == 4 and s.shape[0] > 1]
    sound = len(places - {REPLICATE}) == 1 and isinstance(place, Shard) and place.dim < 2
    return [place] * len(outs) if sound and all(s.place == place for s in inputs) else MIXED


PLACES: dict[Any, Callable[[Sites, tuple, list], Found]] = {
    **dict.fromkeys(
        (aten._log_softmax.default, aten._softmax.default, aten.softmax.int, aten.log_softmax.int, aten._safe_softmax.default,
         aten.cumsum.default, aten.scatter.value, aten.scatter.src, aten.scatter_add.default,
         aten.logcumsumexp.default), _along_argument(1)),
    **dict.fromkeys((aten._log_softmax_backward_data.default, aten._softmax_backward_data.default), _along_argument(2)),
    **dict.fromkeys(
        (aten.amax.default, aten.amin.default, aten.any.default, aten.any.dim, aten.all.default, aten.all.dim,
         aten.argmax.default, aten.argmin.default, aten.prod.dim_int, aten.logsumexp.default), _reduction),
    **dict.fromkeys(
        (aten.max_pool2d_with_indices_backward.default, aten.avg_pool2d_backward.default,
         aten._adaptive_avg_pool2d_backward.default), _images),
    **dict.fromkeys((aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default), _transform(1)),
    **dict.fromkeys(
        (aten.fft_fft.default, aten.fft_ifft.default, aten.fft_rfft.default, aten.fft_irfft.default, aten.fft_fft2.default,
         aten.fft_ifft2.default, aten.fft_rfft2.default, aten.fft_irfft2.default), _transform(2)),
    **dict.fromkeys((aten.view_as_real.default, aten.view_as_complex.default), _pairs),
    aten.gather.default: _gather,
    **dict.fromkeys((aten.log_sigmoid_forward.default, aten.polar.default, aten.complex.default), _elementwise),
    torch.ops.fxcurv.max_pool_columns.default: _max_pool_columns,
    torch.ops.fxcurv.syrk.default: _syrk,
    torch.ops.fxcurv.syrk_conv.default: _syrk_conv,
    aten.convolution_backward.default: _convolution_backward,
    aten.unfold.default: _unfold,
    aten.slice_backward.default: _slice_backward,
    aten.select_backward.default: _select_backward,
    aten.nll_loss_forward.default: _nll,
    aten.nll_loss2d_forward.default: _nll,
    **dict.fromkeys((aten.nll_loss_backward.default, aten.nll_loss2d_backward.default), _nll_backward),
    **dict.fromkeys(
        (aten.mse_loss_backward.default, aten.smooth_l1_loss_backward.default, aten.huber_loss_backward.default),
        _loss_backward),
    **dict.fromkeys((aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default), _reduced_loss),
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.index_add.default: _index_add,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.stack.default: _stack,
    **dict.fromkeys((aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default), _split_or_unbind),
    aten._linalg_eigh.default: _eigh,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.searchsorted.Tensor: _searchsorted,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention,
}  # fmt: skip
"""op -> function (sites, arguments, shapes) -> placement of the output; its arguments are `Shard` or `Replicate`."""
