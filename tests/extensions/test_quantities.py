"""Every extension on every case, against the oracle, in float64."""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from compiled import close, compiled_case

from fxcurv.extensions import (
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    Jacobian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)

MAX_NORM = 0.1
SUBSAMPLING = [0, 0]
EXACT = [
    BatchGrad(),
    BatchGrad(subsampling=SUBSAMPLING, savefield="grad_batch_sub"),
    BatchL2Grad(),
    SumGradSquared(),
    Variance(),
    ClippedGrad(MAX_NORM),
    ClippedGrad(MAX_NORM, over="param", savefield="grad_clipped_param"),
    DiagGGNExact(),
    BatchDiagGGNExact(),
    SqrtGGNExact(),
    SqrtGGNExact(subsampling=SUBSAMPLING, savefield="sqrt_sub"),
]
SAMPLED = [DiagGGNMC(mc_samples=3), BatchDiagGGNMC(mc_samples=3), SqrtGGNMC(mc_samples=3)]
PLAIN = ("grad", "grad_batch", "batch_l2", "sum_grad_squared", "variance", "diag_ggn_exact", "diag_ggn_exact_batch")


# one of each kind by default; the slow tests take them all
REPRESENTATIVE = {
    "logistic_regression", "mlp_relu", "mlp_single_sample", "layer_called_twice", "tied_embedding_lm", "weight_norm_linear",
    "low_rank_adapter", "functional_einsum", "inputs_tuple", "batch_second", "frozen_parameters", "unreached_parameter",
    "conv2d_groups", "conv_transpose2d_stride", "residual_net", "batch_norm2d", "group_norm", "max_pool2d",
    "transformer_encoder", "transformer_decoder_lm", "multihead_attention_inputs", "lstm", "ragged_sequence_first",
    "ce_maps_ignore_weights", "ce_soft", "mse_maps", "own_slices", "bce_weights_soft", "loss_poisson", "loss_hinge_embedding",
    "sigmoid_in_model", "output_tuple",
}  # fmt: skip


def names(*without):
    kept = [name for name, case in CASES.items() if not set(without) & set(case.tags)]
    return [pytest.param(name, marks=[] if name in REPRESENTATIVE else pytest.mark.slow) for name in kept]


FEW = {
    "mlp_relu",
    "residual_net",
    "transformer_decoder_lm",
    "lstm",
    "ce_maps_ignore_weights",
    "mse_maps",
    "bce_weights_soft",
}


def few(*without):
    return [p if p.values[0] in FEW else pytest.param(*p.values, marks=pytest.mark.slow) for p in names(*without)]


def gram(columns):
    """sum_v s s^T of [V, N, *P] over v, per sample."""
    flat = columns.flatten(2)
    return torch.einsum("vnp,vnq->npq", flat, flat)


@pytest.mark.parametrize("name", names())
def test_exact_quantities(name):
    case = CASES[name]
    extensions = [e for e in EXACT if not (e.needs_convex and "nonconvex" in case.tags)]
    compiled, arguments, oracle = compiled_case(case, extensions)
    result = compiled(*arguments)
    torch.testing.assert_close(result.loss, oracle.loss())
    for field in PLAIN:
        if hasattr(result, field):
            close(getattr(result, field), getattr(oracle, field)(), field)
    close(result.grad_batch_sub, oracle.grad_batch(subsampling=SUBSAMPLING), "grad_batch_sub")
    close(result.grad_clipped, oracle.grad_clipped(MAX_NORM, "all"), "grad_clipped")
    close(result.grad_clipped_param, oracle.grad_clipped(MAX_NORM, "param"), "grad_clipped_param")
    torch.testing.assert_close(result.sample_norms, oracle.sample_norms())
    if "nonconvex" in case.tags:
        return
    for field, expected in (
        ("sqrt_ggn_exact", oracle.sqrt_ggn_exact()),
        ("sqrt_sub", oracle.sqrt_ggn_exact(subsampling=SUBSAMPLING)),
    ):
        actual = getattr(result, field)
        if "ambiguous_columns" in case.tags:
            close({k: gram(v) for k, v in actual.items()}, {k: gram(v) for k, v in expected.items()}, field)
        else:
            close(actual, expected, field)


@pytest.mark.parametrize("name", few("nonconvex"))
def test_diagonals_alone(name):
    """Without a result that shows the columns, fewer of them do."""
    compiled, arguments, oracle = compiled_case(CASES[name], [DiagGGNExact(), BatchDiagGGNExact()])
    result = compiled(*arguments)
    close(result.diag_ggn_exact, oracle.diag_ggn_exact(), "diag_ggn_exact")
    close(result.diag_ggn_exact_batch, oracle.diag_ggn_exact_batch(), "diag_ggn_exact_batch")


@pytest.mark.parametrize("name", few("several_leaves"))
def test_jacobian(name):
    compiled, arguments, oracle = compiled_case(CASES[name], [Jacobian()])
    close(compiled(*arguments).jacobian, oracle.jacobian(), "jacobian")


@pytest.mark.parametrize("name", few("nonconvex"))
def test_sampled_quantities(name):
    compiled, arguments, oracle = compiled_case(CASES[name], SAMPLED)
    result, again = compiled(*arguments, seed=7), compiled(*arguments, seed=7)
    found = oracle.recover(result.sqrt_ggn_mc)
    assert found.residual < 1e-7
    for param, p in result.sqrt_ggn_mc.items():
        torch.testing.assert_close(p, again.sqrt_ggn_mc[param], rtol=0, atol=0)
        torch.testing.assert_close(result.diag_ggn_mc_batch[param], p.square().sum(0))
        torch.testing.assert_close(result.diag_ggn_mc[param], p.square().sum((0, 1)))
