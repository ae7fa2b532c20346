"""Losses, and Python code in models and losses, that people brought to the same projects, as rows of a table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net, param
from situations import Refused, Situation, classes, numbers, shares, together
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Beta,
    Categorical,
    Dirichlet,
    Gamma,
    Independent,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    TransformedDistribution,
    kl_divergence,
)

import fxcurv
from fxcurv.errors import CaptureError, MixedSamplesError
from fxcurv.extensions import BatchGrad

CE, MSE, BCE = nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def after(run: Any, out: int = 3, **parts: Any) -> nn.Module:
    """`run` on what a small network gives."""
    return Net(lambda m, *xs: run(m, m.body(xs[0]), *xs[1:]), body=mlp(4, 5, out), **parts)


# ---- models ------------------------------


def shifted_column(m: Any, h: Tensor) -> Tensor:
    h[:, 0] += 3
    return h


def particles(m: Any, x: Tensor) -> Tensor:
    """The logarithm of a determinant of orbitals of all particles, which read their mean as well."""
    mean = x.mean(1, keepdim=True).expand(-1, x.shape[1], -1)
    return torch.linalg.slogdet(m.out(torch.tanh(m.first(torch.cat([x, mean], -1)))))[1]


def looked_up(m: Any, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return h.unflatten(1, (2, 2))[torch.arange(len(h)), row, column]


def kernel(m: Any, h: Tensor) -> Tensor:
    difference = h / m.length - h.detach() / m.length.detach()
    distance = torch.linalg.vector_norm(difference + h.detach(), dim=1)
    return torch.exp(-distance * distance)


def half_square(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[h < 1] = 0.5 * h[h < 1] ** 2
    out[h >= 1] = h[h >= 1].abs() - 0.5
    return out


def kept(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.b(h[h[:, 0] > 0].sum(0) + h)


def noisy(m: Any, x: Tensor) -> Tensor:
    mean, scale = m.encoder(x).chunk(2, 1)
    std = (0.5 * scale).exp()
    return m.decoder(mean + std * torch.randn_like(std))


def variational(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    mean, scale = m.encoder(x).chunk(2, 1)
    posterior = Normal(mean, (0.5 * scale).exp())
    kl = kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1)
    return m.decoder(posterior.rsample()), kl


def straight_through(m: Any, h: Tensor) -> Tensor:
    return h + (torch.round(h) - h).data


def residual_of_equation(m: Any, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    u = m.body(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return slope - u


def strided(m: Any, x: Tensor) -> Tensor:
    a, b = m.skip(x[:, :, ::2, ::2]), m.conv(x[:, :, 1:, 1:])
    return m.head((a + b).flatten(1))


def vae() -> nn.Module:
    return Net(noisy, encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4))


# ---- losses ------------------------------


def gaussian(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    mean, log_variance = out
    return (0.5 * (log_variance + (y - mean) ** 2 / log_variance.exp() + math.log(2 * math.pi))).sum(1).mean()


def transported(f: Tensor, y: Tensor) -> Tensor:
    """Entropic transport between the rows of two batches, sample by sample in a loop."""
    cost, total = (torch.arange(3.0)[:, None] - torch.arange(3.0)).abs().to(f), 0.0
    for p, q in zip(f.softmax(1), y.softmax(1), strict=True):
        k, v = torch.exp(-cost), torch.ones(3).to(f)
        for _ in range(3):
            u = p / (k @ v)
            v = q / (k.T @ u)
        total = total + (u[:, None] * k * v[None] * cost).sum()
    return total / len(f)


def active(f: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
    labels, mask = y
    rows = mask.reshape(-1) == 1
    return F.cross_entropy(f.reshape(-1, 3)[rows], labels.reshape(-1)[rows])


def active_by_where(f: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
    labels, mask = y
    chosen = torch.where(mask.view(-1) == 1, labels.view(-1), torch.tensor(-100))
    return F.cross_entropy(f.view(-1, 3), chosen)


def by_items(f: Tensor, y: Tensor) -> Tensor:
    labels = F.pad(y, (0, 1), value=-100)[..., 1:]
    return F.cross_entropy(f.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / 11


def span(f: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
    start, end = f.split(1, dim=-1)
    losses = [
        F.cross_entropy(z.squeeze(-1).contiguous(), t, label_smoothing=0.1)
        for z, t in zip((start, end), y, strict=True)
    ]
    return sum(losses) / 2


def masked_regression(f: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
    target, mask = y
    return ((f.squeeze(-1) - target) ** 2 * mask).sum() / mask.sum()


def critic(f: Tensor, y: Tensor) -> Tensor:
    return f[:, 0].mean() - f[:, 1].mean() + 10 * ((f[:, 2] - 1) ** 2).mean()


def policy(f: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
    """A clipped surrogate objective of a categorical policy, with its entropy."""
    action, advantage = y
    chosen = Categorical(logits=f)
    ratio = torch.exp(chosen.log_prob(action) + math.log(3))
    surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return -surrogate.mean() - 0.01 * chosen.entropy().mean()


def many_likelihoods(f: Tensor, y: Tensor) -> Tensor:
    """One of each kind: of one or several numbers a sample, given by tensors or numbers, asked to validate or not."""
    a, b, c = f.unbind(1)
    positive, share = F.softplus(y[:, 0]) + 0.1, torch.sigmoid(y[:, 1])
    mixed = MixtureSameFamily(Categorical(logits=f), Normal(f, 1.0))
    each = [
        Laplace(a, F.softplus(b)).log_prob(y[:, 0]),
        StudentT(4.0, a, c.exp()).log_prob(y[:, 1]),
        Gamma(F.softplus(a), c.exp(), validate_args=True).log_prob(positive),
        Beta(a.exp(), b.exp()).log_prob(share),
        Dirichlet(f.exp()).log_prob(y.softmax(1)),
        MultivariateNormal(f, torch.eye(3).to(f) * 2).log_prob(y),
        Poisson(b.exp(), validate_args=True).log_prob(torch.floor(positive * 3)),
        LogNormal(a, 0.5).log_prob(positive),
        TransformedDistribution(Normal(a, c.exp()), [AffineTransform(1.0, 2.0)]).log_prob(y[:, 2]),
        mixed.log_prob(y[:, 2]),
    ]
    return -torch.stack(each).sum(0).mean()


def many_draws(m: Any, h: Tensor) -> Tensor:
    """Noise of a shape, and draws whose parameters are learned."""
    p, scale = torch.sigmoid(h), h.exp()
    noise = (
        torch.randn_like(h)
        + torch.rand_like(h)
        + torch.empty_like(h).uniform_(-1, 1)
        + torch.zeros_like(h).exponential_()
    )
    drawn = torch.bernoulli(p) + torch.normal(h, scale) + torch.poisson(scale)
    return h * noise + drawn * p


def likelihood(f: Tensor, y: Tensor) -> Tensor:
    normal = Independent(Normal(loc=f, scale=torch.ones_like(f)), 1)
    return -normal.log_prob(y).mean()


def penalised(model: nn.Module) -> Any:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        z = y.requires_grad_()
        (slope,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
        return f.mean() + (slope.norm(dim=1) - 1).square().mean()

    return loss


PAIR = {"mean": nn.Linear(4, 2), "scale": nn.Linear(4, 2)}

LOSSES = {
    # ---- laplace
    "mean and variance, two heads": Situation(
        "aleximmer/Laplace#78",
        lambda: Net(lambda m, x: (m.mean(x), m.scale(x)), mean=nn.Linear(4, 2), scale=nn.Linear(4, 2)), gaussian, numbers(4),
        numbers(2), "first hessian", quick=True,
    ),
    "one logit a sample": Situation(
        "aleximmer/Laplace#107", lambda: after(lambda m, h: h.squeeze(-1), 1), BCE, numbers(4), shares(), quick=True,
        oracle={"kind": "bce"},
    ),
    "a probability at every pixel": Situation(
        "aleximmer/Laplace#118",
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 1), nn.Sigmoid()), nn.BCELoss(),
        numbers(1, 2, 2), shares(1, 2, 2), "first hessian",
    ),
    # ---- curvlinops
    "several logits and a mean over all": Situation(
        "f-dangel/curvlinops#111", lambda: mlp(4, 5, 3), BCE, numbers(4), shares(3), oracle={"kind": "bce"},
    ),
    # ---- BackPACK
    "a loss of one's own": Situation(
        "f-dangel/backpack#299", lambda: mlp(4, 5, 3), lambda f, y: ((f - y).cosh().log() + 0.1 * (f - y) ** 2).sum(1).mean(),
        numbers(4), numbers(3), quick=True,
    ),
    # ---- Opacus
    "a critic in several terms": Situation("meta-pytorch/opacus#31", lambda: mlp(4, 5, 3), critic, numbers(4), numbers()),
    "ragged bags": Situation(
        "meta-pytorch/opacus#518", lambda: Net(lambda m, i, o: m.head(torch.tanh(m.bag(i, o))), bag=nn.EmbeddingBag(5, 3),
        head=nn.Linear(3, 3)), CE, lambda n: (torch.arange(2 * n) % 5, torch.arange(n) * 2), classes(), "first ggn hessian",
        options={"batch_dim": (None, 0)},
    ),
    # ---- functorch
    "slices with steps": Situation(
        "pytorch/functorch#105", lambda: Net(strided, skip=nn.Conv2d(1, 2, 1), conv=nn.Conv2d(1, 2, 2, stride=2),
        head=nn.Linear(8, 3)), CE, numbers(1, 4, 4), classes(), quick=True,
    ),
    "a column added to in place": Situation("pytorch/functorch#381", lambda: after(shifted_column), MSE, numbers(4), numbers(3)),
    "a determinant of particles": Situation(
        "pytorch/functorch#296", lambda: Net(particles, first=nn.Linear(4, 4), out=nn.Linear(4, 2)), MSE, numbers(2, 2),
        numbers(), quick=True,
    ),
    "transport in a loop over samples": Situation(
        "pytorch/functorch#257", lambda: mlp(4, 5, 3), transported, numbers(4), numbers(3), "grad",
    ),
    "transport in a loop, sample by sample": Situation(
        "pytorch/functorch#257", lambda: mlp(4, 5, 3), transported, numbers(4), numbers(3), "first",
        refused=Refused(MixedSamplesError, "zip(f.softmax(1), y.softmax(1)", ("unbind", "BatchGrad")),
    ),
    "a number by item()": Situation(
        "pytorch/functorch#1108", lambda: after(lambda m, h: h * h.abs().max().item()), CE, numbers(4), classes(), "first",
    ),
    "an entry a sample, by index tensors": Situation(
        "pytorch/functorch#770", lambda: after(looked_up, 4), MSE, together(numbers(4), classes(of=2), classes(of=2)), numbers(),
        quick=True,
    ),
    "dropout and evaluated batch norm": Situation(
        "pytorch/functorch#1117", lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)), CE,
        numbers(4), classes(),
    ),
    "dropout and batch norm in training mode": Situation(
        "pytorch/functorch#1117", lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)), CE,
        numbers(4), classes(), "first", trains=True, refused=Refused(MixedSamplesError, "module '1'", ("BatchGrad",)),
    ),
    "dropout drawn once for all quantities": Situation(
        "pytorch/functorch#408", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)), CE,
        numbers(4), classes(), trains=True, quick=True,
    ),
    "a kernel of a distance": Situation(
        "pytorch/functorch#1097", lambda: after(kernel, length=param(1)), MSE, numbers(4), numbers(), "first ggn hessian",
    ),
    "a piecewise function by boolean writes": Situation(
        "pytorch/pytorch#91942", lambda: after(lambda m, h: half_square(h)), MSE, numbers(4), numbers(3), "first",
        refused=Refused(CaptureError, "out[h < 1] = 0.5 * h[h < 1] ** 2", ("Way out", "torch.where")),
    ),
    "the determinant of a product": Situation(
        "pytorch/pytorch#149694", lambda: after(lambda m, h: torch.det(h.unflatten(1, (2, 2)) @ m.a), 4, a=param(2, 2)), MSE,
        numbers(4), numbers(),
    ),
    "layer norm under products": Situation(
        "pytorch/pytorch#124533", lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), CE, numbers(4),
        classes(), "hessian hessian_batch products",
    ),
    "the norm of an output": Situation(
        "pytorch/pytorch#149804", lambda: after(lambda m, h: torch.linalg.norm(h, dim=1)), MSE, numbers(4), numbers(),
    ),
    "the residual of an equation": Situation(
        "pytorch/functorch#328", lambda: Net(residual_of_equation, body=mlp(1, 4, 1)), lambda f: f.square().mean(), numbers(1),
        None, "first",
    ),
    "the likelihood of a distribution": Situation(
        "pytorch/functorch#928", lambda: mlp(4, 5, 3), likelihood, numbers(4), numbers(3),
    ),
    "a categorical policy": Situation(
        "pytorch/pytorch#92033", lambda: mlp(4, 5, 3), policy, numbers(4), together(classes(), numbers()), "first hessian",
    ),
    "a Bernoulli likelihood": Situation(
        "pytorch/pytorch#92033", lambda: mlp(4, 5, 3), lambda f, y: -Bernoulli(logits=f).log_prob(y).sum(1).mean(), numbers(4),
        shares(3), quick=True,
    ),
    "noise that is drawn like a tensor": Situation(
        "pytorch/functorch#312", vae, MSE, numbers(4), numbers(4), quick=True,
    ),
    "distributions of many kinds": Situation(
        "pytorch/pytorch#92033", lambda: mlp(4, 5, 3), many_likelihoods, numbers(4), numbers(3), "first", quick=True,
    ),
    "draws of many kinds": Situation("pytorch/functorch#18", lambda: after(many_draws), MSE, numbers(4), numbers(3), quick=True),
    "a variational model with distributions": Situation(
        "pytorch/functorch#611", lambda: Net(variational, encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4)),
        lambda out, y: F.mse_loss(out[0], y) + out[1].mean(), numbers(4), numbers(4), "first hessian",
    ),
    "straight through by .data": Situation(
        "pytorch/functorch#1066", lambda: after(straight_through), MSE, numbers(4), numbers(3), "first ggn",
    ),
    # ---- transformers
    "the words that count, by a mask": Situation(
        "huggingface/transformers#251", lambda: mlp(4, 5, 3), active, numbers(2, 4), together(classes(2), shares(2)), "first",
        refused=Refused(MixedSamplesError, "f.reshape(-1, 3)[rows]", ("cross_entropy",)),
    ),
    "the words that count, by labels": Situation(
        "huggingface/transformers#251", lambda: mlp(4, 5, 3), active_by_where, numbers(2, 4),
        together(classes(2), lambda n: torch.tensor([[1, 0]]).expand(n, 2).clone()), quick=True,
    ),
    "divided by a count of one's own": Situation(
        "huggingface/transformers#46204", lambda: mlp(4, 5, 3), by_items, numbers(3, 4), classes(3),
    ),
    "start and end of an answer, smoothed": Situation(
        "huggingface/transformers#13255", lambda: mlp(4, 5, 2), span, numbers(3, 4), together(classes(), classes()), quick=True,
    ),
    "many labels a sample": Situation(
        "huggingface/transformers#1227", lambda: mlp(4, 5, 3), lambda f, y: BCE(f.view(-1, 3), y.view(-1, 3)), numbers(4),
        shares(3),
    ),
    "regression at the words that count": Situation(
        "huggingface/transformers#3703", lambda: mlp(4, 5, 1), masked_regression, numbers(3, 4),
        together(numbers(3), lambda n: torch.tensor([[1.0, 1, 0]]).expand(n, 3).double()), "first ggn hessian",
    ),
    "rows that a mask keeps": Situation(
        "huggingface/transformers#34390", lambda: Net(kept, a=nn.Linear(4, 5), b=nn.Linear(5, 3)), CE, numbers(4), classes(),
        "first", refused=Refused(CaptureError, "h[h[:, 0] > 0].sum(0)", ("Way out",)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if row.quick])
def test_loss(name: str) -> None:
    LOSSES[name].check((3,), LOSSES[name].trains)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_any_size(name: str) -> None:
    row = LOSSES[name]
    for training in row.modes:
        row.check((3, 1, 4) if row.refused is None else (3, 4), training)


def test_a_gradient_penalty() -> None:
    """Source: meta-pytorch/opacus#31, where the penalty's derivative is taken in the loss: it counts sample by sample."""
    torch.manual_seed(0)
    model, x, z = mlp(4, 5, 1).double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()
    loss = penalised(model)
    result = fxcurv.compile(model, loss, [BatchGrad()])(x, z)
    for n in range(3):
        one = loss(model(x[n : n + 1]), z[n : n + 1].clone()) / 3
        grads = torch.autograd.grad(one, list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), grads, strict=True):
            torch.testing.assert_close(result.grad_batch[name][n], g, rtol=1e-10, atol=1e-12)
