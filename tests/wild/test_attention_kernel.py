"""Attention without heads: from PyTorch 2.14 on a CPU runs it in a fused kernel that has no second derivative.

Earlier versions did so for four dimensions alone. Quantities are of its mathematics, so the version does not matter.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

import fxcurv
from fxcurv.errors import CaptureError
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


class Flexible(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.attend = nn.Linear(D, D), flex_attention

    def forward(self, x):
        h = self.mix(x).unsqueeze(1)
        return self.attend(h, h, h).squeeze(1).mean(1)


def test_flex_attention_is_refused():
    model, x, code = Flexible(), torch.randn(N, T, D), flex_attention.__code__
    with pytest.raises(CaptureError, match="flex_attention is not supported.*(\n.*)*scaled_dot_product_attention"):
        fxcurv.compile(model, F.mse_loss, [BatchGrad()])(x, torch.randn(N, D))
    assert flex_attention.__code__ is code


def test_rms_norm_has_no_kernels_on_a_cpu():
    """Where it has, it should stay them, as layer norm does (`rules.fused`)."""
    y = F.rms_norm(torch.randn(N, D, requires_grad=True), [D], torch.randn(D, requires_grad=True))
    assert "Rms" not in y.grad_fn.name()
