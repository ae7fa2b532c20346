"""Tensors that a model or a loss makes of the batch size: identities, counts, masks of pairs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from case_tools import Net
from situations import Situation, numbers, parametrized
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import MixedSamplesError
from fxcurv.extensions import BatchGrad


def of_pairs(mask: Callable[[int], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of all pairs of samples, as contrastive ones are."""

    def loss(f: Tensor, y: Tensor) -> Tensor:
        pairs = torch.tanh(f @ f.t())
        return (pairs * mask(f.shape[0]).to(f)).square().sum() / f.shape[0] + (f - y).square().mean()

    return loss


def own_pair(f: Tensor, y: Tensor) -> Tensor:
    """Of the pairs of f and y each sample's own."""
    return ((f @ y.t()) * torch.eye(f.shape[0])).sum().square()


def scaled(m: nn.Module, x: Tensor) -> Tensor:
    n = x.shape[0]
    h = m.body(x) * torch.full((n, 1), 2.0) * torch.ones(n, 1) + torch.zeros((n, 3), dtype=x.dtype)
    return m.head(torch.tanh(h)) + torch.eye(2, 2).sum()


def smoothed(m: nn.Module, x: Tensor) -> Tensor:
    """A mean over the other samples and the sample's own row, by a matrix."""
    n = x.shape[0]
    return m.head(torch.tanh((torch.eye(n, n, dtype=x.dtype) * 0.5 + 0.5 / n) @ m.body(x)))


def ranked(f: Tensor, y: Tensor) -> Tensor:
    """Weights from 0 to 1 along the batch, by an op that takes a number for its size."""
    return (torch.linspace(0, 1, f.shape[0]).unsqueeze(1) * (f - y)).square().sum()


def row(forward: Callable, loss: Callable, asks: str, quick: bool = False) -> Situation:
    return Situation(
        "", lambda: Net(forward, body=nn.Linear(3, 3), head=nn.Linear(3, 2)), loss, numbers(3), numbers(2), asks, quick=quick,
    )  # fmt: skip


def plain(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.body(x)))


def lower(n: int) -> Tensor:
    return torch.ones(n, n).tril()


def earlier(n: int) -> Tensor:
    return torch.arange(n).unsqueeze(1) > torch.arange(n)


SITUATIONS = {
    "eye in the loss": row(plain, of_pairs(lambda n: 1 - torch.eye(n)), "grad", quick=True),
    "eye of booleans": row(plain, of_pairs(lambda n: ~torch.eye(n, dtype=torch.bool)), "grad"),
    "eye of two sizes": row(plain, of_pairs(lambda n: torch.eye(n, 4)[:, :1].expand(n, n)), "grad"),
    "tril": row(plain, of_pairs(lower), "grad"),
    "arange": row(plain, of_pairs(earlier), "grad"),
    "own pairs": row(plain, own_pair, "grad"),
    "linspace": row(plain, ranked, "first ggn hessian"),
    "one_hot": row(plain, of_pairs(lambda n: torch.nn.functional.one_hot(torch.arange(n), n)), "grad"),
    "full, ones, zeros": row(scaled, nn.MSELoss(), "first ggn hessian products"),
    "a matrix over samples": row(smoothed, nn.MSELoss(), "ggn hessian products"),
}


@pytest.mark.parametrize("name", parametrized(SITUATIONS))
@pytest.mark.parametrize("sizes", [(4, 3, 1), pytest.param((1, 4), marks=pytest.mark.slow)])
def test_equals_the_oracle(name: str, sizes: tuple[int, ...]) -> None:
    SITUATIONS[name].check(sizes)


def test_one_program_for_all_batch_sizes() -> None:
    compiled = fxcurv.compile(nn.Linear(3, 2), of_pairs(lambda n: torch.eye(n)), [])
    for n in (4, 3, 5):
        compiled(torch.randn(n, 3), torch.randn(n, 2))
    assert not compiled.recompiles


def test_a_matrix_over_samples_has_none() -> None:
    model = SITUATIONS["a matrix over samples"].built(3)[0]
    with pytest.raises(MixedSamplesError, match="torch.eye"):
        fxcurv.compile(model, nn.MSELoss(), [BatchGrad()])(torch.randn(3, 3).double(), torch.randn(3, 2).double())
