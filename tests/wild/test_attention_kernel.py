"""Attention without heads: from PyTorch 2.14 on a CPU runs it in a fused kernel that has no second derivative.

Earlier versions did so for four dimensions alone. Quantities are of its mathematics, so the version does not matter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.extensions import BatchGrad, DiagGGNExact, DiagHessian

N, T, D, C = 3, 4, 5, 2


class Pooled(nn.Module):
    """Self-attention on [N, T, D], or the same on one head."""

    def __init__(self, head: bool):
        super().__init__()
        self.head, self.mix, self.last = head, nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x):
        h = self.mix(x).unsqueeze(1) if self.head else self.mix(x)
        h = F.scaled_dot_product_attention(h, h, h)
        return self.last(h.squeeze(1) if self.head else h).mean(1)


def build(head):
    torch.manual_seed(0)
    model = Pooled(head).double()
    return model, torch.randn(N, T, D, dtype=torch.float64), torch.tensor([0, 1, 1])


def test_second_derivatives():
    model, x, y = build(head=False)
    result = fxcurv.compile(model, F.cross_entropy, [BatchGrad(), DiagHessian()])(x, y)
    oracle = Oracle(model, F.cross_entropy, x, y, kind="ce")
    for found, expected in ((result.grad_batch, oracle.grad_batch()), (result.diag_h, oracle.diag_h())):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def test_quantities_are_differentiated_again():
    found = []
    for head in (False, True):
        model, x, y = build(head)
        result = fxcurv.compile(model, F.cross_entropy, [DiagGGNExact()])(x, y, create_graph=True)
        total = sum(value.sum() for value in result.diag_ggn_exact.values())
        found.append(torch.autograd.grad(total, model.mix.weight)[0])
    torch.testing.assert_close(*found)


def test_the_work_of_a_plain_step_is_that_of_the_mathematics():
    """Scores and their average, once forward and each with two products backward, and the two layers."""
    model, x, y = build(head=False)
    attention = 2 * 3 * 2 * N * T * T * D
    layers = 2 * 2 * N * T * D * D + 3 * 2 * N * T * D * C  # nothing asks for the gradient of x
    assert fxcurv.compile(model, F.cross_entropy, [BatchGrad()]).explain(x, y).plain.flops == attention + layers
