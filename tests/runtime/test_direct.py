"""The graph as a function that calls ops directly: the very same ops, the same numbers, no more memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxcurv
from fxcurv.extensions import BatchGrad, BatchL2Grad, DiagGGNExact, DiagGGNMC, DiagHessian
from fxcurv.ir.private import pytree
from fxcurv.rules.bindings import BINDINGS
from fxcurv.runtime.direct import constants, direct

aten = torch.ops.aten


class Listener(TorchDispatchMode):
    """What is dispatched, with the arguments that are no tensors, and how many tensors were alive at most."""

    def __init__(self):
        super().__init__()
        self.heard, self.alive, self.most = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        plain = lambda a: (a.dtype, tuple(a.shape)) if isinstance(a, Tensor) else a  # noqa: E731
        out = func(*args, **(kwargs or {}))
        given = {k: v for k, v in (kwargs or {}).items() if (k, v) != ("pin_memory", False)}  # which is the default
        self.heard.append((func, *pytree.tree_map(plain, (args, given))))
        self.alive += [weakref.ref(t) for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        self.most = max(self.most, sum(r() is not None for r in self.alive))
        return out


def heard(fn, *args, **kwargs):
    with Listener() as listener, torch.no_grad():
        fn(*args, **kwargs)
    return listener.heard


X, N = torch.rand(3, 4) + 0.5, torch.arange(12).reshape(3, 4)
BY_HAND = {
    aten.bmm.out: [((X[None], X.t()[None]), {"out": torch.zeros(1, 3, 3)})],
    aten.mul.out: [((X[:, :, None], X[:, None]), {"out": torch.zeros(3, 4, 4)})],
    aten.mul.Tensor: [((X, 2.0), {}), ((N, 3), {}), ((X, X), {})],
    aten.add.Tensor: [((X, X), {}), ((N[0, 0], N), {"alpha": 5}), ((X, 0.5), {})],
    aten.sub.Tensor: [((X, X[0]), {}), ((X, 1), {})],
    aten.div.Tensor: [((X, 3), {}), ((X, X), {})],
    aten.addcmul.default: [((X, X, X), {"value": -1})],
    aten.pow.Tensor_Scalar: [((X, 2), {}), ((X, 0.5), {})],
    aten.clamp.default: [((X, 1), {}), ((X, None, 9), {})],
    aten.sum.default: [((X,), {}), ((X,), {"dtype": torch.float64})],
    aten.sum.dim_IntList: [((X, [0]), {}), ((X, [0, 1], True), {})],
    aten.linalg_vector_norm.default: [((X, 2, [-1]), {})],
    aten.searchsorted.Tensor: [((X.cumsum(1), X[:, :1].contiguous()), {})],
    aten.bitwise_and.Scalar: [((N, 7), {})],
    aten.bitwise_xor.Tensor: [((N, N), {})],
    aten.squeeze.dim: [((X[None], 0), {})],
    aten.squeeze.dims: [((X[None, :, None], [0, 2]), {})],
    aten.select.int: [((X, 0, 1), {})],
    aten.cat.default: [(([X, X],), {}), (([X, X], 1), {})],
    aten.expand.default: [((X, [2, 3, 4]), {})],
    aten.new_zeros.default: [((X, [2, 3]), {"pin_memory": False}), ((X, [2]), {"dtype": torch.float64})],
    aten.zeros_like.default: [((X,), {"pin_memory": False}), ((N,), {"dtype": torch.float32, "pin_memory": False})],
    aten.scatter.value: [((X, 1, N[:, :1] % 4, 1.0), {})],
    aten.reshape.default: [((X.t(), [12]), {}), ((X, [2, 6]), {})],
    aten.ne.Scalar: [((N, -100), {})],
    aten.gt.Scalar: [((X, 0), {})],
    aten.lt.Tensor: [((X, X[0]), {})],
    aten.cumsum.default: [((X, -1), {}), ((X, 1), {"dtype": torch.float64})],
    aten.unsqueeze.default: [((X, -1), {})],
    aten.permute.default: [((X, [1, 0]), {})],
    aten.mm.default: [((X, X.t()), {})],
    aten.bmm.default: [((X[None], X.t()[None]), {})],
    aten.convolution.default: [
        ((X[None, None], X[None, None, :2, :2], None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), {})
    ],
    aten.embedding.default: [((X, N % 3), {}), ((X, N % 3, 1), {})],
    aten.where.self: [((X > 1, X, X[0]), {})],
    aten._log_softmax.default: [((X, 1, False), {})],
    aten._log_softmax_backward_data.default: [((X, X.log_softmax(1), 1, torch.float32), {})],
    aten.gather.default: [((X, 1, N % 4), {})],
    aten.linear.default: [((X, X), {}), ((X, X, X[0, :3].contiguous()), {})],
}


@pytest.mark.parametrize("op", [op for op in BINDINGS if op is not aten.sym_size.int], ids=str)
def test_bindings_dispatch_the_op(op):
    """The same op with the same arguments, and after it the same ones that it is made of."""
    for args, kwargs in BY_HAND.get(op) or [((X,), {})]:
        assert heard(BINDINGS[op], *args, **kwargs) == heard(op, *args, **kwargs)


def test_sizes():
    assert [BINDINGS[aten.sym_size.int](X, d) for d in (0, -1)] == [3, 4]


def lowered(extensions):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    return fxcurv.compile(model, nn.CrossEntropyLoss(), extensions, check=None), model, x, y


def test_the_same_numbers_and_no_more_memory():
    made, model, x, y = lowered([BatchGrad(), BatchL2Grad(), DiagGGNExact(), DiagGGNMC()])
    program = made.lower(x, y).program
    kinds = {"param": iter([p.detach() for p in model.parameters()]), "input": iter([x]), "target": iter([y]),
             "seed": iter([torch.tensor(3)])}  # fmt: skip
    flat = [next(kinds[i.kind]) for i in program.inputs] if all(i.kind in kinds for i in program.inputs) else None
    assert flat is not None
    fast, kept = direct(program.gm), constants(program.graph)
    with torch.no_grad(), Listener() as plain:
        expected = program.gm(*flat)
    with torch.no_grad(), Listener() as short:
        found = fast(*flat)
    for a, b in zip(found, expected, strict=True):
        assert a.equal(b)
    assert kept and len(short.heard) == len(plain.heard) - len([n for n in kept if n.op == "call_function"])
    assert short.most <= plain.most


def test_a_result_is_no_constant():
    """What is returned, or seen through a view that is, is made anew."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    ones = graph.call_function(aten.ones_like.default, (x,))
    eye = graph.call_function(aten.eye.default, (2,))
    row = graph.call_function(aten.select.int, (eye, 0, 1))
    read = graph.call_function(aten.full.default, ([2], 3.0))
    total = graph.call_function(aten.add.Tensor, (x, read))
    graph.output((ones, row, total))
    for node, val in (
        (x, X[0, :2]),
        (ones, X[0, :2]),
        (eye, X[:2, :2]),
        (row, X[0, :2]),
        (read, X[0, :2]),
        (total, X[0, :2]),
    ):
        node.meta["val"] = val
    assert list(constants(graph)) == [read]
    fast = direct(fx.GraphModule(nn.Module(), graph))
    for out in fast(torch.zeros(2)):
        out.fill_(7)
    ones, row, total = fast(torch.zeros(2))
    assert ones.tolist() == [1, 1] and row.tolist() == [0, 1] and total.tolist() == [3, 3]


def test_the_short_way_is_taken(monkeypatch):
    """A repeated call does not run the graph's own code."""
    made, _, x, y = lowered([BatchL2Grad()])
    first = made(x, y)
    made(x, y)
    monkeypatch.setattr(made.lower(x, y).graph_module, "forward", None)
    again = made(2 * x, y)
    assert not again.loss.equal(first.loss) and made(x, y).loss.equal(first.loss)


def test_a_constant_of_sizes_that_are_symbols_elsewhere():
    """A batch that an op has fixed is a number at that op, and a symbol at what it reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).double()

    def loss(f, y):
        return (f[:, 2:] + 0.5 * ((y - f[:, :2]) / f[:, 2:].exp()) ** 2).sum(1).mean()

    compiled = fxcurv.compile(model, loss, [DiagHessian()])
    bias = model[2].bias
    for n in (5, 5, 5, 3, 3):
        x, y = torch.randn(n, 2, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)
        hidden = model[:2](x).detach()

        def of_bias(b, hidden=hidden, y=y):
            return loss(hidden @ model[2].weight.T.detach() + b, y)

        expected = torch.autograd.functional.hessian(of_bias, bias.detach()).diag()
        torch.testing.assert_close(compiled(x, y).diag_h["2.bias"], expected)
