"""What `rules/traits.py`, tables of other rules and the attributes of rules claim of ops, tried: no derivative rule takes part.

Every claim is tried on a few calls of its op. `test_all_claims_on_the_whole_database` takes the calls of every sample of
PyTorch's operator database instead.
"""

from __future__ import annotations

import ast
import collections
import functools
import itertools
import math
import random
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_samples import aten, canonical, floats, run, samples, shapes, t, tensors, with_leaves
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fxcurv.kernels.max_pool_columns import max_pool_columns  # noqa: F401  (registers the op)
from fxcurv.rules import RULES, bindings, split, traits, trial
from fxcurv.rules.base import FALLBACK, rule_of
from fxcurv.rules.call import Call

MOST = 12
"""Entries of an argument that are changed one by one."""
LARGEST = 120
"""Elements of an argument of a call that is tried, where there are such calls."""


def pooled(x, window):
    return torch.ops.aten.max_pool2d_with_indices.default(x, *window)[1]


# what is drawn where only a shape is read, with default parameters
DRAWN = [
    aten.rand_like.default, aten.uniform.default, aten.exponential.default, aten.cauchy.default, aten.log_normal.default,
]  # fmt: skip


def by_hand() -> dict[Any, list[tuple]]:
    """Op -> arguments without trailing defaults, where the database and `op_samples` have none."""
    index, window = torch.tensor([[2, 0, 1], [1, 1, 0]]), ([2, 2], [2, 2], [0, 0], [1, 1], False)
    x = t(2, 3, 4, 6)
    y = x[0].softmax(1)
    return {
        aten.slice_backward.default: [(t(3, 2), [3, 4], 1, 1, 3, 1)],
        aten.select_backward.default: [(t(3), [3, 4], 1, 2)],
        aten.scatter.value: [(t(3, 3), 0, index, 1.5)],
        aten.scatter.src: [(t(3, 3), 0, index, t(3, 3))],
        aten.scatter_add.default: [(t(3, 3), 0, index, t(3, 3))],
        aten._softmax_backward_data.default: [(t(3, 4, 6), y, 1, torch.float64)],
        aten._log_softmax_backward_data.default: [(t(3, 4, 6), y.log(), 1, torch.float64)],
        aten.index.Tensor: [(t(4, 3), [torch.tensor([2, 0, 2])])],
        aten.zeros.default: [([3, 2],)], aten.ones.default: [([3, 2],)], aten.full.default: [([3, 2], 2.5)],
        aten.new_zeros.default: [(t(2), [3, 2])], aten.new_ones.default: [(t(2), [3, 2])],
        aten.new_full.default: [(t(2), [3, 2], 2.5)], aten.new_empty.default: [(t(2), [3, 2])],
        aten.zeros_like.default: [(t(3, 2),)], aten.ones_like.default: [(t(3, 2),)], aten.full_like.default: [(t(3, 2), 2.5)],
        aten.empty_like.default: [(t(3, 2),)], aten.arange.default: [(5,)], aten.arange.start_step: [(0, 6, 2)],
        aten.eye.default: [(3,)], aten.fill.Scalar: [(t(3, 2), 2.5)], aten.zero.default: [(t(3, 2),)],
        aten.nll_loss_forward.default: [
            (t(5, 3), classes, w, r, -100) for classes in (torch.tensor([2, 0, -100, 1, 1]),) for w in (None, t(3).abs())
            for r in (1, 2)
        ],
        aten.nll_loss2d_forward.default: [(t(2, 3, 1, 3), index[:, None] % 3, w, 1, -100) for w in (None, t(3).abs())],
        aten.to.other: [(t(3, 2), t(2))], aten.type_as.default: [(t(3, 2), t(2))],
        aten.detach.default: [(t(3, 2),)], aten.prod.dim_int: [(t(3, 4, 2), 1), (t(3, 4), -1, True)],
        aten.logsumexp.default: [(t(3, 4, 2), [1])], aten.softmax.int: [(t(3, 4, 2), 1), (t(3, 4), -1)],
        aten.log_softmax.int: [(t(3, 4, 2), 1), (t(3, 4), -1)],
        aten.avg_pool2d.default: [(x, [2, 3])], aten._adaptive_avg_pool2d.default: [(x, [2, 2])],
        aten.max_pool2d_with_indices_backward.default: [(t(2, 3, 2, 3), x, *window, pooled(x, window))],
        torch.ops.fxcurv.max_pool_columns.default: [(t(5, 2, 3, 2, 3), x, pooled(x, window), *window)],
        aten.binomial.default: [(torch.full((3,), 4.0, dtype=torch.float64), y[0, 0, :3])],
        aten.poisson.default: [(y[0, 0],)],
        aten.geometric.default: [(y[0], 0.4)],
        aten.normal.float_Tensor: [(0.5, y[0])],
        aten.normal_functional.default: [(y[0],)],
        **{op: [(y[0],)] for op in DRAWN},
    }  # fmt: skip


@functools.cache
def calls(op) -> list[tuple]:
    """Canonical arguments of calls of `op`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hand = [canonical(op, args, {}) for args in by_hand().get(op, [])]
    found = hand + [args for _, args in samples(op)]
    assert found, f"no call of {op} to try the claim on"
    return [args for args in found if all(x.numel() <= LARGEST for x in tensors(args).values())] or found[:1]


def first(op, args) -> Tensor:
    """The first output, the same numbers drawn at every call."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        y = run(op, args)
    return y if isinstance(y, Tensor) else y[0]


def able(args) -> list[int]:
    return [i for i, x in tensors(args).items() if x.is_floating_point()]


