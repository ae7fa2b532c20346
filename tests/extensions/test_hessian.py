"""Hessian diagonals, against the oracle, in float64."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from compiled import close, compiled_case
from oracle import Oracle

import fxcurv
from fxcurv.extensions import BatchDiagHessian, DiagGGNExact, DiagHessian

# alone: in one program with products they are tested on every case
FEW = [
    "mlp_gelu", "layer_called_twice", "weight_norm_linear", "cnn_two_layers", "layer_norm", "transformer_encoder", "lstm",
    "ce_maps_ignore_weights", "loss_negative_scale", "loss_regularised", "output_gaussian_nll",
]  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_diagonals(name):
    compiled, arguments, oracle = compiled_case(CASES[name], [DiagHessian(), BatchDiagHessian()])
    result = compiled(*arguments)
    close(result.diag_h, oracle.diag_h(), "diag_h")
    close(result.diag_h_batch, oracle.diag_h_batch(), "diag_h_batch")


def test_piecewise_linear_networks_have_the_diagonal_of_the_gauss_newton():
    compiled, arguments, _ = compiled_case(CASES["mlp_relu"], [DiagHessian(), DiagGGNExact()])
    result = compiled(*arguments)
    close(result.diag_h, result.diag_ggn_exact, "diag_h")
    program = compiled.lower(*arguments)
    assert not program.walked.residuals


# a function of the weight [2, 3] beside the loss: entries stay apart, are joined by a linear op in front of one with
# curvature, or only behind it
REGULARISERS = {
    "squares": lambda w: w.square().sum(),
    "product_with_itself": lambda w: (w * w * w.exp()).sum(),
    "two_terms": lambda w: (w.square() + w.tanh()).sum(),
    "broadcast": lambda w: (w * torch.arange(12.0, dtype=w.dtype).reshape(2, 2, 3)).tanh().sum(),
    "moved": lambda w: torch.cat([w.t().reshape(-1), w[0]]).exp().sum(),
    "square_of_the_sum": lambda w: w.sum().square(),
    "matrix_product": lambda w: (torch.arange(15.0, dtype=w.dtype).reshape(5, 3) @ w.t()).square().sum(),
    "neighbours": lambda w: (w[:, 1:] - w[:, :-1]).square().sum(),
    "all_pairs": lambda w: (w.flatten()[None] + w.flatten()[:, None]).exp().sum(),
    "with_its_transpose": lambda w: (w[:, :2] * w[:, :2].t()).sum(),
    "softmax": lambda w: w.softmax(1).square().sum(),
    "norm": lambda w: w.norm(),
}


@pytest.mark.parametrize("name", REGULARISERS)
def test_a_regulariser(name):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)

    def value(w):
        return torch.nn.functional.mse_loss(x @ w.t() + model.bias.detach(), y) + REGULARISERS[name](w)

    def loss(f, y):
        return torch.nn.functional.mse_loss(f, y) + REGULARISERS[name](model.weight)

    expected = torch.autograd.functional.hessian(value, model.weight.detach()).reshape(6, 6).diagonal().reshape(2, 3)
    torch.testing.assert_close(fxcurv.compile(model, loss, [DiagHessian()])(x, y).diag_h["weight"], expected)


def test_a_loss_that_reads_a_parameter_for_every_sample():
    """Its own curvature counts, for every sample too; beside a quantity that needs f it is no sample's, and refused."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    x, y = torch.randn(3, 4).double(), torch.randn(3, 3).double()

    def loss(f, y):
        return (f - y).square().mean() + (model.bias - y).square().sum()

    found = fxcurv.compile(model, loss, [DiagHessian(), BatchDiagHessian()])(x, y)
    for name, expected in Oracle(model, loss, x, y).diag_h().items():
        torch.testing.assert_close(found.diag_h[name], expected)
    # one sample's term of the loss: the mean is over 9 entries, the sum over none
    own = lambda f, t: (f - t).square().sum() / 9 + (model.bias - t).square().sum()  # noqa: E731
    for n in range(3):
        for name, expected in Oracle(model, own, x[n : n + 1], y[n : n + 1]).diag_h().items():
            torch.testing.assert_close(found.diag_h_batch[name][n], expected)
    with pytest.raises(fxcurv.errors.ExtensionError, match="'bias' for every sample"):
        fxcurv.compile(model, loss, [BatchDiagHessian(), DiagGGNExact()])(x, y)
