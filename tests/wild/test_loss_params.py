"""`loss_params=True`: parameters of a loss module are parameters like the model's, here of two modules held in one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from against_oracle import close
from oracle import Oracle
from test_parameters_of_the_loss import STEPS, TAGS, Field, diagonals
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import ArgumentError, LossError
from fxcurv.extensions import HMP, BatchDiagHessian, BatchGrad, BatchL2Grad, DiagGGNExact, DiagHessian


class Tempered(nn.Module):
    """Cross-entropy at a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits * self.log_temperature.exp(), y)


class ArcFace(nn.Module):
    """Deng et al. 2019: the classes' directions are the loss's, with a margin between angles."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, features: Tensor, y: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(features), F.normalize(self.weight))
        angle = torch.acos(cosine.clamp(-0.999, 0.999))
        return F.cross_entropy(8 * torch.where(F.one_hot(y, 3).bool(), (angle + 0.2).cos(), cosine), y)


class Transitions(nn.Module):
    """A linear-chain conditional random field."""

    def __init__(self) -> None:
        super().__init__()
        self.field = Field()
        del self.field.emissions

    def forward(self, emissions: Tensor, tags: Tensor) -> Tensor:
        return self.field.loss(emissions, tags)


class Both(nn.Module):
    """Model and loss in one, whose parameters the oracle takes."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


LOSSES = {"temperature": Tempered, "arcface": ArcFace, "transitions": Transitions}


def built(kind: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    loss = LOSSES[kind]()
    if kind == "transitions":
        model, x, y = (
            nn.Sequential(nn.Linear(2, TAGS), nn.Tanh()),
            torch.randn(5, STEPS, 2),
            torch.randint(TAGS, (5, STEPS)),
        )
    else:
        model, x, y = nn.Sequential(nn.Linear(2, 4), nn.Tanh()), torch.randn(5, 2), torch.randint(3, (5,))
    return model.double(), loss.double(), x.double(), y


def named(model: nn.Module, loss: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters()) | {f"loss.{name}": p for name, p in loss.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 3])
@pytest.mark.parametrize("kind", LOSSES)
def test_second_order_of_all(kind: str, n: int) -> None:
    model, loss, x, y = built(kind)
    rows_of = None if kind == "transitions" else "0"  # others are read beside the logits: refused by name
    asked = [BatchGrad(), DiagHessian(), BatchDiagHessian(params=rows_of), HMP()]
    compiled = fxcurv.compile(model, loss, asked, loss_params=True)
    compiled(x, y)
    x, y = x[:n], y[:n]
    found, held = compiled(x, y), named(model, loss)
    assert list(found.grad) == list(held)
    values = [lambda k=k: loss(model(x[k]), y[k]) for k in (slice(n), *([k] for k in range(n)))]
    total, *each = [torch.autograd.grad(value(), list(held.values()), create_graph=True) for value in values]
    close(found.grad, {name: g.detach() for name, g in zip(held, total, strict=True)}, "grad")
    rows = {name: torch.stack([e[k].detach() for e in each]) / n for k, name in enumerate(held)}
    close(found.grad_batch, rows, "grad_batch")
    names = {name: name if name.startswith("loss.") else f"model.{name}" for name in held}
    of_all, *of_each = [diagonals(Both(model, loss), value) for value in values]
    close(found.diag_h, {name: of_all[names[name]] for name in held}, "diag_h")
    rows = {name: torch.stack([d[names[name]] for d in of_each]) / n for name in found.diag_h_batch}
    close(found.diag_h_batch, rows, "diag_h_batch")
    for name, g in zip(held, total, strict=True):
        v = torch.randn(1, *held[name].shape, dtype=torch.float64)
        (product,) = torch.autograd.grad((g * v[0]).sum(), held[name], retain_graph=True)
        close({name: found.hmp[name](v)}, {name: product.unsqueeze(0)}, "hmp")


