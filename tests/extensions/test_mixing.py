"""Models and losses whose samples interact: what the whole batch has is right, what one sample has is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from asked import arrays
from case_tools import Net, mlp, param
from oracle import call, derivative, plain_mathematics, second_derivative, tensors
from torch import nn

import fxcurv
from fxcurv.errors import LossError, MixedSamplesError
from fxcurv.extensions import (
    GGNMP,
    HMP,
    KFAC,
    BatchGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    Jacobian,
)

N = 4
# what exists for the whole batch
WHOLE = (DiagGGNExact, DiagGGNMC, DiagHessian, Jacobian)
PER_SAMPLE = [e for e in arrays() if not isinstance(e, WHOLE)]


def X(*shape):
    return torch.randn(N, *(shape or (3,)))


LABELS = torch.tensor([2, 0, 1, 1])


def small(mixing):
    """An MLP with `mixing`, a function of the hidden values, behind its first layer."""
    run = lambda m, x: m.last(torch.tanh(mixing(m.first(x))))  # noqa: E731
    return lambda: (Net(run, first=nn.Linear(3, 4), last=nn.Linear(4, 3)), F.cross_entropy, X(), LABELS)


def centred(h):
    return h - h.mean(0)


def info_nce(z, t):
    """All pairs: the second half of the features is the other view."""
    a, b = z.chunk(2, 1)
    return F.cross_entropy(a @ b.t(), torch.arange(len(z)))


def clip(output, t):
    a, b, scale = output
    logits = scale * F.normalize(a) @ F.normalize(b).t()
    return (F.cross_entropy(logits, torch.arange(len(a))) + F.cross_entropy(logits.t(), torch.arange(len(a)))) / 2


def pairs(m, x):
    z = m.net(x)
    return z @ z.t()


def twice(m, x):
    h = torch.tanh(m.layer(x))
    return m.out(torch.tanh(m.layer(centred(h))))


# name: (model, loss, inputs, targets), drawn in float64
CASES = {
    "batch norm": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)), F.cross_entropy, X(), LABELS,
    ),
    "batch norm without statistics": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 3)), F.cross_entropy,
        X(), LABELS,
    ),
    "batch norm, images": lambda: (
        nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)),
        nn.CrossEntropyLoss(), X(1, 3, 3), LABELS,
    ),
    "centred": small(centred),
    "softmax": small(lambda h: h.softmax(0)),
    "cumsum": small(lambda h: h.cumsum(0)),
    "one statistic": small(lambda h: h / (1 + h.square().mean().sqrt())),
    "largest": small(lambda h: h - h.amax(0)),
    "attention over the batch": small(lambda h: (h @ h.t() / 2).softmax(1) @ h),
    "standardised": small(lambda h: (h - h.mean(0)) / h.std(0)),
    "mean squared error": lambda: (
        Net(lambda m, x: m.net(centred(x * m.scale)), net=mlp(), scale=param(4)), nn.MSELoss(reduction="sum"), X(4), X(),
    ),
    "called twice": lambda: (Net(twice, layer=nn.Linear(3, 3), out=nn.Linear(3, 2)), F.mse_loss, X(), X(2)),
    "pooled": lambda: (
        Net(lambda m, x: m.out(torch.tanh(m.layer(x)).mean(0)), layer=nn.Linear(3, 4), out=nn.Linear(4, 2)),
        lambda f, t: (f - t[0]).square().sum(), X(), X(2),
    ),
    "weights from the left": lambda: (
        Net(lambda m, x: m.v @ torch.tanh(m.w @ centred(m.layer(x))), layer=nn.Linear(3, 4), w=param(2, N), v=param(3, 2)),
        lambda f, t: f.square().sum() + f[0, 0] ** 4, X(), LABELS,
    ),
    "pairs": lambda: (Net(pairs, net=mlp()), lambda f, t: F.cross_entropy(f, torch.arange(N)), X(4), LABELS),
    "one number": lambda: (
        Net(lambda m, x: m.scale * torch.tanh(m.net(x)).mean(), net=mlp(), scale=param()),
        lambda f, t: (f - 1).square(), X(4), LABELS,
    ),
    "roots of the features' squares": lambda: (mlp(), lambda f, t: (f - t).square().sum(0).sqrt().sum(), X(4), X()),
    "squares of the mean": lambda: (mlp(), lambda f, t: (f.mean(0) - t.mean(0)).square().sum(), X(4), X()),
    "ranking": lambda: (
        mlp(out=1), lambda f, t: F.softplus(1 - (f[:, 0] - f[:, :1]) * (t - t[:, None]).sign()).mean(), X(4), torch.rand(N),
    ),
    "log likelihood of one": lambda: (
        Net(lambda m, x: m.net(x)[:, 0], net=mlp(out=1)), lambda f, t: F.cross_entropy(f, t), X(4), torch.rand(N).softmax(0),
    ),
    "regularised": lambda: regularised(),
    "InfoNCE": lambda: (mlp(out=4), info_nce, X(4), LABELS),
    "CLIP": lambda: (
        Net(
            lambda m, x: (m.image(x), m.text(x.square()), m.temperature.exp()),
            image=nn.Linear(4, 3), text=mlp(), temperature=param(),
        ),
        clip, X(4), LABELS,
    ),
}  # fmt: skip
NONCONVEX = {"InfoNCE", "CLIP"}
COUPLED = {
    "roots of the features' squares", "squares of the mean", "ranking", "log likelihood of one", "InfoNCE", "CLIP", "pooled",
    "one number", "weights from the left",
}  # fmt: skip
REPRESENTATIVE = {"batch norm", "one statistic", "pairs"}


def regularised():
    model = mlp()
    model.insert(1, nn.BatchNorm1d(5))
    penalty = lambda: sum(p.square().sum() + p.cosh().mean() for p in model.parameters())  # noqa: E731
    return model, lambda f, t: F.cross_entropy(f, t) + 0.1 * penalty(), X(4), LABELS


def build(name):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        return CASES[name]()
    finally:
        torch.set_default_dtype(torch.float32)


class WholeBatch:
    """The gradient, the Hessian and the Gauss-Newton J^T H J of the batch as a whole, by loops of autograd."""

    def __init__(self, model, loss, x, y):
        self.params = dict(model.named_parameters())
        values = list(self.params.values())
        with plain_mathematics():
            output = call(model, x)
            leaves = [f for f in tensors(output) if f.requires_grad]
            firsts = derivative(loss(output, y), values, create_graph=True)
            self.grad = dict(zip(self.params, firsts, strict=True))
            self.hessian = torch.cat([torch.cat([second_derivative(g, p) for p in values], 1) for g in firsts])
            j = torch.cat([torch.cat([second_derivative(f, p) for p in values], 1) for f in leaves])

            def of_f(flat):
                parts = flat.split([f.numel() for f in leaves])
                parts = [p.view_as(f) for p, f in zip(parts, leaves, strict=True)]
                return loss(parts[0] if len(parts) == 1 else parts, y)

            h = torch.autograd.functional.hessian(of_f, torch.cat([f.detach().flatten() for f in leaves]))
        self.ggn = j.mT @ h @ j

    def diagonal(self, matrix):
        parts = matrix.diagonal().split([p.numel() for p in self.params.values()])
        return {name: d.view_as(p) for d, (name, p) in zip(parts, self.params.items(), strict=True)}


def close(actual, expected, **tolerance):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, **(tolerance or {"rtol": 1e-7, "atol": 1e-10}), msg=lambda m, n=name: f"{n}: {m}"
        )


def test_nothing_is_printed(capfd):
    """Beside derivatives that PyTorch takes one by one."""
    model, loss, x, y = build("batch norm")
    fxcurv.compile(model, loss, [DiagHessian()])(x, y)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", [n if n in REPRESENTATIVE else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_the_whole_batch(name):
    """Every quantity that refers to no sample, alone and with products."""
    expected = WholeBatch(*build(name))
    model, loss, x, y = build(name)
    convex = [] if name in NONCONVEX else [DiagGGNExact(), GGNMP()]
    compiled = fxcurv.compile(model, loss, [DiagHessian(), HMP(), *convex], debug=True)
    for _ in range(2):
        result = compiled(x, y)
        close(result.grad, expected.grad)
        close(result.diag_h, expected.diagonal(expected.hessian))
        eye = torch.eye(len(expected.hessian), dtype=x.dtype)
        torch.testing.assert_close(result.hessian @ eye, expected.hessian)
        if convex:
            close(result.diag_ggn_exact, expected.diagonal(expected.ggn))
            torch.testing.assert_close(result.ggn @ eye, expected.ggn)


@pytest.mark.parametrize("name", [n if n == "pairs" else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_sampled_columns(name):
    """Their mean is the Gauss-Newton where the loss itself has a likelihood; a loss that couples samples has none."""
    model, loss, x, y = build(name)
    compiled = fxcurv.compile(model, loss, [DiagGGNMC(mc_samples=3000)])
    if name in COUPLED:
        with pytest.raises(MixedSamplesError, match="DiagGGNMC"):
            compiled(x, y)
        return
    expected = WholeBatch(*build(name))
    scale = expected.ggn.diagonal().max().item()
    # the mean of 3000 squares is within sqrt(2 / 3000) of theirs, here six times that
    close(compiled(x, y, seed=0).diag_ggn_mc, expected.diagonal(expected.ggn), rtol=0.16, atol=1e-9 * scale)


@pytest.mark.parametrize(
    "extension",
    [
        pytest.param(e, id=type(e).__name__, marks=[] if isinstance(e, BatchGrad | KFAC) else pytest.mark.slow)
        for e in PER_SAMPLE
    ],
)
def test_what_refers_to_a_sample_is_refused(extension):
    """In the model and in the loss, by name, also beside something that exists."""
    where = {"batch norm": ["batch_norm", "module '1'"], "InfoNCE": ["in the loss", "a @ b.t()", __file__]}
    for name, places in where.items():
        model, loss, x, y = build(name)
        with pytest.raises(MixedSamplesError) as caught:
            fxcurv.compile(model, loss, [DiagHessian(), extension])(x, y)
        for words in (*places, type(extension).__name__, "mixes samples", "Way out", "DiagHessian, products"):
            assert words in str(caught.value)
        assert "so DiagHessian" not in str(caught.value)


def test_jacobians_are_refused():
    model, _, x, _ = build("softmax")
    with pytest.raises(MixedSamplesError, match="(?s)softmax.*h.softmax.*Jacobian"):
        fxcurv.compile(model, None, [Jacobian()])(x)


def test_convexity_is_that_of_the_whole_batch():
    model, loss, x, y = build("InfoNCE")
    with pytest.raises(LossError, match="not convex.*DiagGGNExact"):
        fxcurv.compile(model, loss, [DiagGGNExact()])(x, y)


@pytest.mark.parametrize("extension", [DiagGGNExact(), DiagHessian(), DiagGGNMC()], ids=str)
def test_a_function_of_the_reduced_loss_has_gradient_and_products_only(extension):
    loss = lambda f, t: F.mse_loss(f, t) ** 2  # noqa: E731
    model, x, y = mlp().double(), X(4).double(), X().double()
    with pytest.raises(
        MixedSamplesError, match=f"(?s)non-linear function of the reduced loss.*{type(extension).__name__}"
    ):
        fxcurv.compile(model, loss, [extension])(x, y)
    expected = WholeBatch(model, loss, x, y)
    result = fxcurv.compile(model, loss, [HMP()])(x, y)
    close(result.grad, expected.grad)
    torch.testing.assert_close(result.hessian @ torch.eye(len(expected.hessian), dtype=x.dtype), expected.hessian)


def test_batches_of_other_sizes():
    """The batch size is a number in these programs: another one is a program of its own."""
    model, loss, x, y = build("centred")
    compiled = fxcurv.compile(model, loss, [DiagGGNExact()])
    for n in (4, 3, 1):
        expected = WholeBatch(model, loss, x[:n], y[:n])
        close(compiled(x[:n], y[:n]).diag_ggn_exact, expected.diagonal(expected.ggn))
    assert "one sample" in str(compiled.explain(x, y))


def test_columns_beyond_the_budget():
    model, loss, x, y = build("softmax")
    expected = WholeBatch(model, loss, x, y)
    compiled = fxcurv.compile(model, loss, [DiagGGNExact(), DiagHessian()], memory_budget=2000, debug=True)
    result = compiled(x, y)
    assert compiled.lower(x, y).walked.sweeps > 1
    close(result.diag_ggn_exact, expected.diagonal(expected.ggn))
    close(result.diag_h, expected.diagonal(expected.hessian))


def test_derivatives_of_the_whole_batch():
    """create_graph: the diagonals can be differentiated again."""
    model, loss, x, y = build("centred")
    weight = model.first.weight
    compiled = fxcurv.compile(model, loss, [DiagGGNExact()])
    total = sum(v.sum() for v in compiled(x, y, create_graph=True).diag_ggn_exact.values())
    (found,) = torch.autograd.grad(total, [weight])
    for entry in ((0, 0), (2, 1)):
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[entry] += step
            sides.append(WholeBatch(model, loss, x, y).ggn.trace())
            with torch.no_grad():
                weight[entry] -= step
        torch.testing.assert_close(found[entry], (sides[0] - sides[1]) / 2e-5, rtol=1e-6, atol=1e-9)
