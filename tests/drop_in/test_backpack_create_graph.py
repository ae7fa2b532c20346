"""Under the drop-in, quantities and gradients differentiated again: `create_graph=True`."""

from __future__ import annotations

import gc

import pytest
import torch
from oracle import Oracle
from torch import nn
from torch.utils import _pytree as pytree

from fxcurv.backpack import backpack, extend
from fxcurv.backpack.extensions import HMP, BatchL2Grad, DiagGGNExact, DiagHessian, Variance


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)).double()


def vectors(n=6):
    torch.manual_seed(1)
    return torch.randn(n, 5).double(), torch.randint(0, 3, (n,))


@pytest.fixture
def model():
    return extend(mlp())


def close(a, b):
    for s, t in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(s, t)


def total(fields):
    """A scalar of all quantities, the same mixture at every call."""
    generator = torch.Generator().manual_seed(0)
    values = [v for field in fields for v in field.values()]
    return sum((v * torch.randn(v.shape, generator=generator).double()).sum() for v in values)


@pytest.mark.parametrize(
    ("extensions", "inside"),
    [([Variance(), BatchL2Grad()], True), ([Variance()], False), ([DiagGGNExact(), DiagHessian()], True)],
    ids=["first", "first-outside", "second"],
)
def test_gradient_of_a_quantity(model, extensions, inside):
    """Against differences of the oracle; in the context, a second backward pass leaves the quantities alone."""
    lossfunc, (x, y) = extend(nn.CrossEntropyLoss()), vectors()
    params, fields = dict(model.named_parameters()), [e.savefield for e in extensions]
    loss, outer = lossfunc(model(x), y), backpack(*extensions)
    with outer:
        torch.autograd.grad(loss, list(params.values()), create_graph=True)
        values = [{name: getattr(p, field) for name, p in params.items()} for field in fields]
        if inside:
            found = torch.autograd.grad(total(values), list(params.values()))
    if not inside:
        found = torch.autograd.grad(total(values), list(params.values()))
    for field, expected in zip(fields, values, strict=True):
        assert all(getattr(p, field) is expected[name] for name, p in params.items())
    torch.manual_seed(2)
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    slope = sum((g * d).sum() for g, d in zip(found, direction.values(), strict=True))

    def at(step):
        moved = mlp()
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p += step * direction[name]
        oracle = Oracle(moved, nn.CrossEntropyLoss(), x, y, kind="ce")
        return total([getattr(oracle, field)() for field in fields])

    h = 1e-5
    torch.testing.assert_close(slope.detach(), (at(h) - at(-h)).detach() / (2 * h), rtol=1e-6, atol=1e-9)


def individual(model, lossfunc, x, y):
    """[N] gradients of all parameters with their graph, of the mean loss."""
    params, n = list(model.parameters()), len(x)
    losses = [lossfunc(model(x[k : k + 1]), y[k : k + 1]) / n for k in range(n)]
    return [torch.autograd.grad(value, params, create_graph=True) for value in losses]


def test_variance_by_backward_with_create_graph(model):
    """`loss.backward(create_graph=True)`; with respect to an input as well; nothing stays after the graph is dropped."""
    lossfunc, (x, y) = extend(nn.CrossEntropyLoss()), vectors()
    x.requires_grad_()
    rows = individual(mlp(), nn.CrossEntropyLoss(), x, y)
    by_param = [torch.stack(g).var(0, correction=0).sum() for g in zip(*rows, strict=True)]
    (expected,) = torch.autograd.grad(sum(by_param), x)
    loss = lossfunc(model(x), y)
    with backpack(Variance()), pytest.warns(UserWarning, match="reference cycle"):
        loss.backward(create_graph=True)
    assert all(p.grad.requires_grad for p in model.parameters())
    (found,) = torch.autograd.grad(sum(p.variance.sum() for p in model.parameters()), x)
    torch.testing.assert_close(found, expected)


def test_gradients_are_differentiated_like_plain_ones(model):
    """Hessian-vector products by two backward passes through an extended model, mean squared gradients with the loss."""
    plain, (x, y) = mlp(), vectors()
    found = []
    for m, lossfunc in ((model, extend(nn.CrossEntropyLoss())), (plain, nn.CrossEntropyLoss())):
        params = list(m.parameters())
        loss = lossfunc(m(x), y)
        gradients = torch.autograd.grad(loss, params, create_graph=True)
        penalty = sum(g.square().sum() for g in gradients)
        found.append(torch.autograd.grad(loss + penalty, params))
    close(*found)


def test_products_differentiated_again(model):
    lossfunc, (x, y) = extend(nn.CrossEntropyLoss()), vectors()
    p = model[0].weight
    v = torch.randn_like(p)
    with backpack(HMP()):
        torch.autograd.grad(lossfunc(model(x), y), list(model.parameters()), create_graph=True)
    (found,) = torch.autograd.grad((p.hmp(v) * v).sum(), p)
    plain = mlp()
    q = plain[0].weight
    (g,) = torch.autograd.grad(nn.CrossEntropyLoss()(plain(x), y), q, create_graph=True)
    (hv,) = torch.autograd.grad((g * v).sum(), q, create_graph=True)
    (expected,) = torch.autograd.grad((hv * v).sum(), q)
    torch.testing.assert_close(found, expected)


def test_nothing_leaks(model):
    lossfunc, (x, y) = extend(nn.CrossEntropyLoss()), vectors()

    def tensors_after(rounds):
        for _ in range(rounds):
            loss = lossfunc(model(x), y)
            with backpack(Variance()):
                torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        del loss
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    tensors_after(2)  # what was there before the test dies with it
    assert tensors_after(2) == tensors_after(5)
