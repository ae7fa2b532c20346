"""Second derivatives against the oracle, of ops whose backward takes a way under `no_grad` that has none, and of others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_oracle import check
from case_tools import Net
from torch import nn

import fxcurv
from fxcurv.extensions import DiagHessian


def positive_definite(h):
    a = h.reshape(-1, 3, 3)
    return a @ a.mT + torch.eye(3, dtype=h.dtype)


OPS = {
    "det": lambda h: torch.linalg.det(h.reshape(-1, 3, 3) + 2 * torch.eye(3, dtype=h.dtype)).unsqueeze(1),
    "slogdet": lambda h: torch.linalg.slogdet(positive_definite(h))[1].unsqueeze(1),
    "logdet": lambda h: torch.logdet(positive_definite(h)).unsqueeze(1),
    "solve": lambda h: torch.linalg.solve(positive_definite(h), h[:, :3]),
    "inv": lambda h: torch.linalg.inv(positive_definite(h)).flatten(1),
    "cholesky": lambda h: torch.linalg.cholesky(positive_definite(h)).flatten(1),
}


@pytest.mark.parametrize("name", OPS)
def test_diagonal_and_products(name):
    torch.manual_seed(0)
    model = Net(lambda m, x: OPS[name](m.a(x)), a=nn.Linear(2, 9)).double()
    x = torch.randn(2, 2, dtype=torch.float64)
    with torch.no_grad():
        y = torch.randn_like(model(x))
    check(model, nn.MSELoss(), x, y, kind="mse")


def test_an_image_at_positions_when_both_are_computed():
    """A spatial transformer. The second derivative of sampling writes in place, which `torch.vmap` refuses."""
    torch.manual_seed(0)
    net = Net(
        lambda m, x: F.grid_sample(m.image(x).view(-1, 1, 2, 3), m.at(x).view(-1, 2, 1, 2), align_corners=False).flatten(1),
        image=nn.Linear(2, 6), at=nn.Linear(2, 4),
    ).double()  # fmt: skip
    x, y = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    check(net, nn.MSELoss(), x, y, kind="mse")


def test_statistics_beside_a_norm_in_products():
    """native_layer_norm has three outputs, and so has what its second derivative is traced through."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(5, dtype=torch.float64)
    run = lambda m, x: m.b(torch.native_layer_norm(m.a(x), [5], m.norm.weight, m.norm.bias, 1e-5)[0])  # noqa: E731
    net = Net(run, a=nn.Linear(4, 5), norm=norm, b=nn.Linear(5, 3)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    check(net, nn.MSELoss(), x, torch.randn(3, 3, dtype=torch.float64), kind="mse")


def test_a_maximum_over_bags():
    """Of different lengths: PyTorch has no second derivative of it, the lookups and reductions that it is said in have one."""
    torch.manual_seed(0)
    indices, offsets = torch.tensor([0, 2, 1, 3, 3]), torch.tensor([0, 1, 3])
    bag = nn.EmbeddingBag(4, 2, mode="max", dtype=torch.float64)
    net = Net(lambda m, x: x @ m.bag(indices, offsets), bag=bag)
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    found = fxcurv.compile(net, nn.MSELoss(), [DiagHessian()])(x, y)
    rows = lambda w: torch.stack([w[indices[a:b]].amax(0) for a, b in ((0, 1), (1, 3), (3, 5))])  # noqa: E731
    hessian = torch.autograd.functional.hessian(lambda w: nn.functional.mse_loss(x @ rows(w), y), bag.weight.detach())
    torch.testing.assert_close(found.diag_h["bag.weight"].flatten(), hessian.reshape(8, 8).diagonal())
