"""Kronecker factors of a whole transformer: what is no layer's weight, and inputs that several layers read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
from fxcurv import kronecker
from fxcurv.extensions import EKFAC, KFAC, KFLR, DiagGGNMC, SqrtGGNExact, SqrtGGNMC

N, T, D, C = 3, 4, 6, 7


class Tiny(nn.Module):
    """Token indices [N, T] to logits [N, C, T]: an embedding that is the head too, a table of positions, norms, q, k and v."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(C, D), nn.Parameter(torch.randn(T, D))
        self.norm, self.last = nn.LayerNorm(D), nn.LayerNorm(D, bias=False)
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))

    def forward(self, x):
        h = self.tokens(x) + self.positions
        a = self.norm(h)
        q, k, v = (f(a).unsqueeze(1) for f in (self.q, self.k, self.v))
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return F.linear(self.last(h), self.tokens.weight).transpose(1, 2)


def build():
    torch.manual_seed(0)
    return Tiny().double(), torch.randint(C, (N, T)), torch.randint(C, (N, T))


def test_a_transformer_by_default():
    model, x, y = build()
    asked = [KFLR(), KFAC(mc_samples=2), EKFAC(mc_samples=2), SqrtGGNExact(), SqrtGGNMC(mc_samples=2)]
    compiled = fxcurv.compile(model, F.cross_entropy, asked, debug=True)
    result = compiled(x, y, seed=0)
    for field, root in ((result.kflr, result.sqrt_ggn_exact), (result.kfac, result.sqrt_ggn_mc)):
        assert set(field) == {name for name, _ in model.named_parameters()}
        for name in ("norm.weight", "last.weight"):
            p = root[name].flatten(0, 1)
            torch.testing.assert_close(field[name][0], p.T @ p)
        for name in ("tokens.weight", "positions"):
            (b,) = field[name]
            torch.testing.assert_close(b, root[name].square().sum((0, 1)).flatten())
            v = torch.randn(2, *root[name].shape[2:], dtype=torch.float64)
            torch.testing.assert_close(kronecker.matmul(field[name], v), b.reshape(v.shape[1:]) * v)
            for damping in (0.1, (0.1, 0.3)):
                torch.testing.assert_close(kronecker.solve(field[name], v, damping), v / (b.reshape(v.shape[1:]) + 0.1))
        assert [len(field[name]) for name in ("q.weight", "k.weight", "v.weight")] == [2, 2, 2]
    for name in ("tokens.weight", "norm.weight"):
        torch.testing.assert_close(kronecker.dense(result.ekfac[name]), kronecker.dense(result.kfac[name]))
    said = {(row.param, row.algorithm) for row in compiled.explain(x, y).rows if row.extension == "KFAC"}
    assert {("tokens.weight", "diagonal of its block"), ("norm.weight", f"exact block [{D}, {D}]")} <= said


@pytest.mark.slow
def test_left_out():
    model, x, y = build()
    compiled = fxcurv.compile(model, F.cross_entropy, [KFLR(others="skip"), DiagGGNMC()], debug=True)
    assert set(compiled(x, y).kflr) == {"q.weight", "k.weight", "v.weight", "norm.bias"}
    left = {row.param for row in compiled.explain(x, y).rows if row.algorithm == "left out"}
    assert left == {"tokens.weight", "positions", "norm.weight", "last.weight"}


@pytest.mark.parametrize("sharing", ["expand", pytest.param("reduce", marks=pytest.mark.slow)])
def test_equal_inputs_have_one_factor(sharing):
    """q, k and v read the same activations."""
    model, x, y = build()
    compiled = fxcurv.compile(model, F.cross_entropy, [KFAC(weight_sharing=sharing, params=["q", "k", "v"])])
    results = compiled.lower(x, y).program.results["kfac"]
    assert len({results[f"{name}.weight"][1] for name in "qkv"}) == 1
    assert len({results[f"{name}.weight"][0] for name in "qkv"}) == 3
    nodes = compiled.lower(x, y).graph_module.graph.nodes
    products = [n for n in nodes if n.meta.get("origin", {}).get("extension") == "KFAC" and "mm" in str(n.target)]
    assert len(products) == 4
