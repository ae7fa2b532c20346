"""Hessian diagonals in float32 are as good as double autograd's, where an op's curvature is small against one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxcurv
from fxcurv.extensions import DiagGGNExact, DiagHessian

# How much worse than double autograd in the same precision: both are a few roundings.
AS_GOOD = 10


class Block(nn.Module):
    """A layer of BERT."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.o(a))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class Bert(nn.Module):
    """A tiny BERT with a classifier, at its own initialisation (0.02)."""

    def __init__(self, words=7, length=3, width=4, layers=1, classes=3):
        super().__init__()
        self.words, self.places, self.norm = (
            nn.Embedding(words, width),
            nn.Embedding(length, width),
            nn.LayerNorm(width),
        )
        self.layers = nn.Sequential(*(Block(width, 2) for _ in range(layers)))
        self.pool, self.head = nn.Linear(width, width), nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens):
        x = self.norm(self.words(tokens) + self.places(torch.arange(tokens.shape[1])))
        return self.head(torch.tanh(self.pool(self.layers(x)[:, 0])))


class Tied(nn.Module):
    """Small weights, one of which is used twice: the curvature of the products counts."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        nn.init.normal_(self.inner.weight, std=1e-3)

    def forward(self, x):
        h = self.inner(x)
        return self.head(self.inner(torch.tanh(h)) * h)


class Images(nn.Module):
    """Convolutions around an op that has no rule of its own for its curvature."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 3, 2), nn.Conv2d(3, 2, 2), nn.Linear(8, 2)
        nn.init.normal_(self.second.weight, std=1e-3)

    def forward(self, x):
        return self.head(self.second(self.first(x).softmax(1)).flatten(1))


def diagonal(model, loss_fn, x, y) -> list[torch.Tensor]:
    """The Hessian's diagonal by differentiating every entry of the gradient again."""
    params = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # others have no second derivative
        grads = torch.autograd.grad(loss_fn(model(x), y), params, create_graph=True)
    out = []
    for g, p in zip(grads, params, strict=True):
        rows = [torch.autograd.grad(e, p, retain_graph=True, materialize_grads=True)[0] for e in g.flatten()]
        out.append(torch.stack([row.flatten()[i] for i, row in enumerate(rows)]).view_as(p))
    return out


def power_loss(f, y):
    """A loss without closed form."""
    return ((f - y) ** 4).sum() + (f.exp() * 1e-4).sum()


MODELS = {
    "bert": (Bert, lambda: torch.randint(0, 7, (3, 3)), lambda: torch.randint(0, 3, (3,)), nn.CrossEntropyLoss()),
    "tied": (Tied, lambda: torch.randn(3, 4), lambda: torch.randint(0, 2, (3,)), nn.CrossEntropyLoss()),
    "images": (Images, lambda: torch.randn(2, 1, 4, 4), lambda: torch.randint(0, 2, (2,)), nn.CrossEntropyLoss()),
    "general loss": (lambda: nn.Linear(4, 2), lambda: torch.randn(3, 4), lambda: torch.randn(3, 2), power_loss),
}


@pytest.mark.parametrize("name, budget", [*((name, None) for name in MODELS), ("tied", 1), ("general loss", 1)])
def test_as_good_as_autograd(name, budget):
    make, inputs, targets, loss_fn = MODELS[name]
    torch.manual_seed(0)
    model, x, y = make(), inputs(), targets()
    double = copy.deepcopy(model).double()
    widen = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    right, single = diagonal(double, loss_fn, widen(x), widen(y)), diagonal(model, loss_fn, x, y)
    found = fxcurv.compile(model, loss_fn, extensions=[DiagHessian()], memory_budget=budget)(x, y).diag_h
    for (param, _), true, one in zip(model.named_parameters(), right, single, strict=True):
        if true.norm() < 1e-12:  # a key's bias does not change attention: all digits are rounding
            assert found[param].norm() < 1e-12, param
            continue
        own = max((one - true).norm(), torch.finfo(torch.float32).eps * true.norm())
        assert (found[param] - true).norm() <= AS_GOOD * own, param


def test_gauss_newton_of_a_general_loss():
    """The Hessian in f of a loss that sees the outputs together is small against one."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(4, 3)
    loss = lambda f: 1e-6 * torch.logsumexp(f.exp(), 1).sum()  # noqa: E731
    f64 = copy.deepcopy(model).double()
    found = fxcurv.compile(model, loss, extensions=[DiagGGNExact()])(x).diag_ggn_exact
    out = f64(x.double())
    for name, p in f64.named_parameters():
        true = torch.zeros_like(p)
        for n in range(len(x)):
            h = torch.autograd.functional.hessian(lambda f: loss(f[None]), out[n].detach())
            j = torch.stack([torch.autograd.grad(o, p, retain_graph=True)[0].flatten() for o in out[n]])
            true += (j.T @ h @ j).diagonal().view_as(p)
        torch.testing.assert_close(found[name].double(), true, rtol=2e-6, atol=0)
