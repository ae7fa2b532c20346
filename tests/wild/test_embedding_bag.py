"""Bags of embeddings in all their options, against the same bags said as a loop over them."""

from __future__ import annotations

import pytest
import torch
from against_oracle import close
from case_tools import Net
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.errors import ArgumentError, MixedSamplesError, UnsupportedOpError
from fxcurv.extensions import HMP, BatchGrad, DiagGGNExact, DiagHessian

ROWS = torch.tensor([[0, 1, 2], [1, 1, 1], [4, 3, 3], [2, 1, 4]])
FIELDS = ("grad", "grad_batch", "diag_ggn_exact", "diag_h")
BAGS = torch.tensor([0, 1, 4, 2, 1, 3, 3]), torch.tensor([0, 3, 3, 5])  # the second is empty


def by_loop(bag, bags, scales):
    """Sum, mean or maximum of each bag's rows that are no padding; zero where there is none."""
    out = []
    for indices, scale in zip(bags, scales, strict=True):
        kept = indices != (-1 if bag.padding_idx is None else bag.padding_idx)
        rows = (bag.weight[indices] * scale.unsqueeze(1))[kept]
        zero = bag.weight.new_zeros(bag.weight.shape[1])
        out.append(zero if not len(rows) else rows.max(0).values if bag.mode == "max" else getattr(rows, bag.mode)(0))
    return torch.stack(out)


def nets(mode, scaled=False, uneven=False, **options):
    """The model with PyTorch's bags, and with a loop over them."""
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(5, 3, mode=mode, **options).double()
    nn.init.normal_(bag.weight)  # PyTorch has zeros at the padding
    scale = nn.Parameter(torch.rand(5).double() + 0.5)
    parts = {"bag": bag, "b": nn.Linear(3, 2).double()} | ({"scale": scale} if scaled else {})

    def scales(m, x):
        return m.scale[x] if scaled else None

    def plain(m, x, *offsets):
        return m.b(m.bag(x, *offsets, per_sample_weights=scales(m, x)).tanh())

    def loop(m, x, *offsets):
        split = (lambda t: t.tensor_split(BAGS[1][1:])) if uneven else list
        given = scales(m, x) if scaled else torch.ones(x.shape).double()
        return m.b(by_loop(m.bag, split(x), split(given)).tanh())

    return Net(plain, **parts), Net(loop, **parts)


OPTIONS = [(mode, scaled, padding) for mode in ("sum", "mean", "max") for scaled in (False, True) for padding in (None, 1, -1)
           if mode == "sum" or not scaled]  # fmt: skip


@pytest.mark.parametrize("mode, scaled, padding", OPTIONS)
def test_a_bag_per_sample(mode, scaled, padding):
    net, loop = nets(mode, scaled, padding_idx=padding)
    y = torch.randn(4, 2, dtype=torch.float64)
    found = fxcurv.compile(net, nn.MSELoss(), [BatchGrad(), DiagGGNExact(), DiagHessian()])(ROWS, y)
    true = Oracle(loop, nn.MSELoss(), ROWS, y, kind="mse")
    for field in FIELDS:
        close(getattr(found, field), getattr(true, field)(), field)


UNEVEN = [("sum", True, 1), ("mean", False, 1), ("mean", False, None), ("max", False, 1), ("max", False, None)]


@pytest.mark.parametrize("mode, scaled, padding", UNEVEN)
def test_bags_of_any_lengths(mode, scaled, padding):
    """Indices of all samples in a row, and where each sample's begin: a bag's gradient is of its sample alone."""
    net, loop = nets(mode, scaled, uneven=True, padding_idx=padding)
    y = torch.randn(4, 2, dtype=torch.float64)
    found = fxcurv.compile(net, nn.MSELoss(), [BatchGrad(), DiagGGNExact(), DiagHessian(), HMP()], batch_dim=(None, 0))(
        BAGS, y
    )
    true = Oracle(loop, nn.MSELoss(), BAGS, y, kind="mse")
    for field in FIELDS:
        close(getattr(found, field), getattr(true, field)(), field)
    for name, h in true.hessian().items():
        v = torch.randn_like(found.grad[name])
        close({name: found.hmp[name](v)}, {name: (h @ v.flatten()).reshape(v.shape)}, "hmp")


def ragged(n, count):
    """`count` indices in `n` bags, the last but one of them empty where there are three."""
    torch.manual_seed(n + count)
    inner = torch.randint(1, count, (n - 1,)).sort().values
    begins = torch.cat([torch.zeros(1, dtype=torch.long), inner])
    return torch.randint(5, (count,)), begins if n < 3 else begins.index_copy(0, torch.tensor([n - 2]), begins[-1:])


