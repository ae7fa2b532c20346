"""Factors against autograd and loops, and every candidate against the definition."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcurv.contractions.candidates import CANDIDATES, Candidate
from fxcurv.contractions.contract import Contract, Spec, combine, contract
from fxcurv.contractions.factors import Arrange, Conv, Dense, Explicit, Gather, unfold
from fxcurv.contractions.sizes import dims
from fxcurv.cost import CPU
from fxcurv.ir.placement import Shard

FEW = settings(max_examples=25, deadline=None, derandomize=True)
N = 3
PLAIN = Shard(0)


def t(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ---- factors with their P, computed another way ------------------------------


def dense(v, s, k, o, i, order=(0, 1, 2), n=N):
    """Dense with the core's axes (k, o, i) permuted to the parameter's."""
    a, g = t(n, s, k, i), t(v, n, s, k, o)
    shape = tuple((k, o, i)[d] for d in order)
    core = torch.zeros(v, n, k, o, i, dtype=torch.float64)
    for c, m, p in itertools.product(range(v), range(n), range(s)):
        for group in range(k):
            core[c, m, group] += torch.outer(g[c, m, p, group], a[m, p, group])
    return Dense(a, g, Arrange((k, o, i), order, shape)), core.permute(0, 1, *(d + 2 for d in order))


def gather(v, s, rows, d, padding, n=N):
    index, g = torch.randint(rows, (n, s)), t(v, n, s, d)
    p = torch.zeros(v, n, rows, d, dtype=torch.float64)
    for m, q in itertools.product(range(n), range(s)):
        if int(index[m, q]) != padding:
            p[:, m, index[m, q]] += g[:, m, q]
    return Gather(index, g, rows, padding), p


def jacobian(v, *shape, n=N):
    p = t(v, n, *shape)
    return Explicit(p), p


FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
BACK = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv(v, size, kernel, stride, padding, dilation, groups=1, extra=None, place=PLAIN, n=N):
    """A convolution's factor and P by autograd, one sample at a time; `extra`: transposed, with this output padding."""
    d, transposed = len(size), extra is not None
    batch, cin, cout = n * place.outer * place.inner, 2 * groups, 3 * groups
    a = t(batch, cin, *size)
    shape = (cin, cout // groups, *kernel) if transposed else (cout, cin // groups, *kernel)
    weight = t(*shape).requires_grad_()

    def op(x):
        if transposed:
            return BACK[d](x, weight, None, stride, padding, extra, groups, dilation)
        return FORWARD[d](x, weight, None, stride, padding, dilation, groups)

    y = op(a)
    g = t(v, *y.shape)
    owner = torch.arange(batch).div(place.inner, rounding_mode="floor") % n
    rows = []
    for column in g:
        each = [column * (owner == m).view(-1, *[1] * (d + 1)) for m in range(n)]
        rows.append(torch.stack([torch.autograd.grad(y, weight, e, retain_graph=True)[0] for e in each]))
    factor = Conv(a, g, place, kernel, stride, padding, dilation, groups, transposed, tuple(extra or (0,) * d), shape)
    return factor, torch.stack(rows)


CASES = {
    "linear": lambda: dense(2, 1, 1, 3, 4),
    "linear_one_column": lambda: dense(1, 1, 1, 3, 4, (0, 2, 1)),
    "sequence": lambda: dense(2, 5, 1, 3, 4),
    "sequence_one_column": lambda: dense(1, 5, 1, 3, 4, (2, 0, 1)),
    "groups": lambda: dense(2, 1, 3, 2, 4, (1, 0, 2)),
    "groups_sequence": lambda: dense(2, 4, 3, 2, 3, (2, 1, 0)),
    "one_sample": lambda: dense(2, 3, 1, 2, 2, n=1),
    "conv1d": lambda: conv(2, (7,), (3,), (2,), (1,), (1,)),
    "conv1d_merged_samples": lambda: conv(2, (5,), (2,), (1,), (0,), (2,), place=Shard(0, 2, 2)),
    "conv2d": lambda: conv(2, (5, 4), (3, 2), (2, 1), (1, 0), (1, 2)),
    "conv2d_groups": lambda: conv(2, (5, 4), (2, 2), (1, 1), (1, 1), (1, 1), groups=2),
    "conv2d_unread_rows": lambda: conv(1, (6, 6), (3, 3), (2, 2), (0, 0), (1, 1)),
    "conv2d_pointwise": lambda: conv(2, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    "conv3d": lambda: conv(1, (3, 4, 3), (2, 2, 1), (1, 2, 1), (1, 0, 0), (1, 1, 1)),
    "back1d": lambda: conv(2, (4,), (3,), (2,), (1,), (1,), extra=(1,)),
    "back1d_merged_samples": lambda: conv(2, (4,), (3,), (2,), (1,), (1,), extra=(0,), place=Shard(0, 1, 2)),
    "back2d_groups": lambda: conv(2, (3, 3), (2, 3), (2, 1), (0, 1), (1, 2), groups=2, extra=(1, 0)),
    "back3d": lambda: conv(1, (2, 2, 3), (2, 2, 2), (1, 2, 1), (0, 0, 1), (1, 1, 1), extra=(0, 1, 0)),
    "embedding": lambda: gather(2, 4, 5, 3, -1),
    "embedding_padding": lambda: gather(2, 6, 3, 2, 1),
    "embedding_one_position": lambda: gather(1, 1, 4, 2, 0),
    "jacobian": lambda: jacobian(2, 3, 4),
    "jacobian_scalar": lambda: jacobian(2),
}
# Several uses of one parameter: their P add before anything is squared.
SEVERAL = {
    "linear_twice": lambda: [dense(2, 1, 1, 3, 4), dense(2, 3, 1, 3, 4)],
    "groups_twice": lambda: [dense(2, 2, 2, 3, 4), dense(2, 1, 2, 3, 4)],
    "arranged_in_two_ways": lambda: [dense(2, 1, 1, 3, 4, (0, 2, 1)), dense(2, 2, 1, 4, 3)],
    "conv_twice": lambda: [conv(2, (5,), (3,), (1,), (1,), (1,)), conv(2, (4,), (3,), (2,), (0,), (1,))],
    "conv_and_jacobian": lambda: [conv(2, (5,), (3,), (1,), (1,), (1,)), jacobian(2, 3, 2, 3)],
    "embedding_twice": lambda: [gather(2, 4, 5, 3, 2), gather(2, 1, 5, 3, 2)],
    "embedding_with_two_paddings": lambda: [gather(2, 4, 5, 3, 2), gather(2, 3, 5, 3, -1)],
    "tied_embedding": lambda: [gather(2, 4, 5, 3, -1), dense(2, 4, 1, 5, 3, (0, 1, 2))],
    "jacobians": lambda: [jacobian(2, 4), jacobian(2, 4), jacobian(2, 4)],
}


def built(name):
    """(factors, P)."""
    torch.manual_seed(0)
    pairs = [CASES[name]()] if name in CASES else SEVERAL[name]()
    shape = max((p.shape for _, p in pairs), key=len)
    if name in SEVERAL and any(p.shape != pairs[0][1].shape for _, p in pairs):
        # a core [1, O, I] and a matrix are one parameter
        shape = min((p.shape for _, p in pairs), key=len)
        pairs = [(reshaped(f, shape[2:]), p.reshape(shape)) for f, p in pairs]
    return [f for f, _ in pairs], sum(p for _, p in pairs)


def reshaped(factor, shape):
    if isinstance(factor, Dense):
        sizes = tuple(factor.arrange.sizes[d] for d in range(3))
        return Dense(factor.a, factor.g, Arrange(sizes, factor.arrange.order, tuple(shape)))
    return factor


EVERY = [*CASES, *SEVERAL]
REDUCTIONS = ("", "v", "n", "vn", "p", "vp", "np", "vnp")


def reduced(p, power, reduce, samples, weights):
    """The definition of a contraction."""
    p = p if samples is None else p[:, list(samples)]
    value = p**power
    if weights is not None:
        w = weights.expand(p.shape[:2])
        value = value * w.reshape(*w.shape, *[1] * (p.ndim - 2))
    if "p" in reduce:
        value = value.flatten(2).sum(2) if value.ndim > 2 else value
    for axis, letter in ((1, "n"), (0, "v")):
        value = value.sum(axis) if letter in reduce else value
    return value


def weightings(p, samples):
    n = p.shape[1] if samples is None else len(samples)
    return [None, t(p.shape[0], n), t(1, n), t(p.shape[0], 1)]


def specs(p):
    for power, reduce, samples in itertools.product((1, 2), REDUCTIONS, (None, (0, 0), (p.shape[1] - 1, 0))):
        for weights in weightings(p, samples):
            yield Spec(power, reduce, samples), weights


@pytest.mark.parametrize("name", EVERY)
def test_p(name):
    factors, p = built(name)
    total = sum(f.materialise() for f in factors)
    torch.testing.assert_close(total, p)
    torch.testing.assert_close(sum(f.dense().materialise() for f in factors), p)
    for weights in weightings(p, None):
        summed = sum(f.summed(weights) for f in factors)
        torch.testing.assert_close(summed, reduced(p, 1, "vn", None, weights))
    index = torch.tensor([p.shape[1] - 1, 0, 0])
    torch.testing.assert_close(sum(f.dense().samples(index).materialise() for f in factors), p[:, index])


@pytest.mark.parametrize("name", EVERY)
def test_candidates(name):
    """Every candidate that says it applies computes the definition, and so does the contract node itself."""
    factors, p = built(name)
    used = set()
    for spec, weights in specs(p):
        expected = reduced(p, spec.power, spec.reduce, spec.samples, weights)
        told = f"{spec} weights {None if weights is None else tuple(weights.shape)}"
        torch.testing.assert_close(contract(spec, factors, weights), expected, msg=lambda m, t=told: f"{t}: {m}")
        for candidate in CANDIDATES:
            if candidate.applies(spec, factors):
                used.add(candidate.name)
                actual = candidate.run(spec, factors, weights)
                torch.testing.assert_close(actual, expected, msg=lambda m, c=candidate, t=told: f"{c.name} {t}: {m}")
                cost = candidate.cost(spec, factors)
                assert cost.seconds(CPU) > 0
                assert min(cost.flops, cost.bytes, cost.fresh, cost.calls) >= 0
    assert {"materialise", "direct"} <= used


def test_every_candidate_applies_somewhere():
    kinds = set()
    for name in EVERY:
        factors, p = built(name)
        for spec, _ in specs(p):
            kinds |= {type(c) for c in CANDIDATES if c.applies(spec, factors)}
    assert kinds == {*Candidate.__subclasses__()} and len({kind.name for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("name", EVERY)
def test_contract_node(name):
    """The target of a contract node: flat tensors in, the same number out; equal ones are one dictionary key."""
    factors, p = built(name)
    spec, weights = Spec(2, "vn"), t(*p.shape[:2])
    target, args = Contract.of(spec, factors, weights)
    again, _ = Contract.of(spec, factors, weights)
    assert target == again
    assert hash(target) == hash(again)
    assert all(isinstance(a, torch.Tensor) for a in args)
    torch.testing.assert_close(target(*args), reduced(p, 2, "vn", None, weights))


@pytest.mark.parametrize("name", ["linear_twice", "groups_twice", "conv_twice", "embedding_twice", "jacobians"])
def test_uses_of_one_kind_become_one(name):
    factors, p = built(name)
    (one,) = combine(Spec(2, "vn"), factors)
    torch.testing.assert_close(one.materialise(), p)


@pytest.mark.parametrize("name", CASES)
def test_dims(name):
    """The sizes that costs are made of."""
    (factor,), p = built(name)
    found = dims(factor)
    assert (found.v, found.n) == p.shape[:2]
    assert found.p == prod(p.shape[2:])
    if not isinstance(factor, Explicit | Gather):
        plain = factor.dense()
        assert (found.s, found.k) == tuple(plain.g.shape[2:4])
        assert (found.o, found.i) == (plain.g.shape[4], plain.a.shape[3])


@FEW
@given(st.data())
def test_unfold(data):
    """Patches in any number of dimensions, against the convolution with the identity as its kernel."""
    d = data.draw(st.integers(1, 3))
    numbers = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(d))  # noqa: E731
    kernel, stride, padding, dilation = numbers(1, 3), numbers(1, 3), numbers(0, 2), numbers(1, 2)
    size = tuple(di * (k - 1) + 1 + data.draw(st.integers(0, 3)) for k, di in zip(kernel, dilation, strict=True))
    channels = data.draw(st.integers(1, 2))
    x = t(2, channels, *size)
    eye = torch.eye(channels * prod(kernel), dtype=torch.float64).reshape(-1, channels, *kernel)
    y = FORWARD[d](x, eye, None, stride, padding, dilation)
    torch.testing.assert_close(unfold(x, y.shape[2:], kernel, stride, padding, dilation), y.flatten(2))
