"""Bags of embeddings in all their options, against the same bags said as a loop over them."""

from __future__ import annotations

import pytest
import torch
from against_oracle import close
from case_tools import Net
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.errors import UnsupportedOpError
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


@pytest.mark.parametrize("mode, scaled, padding", [("sum", True, 1), ("mean", False, 1), ("mean", False, None)])
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


def test_what_no_derivative_says_is_refused():
    net, _ = nets("sum", scale_grad_by_freq=True)
    with pytest.raises(UnsupportedOpError, match="embedding_bag"):
        fxcurv.compile(net, nn.MSELoss())(ROWS, torch.randn(4, 2).double())


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
