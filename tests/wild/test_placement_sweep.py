"""Ops of PyTorch's database without a rule: every pair of placements, with indices that lead from sample to sample.

What the compiler says of an op's output is held against the op on other values: a slice of one sample moves with this
sample alone, a sum over samples by the sum of its terms' changes, and what is mixed stays so.
"""

from __future__ import annotations

import itertools
import types
from collections import Counter

import op_samples
import pytest
import torch
from op_samples import differentiable, floats, run, tensors, with_leaves
from torch import fx
from torch.utils import _pytree as pytree

from fxcurv.errors import UnsupportedOpError
from fxcurv.ir.batch import Batch
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Shard
from fxcurv.ir.state import Options
from fxcurv.passes.independence import visit
from fxcurv.rules.base import REWRITES, RULES

aten = torch.ops.aten
BY_INDEX = [
    "gather", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_put", "index_select", "index",
    "index_reduce", "index_fill", "take", "put", "masked_scatter", "max_unpool2d", "_embedding_bag",
]  # fmt: skip
t = op_samples.t


def whole(*shape, high=3):
    return torch.randint(high, shape)


# sizes that equal the batch size, which the database has not
BY_HAND = {
    aten.gather.default: [(t(3, 3), d, whole(3, 3)) for d in (0, 1)],
    aten.scatter.src: [(t(3, 3), d, whole(3, 3), t(3, 3)) for d in (0, 1)],
    aten.scatter_add.default: [(t(3, 3), d, whole(3, 3), t(3, 3)) for d in (0, 1)],
    aten.scatter_reduce.two: [(t(3, 3), d, whole(3, 3), t(3, 3), "amax") for d in (0, 1)],
    aten.index_add.default: [(t(3, 3), d, whole(3), t(3, 3)) for d in (0, 1)],
    aten.index_copy.default: [(t(3, 3), d, whole(3), t(3, 3)) for d in (0, 1)],
    aten.index_select.default: [(t(3, 3), d, whole(3)) for d in (0, 1)],
    aten.index_reduce.default: [(t(3, 3), d, whole(3), t(3, 3), "mean") for d in (0, 1)],
    aten.index_fill.int_Scalar: [(t(3, 3), d, whole(3), 1.0) for d in (0, 1)],
    aten.index.Tensor: [(t(3, 3), i) for i in ([whole(3)], [None, whole(3)], [whole(3), whole(3)], [whole(3, 1), whole(3)])],
    aten.index_put.default: [
        (t(3, 3), i, t(3, 3), a) for i in ([whole(3)], [None, whole(3)], [whole(3, 1), whole(3)]) for a in (False, True)],
    aten.take.default: [(t(3, 3), whole(3, 3, high=9))],
    aten.put.default: [(t(3, 3), whole(3, 3, high=9), t(3, 3), True)],
    aten.masked_scatter.default: [(t(3, 3), t(3, 3) > 0, t(3, 3))],
}  # fmt: skip


def ops():
    """Differentiable ops of the database that are captured as they are and have neither rule nor rewrite."""
    names = set(op_samples._database()) | {op._schema.name.removeprefix("aten::") for op in BY_HAND}
    for name in sorted(names):
        packet = getattr(aten, name, None)
        private = name.startswith("__")
        for overload in packet.overloads() if not private and isinstance(packet, type(aten.add)) else ():
            op = getattr(packet, overload)
            plain = not op._schema.is_mutable and not overload.endswith("out") and not composite(op)
            unchecked = "backward" in name  # they take indices of PyTorch itself, and write anywhere
            known = unchecked or op in RULES or op in REWRITES or torch.Tag.pointwise in op.tags
            if plain and not known and torch.Tag.nondeterministic_seeded not in op.tags:
                yield op


def composite(op):
    try:
        return op._can_decompose()
    except RuntimeError:  # it serves scripts alone
        return True


def calls(op):
    torch.manual_seed(0)
    hand = [(op, op_samples.canonical(op, args, {})) for args in BY_HAND.get(op, [])]
    return [args for _, args in hand or op_samples.samples(op, 3) if len(tensors(args)) <= 4]


