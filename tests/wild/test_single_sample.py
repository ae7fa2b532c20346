"""A batch of one, before and after larger ones, and losses that broadcast: PyTorch's own value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxcurv
from fxcurv.extensions import BatchGrad

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