def changed(x: Tensor, entries: Tensor | int) -> Tensor:
    """`x` with some of its entries drawn anew, in the same range."""
    new = x.flatten().clone()
    new[entries] = new[entries] * 0.5 + 0.123
    return new.reshape(x.shape)


def moved(op, args, i: int, entries) -> Tensor:
    """Which entries of the first output move when those of the argument do."""
    before = first(op, args)
    after = first(op, with_leaves(args, {i: changed(tensors(args)[i], entries)}))
    return (before != after) & ~(before.isnan() & after.isnan())


def some(x: Tensor) -> list[int]:
    return sorted({int(e) for e in torch.linspace(0, x.numel() - 1, min(MOST, x.numel()))})


def node(op, args) -> fx.Node:
    """A call as a node, with its value."""
    graph = fx.Graph()

    def placeholder(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        made = graph.placeholder("x")
        made.meta["val"] = leaf
        return made

    args = pytree.tree_map(placeholder, args)
    schema = op._schema.arguments
    positional = tuple(v for a, v in zip(schema, args, strict=True) if not a.kwarg_only)
    keywords = {a.name: v for a, v in zip(schema, args, strict=True) if a.kwarg_only}
    made = graph.call_function(op, positional, keywords)
    made.meta["val"] = fx.node.map_arg(made.args, lambda n: n.meta["val"]) and run(op, pytree.tree_map(
        lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, args))  # fmt: skip
    return made


def having(name: str) -> list[Any]:
    """The ops whose rule has an attribute."""
    return [op for op, rule in RULES.items() if getattr(rule, name)]


CLAIMS: list[tuple[Callable, list[Any]]] = []
"""(a test of one op, the ops of which its claim is made)"""


def each(ops):
    """A test for each of `ops`, which is a claim."""
    ops = sorted(ops, key=str)

    def claimed(test):
        CLAIMS.append((test, ops))
        return pytest.mark.parametrize("op", ops, ids=str)(test)

    return claimed


# ---- what rules say ------------------------------


def is_elementwise(op, args) -> bool:
    """Whether every entry of the output moves with the entries at its place alone."""
    y = first(op, args)
    for i in able(args):
        x = tensors(args)[i]
        try:
            place = torch.arange(x.numel()).reshape(x.shape).broadcast_to(y.shape)
        except RuntimeError:
            return False
        if any((moved(op, args, i, e) & (place != e)).any() for e in some(x)):
            return False
    return True


@each(having("elementwise"))
def test_elementwise(op):
    assert all(is_elementwise(op, args) for args in calls(op))


@each(having("in_order"))
def test_in_order(op):
    for args in calls(op):
        y = first(op, args)
        assert y.reshape(-1).equal(tensors(args)[0].reshape(-1).to(y.dtype))


@each(having("index_map"))
def test_index_map(op):
    """Every entry of the output is one of the arguments' or a constant, and which one is no matter of values."""
    for args in calls(op):
        found = []
        for seed in range(2):
            drawn = torch.Generator().manual_seed(seed)
            new = {i: torch.rand(tensors(args)[i].shape, generator=drawn, dtype=torch.float64) + 2 for i in able(args)}
            y = first(op, with_leaves(args, new))
            if not y.is_floating_point():
                break  # integers may be equal
            values = torch.cat([x.flatten() for x in new.values()]).to(y.dtype)
            match = y.flatten().unsqueeze(1) == values
            assert (match.sum(1) <= 1).all()
            found.append((match, y.flatten()))
        if not found:
            continue
        (one, y), (two, z) = found
        assert one.equal(two)
        assert y[~one.any(1)].equal(z[~one.any(1)])


@each(having("shifts"))
def test_shifts(op):
    for args in calls(op):
        x = tensors(args)[0]
        y, d = first(op, args), torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
        torch.testing.assert_close(first(op, with_leaves(args, {0: x + d})), y + d)


@each(having("picks"))
def test_picks(op):
    for args in calls(op):
        y, index = run(op, args)
        dims = rule_of(op, {}).mixed_axes(args)
        assert y.flatten(-dims).equal(args[0].flatten(-dims).gather(-1, index.flatten(-dims)))


@each(op for op, rule in RULES.items() if type(rule).mixed_axes is not type(FALLBACK).mixed_axes)
def test_mixed_axes(op):
    """A slice over the last axes moves the slice at its place alone."""
    for args in calls(op):
        x, y = args[0], first(op, args)
        lead = x.ndim - rule_of(op, {}).mixed_axes(args)
        assert x.shape[:lead] == y.shape[:lead]
        where = torch.arange(math.prod(x.shape[:lead]))
        of_entry = where.reshape(*x.shape[:lead], *[1] * (x.ndim - lead)).expand(x.shape).flatten()
        of_output = where.reshape(*x.shape[:lead], *[1] * (y.ndim - lead)).expand(y.shape)
        for k in where:
            assert not (moved(op, args, 0, (of_entry == k).nonzero().flatten()) & (of_output != k)).any()


RESTRIDED = [op for op, rule in RULES.items() if type(rule).restrided is not type(FALLBACK).restrided]


@each(RESTRIDED)
def test_restrided(op):
    for args in calls(op):
        x, y = args[0], first(op, args)
        found = rule_of(op, {}).restrided(x, args, tuple(y.shape))
        assert found.to(y.dtype).equal(y)
        assert found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_all_other_rules_refuse_to_be_followed_by_strides():
    assert all(rule.restrided(t(2), (), (2,)) is None for op, rule in RULES.items() if op not in RESTRIDED)


# ---- layers ------------------------------


@each(traits.WEIGHTS)
def test_weights(op):
    """An entry moves one index of the axis; all indices have entries."""
    position, axis = traits.WEIGHTS[op]
    for args in sorted(calls(op), key=lambda a: a[position].numel())[:4]:
        i = next(k for k, leaf in enumerate(pytree.tree_leaves(args)) if leaf is args[position])
        if op is aten.linear.default and args[1].ndim < 2:
            continue  # one feature, without an axis of its own
        y, seen = first(op, args), set()
        for e in range(args[position].numel()):
            there = (
                moved(op, args, i, e).movedim(axis, 0).reshape(y.shape[axis], -1).any(1).nonzero().flatten().tolist()
            )
            assert len(there) <= 1
            seen.update(there)
        assert seen == set(range(y.shape[axis])) or op is aten.embedding.default


@each(traits.BIASES)
def test_biases(op):
    position, axis = traits.BIASES[op]
    tried = 0
    for args in calls(op):
        bias = args[position]
        if bias is None or bias.ndim != 1:
            continue
        y, d = first(op, args), torch.linspace(1, 2, len(bias), dtype=bias.dtype)
        new = list(args)
        new[position] = bias + d
        along = d.reshape(*d.shape, *[1] * (y.ndim - axis % y.ndim - 1))
        torch.testing.assert_close(first(op, tuple(new)), y + along)
        tried += 1
    assert tried


@each(traits.PRODUCTS)
def test_products(op):
    for args in calls(op):
        x, z, *rest = args
        alone = (None, *rest[1:]) if rest else ()
        y = first(op, (x, z, *alone))
        for k in (0, 1):
            new = [x, z]
            other = torch.randn_like(new[k])
            new[k] = 2 * new[k] + other
            only = [x, z]
            only[k] = other
            torch.testing.assert_close(first(op, (*new, *alone)), 2 * y + first(op, (*only, *alone)))
        if rest and rest[0] is not None:  # what is added does not depend on x and z
            torch.testing.assert_close(first(op, args) - y, first(op, (0 * x, 0 * z, *rest)))


@each(traits.MATRIX_PRODUCTS)
def test_matrix_products(op):
    for args in calls(op):
        x, z = args[:2]
        if z.ndim < 2:
            continue
        torch.testing.assert_close(
            first(op, (x, z, *[None] * (len(args) - 2))), x @ (z.mT if traits.MATRIX_PRODUCTS[op] else z)
        )


def test_convolution():
    for args in calls(aten.convolution.default):
        conv = traits.convolution(node(aten.convolution.default, args))
        assert conv.groups == args[8]
        assert conv.stride == args[3] and conv.weight.meta["val"] is args[1]
    assert traits.convolution(node(aten.mm.default, (t(2, 3), t(3, 4)))) is None


@each(traits.APART)
def test_apart(op):
    """At equal values, what is read alone has a derivative, which a cotangent of zero for the others makes NaN."""
    x = torch.eye(3, dtype=torch.float64)
    outputs, pull = torch.func.vjp(lambda x: tuple(FALLBACK.formula(op, canonical(op, (x,), {}))), x)
    values = next(k for k, y in enumerate(outputs) if y.ndim == 1)
    g = [torch.arange(1.0, 4).double() if k == values else torch.zeros_like(y) for k, y in enumerate(outputs)]
    assert pull(tuple(g))[0].isnan().any()
    alone = tuple(c.unsqueeze(0) if k == values else None for k, c in enumerate(g))
    call = Call(op, canonical(op, (x,), {}), outputs, None, (None,), (None,))
    (found,) = FALLBACK.transpose(call, (0,), alone)
    torch.testing.assert_close(found[0].diagonal().sum(), g[values].sum())


# ---- sums and zeros ------------------------------


def test_plain_sum():
    x = t(3, 4)
    assert traits.plain_sum(node(aten.add.Tensor, (x, x, 1)))
    assert not traits.plain_sum(node(aten.add.Tensor, (x, x, 2)))
    assert not traits.plain_sum(node(aten.sub.Tensor, (x, x, 1)))


@each([*traits.ZEROS, aten.full.default])
def test_zeros(op):
    for args in calls(op):
        args = (args[0], 0, *args[2:]) if op is aten.full.default else args
        assert traits.makes_zeros(node(op, args)) and not run(op, args).any()
    assert not traits.makes_zeros(node(aten.full.default, canonical(aten.full.default, ([2], 1.0), {})))


def keeps_zero(op, args) -> bool:
    x = tensors(args)[0]
    return not first(op, with_leaves(args, {0: torch.zeros_like(x)})).any()


@each(traits.KEEP_ZERO)
def test_keep_zero(op):
    assert all(keeps_zero(op, args) for args in calls(op))


@each(traits.ZERO_FACTOR)
def test_zero_factor(op):
    for args in calls(op):
        for i in able(args):
            assert not first(op, with_leaves(args, {i: torch.zeros_like(tensors(args)[i])})).any()


@each(traits.ONES)
def test_ones(op):
    for args in calls(op):
        assert run(op, args).eq(1).all()


@each(traits.KEEP_ONES)
def test_keep_ones(op):
    for args in calls(op):
        assert first(op, with_leaves(args, {0: torch.ones_like(tensors(args)[0])})).eq(1).all()


@each(traits.SUMS)
def test_sums(op):
    for args in calls(op):
        x, dims, keep, _ = args
        if not x.ndim:
            continue
        expected = x
        for d in sorted(dims or range(x.ndim), key=lambda d: d % max(1, x.ndim), reverse=True):
            expected = (
                torch.stack(expected.unbind(d)).sum(0).unsqueeze(d) if keep else torch.stack(expected.unbind(d)).sum(0)
            )
        torch.testing.assert_close(first(op, args), expected)


SAMPLES_IN_PLACE = {
    aten.pow.Tensor_Scalar: (2,), aten.index_add.default: (0, torch.tensor([2, 0, 2]), t(3, 4)),
}  # fmt: skip


@each(traits.IN_PLACE)
def test_in_place(op):
    """The same numbers, in the memory of the first argument."""
    x, rest = t(3, 4), SAMPLES_IN_PLACE.get(op, (t(3, 4) + 2,))
    expected, there = op(x, *rest), x.clone()
    assert traits.IN_PLACE[op](there, *rest).data_ptr() == there.data_ptr()
    torch.testing.assert_close(there, expected)


@each(traits.ADDING)
def test_adding(op):
    """What is added to the first argument before is added to the result."""
    x, z, rest = t(3, 4), t(3, 4), SAMPLES_IN_PLACE.get(op, (t(3, 4),))
    torch.testing.assert_close(op(x + z, *rest), op(x, *rest) + z)


@each(traits.ADDED)
def test_added(op):
    lead = (2,) if op is aten.bmm.default else ()
    a, b, total = t(*lead, 3, 4), t(*lead, 4, 5), t(*lead, 3, 5)
    expected = total + op(a, b)
    torch.testing.assert_close(traits.ADDED[op](None, a, b), op(a, b))
    assert traits.ADDED[op](total, a, b) is total
    torch.testing.assert_close(total, expected)


@each(traits.SCATTERS)
def test_scatters(op):
    """Every value is at one position of its own plane."""
    for args in calls(op):
        g = args[0]
        for e in range(g.numel()):
            one = torch.zeros(g.numel(), dtype=g.dtype)
            one[e] = 1
            one = one.reshape(g.shape)
            y = first(op, (one, *args[1:]))
            assert y.sum() == 1 and (y != 0).sum() == 1
            torch.testing.assert_close(y.sum((-2, -1)), one.sum((-2, -1)))


@each(traits.MEANS)
def test_means(op):
    """The sum over as many entries as one output is of."""
    total = {aten.mean.default: aten.sum.default, aten.mean.dim: aten.sum.dim_IntList}[op]
    for args in calls(op):
        y = first(op, args)
        torch.testing.assert_close(y * (args[0].numel() / y.numel()), first(total, args))


@each(traits.WEIGHED)
def test_weighed(op):
    """(loss, sum of the weights): a mean is the sum of the losses over it."""
    for args in calls(op):
        x, target, weight, _, ignored = args
        weight = torch.ones(x.shape[1 if x.ndim > 1 else 0], dtype=x.dtype) if weight is None else weight
        kept = target[target != ignored]
        loss, total = run(op, (x, target, weight, 1, ignored))
        torch.testing.assert_close(total, weight[kept].sum())
        if total == 0:
            assert loss.isnan()
            continue
        torch.testing.assert_close(loss * total, run(op, (x, target, weight, 2, ignored))[0])


# ---- linear, by the tables of `rules.split` and `rules.trial` ------------------------------


def outputs(op, args) -> list[Tensor]:
    with torch.no_grad():
        return pytree.tree_leaves(run(op, args))


def is_linear(op, args, where: list[int], shift: bool = False) -> bool:
    """Whether the op is homogeneous and linear in the tensors at `where` together; or affine, by `shift`."""
    xs = {i: tensors(args)[i] for i in where}
    other = {i: x.flip(list(range(x.ndim))) * 0.7 + 0.2 for i, x in xs.items()}
    mixed = {i: 2 * x - (1 if shift else 3) * other[i] for i, x in xs.items()}
    for a, b, c in zip(*(outputs(op, with_leaves(args, new)) for new in (mixed, xs, other)), strict=True):
        if not torch.allclose(a, 2 * b - (1 if shift else 3) * c):
            return False
    return True


@each(split.OF_ALL)
def test_of_all(op):
    assert all(is_linear(op, args, able(args)) for args in calls(op) if able(args) == list(tensors(args)))


@each(split.OF_ONE)
def test_of_one(op):
    """From floats to floats, which `rules.split` asks for."""
    for args in calls(op):
        if 0 in able(args) and all(y.is_floating_point() for y in outputs(op, args)):
            assert is_linear(op, args, [0])


@each(split.OF_EITHER)
def test_of_either(op):
    """What is added, the third argument of a linear layer, is left out."""
    for args in calls(op):
        args = (*args[:2], *[None] * (len(args) - 2))
        assert all(is_linear(op, args, [i]) for i in able(args))


@each(trial._AFFINE)
def test_affine(op):
    assert all(is_linear(op, args, [i], shift=True) for args in calls(op) for i in able(args))


# ---- what is read ------------------------------


@each(traits.ITEMS)
def test_items(op):
    for value in (2.5, 3, True):
        assert op(torch.tensor(value)) == value == op(torch.tensor([[value]]))


@each(traits.LITERALS)
def test_literals(op):
    assert op(x := torch.tensor([1.5, 2.0])).equal(x)


SIZES = {
    aten.sym_size.int: (0,),
    aten.sym_stride.int: (1,),
    aten.sym_numel.default: (),
    aten.sym_storage_offset.default: (),
}
EMPTY = {
    aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default, aten.empty.memory_format,
    aten.empty_strided.default,
}  # fmt: skip


@each(traits.OF_SHAPE | split.CONSTANT | bindings.FILLED | bindings.FACTORIES)
def test_of_shape(op):
    """The same of other values of the first argument; no other argument is a tensor."""
    if op in SIZES:
        assert op(t(2, 3), *SIZES[op]) == op(t(2, 3), *SIZES[op])
        return
    for args in calls(op):
        here = tensors(args)
        assert not here or list(here) == [0]
        one, two = (run(op, with_leaves(args, {i: x * 0.5 + k for i, x in here.items()})) for k in (0, 1))
        assert (
            one.shape == two.shape
            and one.dtype == two.dtype
            and (op in EMPTY or (one == two).logical_or(one != one).all())
        )


@each(traits.EXTREMES)
def test_extremes(op):
    """Every result is an entry of the argument."""
    x = t(5, 3)
    found = op(x)
    assert all(torch.isin(y, x).all() for y in (found if isinstance(found, tuple) else (found,)))
    assert traits.extreme(op, (x,)) and not traits.extreme(aten.sum.default, (x,))


def test_norms_that_are_extremes():
    for p, known in ((math.inf, True), (-math.inf, True), (2, False)):
        assert traits.extreme(aten.linalg_vector_norm.default, (t(5), p)) is known


@each(traits.BY_SQUARING)
def test_rounding(op):
    """In single precision, errors are those of the largest entry, times the argument's size, and no other op's."""
    x = torch.tensor([[[3.0, 200.0], [-1.0, 1.0]], [[30.0, 2000.0], [-10.0, 10.0]]])
    exact, found = op(x.double()), op(x)
    errors = (found.double() - exact).abs() / torch.finfo(torch.float32).eps
    assert (errors > 4 * exact.abs()).any()  # more than one unit of each entry
    assert (errors <= traits.rounding(op, (x,), found)).all()
    assert traits.rounding(aten.sum.default, (x,), found) is found


@each(traits.LIKE_OTHER)
def test_like_other(op):
    """The same for other values of the second argument, of the same shape and dtype."""
    x, other = t(1, 3), t(2, 3).float()
    given = t(2, 3) if op in (aten.view_as.default, aten.reshape_as.default) else x
    one, two = op(given, other), op(given, other * 3 + 1)
    assert one.shape == two.shape and one.dtype == two.dtype and one.equal(two)


# The indices that each of `trial._CHECKED` reads, of the size 3 along the axis.
OUTSIDE = torch.tensor([[5, 0, 1]])
AT_INDEX: dict[str, Callable[[Tensor], Any]] = {
    "embedding": lambda i: F.embedding(i, t(3, 2)),
    "embedding_bag": lambda i: F.embedding_bag(i, t(3, 2)),
    "gather": lambda i: t(3, 3).gather(0, i),
    "index": lambda i: t(3, 3)[i[0]],
    "index_add": lambda i: t(3, 3).index_add(0, i[0], t(3, 3)),
    "index_copy": lambda i: t(3, 3).index_copy(0, i[0], t(3, 3)),
    "index_fill": lambda i: t(3, 3).index_fill(0, i[0], 1.0),
    "index_put": lambda i: t(3, 3).index_put((i[0],), t(3, 3)),
    "index_reduce": lambda i: t(3, 3).index_reduce(0, i[0], t(3, 3), "amax"),
    "index_select": lambda i: t(3, 3).index_select(0, i[0]),
    "max_unpool2d": lambda i: F.max_unpool2d(t(1, 1, 3), i[None], (1, 1), output_size=(1, 3)),
    "max_unpool3d": lambda i: F.max_unpool3d(t(1, 1, 1, 3), i[None, None], (1, 1, 1), output_size=(1, 1, 3)),
    "multi_margin_loss": lambda i: F.multi_margin_loss(t(3, 3), i[0]),
    "multilabel_margin_loss": lambda i: F.multilabel_margin_loss(t(1, 3), i),
    "put": lambda i: t(3).put(i[0], t(3)),
    "scatter": lambda i: t(3, 3).scatter(0, i, t(3, 3)),
    "scatter_add": lambda i: t(3, 3).scatter_add(0, i, t(3, 3)),
    "scatter_reduce": lambda i: t(3, 3).scatter_reduce(0, i, t(3, 3), "amax"),
    "take": lambda i: t(3).take(i[0]),
    "nll_loss": lambda i: F.nll_loss(t(3, 3), i[0]),
    "nll_loss2d": lambda i: F.nll_loss(t(1, 3, 1, 3), i[None]),
    "nll_loss_nd": lambda i: aten.nll_loss_nd(t(3, 3), i[0]),
    "cross_entropy_loss": lambda i: F.cross_entropy(t(3, 3), i[0]),
}


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", sorted(trial._CHECKED))
def test_indices_are_checked(name):
    """An index out of range raises, and one in range does not."""
    AT_INDEX[name](OUTSIDE.clamp(max=2))
    for index in (OUTSIDE, -OUTSIDE):
        with pytest.raises((IndexError, RuntimeError)):
            AT_INDEX[name](index)


def test_named_loss():
    losses = [n for n in dir(F) if n.endswith("_loss") or n.startswith("binary_cross_entropy") or n == "kl_div"]
    named = [n for n in losses if hasattr(aten, n)]
    assert len(named) > 10 and all(traits.named_loss(f"aten.{n}.default") for n in named)
    assert not any(traits.named_loss(str(op)) for op in (*traits.PRODUCTS, *traits.CHEAP, *traits.SUMS))


def test_takes_sizes():
    assert all(
        traits.takes_sizes(op) for op in (aten.view.default, aten.expand.default, aten.slice.Tensor, aten.full.default)
    )
    assert not any(
        traits.takes_sizes(op) for op in (aten.mm.default, aten.relu.default, aten.sum.dim_IntList, aten.t.default)
    )
    assert traits.takes_sizes(len)  # which has no schema


@each(op for op in RULES if op._schema.name.startswith("aten::") and not traits.random(op))
def test_borrows(op):
    """What is said to have memory of its own shares none with an argument."""
    for args in calls(op):
        call = node(op, args)
        if not traits.borrows(call, set(call.all_input_nodes)):
            given = {x.untyped_storage().data_ptr() for x in tensors(args).values()}
            mine = {
                y.untyped_storage().data_ptr() for y in pytree.tree_leaves(call.meta["val"]) if isinstance(y, Tensor)
            }
            assert not given & mine
        else:
            assert not traits.borrows(call, set())


# ---- what is saved, what is no function of its arguments ------------------------------


@each(traits.CHEAP)
def test_cheap(op):
    """No product of matrices, and the same again."""
    for args in calls(op):
        with FlopCounterMode(display=False) as counter:
            one = run(op, args)
        assert counter.get_total_flops() == 0
        for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(run(op, args)), strict=True):
            assert a.equal(b)
    assert not traits.random(op)


