"""Short forms: the same numbers, in no more ops, on random graphs of views and elementwise ops, and each alone."""

from __future__ import annotations

import random

import pytest
import torch
from torch import fx, nn

from fxcurv.rules.shorter import shorter

aten = torch.ops.aten

KINDS = ["view", "t", "permute", "expand", "select", "slice", "relu", "mul", "one", "cat"]
KINDS += ["unsqueeze"] * 3 + ["squeeze"] * 2


class Random:
    """Grows a graph of ops on values with many axes of size one."""

    def __init__(self, seed: int):
        self.random, self.graph = random.Random(seed), fx.Graph()
        self.x = torch.randn(self.random.choice([(3, 2), (1, 3, 2), (3, 1, 2), (2, 3, 2), (1, 1)]), dtype=torch.float64)
        self.values = [self.graph.placeholder("x")]
        self.values[0].meta["val"] = self.x

    def add(self, op, *args, **kwargs):
        node = self.graph.call_function(op, args, kwargs)
        node.meta["val"] = op(*fx.node.map_arg(args, lambda a: a.meta["val"]), **kwargs)
        self.values.append(node)

    def grow(self):
        choice, node = self.random.choice, self.random.choice(self.values[-3:])
        val = node.meta["val"]
        d = choice(range(val.ndim)) if val.ndim else 0
        kind = choice(KINDS)
        if kind == "unsqueeze" and val.ndim < 5:
            self.add(aten.unsqueeze.default, node, choice([0, 0, d]))
        elif kind == "squeeze" and val.ndim > 1:
            self.add(aten.squeeze.dim, node, d)
        elif kind == "view":
            sizes = choice(
                [[-1], [*val.shape, 1], [1, *val.shape], [1, -1], [2, -1] if val.numel() % 2 == 0 else [-1, 1]]
            )
            self.add(aten.reshape.default if not val.is_contiguous() else aten.view.default, node, sizes)
        elif kind == "t" and val.ndim == 2:
            self.add(aten.t.default, node)
        elif kind == "permute":
            self.add(aten.permute.default, node, self.random.sample(range(val.ndim), val.ndim))
        elif kind == "expand" and val.ndim < 5:
            self.add(aten.expand.default, node, [choice([1, 1, 2]), *val.shape])
        elif kind == "select" and val.ndim > 1:
            self.add(aten.select.int, node, d, choice([0, val.shape[d] - 1]))
        elif kind == "slice" and val.ndim and val.shape[d] > 0:
            start = choice(range(val.shape[d]))
            self.add(aten.slice.Tensor, node, d, start, start + choice([1, 1, 2]))
            if choice([True, False]):
                self.add(aten.squeeze.dim, self.values[-1], d)
        elif kind == "relu":
            self.add(aten.relu.default, node)
        elif kind == "one":
            self.add(aten.ones_like.default, node)
            self.add(aten.mul.Tensor, *self.random.sample([node, self.values[-1]], 2))
        elif kind == "mul":
            others = [v for v in self.values if _broadcast(v.meta["val"].shape, val.shape)]
            self.add(aten.mul.Tensor, node, choice(others))
        elif kind == "cat" and val.ndim:
            self.add(aten.cat.default, [node, node], d)
            joined, rows = self.values[-1], val.shape[d]
            self.add(aten.slice.Tensor, joined, d, rows, 2 * rows)


def _broadcast(a, b) -> bool:
    try:
        return len(torch.broadcast_shapes(a, b)) < 6
    except RuntimeError:
        return False


def shortened(graph: fx.Graph) -> None:
    """All short forms, as the pass has them."""
    todo = [n for n in reversed(graph.nodes) if n.op == "call_function"]
    while todo:
        node, made = todo.pop(), []

        def make(op, *args, node=node, made=made, like=None, **kwargs):
            with graph.inserting_before(node):
                new = graph.call_function(op, args, kwargs)
            new.meta["val"] = op(*fx.node.map_arg(args, lambda a: a.meta["val"]), **kwargs)
            if like is not None:
                assert (new.meta["val"].shape, new.meta["val"].dtype) == (
                    like.meta["val"].shape,
                    like.meta["val"].dtype,
                )
            made.append(new)
            return new

        new = shorter(make, node)
        if new is not None:
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            todo += reversed(made)
    graph.eliminate_dead_code()


@pytest.mark.parametrize("part", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 20))])
def test_random_graphs(part):
    fewer = 0
    for seed in range(100 * part, 100 * part + 100):
        grown = Random(seed)
        for _ in range(grown.random.choice([3, 6, 10])):
            grown.grow()
        grown.graph.output(tuple(grown.values[-2:]))
        grown.graph.eliminate_dead_code()
        before = fx.GraphModule(nn.Module(), grown.graph)
        expected, count = before(grown.x), len(grown.graph.nodes)
        shortened(grown.graph)
        found = fx.GraphModule(nn.Module(), grown.graph)(grown.x)
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape and a.equal(b), (seed, before.code, grown.graph)
        fewer += count - len(grown.graph.nodes)
    assert fewer > 100


def graph_of(fn, *values):
    """The graph that `fn` makes of values, by a `call` that it is handed."""
    graph, given = fx.Graph(), []
    for k, value in enumerate(values):
        given.append(graph.placeholder(f"x{k}"))
        given[-1].meta["val"] = value

    def call(op, *args, **kwargs):
        node = graph.call_function(op, args, kwargs)
        node.meta["val"] = op(*fx.node.map_arg(args, lambda a: a.meta["val"]), **kwargs)
        return node

    graph.output(fn(call, *given))
    return graph


def ops(graph):
    return [n.target for n in graph.nodes if n.op == "call_function"]


