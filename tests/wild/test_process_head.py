"""A Gaussian process on learned features: the marginal likelihood is of the whole batch, and so is the Hessian's diagonal."""

from __future__ import annotations

import pytest
import torch
from against_oracle import close
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import DiagHessian


class Kernel(nn.Module):
    """The covariance of all pairs of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(3, 2)
        self.scale, self.noise = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> Tensor:
        z = self.features(x).tanh()
        squares = (z.unsqueeze(1) - z.unsqueeze(0)).square().sum(-1)
        return torch.exp(-squares * self.scale.exp()) + self.noise.exp() * torch.eye(len(x), dtype=x.dtype)


def by_cholesky(k: Tensor, y: Tensor) -> Tensor:
    root = torch.linalg.cholesky(k)
    return 0.5 * y @ torch.cholesky_solve(y.unsqueeze(1), root)[:, 0] + root.diagonal().log().sum()


def by_triangles(k: Tensor, y: Tensor) -> Tensor:
    root = torch.linalg.cholesky(k)
    return (
        0.5 * torch.linalg.solve_triangular(root, y.unsqueeze(1), upper=False).square().sum()
        + root.diagonal().log().sum()
    )


def by_determinant(k: Tensor, y: Tensor) -> Tensor:
    return 0.5 * y @ torch.linalg.solve(k, y) + 0.5 * torch.logdet(k)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("loss", [by_cholesky, by_triangles, by_determinant])
def test_the_hessian_of_the_marginal_likelihood(loss, n: int) -> None:
    torch.manual_seed(0)
    model, x, y = Kernel().double(), torch.randn(n, 3).double(), torch.randn(n).double()
    expected = {}
    for name, p in model.named_parameters():
        (first,) = torch.autograd.grad(loss(model(x), y), [p], create_graph=True)
        rows = [
            torch.autograd.grad(entry, [p], retain_graph=True)[0].flatten()[k]
            for k, entry in enumerate(first.flatten())
        ]
        expected[name] = torch.stack(rows).reshape(p.shape)
    close(fxcurv.compile(model, loss, [DiagHessian()])(x, y).diag_h, expected, "diag_h")