@each(traits.CUTS)
def test_cuts(op):
    """Autograd has no derivative or zeros."""
    for args in calls(op) if op not in SIZES else []:  # those give numbers
        xs = {i: tensors(args)[i].clone().requires_grad_() for i in able(args)}
        outs = [y for y in floats(run(op, with_leaves(args, xs))) if y.requires_grad]
        if outs and xs:
            try:
                found = torch.autograd.grad([y.sum() for y in outs], list(xs.values()), allow_unused=True)
            except RuntimeError as error:
                assert "is not implemented" in str(error)
                continue
            assert all(g is None or not g.any() for g in found)


@each([aten.native_dropout.default, aten.bernoulli.default, aten.rand_like.default])
def test_random(op):
    assert traits.random(op)


# ---- memory ------------------------------

IMAGE = (2, 3, 4, 6)


def of_images(op) -> tuple:
    """A call of `op` on images."""
    x, window = t(*IMAGE), [2, 2]
    given = {
        aten.max_pool2d_with_indices.default: (x, window), aten.avg_pool2d.default: (x, window),
        aten._adaptive_avg_pool2d.default: (x, window), aten.constant_pad_nd.default: (x, [1, 2, 0, 1]),
        aten._native_batch_norm_legit_no_training.default: (x, t(3), t(3), t(3), t(3).abs() + 1, 0.1, 1e-5),
        aten.cat.default: ([x, t(*IMAGE)], 1), aten._to_copy.default: (x,), aten.where.self: (x > 0, x, t(*IMAGE)),
        aten.masked_fill.Scalar: (x, x > 0, 2.0), aten.masked_fill.Tensor: (x, x > 0, t(1)[0]),
        aten.threshold.default: (x, 0.1, 0.5), aten.pow.Tensor_Scalar: (x, 2),
    }  # fmt: skip
    if op not in given:
        needed = [
            a
            for a in op._schema.arguments
            if a.default_value is None and not a.kwarg_only and not a.has_default_value()
        ]
        given[op] = tuple(t(*IMAGE).abs() if "Tensor" in str(a.type) else 1.5 for a in needed)
    return canonical(op, given[op], {})


