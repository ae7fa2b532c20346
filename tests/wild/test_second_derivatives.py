"""Ops whose backward takes a way under `no_grad` that cannot be differentiated: second derivatives against the oracle."""

from __future__ import annotations

import pytest
import torch
from against_oracle import check
from case_tools import Net
from torch import nn


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
