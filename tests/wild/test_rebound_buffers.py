"""`self.mean = ...` of a buffer: every call leaves the buffer with the value that a plain pass gives it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import BatchGrad, DiagGGNExact


class Base(nn.Module):
    def __init__(self, *shape: int):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.register_buffer("kept", torch.zeros(shape))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.double()

    def activation(self, h: Tensor) -> Tensor:
        return h.tanh()

    def forward(self, x):
        return self.last(self.activation(self.first(x)))


class Centred(Base):
    """A running mean, as people write it, and a counter."""

    def activation(self, h):
        self.kept = 0.9 * self.kept + 0.1 * h.detach().mean(0)
        self.steps = self.steps + 1
        return (h - self.kept).tanh()


class Membrane(Base):
    """A state that begins anew at every pass, with the batch's shape, as spiking neurons have it."""

    def activation(self, h):
        self.kept = torch.zeros_like(h)
        for _ in range(2):
            self.kept = h.tanh() + 0.5 * self.kept
        return self.kept


class Twice(Base):
    """Reads what it has set."""

    def activation(self, h):
        self.kept = self.kept + 1.0
        h = h * self.kept
        self.kept = self.kept * 2.0
        return h.tanh()


def data(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 3, dtype=torch.float64, generator=generator), torch.randint(0, 3, (n,), generator=generator)


@pytest.mark.parametrize("make", [lambda: Centred(4), lambda: Membrane(0), lambda: Membrane(4), lambda: Twice(4)])
def test_every_call(make):
    model = make()
    plain, extensions = (
        copy.deepcopy(model),
        [DiagGGNExact()] if not isinstance(model, Membrane) else [BatchGrad(), DiagGGNExact()],
    )
    compiled = fxcurv.compile(model, F.cross_entropy, extensions)
    for n in (5, 3, 5):
        (x, y), before = data(n), copy.deepcopy(plain)
        oracle = Oracle(before, F.cross_entropy, x, y, kind="ce")
        result = compiled(x, y)
        with torch.no_grad():
            plain(x)
        for name, value in plain.named_buffers():
            torch.testing.assert_close(dict(model.named_buffers())[name], value, rtol=1e-10, atol=1e-12)
            assert not dict(model.named_buffers())[name].requires_grad
        if not isinstance(model, Membrane):  # the oracle runs a model several times
            params = dict(before.named_parameters())
            grads = torch.autograd.grad(F.cross_entropy(before(x), y), list(params.values()))
            wanted = dict(zip(params, grads, strict=True))
        else:
            wanted = oracle.grad()
            for name, value in oracle.diag_ggn_exact().items():
                torch.testing.assert_close(result.diag_ggn_exact[name], value, rtol=1e-9, atol=1e-11)
        for name, value in wanted.items():
            torch.testing.assert_close(result.grad[name], value, rtol=1e-9, atol=1e-11)


def test_one_program_serves():
    model = Centred(4)
    compiled = fxcurv.compile(model, F.cross_entropy)
    for n in (5, 3, 7):
        compiled(*data(n))
    assert len(compiled.recompiles) == 0 and model.steps == 3


@pytest.mark.parametrize("make", [lambda: Centred(4), lambda: Membrane(0)])
def test_without_updates(make):
    model = make()
    before = {name: t.clone() for name, t in model.named_buffers()}
    result = fxcurv.compile(model, F.cross_entropy, update_buffers=False)(*data(5))
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name])
    if isinstance(model, Centred):
        assert result.buffers["steps"] == 1


class Siamese(nn.Module):
    """Two passes through one encoder, whose norm updates its statistics in each."""

    def __init__(self, momentum: float | None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        one, other = (self.norm(self.first(t)).tanh() for t in (x, x.sin()))
        return self.last(one - other)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_norm_that_is_called_twice(momentum):
    """What the second call reads of the first are statistics, which nothing is differentiated through."""
    model, x, y = Siamese(momentum), torch.randn(5, 3).double(), torch.tensor([0, 2, 1, 1, 0])
    plain = copy.deepcopy(model)
    result = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagGGNExact()])(x, y)
    f = plain(x)
    grads = torch.autograd.grad(F.cross_entropy(f, y), list(plain.parameters()), retain_graph=True)
    p = f.softmax(1).detach()
    h = torch.block_diag(*(q.diag() - q.outer(q) for q in p)) / len(x)
    for (name, w), g in zip(plain.named_parameters(), grads, strict=True):
        rows = torch.stack([torch.autograd.grad(e, w, retain_graph=True)[0].flatten() for e in f.flatten()])
        torch.testing.assert_close(result.grad[name], g)
        torch.testing.assert_close(result.diag_ggn_exact[name].flatten(), (rows * (h @ rows)).sum(0))
    for (name, got), want in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, want, msg=name)