def test_calls_attach_and_copies() -> None:
    model, loss, x, y = built("temperature")
    compiled = fxcurv.compile(model, loss, [BatchL2Grad()], loss_params=True)
    loss(model(x), y).backward()
    expected = {name: p.grad.clone() for name, p in named(model, loss).items()}
    for again in range(3):  # the third call is bound by `runtime.again`
        model.zero_grad(), loss.zero_grad()
        compiled(x, y).attach()
        close({name: p.grad for name, p in named(model, loss).items()}, expected, f"call {again}")
        assert loss.log_temperature.batch_l2.shape == (5,)
    with torch.no_grad():
        loss.log_temperature.add_(0.5)
    model.zero_grad(), loss.zero_grad()
    loss(model(x), y).backward()
    found = compiled(x, y)
    close(found.grad, {name: p.grad for name, p in named(model, loss).items()}, "after a step")
    other = copy.deepcopy(compiled)
    close(other(x, y).grad, found.grad, "a copy")
    loaded, (model, loss) = pickle.loads(pickle.dumps(found)), (other.model, other.loss)
    model.zero_grad(), loss.zero_grad()
    with pytest.raises(ArgumentError, match=r"loss\.log_temperature"):
        loaded.attach(model)
    loaded.attach(model, loss)
    close({name: p.grad for name, p in named(model, loss).items()}, found.grad, "a loaded result")
    given = compiled(x, y, params={"loss.log_temperature": torch.tensor(0.3).double()})
    close(given.grad, expected, "params= of a call")
    nobody = compiled(x[:0], y[:0])
    assert nobody.grad.keys() == found.grad.keys() and nobody.batch_l2["loss.log_temperature"].shape == (0,)


@pytest.mark.slow
def test_a_frozen_model_under_a_learned_loss() -> None:
    model, loss, x, y = built("temperature")
    model.requires_grad_(False)
    found = fxcurv.compile(model, loss, [DiagHessian()], loss_params=True)(x, y)
    assert list(found.diag_h) == ["loss.log_temperature"]
    expected = diagonals(loss, lambda: loss(model(x), y))
    close(found.diag_h, {f"loss.{name}": d for name, d in expected.items()}, "diag_h")


@pytest.mark.slow
def test_choices_and_what_is_said() -> None:
    model, loss, x, y = built("temperature")
    found = fxcurv.compile(model, loss, [DiagGGNExact(params="0")], loss_params=True)(x, y)
    close(found.diag_ggn_exact, Oracle(model, loss, x, y).diag_ggn_exact(), "the model's Gauss-Newton")
    assert list(found.grad) == ["0.weight", "0.bias", "loss.log_temperature"]
    assert "loss_params=True" in " ".join(str(fxcurv.compile(model, loss, []).explain(x, y)).split())
    report = str(fxcurv.compile(model, loss, [], loss_params=True).explain(x, y))
    assert "held constant" not in report
    crf, field, x, y = built("transitions")
    with pytest.raises(LossError, match="Gauss-Newton"):
        fxcurv.compile(crf, field, [DiagGGNExact()], loss_params=True)(x, y)


class Scaled(nn.Module):
    """The temperature as part of the model, whose output is the logits of softmax."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.loss.log_temperature.exp()


def test_the_gauss_newton_of_a_temperature_is_of_the_scaled_logits() -> None:
    model, loss, x, y = built("temperature")
    compiled = fxcurv.compile(model, loss, [DiagGGNExact()], loss_params=True)
    for n in (5, 3):
        true = Oracle(Scaled(model, loss), F.cross_entropy, x[:n], y[:n]).diag_ggn_exact()
        close(
            compiled(x[:n], y[:n]).diag_ggn_exact,
            {name.removeprefix("model."): d for name, d in true.items()},
            "diag_ggn",
        )


def test_refusals() -> None:
    model, loss, _, _ = built("temperature")
    with pytest.raises(ArgumentError, match="no module"):
        fxcurv.compile(model, F.cross_entropy, [], loss_params=True)
    other = nn.Sequential(nn.Linear(2, 4))
    other.add_module("loss", Tempered())
    with pytest.raises(ArgumentError, match=r"'loss\.log_temperature' of its own"):
        fxcurv.compile(other, loss, [], loss_params=True)
    assert fxcurv.compile(other, other.loss, [], loss_params=True).covered()[0][-1] == "loss.log_temperature"


@pytest.mark.slow
def test_inside_torch_compile() -> None:
    model, loss, x, y = built("temperature")
    compiled = fxcurv.compile(model, loss, [BatchGrad()], loss_params=True)
    expected = compiled(x, y)

    @torch.compile(backend="eager", fullgraph=True)
    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        found = compiled(x, y)
        return found.grad_batch

    close(step(x, y), expected.grad_batch, "inside torch.compile")