@each([*traits.KEEP, *(op for op in having("elementwise") if not traits.random(op))])
def test_keeps_the_layout(op):
    """Images with channels last give the same values, in that layout, and the fake op knows it (not that of log_sigmoid)."""
    args = of_images(op)
    last = pytree.tree_map(lambda a: a.contiguous(memory_format=torch.channels_last) if _is_image(a) else a, args)
    y = first(op, last)
    torch.testing.assert_close(y, first(op, args))
    assert y.is_contiguous(memory_format=torch.channels_last) != (op in traits.CONTIGUOUS)
    assert y.is_contiguous() == (op in traits.CONTIGUOUS)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = run(op, pytree.tree_map_only(Tensor, mode.from_tensor, last))
    assert op in traits.CONTIGUOUS or pytree.tree_leaves(fake)[0].stride() == y.stride()


def _is_image(a):
    return isinstance(a, Tensor) and a.ndim == 4


@each(traits.REARRANGED)
def test_views(op):
    """The same memory from the same element on, in the same dtype; every element is there."""
    for args in calls(op):
        x, y = args[0], first(op, args)
        assert y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert (y.storage_offset(), y.dtype) == (x.storage_offset(), x.dtype)
        assert set(y.flatten().tolist()) == set(x.flatten().tolist())


