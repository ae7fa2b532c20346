"""Linear systems whose matrix and right-hand sides have other batch axes: PyTorch's derivative under `vmap` is wrong there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from case_tools import Net
from situations import numbers, parametrized
from test_derivatives_inside import Inside
from torch import Tensor, nn

MSE = nn.MSELoss()


def system(run: Callable[[Tensor, Tensor], Tensor], *shape: int) -> Callable[[], nn.Module]:
    """A model whose parameter is a well-conditioned matrix, or several."""
    return lambda: Net(lambda m, x: run(m.a, x), a=nn.Parameter(3 * torch.eye(shape[-1]) + 0.1 * torch.randn(*shape)))


ROWS = {
    "one matrix": Inside(
        "", system(torch.linalg.solve, 2, 2), MSE, numbers(2, 3), numbers(2, 3), "first ggn hessian", quick=True,
    ),
    "from the right": Inside(
        "", system(lambda a, x: torch.linalg.solve(a, x, left=False), 2, 2), MSE, numbers(3, 2), numbers(3, 2),
        "first ggn hessian",
    ),
    "a batch axis of one": Inside(
        "", system(torch.linalg.solve, 1, 2, 2), MSE, numbers(2, 3), numbers(2, 3), "first ggn hessian",
    ),
    "three matrices": Inside(
        "", system(torch.linalg.solve, 3, 2, 2), MSE, numbers(3, 2, 1), numbers(3, 2, 1), "first ggn hessian",
    ),
    "with its status": Inside(
        "", system(lambda a, x: torch.linalg.solve_ex(a, x)[0], 2, 2), MSE, numbers(2, 3), numbers(2, 3), "first ggn",
    ),
    "a vector each": Inside(
        "", system(lambda a, x: torch.linalg.solve(a.expand(x.shape[0], 2, 2), x), 2, 2), MSE, numbers(2), numbers(2),
        "first ggn hessian",
    ),
    "matrices of the data": Inside(
        "", system(lambda a, x: torch.linalg.solve(x @ x.mT + torch.eye(2), a), 2, 2), MSE, numbers(2, 3), numbers(2, 2),
        "first ggn hessian",
    ),
    "by factors": Inside(
        "", system(lambda a, x: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), x), 2, 2), MSE, numbers(2, 3),
        numbers(2, 3), "first ggn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", parametrized(ROWS))
def test_quantities(name: str) -> None:
    torch.manual_seed(0)
    ROWS[name].check((3, 1), ROWS[name].trains)
