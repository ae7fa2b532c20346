"""A table that is looked up and multiplied with: its squares and norms without a table per sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
from fxcurv.contractions.candidates import CANDIDATES
from fxcurv.contractions.contract import Spec, contract
from fxcurv.contractions.factors import Arrange, Dense, Gather
from fxcurv.extensions import BatchL2Grad, ClippedGrad, DiagGGNMC, SqrtGGNMC, SumGradSquared

N, T, D, ROWS = 3, 5, 16, 5003

TIED = next(c for c in CANDIDATES if c.name == "products and lookups apart")


def dense(v, s, order=(0, 1)):
    a, g = torch.randn(N, s, 1, D).double(), torch.randn(v, N, s, 1, ROWS).double()
    return Dense(a, g, Arrange((ROWS, D), order, (ROWS, D) if order == (0, 1) else (D, ROWS)))


def lookup(v, t, padding=-1, rows=7):
    """Of few rows, so that most of them repeat."""
    return Gather(torch.randint(rows, (N, t)), torch.randn(v, N, t, D).double(), ROWS, padding)


@pytest.mark.parametrize("reduce", ["vn", "vp"])
@pytest.mark.parametrize("v", [1, 3])
def test_is_the_contraction(reduce, v):
    torch.manual_seed(0)
    uses = {
        "two": [dense(v, T), lookup(v, T)],
        "other lengths, a padding index": [lookup(v, 6, padding=3), dense(v, 2)],
        "several of each": [dense(v, T), lookup(v, 3, padding=2), dense(v, 1), lookup(v, 4)],
    }
    for name, factors in uses.items():
        for weights in (None, torch.randn(v, N).double(), torch.randn(v, 1).double()):
            spec = Spec(2, reduce)
            assert TIED.applies(spec, factors)
            found, expected = TIED.run(spec, factors, weights), contract(spec, factors, weights)
            torch.testing.assert_close(found, expected, msg=lambda m, name=name: f"{name}: {m}")


def test_applies_to_nothing_else():
    both = [dense(1, T), lookup(1, T)]
    assert not TIED.applies(Spec(2, "v"), both)
    assert not TIED.applies(Spec(1, "vn"), both)
    assert not TIED.applies(Spec(2, "vn", (0,)), both)
    assert not TIED.applies(Spec(2, "vn"), both[:1])
    assert not TIED.applies(Spec(2, "vn"), [dense(1, T, order=(1, 0)), lookup(1, T)])


class Tied(nn.Module):
    """Token indices [N, T] to logits [N, ROWS, T], by one table."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(ROWS, D, padding_idx=2), nn.Linear(D, D)

    def forward(self, x):
        h = self.table(x)
        h = h + torch.tanh(self.mix(h)).cumsum(1)
        return F.linear(h, self.table.weight).transpose(1, 2)


def test_no_table_per_sample():
    torch.manual_seed(0)
    model, y = Tied().double(), torch.randint(ROWS, (N, T))
    x = torch.tensor([[1, 2, 1, 1, 5], [2, 2, 2, 2, 7], [9, 9, 9, 9, 9]])
    asked = [BatchL2Grad(), SumGradSquared(), ClippedGrad(max_norm=1e-2), DiagGGNMC()]
    compiled = fxcurv.compile(model, F.cross_entropy, asked)
    result = compiled(x, y, seed=0)
    rows = {r.extension: r.algorithm for r in compiled.explain(x, y).rows if r.param == "table.weight"}
    assert [rows[type(e).__name__] for e in asked if not isinstance(e, ClippedGrad)] == [TIED.name] * 3
    vals = [n.meta.get("val") for n in compiled.lower(x, y).graph_module.graph.nodes]
    tables = [v for v in vals if isinstance(v, torch.Tensor) and v.shape[-2:] == (ROWS, D) and v.ndim > 2]
    assert all(v.stride(0) == 0 for v in tables)  # the table itself, seen as one for every sample
    grads = {name: [] for name, _ in model.named_parameters()}
    for k in range(N):
        loss = F.cross_entropy(model(x[k : k + 1]), y[k : k + 1]) / N
        for name, g in zip(grads, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            grads[name].append(g)
    grads = {name: torch.stack(g) for name, g in grads.items()}
    norms = sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()
    scale = (1e-2 / norms).clamp(max=1)
    root = fxcurv.compile(model, F.cross_entropy, [SqrtGGNMC()])(x, y, seed=0).sqrt_ggn_mc
    for name, g in grads.items():
        torch.testing.assert_close(result.batch_l2[name], g.flatten(1).square().sum(1))
        torch.testing.assert_close(result.sum_grad_squared[name], g.square().sum(0))
        torch.testing.assert_close(result.grad_clipped[name], torch.einsum("n,n...->...", scale, g))
        torch.testing.assert_close(result.diag_ggn_mc[name], root[name].square().sum((0, 1)))