@each(traits.VIEWS)
def test_views_never_copy(op):
    """Where strides allow no view, they raise."""
    shared = 0
    for args in calls(op):
        x = args[0].T.contiguous().T if args[0].ndim == 2 else args[0]
        try:
            y = first(op, (x, *args[1:]))
        except RuntimeError as error:
            assert "view size is not compatible" in str(error)
            continue
        assert y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        shared += 1
    assert shared


@each(traits.UNSAID_VIEWS)
def test_unsaid_views(op):
    assert all(r.alias_info is None for r in op._schema.returns)
    for args in calls(op):
        assert first(op, args).untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()


def test_on_rows():
    """The arguments for fewer entries of the first axis give their part of the view."""
    tried = set()
    for op in traits.REARRANGED:
        for args in calls(op):
            call = node(op, args)
            x, y = args[0], call.meta["val"]
            given = traits.on_rows(call, 1)
            if given is not None and x.ndim and y.ndim and x.shape[0] == y.shape[0]:
                assert op(x[:1], *given).equal(y[:1])
                tried.add(op)
    assert tried == {aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim}


def test_sliced():
    for args in calls(aten.slice.Tensor):
        cut = traits.sliced(node(aten.slice.Tensor, args))
        x, dim = args[0], cut.dim % args[0].ndim
        index = (*[slice(None)] * dim, slice(cut.start, cut.end, cut.step))
        y = first(aten.slice.Tensor, args)
        assert y.equal(x[index]) and (not cut.everything or y.equal(x))
    assert traits.sliced(node(aten.slice.Tensor, (t(3), 0, 0, 2**63 - 1, 1))).everything
    assert not traits.sliced(node(aten.slice.Tensor, (t(3), 0, 0, 2**63 - 1, 2))).everything
    assert not traits.sliced(node(aten.slice.Tensor, (t(3), 0, 1, None, 1))).everything


