"""Micro-batches give what one call on all of them gives, sampled columns and normalisers included."""

import pytest
import torch
from oracle import Oracle
from torch import nn
from torch.utils import _pytree as pytree

import fxcurv
from fxcurv.errors import ArgumentError, ExtensionError, MixedSamplesError
from fxcurv.extensions import (
    EKFAC,
    GGNMP,
    KFAC,
    BatchGrad,
    ClippedGrad,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from fxcurv.kronecker import Eigenbasis, dense

CUTS = [[4, 1, 0, 2], [7], [1] * 7]


class Tokens(nn.Module):
    """Scores [N, K, T] of every token."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.embed(x).tanh()).transpose(1, 2)


def classes():
    """Class weights and targets that do not count: micro-batches weigh as they will, one of them nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 5]).double(), ignore_index=0)
    return model, loss, torch.randn(7, 3).double(), torch.tensor([1, 2, 2, 1, 0, 2, 1])


def tokens():
    torch.manual_seed(0)
    targets = torch.randint(4, (7, 3))
    targets[1, 1:] = targets[4] = -100
    return Tokens().double(), nn.CrossEntropyLoss(), torch.randint(5, (7, 3)), targets


def parts(sizes, x, y):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def leaves(value):
    """The tensors of a field; an eigenbasis as the matrix that it is of."""
    basis = lambda v: isinstance(v, Eigenbasis)  # noqa: E731
    found = pytree.tree_leaves(value, is_leaf=basis)
    return [dense(v) if basis(v) else v for v in found]


def same(found, wanted):
    fields = ["loss", "grad", *(e.savefield for e in wanted.extensions)]
    fields += ["sample_norms"] if "sample_norms" in dir(wanted) else []
    for field in fields:
        pairs = zip(leaves(getattr(found, field)), leaves(getattr(wanted, field)), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13, msg=lambda m, f=field: f"{f}: {m}")


def check(case, asked, cuts):
    model, loss, x, y = case()
    compiled = fxcurv.compile(model, loss, asked, check=None)
    want = compiled(x, y, seed=3)
    for sizes in cuts:
        same(fxcurv.accumulate(compiled, parts(sizes, x, y), seed=3), want)


def test_micro_batches_are_as_one_call():
    """What one call computes is itself held to the oracle; here first order quantities are, at once."""
    model, loss, x, y = classes()
    compiled = fxcurv.compile(
        model, loss, [BatchGrad(), Variance(), SumGradSquared(), KFAC(2), SqrtGGNMC(2)], check=None
    )
    want, oracle = compiled(x, y, seed=3), Oracle(model, loss, x, y)
    assert not torch.equal(want.sqrt_ggn_mc["2.weight"], compiled(x, y, seed=4).sqrt_ggn_mc["2.weight"])
    for sizes in CUTS[:2]:
        found = fxcurv.accumulate(compiled, iter(parts(sizes, x, y)), seed=3)
        same(found, want)
        for field in ("grad", "grad_batch", "variance", "sum_grad_squared"):
            for name, value in getattr(oracle, field)().items() if callable(getattr(oracle, field)) else ():
                torch.testing.assert_close(getattr(found, field)[name], value, rtol=1e-9, atol=1e-12)
    assert "output" not in dir(found)
    found.attach()
    torch.testing.assert_close(model[0].weight.grad, want.grad["0.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("case", [classes, tokens])
def test_every_cut(case):
    check(case, [Variance(), BatchGrad(), KFAC(2), EKFAC(2), DiagGGNMC(3), DiagHessian()], CUTS)


@pytest.mark.slow
def test_clipping_of_a_sum():
    model, _, x, y = classes()
    check(lambda: (model, nn.CrossEntropyLoss(reduction="sum"), x, y), [ClippedGrad(0.5)], CUTS)


def test_without_a_seed_the_generator_draws_one():
    model, loss, x, y = classes()
    compiled = fxcurv.compile(model, loss, [DiagGGNMC(1)], check=None)
    torch.manual_seed(5)
    want = compiled(x, y)
    torch.manual_seed(5)
    same(fxcurv.accumulate(compiled, parts([3, 4], x, y)), want)


def test_what_is_not_finite_is_returned_as_a_call_returns_it():
    model, loss, x, y = classes()
    x[2] = torch.inf
    found = fxcurv.accumulate(fxcurv.compile(model, loss, [BatchGrad()], check=None), parts([4, 3], x, y))
    assert found.grad_batch["2.weight"][2].isnan().any() and found.grad_batch["2.weight"][3:].isfinite().all()


@pytest.mark.parametrize(
    ("asked", "kind", "said"),
    [([ClippedGrad(0.5)], ArgumentError, "ClippedGrad of a mean"), ([GGNMP()], ExtensionError, "GGNMP of a data set")],
)
def test_refused_by_name(asked, kind, said):
    model, loss, x, y = classes()
    with pytest.raises(kind, match=said):
        fxcurv.accumulate(fxcurv.compile(model, loss, asked, check=None), parts([4, 3], x, y))


def test_nothing_to_accumulate():
    model, loss, x, y = classes()
    compiled = fxcurv.compile(model, loss, check=None)
    with pytest.raises(ArgumentError, match="no sample"):
        fxcurv.accumulate(compiled, [])
    none = fxcurv.accumulate(compiled, parts([4, 3], x, y * 0))
    assert none.loss.isnan() and not any(g.any() for g in none.grad.values())
    norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(MixedSamplesError, match="batch norm"):
        fxcurv.accumulate(fxcurv.compile(norm, loss, check=None), parts([4, 3], x, y))
