"""A table that is read at the same places for all samples, as BERT, GPT-2 and T5 have it: one program for all batch sizes."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import BatchGrad, DiagGGNExact, SumGradSquared

TOKENS, LENGTH, WIDTH = 11, 7, 4


class Positions(nn.Module):
    """Tokens and their positions; `options` are those of the table of positions."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.positions = nn.Embedding(9, WIDTH, **options)
        self.register_buffer("ids", torch.arange(9).view(1, -1) % 6)  # some twice, so that a frequency is more than one
        self.head = nn.Linear(WIDTH, 3)

    def places(self, x: Tensor) -> Tensor:
        return self.positions(self.ids[:, : x.shape[1]])

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.tokens(x) + self.places(x)).tanh().mean(1))


class Made(Positions):
    """Without an axis for the batch, by `arange`."""

    def places(self, x: Tensor) -> Tensor:
        return self.positions(torch.arange(x.shape[1], device=x.device))


class Relative(Positions):
    """A bias per distance, added to the scores of attention."""

    def forward(self, x: Tensor) -> Tensor:
        h, at = self.tokens(x), torch.arange(x.shape[1])
        bias = self.positions((at.unsqueeze(0) - at.unsqueeze(1)).abs()).sum(-1)
        return self.head(((h @ h.mT + bias).softmax(-1) @ h).mean(1))


MODELS = {
    "buffer of positions": Positions,
    "with padding": lambda: Positions(padding_idx=2),
    "scaled by frequency": lambda: Positions(scale_grad_by_freq=True),
    "arange": Made,
    "relative distances": Relative,
}


@pytest.mark.parametrize("name", MODELS)
def test_one_program_for_all_batch_sizes(name: str) -> None:
    torch.manual_seed(0)
    model, loss = MODELS[name]().double(), nn.CrossEntropyLoss()
    compiled = fxcurv.compile(model, loss, [BatchGrad(), SumGradSquared(), DiagGGNExact()])
    for n in (4, 5, 3, 1):
        x, y = torch.randint(TOKENS, (n, LENGTH)), torch.randint(3, (n,))
        result, oracle = compiled(x, y), Oracle(model, loss, x, y)
        torch.testing.assert_close(result.grad, dict(oracle.grad()))
        torch.testing.assert_close(result.diag_ggn_exact, dict(oracle.diag_ggn_exact()))
        torch.testing.assert_close(result.grad_batch, dict(oracle.grad_batch()))
    assert compiled.recompiles == []