# ---- along axes ------------------------------


def falls_apart(op, args, lines: Tensor) -> bool:
    """Whether the entries of argument 0 with different numbers in `lines` move different entries of the output."""
    meets = [moved(op, args, 0, (lines.flatten() == k).nonzero().flatten()) for k in range(int(lines.max()) + 1)]
    return not (torch.stack(meets).sum(0) > 1).any()


def lines_along(x: Tensor, axes: list[int]) -> Tensor:
    """A number per line along the axes."""
    sizes = [1 if d in axes else s for d, s in enumerate(x.shape)]
    return torch.arange(math.prod(sizes)).reshape(sizes).expand(x.shape)


@each(traits.ALONG_AXIS)
def test_along_axis(op):
    for args in calls(op):
        axis = args[1] if isinstance(args[1], int) else None
        if axis is not None and args[0].ndim:
            assert falls_apart(op, args, lines_along(args[0], [axis % args[0].ndim]))


@each(traits.ALONG_LAST_AXES)
def test_along_last_axes(op):
    for args in calls(op):
        ndim = args[0].ndim
        assert falls_apart(op, args, lines_along(args[0], list(range(ndim - len(args[1]), ndim))))


# ---- clamps and maxima ------------------------------


@each([*traits.CLAMPS, aten.hardtanh.default])
def test_bounds(op):
    for args in calls(op):
        low, high = traits.bounds(node(op, args))
        x = torch.cat([args[0].flatten(), 4 * torch.randn(50, dtype=torch.float64)])
        assert first(op, (x, *args[1:])).equal(torch.maximum(torch.minimum(x, x.new_tensor(high)), x.new_tensor(low)))


