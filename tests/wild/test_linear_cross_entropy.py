"""Head and cross-entropy in one, as PyTorch 2.13 has them: also in pieces, whose derivative PyTorch computes ahead."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.extensions import BatchGrad, DiagGGNExact, DiagHessian, SumGradSquared

if not hasattr(F, "linear_cross_entropy"):
    pytest.skip("this PyTorch does not have it", allow_module_level=True)


class Language(nn.Module):
    """A model that returns its loss, of all positions at once."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        pieces = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
        self.body = nn.Linear(3, 4)
        self.loss = nn.LinearCrossEntropyLoss(4, 5, bias=True, options=pieces, reduction=reduction, ignore_index=1)

    def forward(self, x, y):
        return self.loss(torch.tanh(self.body(x)).flatten(0, 1), y.flatten()).mean()


def reference(model: nn.Module) -> nn.Module:
    return nn.Sequential(model.body, nn.Tanh(), model.loss.linear)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_in_pieces(reduction: str) -> None:
    torch.manual_seed(0)
    model, x, y = Language(reduction).double(), torch.randn(3, 2, 3).double(), torch.randint(0, 5, (3, 2))
    y[0, 0] = 1  # ignored
    asked = [BatchGrad(), SumGradSquared(), DiagGGNExact(), DiagHessian()]
    result = fxcurv.compile(model, lambda loss: loss, asked)((x, y))

    def loss(f, y):
        total = F.cross_entropy(f.flatten(0, 1), y.flatten(), reduction="sum", ignore_index=1)
        return total / {"mean": (y != 1).sum(), "sum": 1, "none": y.numel()}[reduction]

    oracle = Oracle(reference(model), loss, x, y)
    expected = {
        "grad": oracle.grad(), "grad_batch": oracle.grad_batch(), "sum_grad_squared": oracle.sum_grad_squared(),
        "diag_ggn_exact": oracle.diag_ggn_exact(), "diag_h": oracle.diag_h(),
    }  # fmt: skip
    names = dict(zip(expected["grad"], dict(model.named_parameters()), strict=True))
    for field, of in expected.items():
        torch.testing.assert_close(getattr(result, field), {names[k]: v for k, v in of.items()})


@pytest.mark.parametrize("outputs", [True, False])
def test_as_the_loss(outputs: bool) -> None:
    """The head is the loss module's own."""
    torch.manual_seed(0)
    model, x, y = Language("mean").double(), torch.randn(5, 3).double(), torch.tensor([0, 2, 3, 4, 2])
    body = nn.Sequential(model.body, nn.Tanh())
    compiled = fxcurv.compile(body, model.loss, [SumGradSquared()], loss_params=True, outputs=outputs)
    found = compiled(x, y).sum_grad_squared
    expected = Oracle(reference(model), F.cross_entropy, x, y).sum_grad_squared()
    assert [*found] == ["0.weight", "0.bias", "loss.linear.weight", "loss.linear.bias"]
    torch.testing.assert_close([*found.values()], [*expected.values()])