def options(x, n):
    """Where the samples of an argument may be."""
    found = [
        Shard(d, o, size // (o * n)) for d, size in enumerate(x.shape) for o in (1, 2) if size and size % (o * n) == 0
    ]
    return [REPLICATE, PARTIAL, MIXED, *found] if x.is_floating_point() else [REPLICATE, *found]


def arrangements(args, able):
    """(n, placements, active): every pair of placements of two active arguments, indices with and without samples."""
    given = tensors(args)
    sizes = {s for x in given.values() for s in x.shape if 2 <= s <= 4}
    for n, pair in itertools.product(sorted(sizes), itertools.combinations(able, min(2, len(able)))):
        others = [i for i in given if i not in pair]
        for where in itertools.product(*(options(given[i], n) for i in pair)):
            for index in (False, True):
                ints = {i for i in others if index and not given[i].is_floating_point()}
                beside = {i: options(given[i], n)[-1] if i in ints else REPLICATE for i in others}
                yield n, dict(zip(pair, where, strict=True)) | beside, pair


def placed(op, args, n, where, active):
    """What the compiler says of the outputs."""
    graph, leaves = fx.Graph(), pytree.tree_leaves(args)
    nodes = {}
    for i in tensors(args):
        nodes[i] = graph.placeholder(f"x{i}")
        nodes[i].meta = {"val": leaves[i], "place": where[i], "active": i in active}
    given = with_leaves(args, nodes)
    schema = op._schema.arguments
    kwargs = {a.name: v for a, v in zip(schema, given, strict=True) if a.kwarg_only}
    node = graph.call_function(op, tuple(given[: len(given) - len(kwargs)]), kwargs)
    node.meta["val"] = run(op, args)
    extensions = (types.SimpleNamespace(per_sample=True),)
    program = types.SimpleNamespace(batch=Batch(frozenset(), n), rules={}, extensions=extensions, options=Options())
    visit(program, node)
    return node.meta["place"] if isinstance(node.meta["place"], list) else [node.meta["place"]]


def slots(shape, place, n):
    owner = torch.arange(shape[place.dim]).div(place.inner, rounding_mode="floor") % n
    return owner.view(-1, *[1] * (len(shape) - place.dim - 1)).expand(shape)


def like(x):
    """Another value that an op takes wherever it takes `x`."""
    if not x.is_floating_point():
        return x
    square = x.ndim > 1 and x.shape[-1] == x.shape[-2]
    return x + 0.3 * torch.rand_like(x) * x.abs() if square else x * (0.5 + torch.rand_like(x))


def holds(op, args, n, where, active, places):
    """Whether placements are true of the op at these values, as a message if they are not."""
    given = tensors(args)
    new = {i: like(given[i]) for i in active}
    shift = {i: [like(given[i]) - given[i] for _ in range(n)] for i in active if where[i] == PARTIAL}

    def outputs(samples):
        changed = {}
        for i in active:
            if isinstance(where[i], Shard):
                mine = torch.isin(slots(given[i].shape, where[i], n), torch.tensor(samples, dtype=torch.long))
                changed[i] = torch.where(mine, new[i], given[i])
            elif where[i] == PARTIAL:
                changed[i] = given[i] + sum((shift[i][k] for k in samples), torch.zeros_like(given[i]))
        return [o.nan_to_num() for o in floats(run(op, with_leaves(args, changed)))]

    base, every, singles = outputs([]), outputs(list(range(n))), [outputs([k]) for k in range(n)]
    for j, place in enumerate(places):
        for k, single in enumerate(singles):
            moved = ~torch.isclose(single[j], base[j], rtol=1e-9, atol=1e-12)
            if isinstance(place, Shard) and (moved & (slots(base[j].shape, place, n) != k)).any():
                return f"sample {k} moves others, not only {place}"
            if place == REPLICATE and moved.any():
                return f"sample {k} moves what is said to be the same for all"
        if place == PARTIAL:
            total = base[j] + sum(s[j] - base[j] for s in singles)
            if not torch.allclose(every[j], total, rtol=1e-6, atol=1e-8):
                return "the samples' changes do not add up"
    return ""


def crossing(op, args):
    """The same call with other integers from the largest range that the op takes."""
    found = {}
    for i, x in tensors(args).items():
        if x.is_floating_point() or x.dtype is torch.bool:
            continue
        for high in sorted({s for y in tensors(args).values() for s in (*y.shape, y.numel())} - {0}, reverse=True):
            try:
                run(op, with_leaves(args, {i: torch.full_like(x, high - 1)}))
            except (RuntimeError, IndexError):
                continue
            found[i] = torch.randint(high, x.shape).to(x.dtype)
            break
    return with_leaves(args, found)


def check(op, most):
    seen = Counter()
    for args in calls(op):
        try:
            able = differentiable(op, args)
            whole_set = list(arrangements(args, able))
        except RuntimeError:
            continue
        for n, where, active in whole_set[:: max(1, len(whole_set) // most)]:
            if not any(p != REPLICATE for p in where.values()):
                continue
            told = (op, op_samples.shapes(args), n, where)
            try:
                places = placed(op, args, n, where, active)
            except UnsupportedOpError:
                seen["refused"] += 1
                continue
            if any(where[i] == MIXED for i in active):
                assert all(p == MIXED for p in places), told
                continue
            if {PARTIAL} < {where[i] for i in active} and any(isinstance(where[i], Shard) for i in active):
                assert all(p == MIXED for p in places), told
                continue
            seen[type(places[0]).__name__] += 1
            val = run(op, args)
            vals = val if isinstance(val, list | tuple) else [val]
            told_of = [
                p for p, v in zip(places, vals, strict=True) if isinstance(v, torch.Tensor) and v.is_floating_point()
            ]
            for seed in range(4):
                torch.manual_seed(seed)
                try:
                    problem = holds(op, crossing(op, args), n, where, active, told_of)
                except (RuntimeError, IndexError):
                    continue  # values that the op does not take
                assert not problem, (*told, places, problem)
    return seen


OPS = list(ops())
MOVING = [op for op in OPS if op._schema.name.removeprefix("aten::") in BY_INDEX]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", MOVING, ids=str)
def test_moved_by_an_index(op):
    check(op, 24)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_op(op):
    check(op, 200)


def test_the_sweep_sees_something():
    """An index along a sample keeps it, one along the samples does not, and there are hundreds of ops."""
    assert len(OPS) > 100 and len(MOVING) > 10
    args = op_samples.canonical(aten.gather.default, BY_HAND[aten.gather.default][0], {})
    assert placed(aten.gather.default, args, 3, {0: Shard(0), 2: Shard(0)}, (0,)) == [PARTIAL]
    args = op_samples.canonical(aten.gather.default, BY_HAND[aten.gather.default][1], {})
    assert placed(aten.gather.default, args, 3, {0: Shard(0), 2: Shard(0)}, (0,)) == [Shard(0)]
