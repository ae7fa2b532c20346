"""Half precision, autocast and complex numbers, against the oracle in float64 at the rounded weights and inputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net, mlp, param
from cases import CASES
from oracle import Oracle, tensors
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import fxcurv
from fxcurv.errors import ArgumentError
from fxcurv.extensions import (
    EKFAC,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

HALF = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
NAMES = ["mlp_gelu", "cnn_two_layers", "transformer_encoder", "loss_log_cosh"]
GIVEN = [BatchGrad(), SqrtGGNExact(), ClippedGrad(0.1)]
ACCUMULATED = [
    BatchL2Grad(), SumGradSquared(), Variance(), DiagGGNExact(), BatchDiagGGNExact(), DiagHessian(),
]  # fmt: skip


def rounded(name: str, dtype: torch.dtype):
    """(parts in `dtype`, the same numbers in float64)."""
    case = CASES[name]
    half = case.build(dtype)
    model, loss, inputs, targets = copy.deepcopy(half)
    double = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    loss = loss.double() if isinstance(loss, nn.Module) else loss
    parts = model.double(), loss, *(tree_map_only(Tensor, double, part) for part in (inputs, targets))
    return half, Oracle(*parts, **case.oracle)


def near(actual, expected, bound: float, name: str) -> None:
    """Norms of the errors of all parameters together, relative to the norm of the values."""
    assert set(actual) == set(expected)
    error = sum((actual[k].double() - v.double()).square().sum() for k, v in expected.items()).sqrt()
    size = sum(v.double().square().sum() for v in expected.values()).sqrt()
    assert error <= bound * size, f"{name}: {(error / size).item():.2g} > {bound:.2g}"


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", [n if n == "mlp_gelu" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_half_precision(name, dtype):
    (model, loss, x, y), oracle = rounded(name, dtype)
    result = fxcurv.compile(model, loss, [*GIVEN, *ACCUMULATED])(x, y)
    # every value of the forward pass and of the walk is rounded once; a square has twice the relative error
    bound = 12 * torch.finfo(dtype).eps
    for e in GIVEN:
        values = getattr(result, e.savefield)
        assert {v.dtype for v in values.values()} == {dtype}, e
        if e.savefield != "sqrt_ggn_exact" or "ambiguous_columns" not in CASES[name].tags:
            near(values, getattr(oracle, e.savefield)(), bound, e.savefield)
    for e in ACCUMULATED:
        values = getattr(result, e.savefield)
        assert {v.dtype for v in values.values()} == {torch.float32}, e
        near(values, getattr(oracle, e.savefield)(), 2 * bound, e.savefield)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_accumulation_is_that_of_float32(dtype):
    """From the same half-precision individual gradients, the sums are those of float32: only the sums are tested."""
    (model, loss, x, y), _ = rounded("mlp_gelu", dtype)
    x, y = torch.cat([x] * 300), torch.cat([y] * 300)
    loss = nn.CrossEntropyLoss(reduction="sum")
    result = fxcurv.compile(model, loss, [BatchGrad(), *ACCUMULATED[:4]])(x, y)
    for name, g in result.grad_batch.items():
        g = g.double()
        # P itself is rounded to half in `g`, and not in the sums: eps, not eps over the 1200 samples
        tolerance = {"rtol": 3 * torch.finfo(dtype).eps, "atol": 1e-6}
        torch.testing.assert_close(result.sum_grad_squared[name].double(), g.square().sum(0), **tolerance)
        torch.testing.assert_close(result.batch_l2[name].double(), g.square().flatten(1).sum(1), **tolerance)
        torch.testing.assert_close(result.variance[name].double(), g.var(0, correction=0), **tolerance)


@pytest.mark.parametrize("scale", [3e3, pytest.param(1e-3, marks=pytest.mark.slow)])
def test_squares_beyond_the_range_of_float16(scale):
    """Squares of large gradients are above 65504, those of small ones below the smallest normal float16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).half()
    x, y = torch.randn(3, 4).half(), torch.randn(3, 2).half()
    loss = lambda f, t: scale * F.mse_loss(f, t)  # noqa: E731
    extensions = [SumGradSquared(), BatchL2Grad(), Variance(), DiagGGNExact(), KFLR(), KFAC(), KFRA(), EKFAC()]
    result = fxcurv.compile(model, loss, [*extensions, BatchGrad()])(x, y)
    oracle = Oracle(copy.deepcopy(model).double(), loss, x.double(), y.double())
    squares = oracle.sum_grad_squared()
    largest = max(s.max() for s in squares.values())
    assert largest > 65504 if scale > 1 else largest < 2**-14
    bound = 24 * torch.finfo(torch.float16).eps
    near(result.sum_grad_squared, squares, bound, "sum_grad_squared")
    near(result.batch_l2, oracle.batch_l2(), bound, "batch_l2")
    near(result.variance, oracle.variance(), bound, "variance")
    near(result.diag_ggn_exact, oracle.diag_ggn_exact(), bound, "diag_ggn_exact")
    for field in ("kflr", "kfac", "kfra", "ekfac"):
        for name, factors in getattr(result, field).items():
            assert all(f.dtype == torch.float32 and f.isfinite().all() and f.any() for f in factors), (field, name)
    # a bias' factor is its exact block, whose diagonal is the Gauss-Newton's
    near({"b": result.kflr["2.bias"][0].diagonal()}, {"b": oracle.diag_ggn_exact()["2.bias"]}, bound, "kflr")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kronecker_factors_and_products(dtype):
    """The factors of a half-precision model are those of the float32 model at the same weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(4, 1, 3, 3, dtype=dtype), torch.randint(3, (4,))
    single = copy.deepcopy(model).float()
    extensions = [KFLR(), KFRA(), KFAC(fisher="empirical")]
    half = fxcurv.compile(model, F.cross_entropy, [*extensions, HMP(), PCHMP()])(x, y)
    full = fxcurv.compile(single, F.cross_entropy, [*extensions, HMP(), PCHMP()])(x.float(), y)
    bound = 24 * torch.finfo(dtype).eps
    for e in extensions:
        pairs = zip(tensors(list(half[e].values())), tensors(list(full[e].values())), strict=True)
        for k, (a, b) in enumerate(pairs):
            assert a.dtype == torch.float32
            near({"": a}, {"": b}, bound, f"{e} {k}")
    for field in ("hmp", "pchmp"):
        for name, p in model.named_parameters():
            v = torch.randn(p.shape).to(dtype)
            product = getattr(half, field)[name](v)
            assert product.dtype == dtype
            near({"": product}, {"": getattr(full, field)[name](v.float())}, 2 * bound, f"{field} {name}")


def test_sampled_columns_of_half_precision():
    """Probabilities are summed in float32: rare classes are drawn as often as they should be."""
    bias = torch.tensor([6.0, 0.0, 0.0]).bfloat16()
    model = Net(lambda m, x: x * m.w + bias, w=nn.Parameter(torch.ones(3, dtype=torch.bfloat16)))
    x, y = torch.ones(1, 3, dtype=torch.bfloat16), torch.tensor([0])
    result = fxcurv.compile(model, F.cross_entropy, [DiagGGNMC(mc_samples=200_000), DiagGGNExact()])(x, y, seed=0)
    torch.testing.assert_close(result.diag_ggn_mc["w"], result.diag_ggn_exact["w"], rtol=0.2, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp_gelu", "cnn_two_layers", "transformer_encoder_norm_first"])
def test_autocast(name):
    """float32 parameters, bfloat16 matrix products: results have the parameters' dtype. No kink is within rounding of a value."""
    case = CASES[name]
    model, loss, x, y = case.build(torch.float32)
    oracle = Oracle(*case.build(), **case.oracle)
    compiled = fxcurv.compile(model, loss, [*GIVEN, *ACCUMULATED, KFLR(others="exact")])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = compiled(x, y)
    plain = compiled(x, y)
    assert result.output.dtype == torch.bfloat16 and plain.output.dtype == torch.float32
    bound = 16 * torch.finfo(torch.bfloat16).eps
    for e in [*GIVEN, *ACCUMULATED]:
        values = getattr(result, e.savefield)
        assert {v.dtype for v in values.values()} == {torch.float32}, e
        near(values, getattr(oracle, e.savefield)(), 2 * bound, e.savefield)
        near(getattr(plain, e.savefield), getattr(oracle, e.savefield)(), 1e-4, e.savefield)
    for a, b in zip(tensors(list(result.kflr.values())), tensors(list(plain.kflr.values())), strict=True):
        assert a.dtype == torch.float32
        near({"": a}, {"": b}, 2 * bound, "kflr")


def test_complex_numbers_are_refused_by_name():
    """Those of inputs and parameters; those in between are not (tests/wild/test_complex_numbers.py)."""
    x, y = torch.randn(4, 4), torch.randint(3, (4,))
    with pytest.raises(ArgumentError, match="complex"):
        fxcurv.compile(mlp(), F.cross_entropy)(x.to(torch.complex64), y)
    model = Net(lambda m, x: m.net(x) + (m.w.abs()), net=mlp(), w=param(3))
    model.w = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ArgumentError, match="'w' is complex"):
        fxcurv.compile(model, F.cross_entropy)
    model = Net(lambda m, x: m.net(torch.fft.fft(x).real), net=mlp())  # nothing is learned through the inputs' spectrum
    result = fxcurv.compile(model, F.cross_entropy, [BatchGrad()])(x, y)
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for actual, value in zip(result.grad.values(), expected, strict=True):
        torch.testing.assert_close(actual, value)
