"""Gram matrices and inner products against individual gradients by plain autograd."""

import pytest
import torch
from many_uses import Net
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.errors import ExtensionError
from fxcurv.extensions import Dots, GramGrad


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model, x, y = Net().double(), torch.randn(7, 2, 3).double(), torch.randint(3, (7,))
    vectors = {n: torch.randn(4, *p.shape).double() for n, p in model.named_parameters()}
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [GramGrad(), Dots(vectors)])
    return compiled, vectors, x, y, Oracle(model, nn.CrossEntropyLoss(), x, y, kind="ce").grad_batch()


def test_pairs(case):
    compiled, vectors, x, y, each = case
    result = compiled(x, y)
    for name, g in each.items():
        rows = g.flatten(1)
        torch.testing.assert_close(result.gram_grad[name], rows @ rows.t())
        torch.testing.assert_close(result.dots[name], rows @ vectors[name].flatten(1).t())
    program = compiled.lower(x, y).program
    chosen = {(d.param, d.extension): d.algorithm for d in program.decisions if d.extension in ("GramGrad", "Dots")}
    assert (
        chosen["conv.weight", "GramGrad"] == "blocks of P"
        and chosen["token.weight", "GramGrad"] == "products of factors"
    )
    assert chosen["b", "Dots"] == "products of factors" and chosen["token.weight", "Dots"] == "blocks of P"
    empty = compiled(x[:0], y[:0])
    assert empty.gram_grad["b"].shape == (0, 0) and empty.dots["b"].shape == (0, 4)


def test_dots_of_a_data_set(case):
    compiled, _, x, y, _ = case
    dots = compiled.asking([e for e in compiled.extensions if isinstance(e, Dots)])
    found, wanted = fxcurv.over(dots, list(zip(x.split(3), y.split(3), strict=True))), dots(x, y)
    torch.testing.assert_close(found.dots, wanted.dots)
    with pytest.raises(ExtensionError, match="GramGrad of a data set"):
        fxcurv.over(compiled, [(x, y)])


def test_factors_in_another_order():
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 8).double(), torch.randn(5, 6).double(), torch.randint(8, (5,))
    vectors = {"weight": torch.randn(2, 8, 6).double(), "bias": torch.randn(2, 8).double()}
    result = fxcurv.compile(model, nn.CrossEntropyLoss(), [GramGrad(), Dots(vectors)])(x, y)
    for name, g in Oracle(model, nn.CrossEntropyLoss(), x, y, kind="ce").grad_batch().items():
        torch.testing.assert_close(result.gram_grad[name], g.flatten(1) @ g.flatten(1).t())
        torch.testing.assert_close(result.dots[name], g.flatten(1) @ vectors[name].flatten(1).t())


@pytest.mark.parametrize("vectors, says", [
    (None, "pass a dict"), ({"weight": torch.zeros(2, 3, 2)}, "no vector for parameter 'bias'"),
    ({"weight": torch.zeros(3, 2), "bias": torch.zeros(1, 3)}, r"pass \[Q, 3, 2\]"),
], ids=range(3))  # fmt: skip
def test_wrong_vectors(vectors, says):
    with pytest.raises(ExtensionError, match=says):
        fxcurv.compile(nn.Linear(2, 3), nn.CrossEntropyLoss(), [Dots(vectors)])(
            torch.zeros(2, 2), torch.zeros(2).long()
        )