def test_window():
    for args in calls(traits.MAX_POOL):
        kernel, stride, padding, dilation, ceil = traits.window(node(traits.MAX_POOL, args))
        expected = F.max_pool2d(args[0], kernel, stride or None, padding, dilation, ceil)
        assert first(traits.MAX_POOL, args).equal(expected)


def test_zero_padding():
    op = aten.constant_pad_nd.default
    for args in calls(op):
        widths = traits.zero_padding(node(op, args))
        assert (widths is None) == (args[2] != 0)
        assert widths is None or first(op, args).equal(F.pad(args[0], widths))


# ---- the whole database ------------------------------


class Everything(TorchDispatchMode):
    """Keeps up to `kept` calls of different shapes of every op, or of those `wanted`."""

    def __init__(self, kept: int, wanted: set[Any] | None = None):
        super().__init__()
        self.kept, self.wanted = kept, wanted
        self.calls: dict[Any, dict[str, tuple]] = collections.defaultdict(dict)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = self.calls[func]
        if len(found) < self.kept and not func._schema.is_mutable and (self.wanted is None or func in self.wanted):
            call = canonical(func, args, kwargs or {})
            found.setdefault(shapes(call), pytree.tree_map_only(Tensor, Tensor.detach, call))
        return func(*args, **(kwargs or {}))


def recorded(names: list[str], mode: Everything, most: int | None = 12) -> dict[Any, list[tuple]]:
    """The calls that samples of the database come down to, in float64: of the entries named, else of all."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        random.seed(0)
        from torch.testing._internal.common_methods_invocations import op_db

        with mode, torch.no_grad():
            for info in (i for i in op_db if torch.float64 in i.dtypes and (not names or i.name in names)):
                for sample in itertools.islice(info.sample_inputs("cpu", torch.float64), most):
                    try:
                        info.op(sample.input, *sample.args, **sample.kwargs)
                    except Exception:  # a sample of another backend, or of a mode that records cannot run in
                        continue
    small = {
        op: [a for a in found.values() if all(0 < x.numel() <= 125 for x in tensors(a).values())]
        for op, found in mode.calls.items()
    }
    return {op: found for op, found in small.items() if found and not traits.random(op)}


def kinds(args) -> tuple:
    return tuple((x.is_floating_point(), x.is_complex()) for x in tensors(args).values())


@functools.cache
def database() -> dict[Any, list[tuple]]:
    """Of each op that something is claimed of: the calls of all samples of its own entries, and of the other entries'."""
    ops = {op for _, claimed in CLAIMS for op in claimed}
    found = {op: calls(op) + [args for _, args in samples(op, 10**6)] for op in ops if op not in WITHOUT}
    for op, more in recorded([], Everything(40, ops), most=None).items():
        known = {kinds(args) for args in found.get(op, [])}
        finite = [a for a in more if kinds(a) in known and all(x.isfinite().all() for x in tensors(a).values())]
        found[op] = found.get(op, []) + finite
    return {
        op: [a for a in of if all(x.numel() <= LARGEST for x in tensors(a).values())] or of for op, of in found.items()
    }


WITHOUT = traits.ITEMS | traits.APART | set(SIZES) | {aten.lift.default, aten.lift_fresh.default}
"""Tried on values of the test's own."""


