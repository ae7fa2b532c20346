"""Exponentials of matrices: their derivatives are exact to rounding however large the loss, where PyTorch's lose all digits."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.extensions import BatchGrad, DiagGGNExact, DiagHessian

SMALL = 2.0**-60


class Exponentials(nn.Module):
    """exp(A(x)) exp(W): of data and of a parameter."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.linear, self.w, self.size = nn.Linear(4, 9), nn.Parameter(torch.randn(3, 3)), size

    def forward(self, x):
        a = self.linear(x).unflatten(-1, (3, 3)) * self.size
        return (torch.matrix_exp(a) @ torch.matrix_exp(self.w * self.size)).sum(-1)


@pytest.mark.parametrize("size", [0.5, 4.0])
@pytest.mark.parametrize("scale", [2.0**-16, 2.0**16])
def test_in_single_precision(size: float, scale: float) -> None:
    """The gradient of PyTorch 2.13 itself is wrong by half at size 4 (in double precision, by 0.4%: the oracle's loss is small).

    The check of the first call compares with it, and knows how it rounds.
    """
    torch.manual_seed(0)
    model, x, y = Exponentials(size), torch.randn(5, 4), torch.randn(5, 3)

    def loss(f, y):
        return nn.functional.mse_loss(f, y) * scale

    result = fxcurv.compile(model, loss, [BatchGrad(), DiagGGNExact(), DiagHessian()])(x, y)
    oracle = Oracle(copy.deepcopy(model).double(), lambda f, y: SMALL * loss(f, y), x.double(), y.double())
    expected = {
        "grad": oracle.grad(), "grad_batch": oracle.grad_batch(), "diag_ggn_exact": oracle.diag_ggn_exact(),
        "diag_h": oracle.diag_h(),
    }  # fmt: skip
    for field, of in expected.items():
        for name, exact in of.items():
            error = (SMALL * getattr(result, field)[name].double() - exact).abs().max() / exact.abs().max()
            assert error < 1e-5, (field, name, error)
