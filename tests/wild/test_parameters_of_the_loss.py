"""Parameters that only the loss reads, a conditional random field's transitions: second derivatives of all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_oracle import close
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import ExtensionError, LossError
from fxcurv.extensions import HMP, BatchDiagHessian, BatchGrad, DiagGGNExact, DiagHessian

TAGS, STEPS = 2, 3


class Field(nn.Module):
    """Emissions by a layer; the loss reads the transitions."""

    def __init__(self) -> None:
        super().__init__()
        self.emissions, self.transitions = nn.Linear(2, TAGS), nn.Parameter(torch.randn(TAGS, TAGS))

    def forward(self, x: Tensor) -> Tensor:
        return self.emissions(x).tanh()

    def loss(self, emissions: Tensor, tags: Tensor) -> Tensor:
        return self.each(emissions, tags).mean()

    def each(self, emissions: Tensor, tags: Tensor) -> Tensor:
        total = emissions[:, 0]
        for step in range(1, emissions.shape[1]):
            total = torch.logsumexp(total.unsqueeze(2) + self.transitions, 1) + emissions[:, step]
        chosen = F.one_hot(tags, TAGS).to(emissions.dtype)
        pairs = torch.einsum("nti,ij,ntj->n", chosen[:, :-1], self.transitions, chosen[:, 1:])
        return torch.logsumexp(total, 1) - (emissions * chosen).sum((1, 2)) - pairs


def built(n: int) -> tuple[Field, Tensor, Tensor]:
    torch.manual_seed(0)
    return Field().double(), torch.randn(n, STEPS, 2).double(), torch.randint(TAGS, (n, STEPS))


def diagonals(model: Field, value) -> dict[str, Tensor]:
    """The Hessian's diagonal of `value()` by loops of plain autograd."""
    found = {}
    for name, p in model.named_parameters():
        (first,) = torch.autograd.grad(value(), [p], create_graph=True)
        rows = [
            torch.autograd.grad(entry, [p], retain_graph=True)[0].flatten()[k]
            for k, entry in enumerate(first.flatten())
        ]
        found[name] = torch.stack(rows).reshape(p.shape)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 4, 1])
def test_the_hessian_of_all_parameters(n: int) -> None:
    model, x, y = built(n)
    found = fxcurv.compile(model, model.loss, [DiagHessian(), BatchDiagHessian(), BatchGrad(), HMP()])(x, y)
    each = [lambda k=k: model.each(model(x), y)[k] / n for k in range(n)]
    for name in found.grad:
        gradients = [torch.autograd.grad(value(), [dict(model.named_parameters())[name]])[0] for value in each]
        torch.testing.assert_close(found.grad_batch[name], torch.stack(gradients))
    close(found.diag_h, diagonals(model, lambda: model.loss(model(x), y)), "diag_h")
    rows = [diagonals(model, value) for value in each]
    close(found.diag_h_batch, {name: torch.stack([row[name] for row in rows]) for name in found.grad}, "diag_h_batch")


def test_of_the_transitions_alone() -> None:
    model, x, y = built(3)
    found = fxcurv.compile(model, model.loss, [DiagHessian()], params="transitions")(x, y)
    expected = diagonals(model, lambda: model.loss(model(x), y))["transitions"]
    close(found.diag_h, {"transitions": expected}, "diag_h")


def test_the_gauss_newton_is_refused() -> None:
    model, x, y = built(3)
    with pytest.raises(LossError, match="Gauss-Newton"):
        fxcurv.compile(model, model.loss, [DiagGGNExact()])(x, y)


class Tempered(nn.Module):
    """The loss multiplies the logits with a temperature of the model's, which f does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.log_temperature = nn.Linear(2, 3), nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f * self.log_temperature.exp(), y)

    def regularised(self, f: Tensor, y: Tensor) -> Tensor:
        return self.loss(f, y) + self.log_temperature**2


@pytest.mark.parametrize("title", [pytest.param("loss", marks=pytest.mark.slow), "regularised"])
def test_a_temperature_in_a_loss_in_closed_form(title: str) -> None:
    torch.manual_seed(0)
    model, x, y = Tempered().double(), torch.randn(4, 2).double(), torch.tensor([0, 2, 1, 2])
    loss = getattr(model, title)
    compiled = fxcurv.compile(model, loss, [DiagHessian()])
    for n in (4, 3):
        close(compiled(x[:n], y[:n]).diag_h, diagonals(model, lambda n=n: loss(model(x[:n]), y[:n])), "diag_h")
    with pytest.raises(ExtensionError, match="of no sample's curvature"):
        fxcurv.compile(model, model.regularised, [BatchDiagHessian()])(x, y)


class Coupled(nn.Module):
    """The loss reads a parameter again that f depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def product(self, f: Tensor, y: Tensor) -> Tensor:
        return (f.square() * self.layer.bias).mean()

    def square(self, f: Tensor, y: Tensor) -> Tensor:
        return (f + self.layer.bias - y).square().sum()


@pytest.mark.parametrize("title", ["product", "square"])
def test_a_parameter_of_output_and_loss(title: str) -> None:
    torch.manual_seed(0)
    model, x, y = Coupled().double(), torch.randn(4, 4).double(), torch.randn(4, 3).double()
    loss = getattr(model, title)
    compiled = fxcurv.compile(model, loss, [DiagHessian(), HMP()])
    for n in (4, 1):
        found, value = compiled(x[:n], y[:n]), lambda n=n: loss(model(x[:n]), y[:n])
        close(found.diag_h, diagonals(model, value), "diag_h")
        for name, p in model.named_parameters():
            v = torch.randn_like(p)
            (first,) = torch.autograd.grad(value(), [p], create_graph=True)
            (expected,) = torch.autograd.grad((first * v).sum(), [p])
            torch.testing.assert_close(found.hmp[name](v[None])[0], expected)


class OfEmissions(nn.Module):
    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field = field

    def forward(self, emissions: Tensor, tags: Tensor) -> Tensor:
        return self.field.loss(emissions, tags)


def test_parameters_of_a_loss_module_are_named() -> None:
    field, x, y = built(3)
    compiled = fxcurv.compile(nn.Linear(2, TAGS).double(), OfEmissions(field), [])
    report = " ".join(str(compiled.explain(x, y)).split())
    assert "held constant: trainable parameters of the loss" in report and "field.transitions" in report
