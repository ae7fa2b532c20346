"""Models whose output has numbers that are sums over samples already: a divergence, their own loss, a regulariser."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_oracle import close
from oracle import Oracle
from situations import Situation, classes, numbers, parametrized, shares
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import ExtensionError, LossError
from fxcurv.extensions import GGNMP, BatchGrad, DiagGGNExact, DiagHessian, Jacobian, SqrtGGNExact


class Autoencoder(nn.Module):
    """A variational autoencoder that returns (logits, divergence); the noise is an input."""

    def __init__(self, total) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), nn.Linear(2, 4)
        self.total = total

    def parts(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        terms = -0.5 * (1 + log_variance - mean**2 - log_variance.exp())
        return self.decoder(mean + torch.exp(0.5 * log_variance) * noise), terms

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        logits, terms = self.parts(x, noise)
        return logits, self.total(terms)


class Labelled(nn.Module):
    """Returns (loss, logits)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.4), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.body(x)
        return F.cross_entropy(z, y), z


class Penalised(nn.Module):
    """Returns (logits, penalty)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x), sum(p.pow(4).sum() for p in self.parameters())


def elbo(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(out[0], y, reduction="sum") + 0.3 * out[1].sum()


def both(n: int) -> tuple[Tensor, Tensor]:
    return numbers(4)(n), numbers(2)(n)


def labelled(n: int) -> tuple[Tensor, Tensor]:
    return numbers(4)(n), classes()(n)


def variational(total, quick: bool = False) -> Situation:
    oracle = {"logits": lambda model, x: model.parts(*x), "head": lambda f: (f[0], total(f[1]))}
    return Situation(
        "", lambda: Autoencoder(total), elbo, both, shares(4), "first hessian hessian_batch", quick=quick, oracle=oracle
    )


def of_labelled(loss) -> Situation:
    """Both outputs are functions of the logits."""
    oracle = {"logits": lambda model, x: (model(*x)[1], x[1]), "head": lambda f: (F.cross_entropy(*f), f[0])}
    asks = "first ggn hessian hessian_batch products"
    return Situation("", Labelled, loss, labelled, None, asks, trains=True, oracle=oracle)


SITUATIONS = {
    "divergence summed": variational(lambda t: t.sum(), quick=True),
    "divergence, mean over samples": variational(lambda t: t.sum(1).mean()),
    "divergence by latent": variational(lambda t: t.sum(0)),
    "labelled, its loss": of_labelled(lambda out: out[0]),
    "labelled, loss and logits": of_labelled(lambda out: out[0] + 0.1 * out[1].square().mean()),
}


@pytest.mark.parametrize("name", parametrized(SITUATIONS))
def test_equals_the_oracle(name: str) -> None:
    SITUATIONS[name].check((3, 5))


@pytest.mark.slow
@pytest.mark.parametrize("name", SITUATIONS)
def test_of_one_sample(name: str) -> None:
    SITUATIONS[name].check((1,))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, s in SITUATIONS.items() if s.trains])
def test_in_training_mode(name: str) -> None:
    SITUATIONS[name].check((3,), training=True)


def test_a_regulariser_that_is_returned_is_of_no_sample():
    torch.manual_seed(0)
    model, x, y = Penalised().double(), torch.randn(4, 4).double(), classes()(4)
    loss = lambda out, y: F.cross_entropy(out[0], y) + 0.1 * out[1]  # noqa: E731
    found = fxcurv.compile(model, loss, [BatchGrad(), DiagGGNExact(), SqrtGGNExact(), DiagHessian()])(x, y)
    oracle = Oracle(model, loss, x, y, logits=lambda m, x: m.body(x), head=lambda f: (f, model(x)[1]), kind="ce")
    for field in ("grad", "grad_batch", "diag_ggn_exact", "sqrt_ggn_exact"):
        close(getattr(found, field), getattr(oracle, field)(), field)
    curvature = {name: 0.1 * 12 * p.detach() ** 2 for name, p in model.named_parameters()}
    alone = Oracle(model.body, F.cross_entropy, x, y).diag_h()
    close(found.diag_h, {f"body.{name}": h + curvature[f"body.{name}"] for name, h in alone.items()}, "diag_h")


@pytest.mark.parametrize("extension", [DiagGGNExact(), SqrtGGNExact(), GGNMP()], ids=lambda e: type(e).__name__)
def test_where_the_model_ends_is_asked_for(extension):
    """The Gauss-Newton of a divergence depends on what f is, which its sum does not say."""
    _, x, y = SITUATIONS["divergence summed"].built(3)
    model = Autoencoder(lambda t: t.sum()).double()
    with pytest.raises(LossError, match="split='path of the submodule") as error:
        fxcurv.compile(model, elbo, [extension])(x, y)
    assert __file__ in str(error.value)


def test_a_jacobian_is_of_one_output():
    _, x, y = SITUATIONS["divergence summed"].built(3)
    with pytest.raises(ExtensionError, match="split='module.path'"):
        fxcurv.compile(Autoencoder(lambda t: t.sum()).double(), elbo, [Jacobian()])(x, y)
    found = fxcurv.compile(Autoencoder(lambda t: t.sum()).double(), elbo, [Jacobian()], split="decoder")(x, y)
    assert found.jacobian["decoder.weight"].shape == (3, 4, 4, 2)


def test_a_sum_of_a_layer_is_of_its_rows():
    """The loss is linear in it: individual gradients exist, and the Gauss-Newton is zero."""
    torch.manual_seed(0)
    body, x = nn.Linear(4, 3).double(), torch.randn(4, 4).double()

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, x):
            return self.body(x).sum(0)

    weights = torch.tensor([1.0, -2.0, 3.0]).double()
    found = fxcurv.compile(Summed(), lambda out: (out * weights).sum(), [BatchGrad(), DiagGGNExact()])(x)
    torch.testing.assert_close(found.grad_batch["body.weight"], weights.reshape(1, 3, 1) * x.unsqueeze(1))
    assert not found.diag_ggn_exact["body.weight"].any()
