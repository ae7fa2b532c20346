"""Ops that promote: a layer in a narrow dtype meets values in a wider one. A cotangent has the dtype of its value."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
from fxcurv.extensions import HMP, BatchGrad, ClippedGrad, DiagGGNExact, EighGGN, GramGGN

FORWARDS = {
    "added": lambda m, h: h * 2.0 + m.shift,
    "scaled by a parameter": lambda m, h: m.second(h.tanh()) * m.scale,
    "chosen": lambda m, h: torch.where(m.shift > 0, h, h.tanh() * m.shift),
    "joined": lambda m, h: torch.cat([h[:, :2], m.scale[2:].expand(len(h), 2)], 1),
    "multiplied": lambda m, h: (h.softmax(-1) @ m.second.weight) * m.shift,
}
QUICK = ("added", "scaled by a parameter")


class Mixed(nn.Module):
    """Layers in float32, a parameter and a buffer in float64."""

    def __init__(self, forward):
        super().__init__()
        self.first, self.second, self.finish = nn.Linear(3, 4), nn.Linear(4, 4), forward
        self.scale = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.register_buffer("shift", torch.randn(4, dtype=torch.float64))

    def forward(self, x):
        return self.finish(self, self.first(x))


def used(model, loss):
    """Parameters that the loss reaches."""
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {n: p for (n, p), g in zip(model.named_parameters(), grads, strict=True) if g is not None}


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in FORWARDS])
def test_promoted(kind):
    torch.manual_seed(0)
    model, x, y = Mixed(FORWARDS[kind]), torch.randn(3, 3), torch.randint(4, (3,))
    result = fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad(), DiagGGNExact(), HMP()])(x, y)
    params = used(model, F.cross_entropy(model(x), y))
    vectors = {n: torch.randn_like(p) for n, p in params.items()}
    for name, p in params.items():
        assert result.grad[name].dtype == result.grad_batch[name].dtype == p.dtype
        diagonal = torch.zeros_like(p)
        for n in range(len(x)):
            f = model(x[n : n + 1])
            (g,) = torch.autograd.grad(F.cross_entropy(f, y[n : n + 1]) / len(x), p, retain_graph=True)
            close(result.grad_batch[name][n], g)
            rows = torch.stack([torch.autograd.grad(f[0, c], p, retain_graph=True)[0] for c in range(4)]).double()
            probs = f[0].softmax(0).detach()
            rows = rows.flatten(1)
            diagonal += ((rows.T @ (probs.diag() - probs.outer(probs)) * rows.T).sum(1) / len(x)).view_as(p)
        close(result.diag_ggn_exact[name], diagonal)
        (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), p, create_graph=True)
        hv = torch.autograd.grad(g, p, vectors[name], allow_unused=True)[0] if g.requires_grad else None
        close(result.hmp[name](vectors[name].unsqueeze(0))[0], torch.zeros_like(p) if hv is None else hv)


def test_what_belongs_to_all_parameters_in_two_dtypes():
    """A norm of float32 and float64 parts is float64, and weighs both."""
    torch.manual_seed(0)
    model, x, y = Mixed(FORWARDS["scaled by a parameter"]), torch.randn(3, 3), torch.randint(4, (3,))
    asked = [BatchGrad(), ClippedGrad(0.1), GramGGN(), EighGGN(2)]
    result = fxcurv.compile(model, nn.CrossEntropyLoss(), asked)(x, y)
    each = {name: g.double() for name, g in result.grad_batch.items()}
    norms = torch.stack([g.flatten(1).square().sum(1) for g in each.values()]).sum(0).sqrt()
    close(result.sample_norms, norms)
    for name, p in model.named_parameters():
        assert result.grad_clipped[name].dtype == p.dtype
        close(result.grad_clipped[name], torch.einsum("n,n...->...", (0.1 / norms).clamp(max=1), each[name]))
    gram = sum(part.double() for part in result.gram_ggn.values())
    size = gram.shape[0] * gram.shape[1]
    close(result.eigh_ggn_values, torch.linalg.eigvalsh(gram.reshape(size, size)).flip(0)[:2])
    for k in range(2):  # eigenvectors have length one over all parameters
        close(sum(result.eigh_ggn[name][k].double().square().sum() for name in each), torch.tensor(1.0))
