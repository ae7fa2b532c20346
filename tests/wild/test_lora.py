"""Adapters in a frozen model: the walk goes down to the lowest one, and every frozen weight is read as often as it must be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
from fxcurv.extensions import KFAC, BatchGrad, BatchL2Grad, ClippedGrad, DiagGGNMC, Variance

N, T, D, C, RANK = 3, 4, 14, 5, 2


class Adapted(nn.Module):
    """A frozen linear layer and a product of two thin ones beside it."""

    def __init__(self, adapter: bool):
        super().__init__()
        self.layer = nn.Linear(D, D).requires_grad_(False)
        self.a, self.b = (nn.Linear(D, RANK, bias=False), nn.Linear(RANK, D, bias=False)) if adapter else (None, None)

    def forward(self, x):
        y = self.layer(x)
        return torch.tanh(y if self.a is None else y + self.b(self.a(x)))


def build():
    torch.manual_seed(0)
    layers = [Adapted(k in (1, 3)) for k in range(5)]
    norm, head = nn.LayerNorm(D).requires_grad_(False), nn.Linear(D, C).requires_grad_(False)
    model = nn.Sequential(nn.Embedding(C, D).requires_grad_(False), *layers, norm, head).double()
    return model, torch.randint(C, (N, T)), torch.randint(C, (N, T))


def loss(f, y):
    return F.cross_entropy(f.flatten(0, 1), y.flatten())


ASKED = [BatchGrad(), BatchL2Grad(), Variance(), ClippedGrad(max_norm=1e-2), DiagGGNMC(), KFAC()]
PRODUCTS = ("linear", "mm", "matmul")


def readers(program, name):
    """Products that read a weight, through views of it."""
    stack = [n for n in program.graph.nodes if n.op == "placeholder" and n.name.endswith(name)]
    assert len(stack) == 1, name
    found = []
    while stack:
        for user in stack.pop().users:
            product = any(word in str(user.target) for word in PRODUCTS)
            (found if product else stack).append(user)
    return found


def test_frozen_weights_are_transposed_once_at_most():
    model, x, y = build()
    program = fxcurv.compile(model, loss, ASKED).lower(x, y).program
    # forward alone up to the lowest adapter; above it one transpose for all columns
    for layer in (1, 2):
        assert len(readers(program, f"{layer}_layer_weight")) == 1
    for layer in (3, 4, 5):
        assert len(readers(program, f"{layer}_layer_weight")) == 2
    assert [str(n.target) for n in readers(program, "7_weight")].count("aten.linear.default") == 1
    assert len(readers(program, "7_weight")) == 2
    assert not any("embedding" in str(n.target) and "backward" in str(n.target) for n in program.graph.nodes)
    backward = [n for n in program.graph.nodes if str(n.target) == "aten.native_layer_norm_backward.default"]
    assert len(backward) == 1


@pytest.mark.slow
def test_adapters_stay_two_thin_products():
    """No matrix of a frozen weight's size but these."""
    model, x, y = build()
    asked = [BatchL2Grad(), ClippedGrad(max_norm=1e-2), DiagGGNMC()]
    graph = fxcurv.compile(model, loss, asked).lower(x, y).graph_module.graph
    vals = [n.meta.get("val") for n in graph.nodes if n.op != "placeholder" and "aten.t." not in str(n.target)]
    assert not [v.shape for v in vals if isinstance(v, torch.Tensor) and v.shape[-2:] == (D, D)]


@pytest.mark.slow
def test_the_numbers():
    model, x, y = build()
    result = fxcurv.compile(model, loss, [BatchGrad(), Variance()])(x, y)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(result.grad_batch) == set(params)
    for k in range(N):
        value = loss(model(x[k : k + 1]), y[k : k + 1]) / N
        for name, g in zip(params, torch.autograd.grad(value, list(params.values())), strict=True):
            torch.testing.assert_close(result.grad_batch[name][k], g)
