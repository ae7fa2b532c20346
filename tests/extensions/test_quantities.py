"""All extensions in one program on every case, and some alone on a few, against the oracle, in float64."""

from __future__ import annotations

import pytest
import torch
from asked import exact, first, sampled
from cases import CASES
from compiled import close, compiled_case
from fewer import fewer
from oracle import Oracle

from fxcurv.extensions import (
    BatchGrad,
    ClippedGrad,
    Jacobian,
    SqrtGGNExact,
)

MAX_NORM = 0.1
SUBSAMPLING = [0, 0]
EXACT = [
    *first(MAX_NORM),
    BatchGrad(subsampling=SUBSAMPLING, savefield="grad_batch_sub"),
    ClippedGrad(MAX_NORM, over="param", savefield="grad_clipped_param"),
    *exact(),
    SqrtGGNExact(subsampling=SUBSAMPLING, savefield="sqrt_sub"),
]
TOGETHER = [*EXACT, *sampled(3), Jacobian()]
PLAIN = (
    "grad", "grad_batch", "batch_l2", "sum_grad_squared", "variance", "diag_ggn_exact", "diag_ggn_exact_batch", "jacobian",
)  # fmt: skip
AT_ANY_SIZE = ("grad", "grad_batch", "diag_ggn_exact", "diag_ggn_exact_batch")


def wanted(extension, case):
    """Whether the case has this quantity."""
    if isinstance(extension, Jacobian):
        return "several_leaves" not in case.tags
    return "nonconvex" not in case.tags or not extension.needs_convex


def gram(columns):
    """sum_v s s^T of [V, N, *P] over v, per sample."""
    flat = columns.flatten(2)
    return torch.einsum("vnp,vnq->npq", flat, flat)


QUICK = {"residual_net", "tied_embedding_lm", "ce_maps_ignore_weights"}


@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_all_quantities(name):
    """Of one program, which finds nothing wrong with itself either; then of one sample and of two."""
    case = CASES[name]
    compiled, arguments, oracle = compiled_case(case, [e for e in TOGETHER if wanted(e, case)], check="first")
    result = compiled(*arguments, seed=7)
    torch.testing.assert_close(result.loss, oracle.loss())
    for field in PLAIN:
        if hasattr(result, field):
            close(getattr(result, field), getattr(oracle, field)(), field)
    close(result.grad_batch_sub, oracle.grad_batch(subsampling=SUBSAMPLING), "grad_batch_sub")
    close(result.grad_clipped, oracle.grad_clipped(MAX_NORM, "all"), "grad_clipped")
    close(result.grad_clipped_param, oracle.grad_clipped(MAX_NORM, "param"), "grad_clipped_param")
    torch.testing.assert_close(result.sample_norms, oracle.sample_norms())
    if "nonconvex" not in case.tags:
        check_columns(result, oracle, "ambiguous_columns" in case.tags)
        check_sampled(result, compiled(*arguments, seed=7), oracle)
    inputs, targets = (*arguments, None)[:2]
    for n, x, y in fewer(name, inputs, targets):
        result = compiled(x) if y is None else compiled(x, y)
        oracle = Oracle(compiled.model, compiled.loss, x, y, **case.oracle)
        torch.testing.assert_close(result.loss, oracle.loss(), equal_nan=True)
        for field in AT_ANY_SIZE:
            if hasattr(result, field):
                close(getattr(result, field), getattr(oracle, field)(), f"{field} at {n} samples")


def check_columns(result, oracle, ambiguous):
    for field, expected in (
        ("sqrt_ggn_exact", oracle.sqrt_ggn_exact()),
        ("sqrt_sub", oracle.sqrt_ggn_exact(subsampling=SUBSAMPLING)),
    ):
        actual = getattr(result, field)
        if ambiguous:
            close({k: gram(v) for k, v in actual.items()}, {k: gram(v) for k, v in expected.items()}, field)
        else:
            close(actual, expected, field)


def check_sampled(result, again, oracle):
    found = oracle.recover(result.sqrt_ggn_mc)
    assert found.residual < 1e-7
    for param, p in result.sqrt_ggn_mc.items():
        torch.testing.assert_close(p, again.sqrt_ggn_mc[param], rtol=0, atol=0)
        torch.testing.assert_close(result.diag_ggn_mc_batch[param], p.square().sum(0))
        torch.testing.assert_close(result.diag_ggn_mc[param], p.square().sum((0, 1)))


# ---- alone: fewer values are kept than where all are asked for; wild/test_batch_sizes.py has diagonals alone of more

FEW = [
    "mlp_relu", "residual_net", "transformer_decoder_lm", "lstm", "ce_maps_ignore_weights", "mse_maps", "bce_weights_soft",
]  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_jacobian(name):
    compiled, arguments, oracle = compiled_case(CASES[name], [Jacobian()])
    close(compiled(*arguments).jacobian, oracle.jacobian(), "jacobian")


@pytest.mark.parametrize("name", FEW)
def test_sampled_quantities(name):
    compiled, arguments, oracle = compiled_case(CASES[name], sampled(3))
    check_sampled(compiled(*arguments, seed=7), compiled(*arguments, seed=7), oracle)