@pytest.mark.parametrize(
    "mode, training", [("max", True), *(pytest.param(m, False, marks=pytest.mark.slow) for m in ("mean", "sum", "max"))]
)
def test_one_program_for_all_numbers_of_indices(mode, training):
    """A second number of indices makes the program for any, at any number of bags, one included."""
    torch.manual_seed(0)
    bag, head = nn.EmbeddingBag(5, 3, mode=mode, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)
    net = Net(lambda m, x, begins: m.head(m.bag(x, begins).tanh()), bag=bag, head=head).train(training)
    compiled = fxcurv.compile(net, nn.MSELoss(), [BatchGrad(), DiagGGNExact()], batch_dim=(None, 0))
    for n, count in ((3, 7), (1, 2), (3, 9), (2, 2), (4, 12), (3, 8)):
        x, y = ragged(n, count), torch.randn(n, 2, dtype=torch.float64)
        loop = Net(
            lambda m, x, begins: m.head(by_loop(m.bag, x.tensor_split(begins[1:]), ones(x, begins)).tanh()),
            bag=bag, head=head,
        )  # fmt: skip
        found, true = compiled(x, y), Oracle(loop, nn.MSELoss(), x, y, kind="mse")
        for field in FIELDS[:3]:
            close(getattr(found, field), getattr(true, field)(), field)
    assert len(compiled.recompiles) == 1


def ones(x, begins):
    return torch.ones(x.shape, dtype=torch.float64).tensor_split(begins[1:])


def test_of_equal_entries_the_first_is_the_largest():
    net, _ = nets("max", uneven=True)
    with torch.no_grad():
        net.bag.weight[1] = net.bag.weight[4]
    y = torch.randn(4, 2, dtype=torch.float64)
    found = fxcurv.compile(net, nn.MSELoss(), [], batch_dim=(None, 0))(BAGS, y)
    true = torch.autograd.grad(nn.functional.mse_loss(net(*BAGS), y), list(net.parameters()))
    close(found.grad, dict(zip(dict(net.named_parameters()), true, strict=True)), "grad")


def test_what_no_derivative_says_is_refused():
    net, _ = nets("sum", scale_grad_by_freq=True)
    with pytest.raises(UnsupportedOpError, match="(?s)embedding_bag.* in plain.*Way out: scale_grad_by_freq=False"):
        fxcurv.compile(net, nn.MSELoss())(ROWS, torch.randn(4, 2).double())


def test_offsets_with_a_last_one_are_no_samples():
    """In bags of any lengths: they are one more than the targets."""
    net, _ = nets("sum", uneven=True, include_last_offset=True)
    bags, y = (BAGS[0], torch.cat([BAGS[1], torch.tensor([7])])), torch.randn(4, 2).double()
    with pytest.raises(ArgumentError, match="no input has a batch"):
        fxcurv.compile(net, nn.MSELoss(), [BatchGrad()], batch_dim=None)(bags, y)
    with pytest.raises(MixedSamplesError, match="without a sample axis"):
        fxcurv.compile(net, nn.MSELoss(), [BatchGrad()], batch_dim=(None, 0))(bags, y)


@pytest.mark.parametrize("padding", [(), (-1,)])
def test_pytorchs_own_function(padding):
    """Without a padding, and with one that counts from the end."""
    net, _ = nets("sum")
    options = (False, 0, False, None, False)
    bare = Net(
        lambda m, x: m.b(torch.embedding_bag(m.bag.weight, *BAGS, *options, *padding)[0] * x), bag=net.bag, b=net.b
    )
    bags = BAGS[0].tensor_split(BAGS[1][1:])
    ones = [torch.ones(len(b)).double() for b in bags]
    loop = Net(lambda m, x: m.b(by_loop(m.bag, bags, ones) * x), bag=net.bag, b=net.b)
    x, y = torch.rand(4, 1).double(), torch.randn(4, 2).double()
    found = fxcurv.compile(bare, nn.MSELoss(), [BatchGrad()])(x, y)
    net.bag.padding_idx = 4 if padding else None
    close(found.grad, torch_grad(loop, x, y), "grad")


def torch_grad(net, x, y):
    grads = torch.autograd.grad(nn.functional.mse_loss(net(x), y), list(net.parameters()))
    return dict(zip(dict(net.named_parameters()), grads, strict=True))