@pytest.mark.slow
def test_all_claims_on_the_whole_database(monkeypatch):
    """No call of any sample of PyTorch's operator database contradicts what is said of its op."""
    found = database()
    assert sum(map(len, found.values())) > 2000
    monkeypatch.setitem(globals(), "calls", lambda op: found[op])
    wrong = []
    for test, ops in CLAIMS:
        for op in ops:
            try:
                test(op)
            except Exception as error:
                wrong.append(f"{test.__name__}[{op}]: {type(error).__name__} {str(error)[:200]}")
    for test in (test_convolution, test_on_rows, test_sliced, test_window, test_zero_padding):
        test()
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("op", traits.COPIES, ids=str)
def test_copies(op):
    """Equal to the argument, whatever the layout, and in memory of their own."""
    x = torch.randn(2, 3, 4, 5)
    for layout in (torch.contiguous_format, torch.channels_last, torch.preserve_format):
        y = op(x, memory_format=layout)
        assert torch.equal(x, y) and y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_sums_of_one():
    """What is said to be a sum over axes of size one is the argument without them; nothing else is said to be one."""
    x, total = torch.randn(1, 3, 1), aten.sum.dim_IntList
    for dims in ([0], [2], [0, 2], [-1]):
        assert traits.of_one(total, x, dims)
        assert torch.equal(total(x, dims), x.squeeze(dims))
    for args, kwargs in [((x, [1]), {}), ((x, [0, 1]), {}), ((x, []), {}), ((x, None), {}), ((x, [0], True), {}),
                         ((x, [0]), {"dtype": torch.float64}), ((x.long(), [0]), {}), ((x > 0, [0]), {})]:  # fmt: skip
        assert not traits.of_one(total, *args, **kwargs)
    assert not traits.of_one(aten.mean.dim, x, [0]) and not traits.of_one(aten.amax.default, x, [0])


def test_outputs_that_are_state_have_no_derivative():
    for op, outputs in traits.STATE.items():
        x, weight, bias = (t(*shape).requires_grad_() for shape in ((5, 3), (3,), (3,)))
        found = op(x, weight, bias, t(3), t(3).abs(), True, 0.1, 1e-5)
        assert found[0].requires_grad and not any(found[k].requires_grad for k in outputs)


def test_every_table_is_tried():
    """Besides what goes on between processes, which tests/distributed runs."""
    tree = ast.parse(Path(traits.__file__).read_text())
    named = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    for n in tree.body:
        targets = n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else []
        named |= {t.id for t in targets if isinstance(t, ast.Name)}
    public = {n for n in named if not n.startswith("_")} - {"aten", "over_ranks"}
    text = Path(__file__).read_text()
    assert {n for n in public if not re.search(rf"traits\.{n}\b", text)} == set()


def holds(check, op, found) -> bool:
    """Whether a property holds in all calls, of which one has several entries."""
    wide = [args for args in found if able(args) and tensors(args)[able(args)[0]].numel() > 2]
    try:
        return bool(wide) and all(check(op, args) for args in wide)
    except Exception:  # what has no such argument or output
        return False


def shares(op, args) -> bool:
    x, y = tensors(args)[0], first(op, args)
    return y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and y.numel() >= x.numel()


def moves_along_axis(op, args) -> bool:
    if args[0].ndim < 2:
        return True  # says nothing
    lines = lines_along(args[0], [args[1] % args[0].ndim])
    alone = torch.arange(args[0].numel()).reshape(args[0].shape)
    return type(args[1]) is int and falls_apart(op, args, lines) and not falls_apart(op, args, alone)


@pytest.mark.parametrize("op", sorted(traits.UNTAGGED, key=str), ids=str)
def test_untagged(op) -> None:
    """An entry of an argument moves its own entry of the output, and no other; a broadcast one those in its row."""
    torch.manual_seed(0)
    x, y = torch.randint(1, 7, (3, 4)), torch.randint(1, 7, (3, 1))
    for other in (y, torch.randint(1, 7, (3, 4))) if str(op).endswith("Tensor") else (5,):
        before, moved = op(x, other), x.clone()
        moved[1, 2] ^= 7
        assert (op(moved, other) != before).nonzero().tolist() == [[1, 2]]
    if str(op).endswith("Tensor"):
        moved = y.clone()
        moved[1] ^= 7
        assert set((op(x, moved) != op(x, y)).nonzero()[:, 0].tolist()) == {1}


def survey(names: list[str]) -> dict[str, set]:
    """What ops of the database have by trial, and no table says: each may be an entry that is missing."""
    found = recorded(names, Everything(6))
    rules = {op for name in ("elementwise", "in_order") for op in having(name)}
    known = {
        "elementwise": (is_elementwise, rules | {op for op in found if traits.pointwise(op)}),
        "views": (shares, traits.REARRANGED | rules),
        "along an axis": (moves_along_axis, traits.ALONG_AXIS),
        "zero for zero": (keeps_zero, traits.KEEP_ZERO | traits.ZERO_FACTOR | traits.ZEROS),
    }
    return {
        name: {op for op, args in found.items() if op not in table and holds(check, op, args)}
        for name, (check, table) in known.items()
    }


def test_survey():
    """It finds what is left out: a sum along an axis is zero for zero, a running sum is along an axis."""
    found = survey(["cumsum", "nn.functional.relu", "log_softmax", "diagonal"])
    assert aten.cumsum.default in found["along an axis"] and aten.cumsum.default in found["zero for zero"]
    assert aten.cumsum.default not in found["elementwise"] | found["views"]
    assert aten.relu.default in found["zero for zero"] and aten.relu.default not in found["elementwise"]
    assert aten._log_softmax.default not in found["along an axis"] | found["zero for zero"]


if __name__ == "__main__":  # python tests/rules/test_traits.py [names of the database]
    for name, ops in survey(sys.argv[1:]).items():
        print(f"{name}: {', '.join(sorted(map(str, ops)))}")
