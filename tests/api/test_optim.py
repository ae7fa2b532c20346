"""The optimizers' steps by hand, and that they train."""

import io

import pytest
import torch
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.errors import ArgumentError
from fxcurv.kronecker import Blocks
from fxcurv.optim import KFAC, DiagGGN


def case(n=12):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    x = torch.randn(n, 4).double()
    return model, x, (x @ torch.randn(4, 3).double()).argmax(1)


def test_steps_are_those_of_the_formula():
    model, x, y = case()
    twin, _, _ = case()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters(), "damping": 0.5}]
    loss = nn.CrossEntropyLoss()
    known = {"lr": 0.2, "momentum": 0.8, "damping": 0.1, "weight_decay": 0.01, "decay": 0.7, "interval": 2}
    optimizer = DiagGGN(model, loss, groups, **known, mc_samples=None, check=None)
    named, momentum, average, updates = dict(twin.named_parameters()), {}, {}, 0
    for step in range(4):
        found = optimizer.step((x, y))
        oracle = Oracle(twin, loss, x, y, kind="ce")
        torch.testing.assert_close(found.loss, oracle.loss())
        if step % 2 == 0:
            updates += 1
            diagonal = oracle.diag_ggn_exact()
            average = {n: 0.7 * average.get(n, 0) + 0.3 * diagonal[n] for n in named}
        grad = oracle.grad()
        with torch.no_grad():
            for n, p in named.items():
                if n.startswith("2."):
                    continue  # in no group
                lr, damping = (0.1, 0.1) if n.startswith("0.") else (0.2, 0.5)
                direction = (grad[n] + 0.01 * p) / (average[n] / (1 - 0.7**updates) + damping)
                momentum[n] = direction if n not in momentum else 0.8 * momentum[n] + direction
                p -= lr * momentum[n]
    for (n, p), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, want, msg=lambda m, n=n: f"{n}: {m}")


def test_a_batch_without_samples_is_no_step():
    """Poisson sampling draws some: neither momentum nor the average moves."""
    model, x, y = case()
    optimizer = DiagGGN(model, nn.CrossEntropyLoss(), lr=0.1, momentum=0.9, decay=0.5, mc_samples=None, check=None)
    optimizer.step((x, y))
    before, state = [p.clone() for p in model.parameters()], optimizer.state_dict()["updates"]
    optimizer.step((x[:0], y[:0]))
    assert all(map(torch.equal, before, model.parameters())) and optimizer.state_dict()["updates"] == state


@pytest.mark.slow
def test_kfac_solves_with_the_averaged_factors():
    model, x, y = case()
    twin, _, _ = case()
    optimizer = KFAC(
        model, nn.CrossEntropyLoss(), lr=0.3, momentum=0, damping=0.1, decay=0.5, mc_samples=None, check=None
    )
    exact = fxcurv.extensions.KFLR(weight_sharing="expand", others="exact")
    compiled = fxcurv.compile(twin, nn.CrossEntropyLoss(), [exact], check=None)
    average = {}
    for step in range(2):
        optimizer.step((x, y))
        result = compiled(x, y)
        for n, p in twin.named_parameters():
            average[n] = [0.5 * a + 0.5 * f for a, f in zip(average.get(n, [0, 0]), result.kflr[n], strict=False)]
            factors = fxcurv.kronecker.Kronecker(
                [f / (1 - 0.5 ** (step + 1)) for f in average[n]], result.kflr[n].arrangement
            )
            with torch.no_grad():
                p -= 0.3 * Blocks({n: factors}).solve({n: result.grad[n]}, 0.1, pi=True)[n]
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) for k in (DiagGGN, KFAC)])
def test_they_train_and_go_on_from_a_state(kind):
    model, x, y = case(60)
    optimizer = kind(model, nn.CrossEntropyLoss(), interval=3, check=None)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
    losses = []
    for step in range(20):
        losses.append(float(optimizer.step((x, y), seed=step).loss))
        scheduler.step()
    assert losses[-1] < 0.4 * losses[0] and optimizer.param_groups[0]["lr"] == 0.0125
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other, _, _ = case()
    other.load_state_dict(state["model"])
    again = kind(other, nn.CrossEntropyLoss(), interval=3, check=None)
    again.load_state_dict(state["optimizer"])
    for step in range(20, 23):  # the first of them uses the old curvature, the second a new one
        optimizer.step((x, y), seed=step)
        again.step((x, y), seed=step)
    torch.testing.assert_close(list(other.parameters()), list(model.parameters()))


def test_what_is_refused():
    model, _, _ = case()
    for wrong in ({"lr": -1}, {"momentum": 1.0}, {"decay": 1.0}, {"interval": 0}, {"damping": -1e-3}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            DiagGGN(model, nn.CrossEntropyLoss(), **wrong)
    with pytest.raises(ArgumentError, match="none of the model's"):
        KFAC(model, nn.CrossEntropyLoss(), [nn.Parameter(torch.zeros(2))])
