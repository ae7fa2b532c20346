"""Quantities that must agree do: one of them wrong, or falling back to another, cannot stay unseen."""

from __future__ import annotations

from collections.abc import Callable

import asked
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import LossError
from fxcurv.extensions import (
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    Extension,
    Jacobian,
    SqrtGGNExact,
    SqrtGGNMC,
)

N, M = 4, 3


class Two(nn.Module):
    """Two outputs, of which a loss may read one with curvature and one without."""

    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.a(h), self.b(h)


class Tied(nn.Module):
    """A weight that is used twice, with a non-linear function between."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x):
        return torch.tanh(x @ self.w) @ self.w


def mlp(out: int = 3):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, out))


def conv():
    return nn.Sequential(nn.Conv1d(1, 2, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(4, 3))


def images(x: Tensor) -> Tensor:
    return x.unsqueeze(1)


CLASSES = torch.tensor([0, 2, 1, 0])
REAL = torch.linspace(-1, 1, 3 * N).double().reshape(N, 3)
KRON = "kron"  # every layer has one position

# (model, loss of the output, what is left out of the comparison)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], str]] = {
    "cross-entropy": (mlp, lambda f: F.cross_entropy(f, CLASSES), KRON),
    "squares, summed": (mlp, lambda f: F.mse_loss(f, REAL, reduction="sum"), KRON),
    "binary": (mlp, lambda f: F.binary_cross_entropy_with_logits(f, (REAL > 0).double()), KRON),
    "a loss without a closed form": (mlp, lambda f: torch.cosh(f).sum(1).mean(), KRON),
    "piecewise linear": (mlp, lambda f: (f - REAL).abs().mean(), KRON),
    "all pairs of samples": (mlp, lambda f: F.mse_loss(f[:, None].expand(-1, N, -1), REAL.expand(N, N, 3)), KRON),
    "linear: a critic's mean": (lambda: mlp(1), lambda f: -f.mean(), KRON),
    "linear: the sum": (mlp, lambda f: f.sum(), KRON),
    "linear: one entry": (mlp, lambda f: f[:, 1].mean(), KRON),
    "linear: one layer": (lambda: nn.Linear(4, 3), lambda f: f.sum(), KRON),
    "linear: images": (conv, lambda f: 2 * f.mean(), ""),
    "linear: a tied weight": (Tied, lambda f: f.mean(), ""),
    "a tied weight": (Tied, lambda f: f.square().mean(), ""),
    "one output is linear": (Two, lambda f: F.mse_loss(f[0], REAL) + f[1].mean(), KRON),
    "both outputs are": (Two, lambda f: f[0].sum() - f[1].mean(), KRON),
    "coupled outputs": (Two, lambda f: (f[0].sum(1) + f[1].prod(1).exp()).square().mean(), "nonconvex"),
}  # fmt: skip
DEFAULT = {"cross-entropy", "all pairs of samples", "linear: the sum", "linear: a tied weight", "one output is linear"}


def names(without: str = "never"):
    kept = [name for name, (_, _, tags) in CASES.items() if without not in tags]
    return [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in kept]


def computed(name: str, extensions: list[Extension]):
    make, loss, tags = CASES[name]
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(N, 4).double()
    x = images(x) if make is conv else x
    extensions = [e for e in extensions if not (e.needs_convex and "nonconvex" in tags)]
    return model, x, loss, fxcurv.compile(model, loss, extensions)(x, seed=5)


def same(a: Tensor, b: Tensor):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def matrix(product, shape) -> Tensor:
    """A product on all unit vectors, [P, P]."""
    units = torch.eye(shape.numel()).double().reshape(-1, *shape)
    return product(units).flatten(1)


def gram(columns: Tensor) -> Tensor:
    """[V, N, *P] -> [P, P]."""
    flat = columns.flatten(2).flatten(0, 1)
    return flat.t() @ flat


@pytest.mark.parametrize("name", names())
def test_second_order(name):
    """Diagonals are those of products and of squared roots, and sums of what is said per sample; all of them are right."""
    model, x, loss, result = computed(name, [*asked.exact(), *asked.sampled(M), *asked.hessian(), GGNMP(), HMP()])
    for key, param in model.named_parameters():
        shape = param.shape
        hessian = matrix(result.hmp[key], shape)
        same(result.diag_h[key], hessian.diagonal().reshape(shape))
        same(result.diag_h_batch[key].sum(0), result.diag_h[key])

        def of(p, key=key):
            return loss(torch.func.functional_call(model, {key: p}, (x,)))

        same(hessian, torch.autograd.functional.hessian(of, param.detach()).reshape(hessian.shape))
        if not hasattr(result, "ggnmp"):
            continue
        ggn = matrix(result.ggnmp[key], shape)
        same(result.diag_ggn_exact[key], ggn.diagonal().reshape(shape))
        same(result.diag_ggn_exact_batch[key].sum(0), result.diag_ggn_exact[key])
        same(gram(result.sqrt_ggn_exact[key]), ggn)
        same(result.sqrt_ggn_exact[key].square().sum(0), result.diag_ggn_exact_batch[key])
        same(result.sqrt_ggn_mc[key].square().sum(0), result.diag_ggn_mc_batch[key])
        same(result.diag_ggn_mc_batch[key].sum(0), result.diag_ggn_mc[key])
        assert result.sqrt_ggn_mc[key].shape[:2] == (M, N)
        outputs = model(x)
        count = sum(f[0].numel() for f in (outputs if isinstance(outputs, tuple) else (outputs,)))
        if name.startswith(("linear", "both", "all")):
            assert result.sqrt_ggn_exact[key].shape == (count, N, *shape)
        if name.startswith(("linear", "both")):
            assert not ggn.any() and not result.sqrt_ggn_mc[key].any()


@pytest.mark.parametrize("name", names())
def test_first_order(name):
    """Sums of individual gradients, their norms, squares and variance."""
    model, x, loss, result = computed(name, asked.first())
    expected = torch.autograd.grad(loss(model(x)), list(model.parameters()))
    for (key, _), g in zip(model.named_parameters(), expected, strict=True):
        each = result.grad_batch[key]
        same(result.grad[key], g)
        same(each.sum(0), g)
        same(result.batch_l2[key], each.flatten(1).square().sum(1))
        same(result.sum_grad_squared[key], each.square().sum(0))
        same(result.variance[key], each.var(0, correction=0))


@pytest.mark.parametrize("name", names())
def test_individual_gradients(name):
    """Rows that are asked for, clipped sums, the columns of the Jacobian: all are of the same individual gradients."""
    rows = [2, 0, 0]
    extensions = [BatchGrad(), BatchGrad(subsampling=rows, savefield="rows"), ClippedGrad(0.1), BatchL2Grad(),
                  ClippedGrad(0.1, over="param", savefield="clipped_param")]  # fmt: skip
    model, x, loss, result = computed(name, extensions)
    norms = sum(result.batch_l2.values()).sqrt()
    same(result.sample_norms, norms)
    outputs = model(x)
    jacobian = computed(name, [Jacobian()])[-1].jacobian if isinstance(outputs, Tensor) else None
    for key, each in result.grad_batch.items():
        same(result.rows[key], each[rows])
        same(result.grad_clipped[key], torch.einsum("n,n...->...", (0.1 / norms).clamp(max=1), each))
        own = (0.1 / result.batch_l2[key].sqrt()).clamp(max=1)
        same(result.clipped_param[key], torch.einsum("n,n...->...", own, each))
        if jacobian is not None:
            (s,) = torch.autograd.grad(loss(outputs), outputs, retain_graph=True)
            same(torch.einsum("nc,nc...->n...", s, jacobian[key]), each)


@pytest.mark.parametrize("name", names("nonconvex"))
def test_operators(name):
    """Blocks of the matrices over all parameters are the products of one; of the last layer all curvatures are the same."""
    extensions = [GGNMP(), HMP(), PCHMP(), PCHMP(savefield="pchmp_abs", modify="abs"), DiagGGNExact()]
    model, x, loss, result = computed(name, extensions)
    sizes = {key: p.shape for key, p in model.named_parameters()}
    start, total = 0, sum(shape.numel() for shape in sizes.values())
    every = {"ggnmp": result.ggn, "hmp": result.hessian}
    dense = {field: operator @ torch.eye(total).double() for field, operator in every.items()}
    last = {"linear: one layer": ("",)}.get(name, ("a", "b") if CASES[name][0] is Two else ("2", "3"))
    for key, shape in sizes.items():
        own = slice(start, start := start + shape.numel())
        for field, full in dense.items():
            same(full[own, own], matrix(getattr(result, field)[key], shape))
            same(full, full.t())
        hessian, ggn = matrix(result.hmp[key], shape), matrix(result.ggnmp[key], shape)
        clipped, absolute = matrix(result.pchmp[key], shape), matrix(result.pchmp_abs[key], shape)
        if key.rpartition(".")[0] in last:  # nothing is behind it but a convex loss
            same(hessian, ggn)
            same(clipped, ggn)
            same(absolute, ggn)
        if CASES[name][0] is not Tied:
            for larger, smaller in ((clipped, ggn), (clipped, hessian), (absolute, clipped)):
                assert torch.linalg.eigvalsh(larger - smaller).min() > -1e-9


@pytest.mark.parametrize("name", names())
def test_kronecker_factors(name):
    """At one position per sample, a bias has its exact block, a weight's traces are the block's where N = 1."""
    _, _, tags = CASES[name]
    if tags == KRON:
        check_factors(name)
        return
    model, _, _, result = computed(
        name, [KFLR(others="exact"), SqrtGGNExact()] if tags != "nonconvex" else [BatchGrad()]
    )
    for key, param in model.named_parameters():
        factors = getattr(result, "kflr", {}).get(key, ())
        if len(factors) == 1 and factors[0].shape == (param.numel(),) * 2:
            same(factors[0], gram(result.sqrt_ggn_exact[key]))


def check_factors(name):
    model, x, loss, result = computed(name, [*asked.kronecker(M), SqrtGGNExact(), SqrtGGNMC(mc_samples=M)])
    inputs = {}
    hooks = [
        layer.register_forward_hook(lambda _, given, __, key=key: inputs.update({key: given[0].detach()}))
        for key, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    for key, _ in model.named_parameters():
        layer, _, kind = key.rpartition(".")
        bias = f"{layer}.bias".removeprefix(".")
        for field, root in (("kflr", result.sqrt_ggn_exact), ("kfac", result.sqrt_ggn_mc)):
            factors = getattr(result, field)[key]
            same(factors[0], gram(root[bias]))  # the columns at a layer's output are its bias's
            if kind == "weight":
                a = inputs[layer]
                same(factors[1], a.t() @ a / N)
        q, *_, moments = result.ekfac[key]
        if kind == "bias":
            same(moments, (gram(result.sqrt_ggn_mc[key]) @ q).mul(q).sum(0))
            same(moments.sum(), result.sqrt_ggn_mc[key].square().sum())
        else:  # rotations keep the sum of squares
            same(moments.sum(), result.sqrt_ggn_mc[key].square().sum())


@pytest.mark.parametrize("loss", [lambda f: f.sum(), lambda f: F.mse_loss(f, REAL)], ids=["linear", "squares"])
def test_averaged_factors_of_the_last_layer(loss):
    """Where nothing was averaged yet, KFRA is KFLR."""
    torch.manual_seed(0)
    model, x = mlp().double(), torch.randn(N, 4).double()
    result = fxcurv.compile(model, loss, [KFRA(), KFLR()])(x)
    for key in ("2.weight", "2.bias"):
        for a, b in zip(result.kfra[key], result.kflr[key], strict=True):
            same(a, b)


def test_a_layer_of_one_sample_has_its_exact_block():
    """B (x) A is the Gauss-Newton's block where there is one sample and one position; zero for a linear loss."""
    for loss, zero in ((F.cross_entropy, False), (lambda f, y: f.sum(), True)):
        torch.manual_seed(0)
        model, x = mlp().double(), torch.randn(1, 4).double()
        result = fxcurv.compile(model, loss, [KFLR(), GGNMP()])(x, CLASSES[:1])
        for key in ("0.weight", "2.weight"):
            b, a = result.kflr[key]
            exact = matrix(result.ggnmp[key], result.grad[key].shape)
            same(torch.kron(b, a), exact)
            assert zero == (not exact.any()) and a.any()


def test_the_mean_of_sampled_columns_is_the_exact_gauss_newton():
    torch.manual_seed(0)
    model, x = mlp().double(), torch.randn(N, 4).double()
    many = DiagGGNMC(mc_samples=20000)
    result = fxcurv.compile(model, lambda f: F.cross_entropy(f, CLASSES), [many, DiagGGNExact()])(x, seed=0)
    for key, exact in result.diag_ggn_exact.items():
        torch.testing.assert_close(result.diag_ggn_mc[key], exact, rtol=0.1, atol=1e-4)


def test_an_empirical_fisher_needs_a_likelihood():
    with pytest.raises(LossError, match="linear in the model's output"):
        fxcurv.compile(mlp().double(), lambda f: f.sum(), [KFAC(fisher="empirical")])(torch.randn(N, 4).double())
