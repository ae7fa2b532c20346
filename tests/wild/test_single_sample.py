"""A batch of one, before and after larger ones, and losses that broadcast: PyTorch's own value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_checks import GROUPS, Checked
from oracle_kron import KroneckerOracle
from torch import nn

import fxcurv
from fxcurv.extensions import KFAC, BatchGrad, DiagGGNExact, DiagHessian, SqrtGGNMC

SHAPES = {"squeeze": lambda z: z.squeeze(), "last": lambda z: z.squeeze(-1), "kept": lambda z: z}
TARGETS = {"numbers": lambda n: torch.rand(n), "column": lambda n: torch.rand(n, 1)}


class Model(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.l, self.shape = nn.Linear(4, 1), shape

    def forward(self, x):
        return self.shape(self.l(x))


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("sizes", [(4, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("shape", ["squeeze", "kept", pytest.param("last", marks=pytest.mark.slow)])
def test_squares(shape, targets, sizes):
    """[N, 1] against [N] is [N, N]; at one sample, `squeeze` leaves no axis."""
    torch.manual_seed(0)
    model = Model(SHAPES[shape]).double()
    compiled = fxcurv.compile(model, nn.MSELoss(), [BatchGrad()])
    for n in sizes:
        x, y = torch.randn(n, 4).double(), TARGETS[targets](n).double()
        result, loss = compiled(x, y), nn.MSELoss()(model(x), y)
        torch.testing.assert_close(result.loss, loss)
        assert result.output.shape == model(x).shape
        for (name, p), g in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(result.grad[name], g)
            torch.testing.assert_close(result.grad_batch[name].sum(0), g)
            assert result.grad_batch[name].shape == (n, *p.shape)


def by_rank(z, x):
    z = z.squeeze()
    return z.unsqueeze(0) if z.ndim == 0 else z


bce = F.binary_cross_entropy_with_logits
# (what the model does with [N, 1], the loss, targets of one sample): a trace at two samples would not do for one
ENDS = {
    "targets of the squeezed shape": (lambda z, x: z.squeeze(), bce, torch.tensor(1.0)),
    "the model looks at the rank": (by_rank, bce, torch.ones(1)),
    "the model looks at the rank, and the loss broadcasts": (by_rank, F.mse_loss, torch.ones(1)),
    "a loss without a closed form, of no axis": (lambda z, x: z.squeeze(), F.smooth_l1_loss, torch.tensor(1.0)),
    "the model looks at the size": (lambda z, x: z * 3 if x.shape[0] > 1 else z.exp(), F.mse_loss, torch.ones(1, 1)),
}


class Ending(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.a, self.l, self.end = nn.Linear(4, 3), nn.Linear(3, 1), end

    def logits(self, x):
        return self.l(torch.tanh(self.a(x)))

    def forward(self, x):
        return self.end(self.logits(x), x)


QUICK = {"targets of the squeezed shape", "the model looks at the rank, and the loss broadcasts"}


@pytest.mark.parametrize("check", ["first", pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ENDS])
def test_one_sample_is_not_traced_as_two(name, check):
    end, loss, y = ENDS[name]
    torch.manual_seed(0)
    model, x, y = Ending(end).double(), torch.randn(1, 4).double(), y.double()
    groups = [group for group in GROUPS if group != "Jacobian"]
    if name == "the model looks at the size":  # f has another curvature than the value before
        oracle = KroneckerOracle(model, loss, x, y)
    else:
        oracle = KroneckerOracle(model, loss, x, y, logits=lambda m, x: m.logits(x), head=lambda f: end(f, x))
    found = Checked.__new__(Checked)
    found.oracle, found.tolerance, found.ambiguous = oracle, 1e-8, False
    found.result = fxcurv.compile(model, loss, [e for group in groups for e in GROUPS[group]], check=check)(x, y)
    assert found.result.output.shape == model(x).shape
    for group in groups:
        found.check(group)


def test_one_sample_after_a_batch_that_is_one():
    """Where samples interact, the batch is one sample; one sample then has a program of its own size."""
    torch.manual_seed(0)
    model = Ending(lambda z, x: z + z.sum(0)).double()
    compiled = fxcurv.compile(model, F.smooth_l1_loss, [DiagGGNExact(), DiagHessian()])
    for n in (3, 1):
        x, y = torch.randn(n, 4).double(), torch.randn(n, 1).double()
        result, oracle = compiled(x, y), KroneckerOracle(model, F.smooth_l1_loss, x, y)
        for key, p in model.named_parameters():
            torch.testing.assert_close(result.diag_ggn_exact[key], oracle.diag_ggn_exact()[key])
            torch.testing.assert_close(result.diag_h[key], oracle.diag_h()[key])
            assert result.grad[key].shape == p.shape


def test_as_many_sampled_columns_as_outputs():
    """A square matrix of cotangents and its transpose differ in strides alone, which a shorter form of the draws changes."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(1, 3).double(), torch.randn(1, 2).double()
    result = fxcurv.compile(model, nn.MSELoss(), [KFAC(2), SqrtGGNMC(2)], check=None)(x, y, seed=1)
    roots = result.sqrt_ggn_mc["bias"].flatten(0, 1)
    torch.testing.assert_close(result.kfac["weight"][0], roots.T @ roots)
    torch.testing.assert_close(result.kfac["bias"][0], roots.T @ roots)
