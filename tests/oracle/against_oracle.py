"""One model of one parameter-carrying layer before and after a function, all quantities against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch
from case_tools import Net
from oracle import Oracle, plain_mathematics
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import HMP, KFLR, BatchDiagHessian, BatchGrad, DiagGGNExact, DiagHessian, SqrtGGNExact


def between(fn, wide: int = 5, bias: bool = True) -> Net:
    """linear, tanh, `fn`, linear."""
    torch.manual_seed(0)
    a, b = nn.Linear(4, wide, dtype=torch.float64), nn.Linear(wide, 3, bias, dtype=torch.float64)
    return Net(lambda m, x: m.b(fn(torch.tanh(m.a(x)))), a=a, b=b)


def close(actual, expected, what: str, tol: float = 1e-9) -> None:
    assert actual.keys() == expected.keys(), what
    for name, e in expected.items():
        a = actual[name].detach()
        assert a.shape == e.shape, (what, name)
        assert a.isfinite().all(), (what, name)
        off = (a - e).abs().max().item() if e.numel() else 0.0
        assert off <= tol * max(1.0, e.abs().max().item() if e.numel() else 0.0), (what, name, off)


def check(model: nn.Module, loss, x, y, sizes=(), **oracle) -> None:
    """Individual gradients, Gauss-Newton and Hessian quantities; then at other batch sizes, the first n samples."""
    asked = [BatchGrad(), DiagGGNExact(), SqrtGGNExact(), DiagHessian(), BatchDiagHessian(), HMP()]
    compiled = fxcurv.compile(model, loss, asked)
    for n in (len(x), *sizes):
        xs, ys = x[:n], y[:n]
        found = compiled(xs, ys)
        with plain_mathematics():
            true = Oracle(model, loss, xs, ys, **oracle)
            close(found.grad, true.grad(), "grad")
            close(found.grad_batch, true.grad_batch(), "grad_batch")
            close(found.diag_ggn_exact, true.diag_ggn_exact(), "diag_ggn_exact")
            close(found.sqrt_ggn_exact, true.sqrt_ggn_exact(), "sqrt_ggn_exact")
            close(found.diag_h, true.diag_h(), "diag_h")
            close(found.diag_h_batch, true.diag_h_batch(), "diag_h_batch")
            hessian = true.hessian()
        for name, p in model.named_parameters():
            v = torch.randn(2, *p.shape, dtype=p.dtype)
            product = found.hmp[name](v)
            expected = (v.flatten(1) @ hessian[name]).reshape(v.shape)
            close({name: product}, {name: expected}, "hmp")


def kflr_of(model, loss, x, y):
    return fxcurv.compile(model, loss, [KFLR()])(x, y).kflr


def compare(found, wanted) -> None:
    """Of every parameter, to the rounding of float64 that sums in another order leave."""
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)


def compare_quantities(result: fxcurv.Result, oracle: Oracle, extensions: list, seed: int) -> None:
    """The gradient, every field that was asked for, and products with a random vector per parameter."""
    compare(result.grad, oracle.grad())
    for field in [e.savefield for e in extensions]:
        if field in ("hmp", "ggnmp"):
            matrices = oracle.hessian() if field == "hmp" else oracle.ggn()
            for name, p in oracle.params.items():
                v = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(seed))
                found = getattr(result, field)[name](v).flatten()
                torch.testing.assert_close(found, matrices[name] @ v.flatten(), rtol=1e-8, atol=1e-10)
        else:
            compare(getattr(result, field), getattr(oracle, field)())


def compare_individual(found, model: nn.Module, loss_of: Callable[[int], Tensor], n: int, tolerance: float) -> None:
    """`grad_batch` against a loop over samples, relative to a sample's largest entry; `loss_of`: sample -> its own loss."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for k in range(n):
        alone = torch.autograd.grad(loss_of(k) / n, [*parameters.values()], allow_unused=True)
        scale = max(g.abs().max() for g in alone if g is not None)
        for (name, p), g in zip(parameters.items(), alone, strict=True):
            mine = found[name][k] if name in found else torch.zeros_like(p)
            wrong = (mine - (torch.zeros_like(p) if g is None else g)).abs().max() / scale
            assert wrong < tolerance, f"{name}: {wrong}"
