"""The sample-independence algebra against a tensor that says of every element which sample it belongs to."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxcurv.ir import placement
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Shard, Site

FEW = settings(max_examples=120, deadline=None, derandomize=True)
NOBODY = -1


def owners(shape, place, n):
    """[*shape]: the sample of every element, NOBODY where it is the same for all."""
    if place == REPLICATE:
        return torch.full(shape, NOBODY)
    slots = torch.arange(shape[place.dim]).div(place.inner, rounding_mode="floor") % n
    return slots.view(-1, *[1] * (len(shape) - place.dim - 1)).expand(shape)


def descriptions(shape, n):
    """Every Shard that a shape allows."""
    for dim, size in enumerate(shape):
        for outer in range(1, size + 1):
            if size % (outer * n) == 0:
                yield Shard(dim, outer, size // (outer * n))


def explains(place, owner, n):
    return bool((owners(owner.shape, place, n) == owner).all())


@st.composite
def sites(draw, most=4, replicate=False):
    """(a value with samples somewhere, N): sizes around the sample axis are small."""
    n = draw(st.sampled_from([2, 3, 5]))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=most))
    if replicate and draw(st.booleans()):
        return Site(tuple(shape), REPLICATE, True), n
    dim = draw(st.integers(0, len(shape) - 1))
    outer, inner = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    shape[dim] = outer * n * inner
    return Site(tuple(shape), Shard(dim, outer, inner), True), n


@st.composite
def reshapes(draw):
    """(site, n, another shape with as many elements)."""
    site, n = draw(sites())
    factors = [p for size in site.shape for p in primes(size)]
    shape = [1] * draw(st.integers(1, 4))
    if draw(st.booleans()):  # products of neighbours give the reshapes that keep the sample axis more often
        cuts = sorted(draw(st.lists(st.integers(0, len(factors)), min_size=len(shape) - 1, max_size=len(shape) - 1)))
        bounds = [0, *cuts, len(factors)]
        shape = [prod(factors[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    else:
        for p in factors:
            shape[draw(st.integers(0, len(shape) - 1))] *= p
    return site, n, tuple(shape)


def primes(size):
    found, p = [], 2
    while size > 1:
        while size % p == 0:
            found.append(p)
            size //= p
        p += 1
    return found


@FEW
@given(reshapes())
def test_view(case):
    site, n, shape = case
    owner = owners(site.shape, site.place, n).reshape(shape)
    found = placement.view(site, shape, n)
    if found == MIXED:
        assert not any(explains(p, owner, n) for p in descriptions(shape, n))
    else:
        assert shape[found.dim] == found.outer * n * found.inner
        assert explains(found, owner, n)


@pytest.mark.parametrize("place", [REPLICATE, PARTIAL, MIXED])
def test_view_and_permute_keep_what_has_no_axis(place):
    site = Site((4, 6), place, True)
    assert placement.view(site, (24,), 2) == place
    assert placement.permute(place, (1, 0)) == place


@FEW
@given(sites(), st.data())
def test_permute(case, data):
    site, n = case
    order = data.draw(st.permutations(range(len(site.shape))))
    signed = [d - len(order) if data.draw(st.booleans()) else d for d in order]
    owner = owners(site.shape, site.place, n).permute(order)
    assert explains(placement.permute(site.place, tuple(signed)), owner, n)


@FEW
@given(sites(), st.data(), st.booleans(), st.booleans())
def test_reduction(case, data, keepdim, linear):
    site, n = case
    ndim = len(site.shape)
    dims = data.draw(st.lists(st.integers(0, ndim - 1), unique=True))
    signed = tuple(d - ndim if data.draw(st.booleans()) else d for d in dims)
    found = placement.reduction(site, signed, keepdim, linear)
    reduced = dims or range(ndim)
    owner = owners(site.shape, site.place, n)
    if site.place.dim in reduced:
        assert found == (PARTIAL if linear else MIXED)
        return
    for d in sorted(reduced, reverse=True):
        owner = owner.select(d, 0).unsqueeze(d) if keepdim else owner.select(d, 0)
    assert explains(found, owner, n)


@pytest.mark.parametrize(("linear", "result"), [(True, PARTIAL), (False, MIXED)])
def test_reduction_of_partial(linear, result):
    assert placement.reduction(Site((3, 4), PARTIAL, True), (0,), False, linear) == result
    assert placement.reduction(Site((3, 4), REPLICATE, True), (0,), False, linear) == REPLICATE
    assert placement.reduction(Site((3, 4), MIXED, True), (0,), False, linear) == MIXED


def same_axis(site, n, data):
    """Another value that broadcasts with `site`: fewer leading axes, ones, or samples at another place."""
    start = data.draw(st.integers(0, len(site.shape)))
    shape = [1 if data.draw(st.booleans()) else s for s in site.shape[start:]]
    options = [REPLICATE, *descriptions(shape, n)]
    return Site(tuple(shape), data.draw(st.sampled_from(options)), True)


@FEW
@given(sites(replicate=True), st.data(), st.booleans())
def test_pointwise(case, data, linear):
    site, n = case
    other = same_axis(site, n, data)
    both = [site, other] if data.draw(st.booleans()) else [other, site]
    found = placement.pointwise(both, len(site.shape), linear)
    a, b = torch.broadcast_tensors(owners(site.shape, site.place, n), owners(other.shape, other.place, n))
    conflict = bool(((a != b) & (a != NOBODY) & (b != NOBODY)).any())
    owner = torch.where(a == NOBODY, b, a)
    if conflict:
        assert found == MIXED
    elif found != MIXED:
        assert explains(found, owner, n)
    else:  # no conflict and yet mixed: two descriptions of the same samples must differ
        assert site.place != REPLICATE and other.place != REPLICATE


@pytest.mark.parametrize("linear", [True, False])
def test_pointwise_of_sums(linear):
    """A sum over samples stays one under linear maps with sample-free values only."""
    shard, partial, free, mixed = (Site((3, 4), p, True) for p in (Shard(0), PARTIAL, REPLICATE, MIXED))
    expected = PARTIAL if linear else MIXED
    assert placement.pointwise([partial, free], 2, linear) == expected
    assert placement.pointwise([partial, partial], 2, linear) == expected
    assert placement.pointwise([partial, shard], 2, linear) == MIXED
    assert placement.pointwise([mixed, partial], 2, linear) == MIXED
    assert placement.pointwise([mixed, free], 2, linear) == MIXED
    assert placement.pointwise([free, free], 2, linear) == REPLICATE
    assert placement.pointwise([shard, free], 2, linear) == Shard(0)


def test_merge():
    assert placement.merge([]) == REPLICATE
    assert placement.merge([Shard(0), REPLICATE, Shard(0)]) == Shard(0)
    assert placement.merge([Shard(0), Shard(1)]) == MIXED
    assert placement.merge([Shard(0), PARTIAL]) == MIXED


@FEW
@given(sites(), st.integers(0, 2))
def test_samples_first_and_back(case, lead):
    site, n = case
    front = (2, 3)[:lead]
    owner = owners(site.shape, site.place, n)
    marked = owner.expand(*front, *site.shape)
    first = placement.samples_first(marked, site.place, lead)
    slices = list(site.shape)
    slices[site.place.dim] //= n
    assert first.shape == (*front, n, *slices)
    expected = torch.arange(n).view(n, *[1] * len(slices)).expand(first.shape)
    assert torch.equal(first, expected)
    value = torch.arange(prod((*front, *site.shape))).reshape(*front, *site.shape)
    first = placement.samples_first(value, site.place, lead)
    assert torch.equal(placement.samples_back(first, site.place, lead), value)
    # a sample's slice keeps its elements in the order that they had
    index = tuple(0 for _ in front)
    assert torch.equal(first[index][0].flatten(), value[index].reshape(site.shape)[owner == 0])


@FEW
@given(sites(most=3), st.data())
def test_sizes_that_hide_the_batch(case, data):
    """An axis of size 1 is never the samples'."""
    site, n = case
    where = data.draw(st.integers(0, len(site.shape)))
    shape = (*site.shape[:where], 1, *site.shape[where:])
    found = placement.view(site, shape, n)
    assume(isinstance(found, Shard))
    assert shape[found.dim] == found.outer * n * found.inner > 1