X = torch.randn(3, 2)
IDS = [
    "column",
    "expand",
    "ones",
    "broadcast",
    "promoted",
    "zeros",
    "negative zero",
    "entry",
    "sizes",
    "axis",
    "copy",
    "back",
]


@pytest.mark.parametrize("fn, values, expected", [
    (lambda c, x: c(aten.squeeze.dim, c(aten.relu.default, c(aten.unsqueeze.default, x, 0)), 0), [X], [aten.relu.default]),
    (lambda c, g, y: c(aten.threshold_backward.default, g, c(aten.expand.default, y, [2, 3, 2]), 0), [torch.randn(2, 3, 2), X],
     [aten.threshold_backward.default]),
    (lambda c, x: c(aten.mul.Tensor, x, c(aten.sqrt.default, c(aten.ones_like.default, x))), [X], []),
    (lambda c, x: c(aten.mul.Tensor, x, c(aten.ones.default, [4, 3, 2])), [X], [aten.ones.default, aten.mul.Tensor]),
    (lambda c, x: c(aten.mul.Tensor, x, c(aten.ones.default, [], dtype=torch.float64)), [X.half()],
     []),
    (lambda c, x: c(aten.add.Tensor, x, c(aten.mul.Tensor, c(aten.zeros.default, [], dtype=torch.long), 3)), [torch.arange(3)],
     []),
    (lambda c, x: c(aten.add.Tensor, x, c(aten.zeros.default, [])), [X], [aten.zeros.default, aten.add.Tensor]),
    (lambda c, x: c(aten.squeeze.dim, c(aten.slice.Tensor, x, 0, 1, 2), 0), [X], [aten.select.int]),
    (lambda c, x: c(aten.view.default, c(aten.view.default, c(aten.unsqueeze.default, x, 1), [6]), [2, 3]), [X],
     [aten.reshape.default]),
    (lambda c, x: c(aten.view.default, x, [1, 3, 2]), [X], [aten.unsqueeze.default]),
    (lambda c, x: c(aten.reshape.default, c(aten.t.default, x), [3, 2]), [X], [aten.t.default, aten.reshape.default]),
    (lambda c, x: c(aten.t.default, c(aten.t.default, x)), [X], []),
], ids=IDS)  # fmt: skip
def test_each(fn, values, expected):
    graph = graph_of(fn, *values)
    before = fx.GraphModule(nn.Module(), graph)(*values)
    shortened(graph)
    assert ops(graph) == expected
    assert fx.GraphModule(nn.Module(), graph)(*values).equal(before)


def parts(*cuts, size=6, dim=1):
    """The sum of parts of x, each in zeros where (start, end) or an index says."""

    def graph(call, x):
        total = None
        for cut in cuts:
            if isinstance(cut, int):
                part = call(aten.select_backward.default, call(aten.select.int, x, dim, 0), [3, size], dim, cut)
            else:
                part = call(aten.slice.Tensor, x, dim, 0, cut[1] - cut[0])
                part = call(aten.slice_backward.default, part, [3, size], dim, *cut, 1)
            total = part if total is None else call(aten.add.Tensor, total, part)
        return total

    return graph


@pytest.mark.parametrize("cuts, whole", [
    ([(0, 2), (2, 6)], True),
    ([(4, 6), (0, 2), (2, 4)], True),
    ([0, 1, 2, 3, 4, -1], True),
    ([(0, 5), 5], True),
    ([(0, 2), (3, 6)], False),
    ([(0, 2), (1, 6)], False),
    ([(0, 2), (2, 5)], False),
    ([(1, 3), (3, 6)], False),
    ([0, 0, 2, 3, 4, 5], False),
], ids=["two", "any order", "entries", "both", "gap", "overlap", "short", "late", "twice"])  # fmt: skip
def test_parts_side_by_side_are_put_together(cuts, whole):
    x = torch.randn(3, 6)
    graph = graph_of(parts(*cuts), x)
    before = fx.GraphModule(nn.Module(), graph)(x)
    shortened(graph)
    assert (aten.cat.default in ops(graph)) == whole
    assert fx.GraphModule(nn.Module(), graph)(x).equal(before)


def test_parts_that_something_else_reads_stay():
    def graph(call, x):
        first = call(aten.slice_backward.default, call(aten.slice.Tensor, x, 1, 0, 2), [3, 6], 1, 0, 2, 1)
        second = call(aten.slice_backward.default, call(aten.slice.Tensor, x, 1, 2, 6), [3, 6], 1, 2, 6, 1)
        third = call(aten.add.Tensor, first, second)
        return call(aten.sub.Tensor, call(aten.add.Tensor, third, x), third)

    x = torch.randn(3, 6)
    made = graph_of(graph, x)
    before = fx.GraphModule(nn.Module(), made)(x)
    shortened(made)
    assert fx.GraphModule(nn.Module(), made)(x).equal(before) and ops(made).count(aten.cat.default) == 1


@pytest.mark.parametrize("viewed", [True, False])
def test_rows_that_are_added_to_zeros_are_added_to_the_value(viewed):
    def graph(call, x, index, g):
        sizes = [3, 4] if viewed else [2, 6]
        rows = call(aten.index_add.default, call(aten.new_zeros.default, g, sizes), 0, index, g)
        return call(aten.add.Tensor, x, call(aten.reshape.default, rows, [2, 6]) if viewed else rows)

    x, index, g = torch.randn(2, 6), torch.tensor([1, 0, 1]), torch.randn(3, 4 if viewed else 6)
    made = graph_of(graph, x, index, g)
    before = fx.GraphModule(nn.Module(), made)(x, index, g)
    shortened(made)
    assert aten.add.Tensor not in ops(made) and aten.new_zeros.default not in ops(made)
    torch.testing.assert_close(fx.GraphModule(nn.Module(), made)(x, index, g), before)
