"""Where opt_einsum is installed, `torch.einsum` asks it for an order of products, and it makes numbers of sizes."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import BatchGrad, Dots, GramGrad

pytestmark = pytest.mark.slow
pytest.importorskip("opt_einsum", reason="pip install fxcurv[plugs]")


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.v = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,ij,jk->nk", self.a(x), self.w, self.v)


def test_one_program_for_all_batch_sizes() -> None:
    torch.manual_seed(0)
    model, loss = Three().double(), nn.CrossEntropyLoss()
    vectors = {name: torch.randn(2, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    compiled = fxcurv.compile(model, loss, [Dots(vectors), BatchGrad(), GramGrad()])
    for n in (5, 4, 3):
        x, y = torch.randn(n, 4, dtype=torch.float64), torch.randint(2, (n,))
        found, expected = compiled(x, y), Oracle(model, loss, x, y).grad_batch()
        for name, value in expected.items():
            torch.testing.assert_close(found.grad_batch[name], value)
            torch.testing.assert_close(found.dots[name], value.flatten(1) @ vectors[name].flatten(1).T)
    assert compiled.recompiles == [] and torch.backends.opt_einsum.enabled
