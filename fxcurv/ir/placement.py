"""Where the samples live on a value: the sample-independence algebra, in the words of `DTensor`.

Sizes here are plain integers, with the symbolic batch size replaced by a prime, so that a factor of N in a size
is never a coincidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from fxcurv.ir.lengths import said


@dataclass(frozen=True)
class Shard:
    """One slice per sample: dimension `dim` has size outer * N * inner and holds the samples in its middle."""

    dim: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Whole(Shard):
    """The batch is one sample, and the whole value its slice; `outer` is the size of dimension 0, if there is one."""


@dataclass(frozen=True)
class Alike(Shard):
    """The same for all samples along `dim` (zeros, ones), wherever in it the samples are taken to be."""


@dataclass(frozen=True)
class Replicate:
    """The same for all samples."""


@dataclass(frozen=True)
class Partial:
    """A sum over samples of terms that each depend on one sample."""


@dataclass(frozen=True)
class Mixed:
    """Samples interact."""


Placement = Shard | Replicate | Partial | Mixed
REPLICATE, PARTIAL, MIXED = Replicate(), Partial(), Mixed()


def places_of(place: Placement | list[Placement] | None) -> list[Any]:
    """The placements of all outputs of an op, as a list."""
    return place if isinstance(place, list) else [place]


@dataclass(frozen=True)
class Site:
    """What a placement rule sees of one argument: its shape, its placement, whether it depends on parameters."""

    shape: tuple[int, ...]
    place: Placement
    active: bool


def shifted(place: Shard, lead: int = 1) -> Shard:
    """The placement behind `lead` more leading axes."""
    return Shard(place.dim + lead, place.outer, place.inner)


def merge(places: list[Placement]) -> Placement:
    """Placement of an op that acts slice by slice on arguments whose shards are already aligned."""
    shards = {p for p in places if isinstance(p, Shard)}
    others = [p for p in places if not isinstance(p, Shard | Replicate)]
    if others or len(shards) > 1:
        return MIXED
    return shards.pop() if shards else REPLICATE


def pointwise(sites: list[Site], ndim: int, linear: bool) -> Placement:
    """Placement of a broadcasting elementwise op with `ndim` output dimensions.

    Next to a sharded value that depends on parameters, constants do not matter.
    """
    if any(isinstance(s.place, Mixed) for s in sites):
        return MIXED
    if any(isinstance(s.place, Partial) for s in sites):
        return PARTIAL if linear and not any(isinstance(s.place, Shard) for s in sites) else MIXED
    sharded = [s for s in sites if s.active and isinstance(s.place, Shard)]
    aligned = [
        Shard(s.place.dim + ndim - len(s.shape), s.place.outer, s.place.inner)
        if isinstance(s.place, Shard)
        else s.place
        for s in sharded or sites
    ]
    return merge(aligned)


def reduction(site: Site, dims: tuple[int, ...], keepdim: bool, linear: bool) -> Placement:
    """Placement of a reduction of `site` over `dims` (linear: sums and means)."""
    if isinstance(site.place, Partial):
        return PARTIAL if linear else MIXED
    if not isinstance(site.place, Shard):
        return site.place
    ndim = len(site.shape)
    dims = tuple(d % ndim for d in dims) or tuple(range(ndim))
    if site.place.dim in dims:
        return PARTIAL if linear else MIXED
    shift = 0 if keepdim else sum(d < site.place.dim for d in dims)
    return Shard(site.place.dim - shift, site.place.outer, site.place.inner)


def view(site: Site, shape: tuple[int, ...], n: int) -> Placement:
    """Placement after a row-major reshape of `site` to `shape`, where the batch size is `n`."""
    if not isinstance(site.place, Shard):
        return site.place
    if not prod(site.shape):  # without entries there is nothing to be elsewhere
        fits = [dim for dim, size in enumerate(shape) if size and size % n == 0]
        dim = site.place.dim if site.place.dim in fits else next(iter(fits), None)
        return MIXED if dim is None else Shard(dim, shape[dim] // n)
    after = site.place.inner * prod(site.shape[site.place.dim + 1 :])
    for dim, size in enumerate(shape):
        rest = prod(shape[dim + 1 :])
        covers = after % rest == 0 and (rest * size) % (after * n) == 0
        if covers and not (size == 1 and n > 1):
            inner = after // rest
            return Shard(dim, size // (n * inner), inner)
    return MIXED


def permute(place: Placement, order: tuple[int, ...]) -> Placement:
    """Placement after `permute(order)`."""
    if not isinstance(place, Shard):
        return place
    order = tuple(d % len(order) for d in order)
    return Shard(order.index(place.dim), place.outer, place.inner)


def halves(n: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """For every bit of a sample's number: the samples that have it, and those that do not.

    Any two samples differ in a bit, so that a change of each half in turn shows every pair that meets.
    """
    bits = range(max(1, (n - 1).bit_length()))
    return [(tuple(k for k in range(n) if k >> b & 1), tuple(k for k in range(n) if not k >> b & 1)) for b in bits]


def samples_first(t, place: Shard, lead: int = 0):
    """Split the sample axis of `t` off and move it behind `lead` leading axes.

    The slice behind it keeps the original number of dimensions, with the sample's dimension at outer * inner.
    `[*lead, d0, outer*N*inner, d2] -> [*lead, N, d0, outer*inner, d2]`.
    """
    if isinstance(place, Whole):
        return t.unsqueeze(lead)
    dim = place.dim + lead
    if place.outer == place.inner == 1:
        return t.movedim(dim, lead).unsqueeze(dim + 1)
    t = t.unflatten(dim, (said(place.outer), -1, said(place.inner)))
    return t.movedim(dim + 1, lead).flatten(dim + 1, dim + 2)


def samples_back(t, place: Shard, lead: int = 0):
    """The inverse of `samples_first` for contiguous slices."""
    if isinstance(place, Whole):
        return t.squeeze(lead)
    dim = place.dim + lead
    if place.outer == place.inner == 1:
        return t.squeeze(dim + 1).movedim(lead, dim)
    t = t.unflatten(dim + 1, (said(place.outer), said(place.inner))).movedim(lead, dim + 1)
    return t.flatten(dim, dim + 2)
