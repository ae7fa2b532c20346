"""Hessian diagonals on every case, against the oracle, in float64."""

from __future__ import annotations

import pytest
from cases import CASES
from compiled import close, compiled_case

from fxcurv.extensions import BatchDiagHessian, DiagGGNExact, DiagHessian

REPRESENTATIVE = {
    "mlp_gelu", "layer_called_twice", "tied_embedding_lm", "weight_norm_linear", "low_rank_adapter", "cnn_two_layers",
    "squeeze_excite", "layer_norm", "transformer_encoder", "lstm", "rnn_tanh", "ce_maps_ignore_weights", "loss_poisson",
    "loss_negative_scale", "loss_regularised", "symmetric_weight", "pointwise_ops", "batch_norm2d", "mlp_single_sample",
    "output_gaussian_nll",
}  # fmt: skip
NAMES = [
    pytest.param(name, marks=[] if name in REPRESENTATIVE else pytest.mark.slow)
    for name, case in CASES.items()
    if "no_hessian" not in case.tags
]


@pytest.mark.parametrize("name", NAMES)
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
