"""The drop-in: a field is of all that the gradient beside it is of, or the backward pass raises."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fxcurv.backpack import backpack, disable, extend
from fxcurv.backpack.extensions import BatchGrad, DiagGGNExact, SumGradSquared
from fxcurv.errors import FieldError

N = 4
FIELDS = ("grad_batch", "diag_ggn_exact")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head, self.unused = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.encoder(x)))


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Model().double()


@pytest.fixture
def model(plain):
    return extend(copy.deepcopy(plain))


def batch(seed=1):
    torch.manual_seed(seed)
    return torch.randn(N, 3).double(), torch.randn(N, 2).double()


def individual(plain, x, y):
    """[N, *P] by name, of the mean squared error of the batch, by loops."""
    used = {name: p for name, p in plain.named_parameters() if not name.startswith("unused")}
    rows = []
    for k in range(len(x)):
        value = nn.MSELoss()(plain(x[k : k + 1]), y[k : k + 1]) / len(x)
        rows.append(torch.autograd.grad(value, list(used.values())))
    return {name: torch.stack(column) for name, column in zip(used, zip(*rows, strict=True), strict=True)}


def check(model, plain, x, y):
    for name, expected in individual(plain, x, y).items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad_batch, expected)


def no_fields(model):
    return not any(hasattr(p, field) for p in model.parameters() for field in FIELDS)


@pytest.mark.parametrize("extension", [BatchGrad(), DiagGGNExact()], ids=lambda e: type(e).__name__)
def test_two_forward_passes_and_one_backward(model, extension):
    x, y = batch()
    loss, other = extend(nn.MSELoss()), extend(nn.MSELoss())
    with backpack(extension), pytest.raises(FieldError, match="forward more than once.*'encoder.weight'"):
        (loss(model(x), y) + other(model(x + 1), y)).backward()
    assert no_fields(model)


def test_a_model_that_is_called_in_a_loop(model):
    """A recurrent use of an extended module, around it a plain one."""
    step = extend(nn.Linear(3, 3).double())
    x, _ = batch()
    with backpack(BatchGrad()), pytest.raises(FieldError, match="torch.cat"):
        step(torch.tanh(step(x))).sum().backward()


def test_two_modules_that_share_a_weight():
    a, b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    b.weight = a.weight
    a, b = extend(a), extend(b)
    x, _ = batch()
    with backpack(BatchGrad()), pytest.raises(FieldError, match="'weight'"):
        b(torch.tanh(a(x))).sum().backward()


def test_without_extensions_two_passes_are_what_they_are_in_pytorch(model, plain):
    x, y = batch()
    for m in (model, plain):
        (nn.MSELoss()(m(x), y) + nn.MSELoss()(m(x + 1), y)).backward()
    with backpack():
        nn.MSELoss()(model(x), y).backward()
    nn.MSELoss()(plain(x), y).backward()
    for p, q in zip(model.head.parameters(), plain.head.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_two_passes_of_which_one_is_differentiated(model, plain):
    x, y = batch()
    loss = extend(nn.MSELoss())
    model(x + 1)
    value = loss(model(x), y)
    model(x - 1)
    with backpack(BatchGrad(), DiagGGNExact()):
        value.backward()
    check(model, plain, x, y)


def test_accumulation_over_backward_calls(model, plain):
    """`p.grad` adds up, as in PyTorch; a field is of the last call, whose gradient its sum is."""
    loss, total = extend(nn.MSELoss()), 0
    for seed in (1, 2):
        x, y = batch(seed)
        with backpack(BatchGrad()):
            loss(model(x), y).backward()
        check(model, plain, x, y)
        total = total + model.head.weight.grad_batch.sum(0)
    torch.testing.assert_close(model.head.weight.grad, total)


def test_the_same_graph_twice(model, plain):
    x, y = batch()
    loss = extend(nn.MSELoss())
    value = loss(model(x), y)
    with backpack(BatchGrad()):
        value.backward(retain_graph=True)
        value.backward()
    check(model, plain, x, y)


def test_forward_in_one_context_and_backward_in_another(model, plain):
    x, y = batch()
    with backpack(SumGradSquared()):
        value = extend(nn.MSELoss())(model(x), y)
    with backpack(BatchGrad()):
        value.backward()
    check(model, plain, x, y)
    assert not hasattr(model.head.weight, "sum_grad_squared")


def test_a_gradient_penalty(model):
    """Its gradient comes through derivatives of a backward pass, of which individual gradients are not known."""
    x, _ = batch()
    x.requires_grad_()
    out = model(x)
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with backpack(BatchGrad()), pytest.raises(FieldError, match="gradient penalty"):
        (g.norm(dim=1) - 1).square().mean().backward()
    assert no_fields(model)


def test_a_gradient_penalty_beside_a_loss(model):
    """Here a field is set, of the loss alone."""
    x, y = batch()
    x.requires_grad_()
    out = model(x)
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with backpack(BatchGrad()), pytest.raises(FieldError, match="gradient penalty"):
        (nn.MSELoss()(out, y) + g.square().mean()).backward()


def test_a_penalty_on_gradients_of_parameters(model):
    x, y = batch()
    value = nn.MSELoss()(model(x), y)
    gradients = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
    with backpack(BatchGrad()), pytest.raises(FieldError):
        (value + sum(g.square().sum() for g in gradients)).backward()


def test_a_gradient_penalty_outside_of_the_context_is_pytorchs(model, plain):
    found = []
    for m in (model, plain):
        x, _ = batch()
        x.requires_grad_()
        (g,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        (g.norm(dim=1) - 1).square().mean().backward()
        found.append(m.encoder.weight.grad)
    torch.testing.assert_close(*found)


def test_past_the_extended_model(model):
    """A submodule called alone, and a forward pass while extended modules are plain."""
    x, y = batch()
    with backpack(BatchGrad()), pytest.raises(FieldError, match="'encoder"):
        model.encoder(x).sum().backward()
    with disable():
        out = model(x)
    with backpack(BatchGrad()), pytest.raises(FieldError, match="disable"):
        nn.MSELoss()(out, y).backward()


def test_parameters_that_were_not_asked_for(model):
    """A field of some parameters; others may have a gradient that went past the model."""
    x, y = batch()
    with backpack(BatchGrad(params="head")):
        (nn.MSELoss()(model(x), y) + 0.1 * model.encoder.weight.square().sum()).backward()
        model.encoder(x).sum().backward()
    assert hasattr(model.head.weight, "grad_batch") and not hasattr(model.encoder.weight, "grad_batch")


def test_frozen_unused_and_penalised_parameters(model, plain):
    """A regulariser is of no sample: the sum of individual gradients is the gradient without it."""
    x, y = batch()
    model.encoder.bias.requires_grad_(False)
    with backpack(BatchGrad()):
        (extend(nn.MSELoss())(model(x), y) + 0.1 * model.head.weight.square().sum()).backward()
    assert not hasattr(model.encoder.bias, "grad_batch") and model.encoder.bias.grad is None
    assert not model.unused.weight.grad_batch.any()
    weight = model.head.weight
    torch.testing.assert_close(weight.grad_batch, individual(plain, x, y)["head.weight"])
    torch.testing.assert_close(weight.grad, weight.grad_batch.sum(0) + 0.2 * weight.detach())


def test_under_no_grad_nothing_is_kept(model, plain):
    x, y = batch()
    with torch.no_grad():
        target = model(x + 1)
    with backpack(BatchGrad()):
        nn.MSELoss()(model(x), target).backward()
    check(model, plain, x, plain(x + 1).detach())


def test_parameters_that_are_replaced_are_watched(model):
    x, _ = batch()
    model.head = nn.Linear(4, 2).double()
    model(x)
    with backpack(BatchGrad()), pytest.raises(FieldError, match="'head"):
        model.head(torch.randn(N, 4).double()).sum().backward()
