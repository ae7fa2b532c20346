"""Columns beyond the memory budget go down in several sweeps, with the same results, in float64."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from compiled import close, compiled_case
from torch import nn

import fxcurv
from fxcurv.extensions import (
    KFLR,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
)

NAMES = ["mlp_gelu", "ce_maps_ignore_weights", "layer_called_twice", "weight_norm_linear"]
SLOW = ["residual_net", "squeeze_excite", "lstm", "transformer_encoder", "loss_poisson", "unet_transposed"]


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_one_column_at_a_time(name):
    extensions = [DiagGGNExact(), BatchDiagGGNExact(), DiagHessian(), BatchDiagHessian(), BatchGrad()]
    compiled, arguments, oracle = compiled_case(CASES[name], extensions, memory_budget=1)
    program = compiled.lower(*arguments)
    # a pair stays together
    assert all(n == (2 if g.paired else 1) for g, n in program.walked.columns.items() if g.part)
    assert program.walked.sweeps > 2
    result = compiled(*arguments)
    for field in ("diag_ggn_exact", "diag_h", "diag_h_batch", "grad_batch"):
        close(getattr(result, field), getattr(oracle, field)(), field)
    close(result.diag_ggn_exact_batch, oracle.diag_ggn_exact_batch(), "diag_ggn_exact_batch")


@pytest.mark.parametrize("sharing", ["backpack", "expand"])
def test_factors(sharing):
    """A layer that two sweeps pass is one use of its weight, not two."""
    model, loss, x, y = CASES["cnn_two_layers"].build()
    whole, parts = (
        fxcurv.compile(model, loss, [KFLR(sharing)], memory_budget=budget)(x, y).kflr for budget in (None, 1)
    )
    for name, factors in whole.items():
        for a, b in zip(factors, parts[name], strict=True):
            torch.testing.assert_close(a, b)


def test_a_result_that_shows_all_columns_holds_them_anyway():
    model, loss, x, y = CASES["mlp_gelu"].build()
    compiled = fxcurv.compile(model, loss, [SqrtGGNExact()], memory_budget=1)
    assert compiled.lower(x, y).walked.sweeps == 1


def test_a_larger_batch_gets_more_sweeps():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)).double()
    columns, bytes_per_column = 5, 3 * 8 * 8
    compiled = fxcurv.compile(
        model, nn.CrossEntropyLoss(), [DiagGGNExact()], memory_budget=10 * columns * bytes_per_column
    )
    sweeps = {}
    for n in (4, 10, 20):
        program = compiled.lower(torch.randn(n, 4, dtype=torch.double), torch.randint(6, (n,)))
        sweeps[n] = program.walked.sweeps
    assert sweeps == {4: 1, 10: 1, 20: 4}  # at 20 samples 2 columns fit, and the first sweep has the gradient alone


def test_budget_must_be_a_number_of_bytes():
    with pytest.raises(fxcurv.errors.ArgumentError, match="memory_budget='2GB'"):
        fxcurv.compile(nn.Linear(2, 2), nn.MSELoss(), memory_budget="2GB")
