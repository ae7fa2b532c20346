"""`nn.EmbeddingBag` with all its options on indices [N, K], against the same lookups written out."""

from __future__ import annotations

import pytest
import torch
from against_oracle import close
from case_tools import Net
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.extensions import BatchGrad, DiagGGNExact, DiagHessian

ROWS = 6
# a whole bag of padding, padding in it, none, twice the same index
INDICES = torch.tensor([[2, 2, 2], [2, 4, 5], [0, 1, 3], [1, 1, 2]])


def bag_by_hand(index: torch.Tensor, weight: torch.Tensor, mode: str, padding: int | None, scale=None) -> torch.Tensor:
    """One sample and column at a time, of what is not padding."""
    rows = []
    for n, bag in enumerate(index):
        kept = [k for k, i in enumerate(bag) if padding is None or i != padding % len(weight)]
        found = [weight[bag[k]] * (1 if scale is None else scale[n, k]) for k in kept]
        if not found:
            rows.append(weight.new_zeros(weight.shape[1]))
            continue
        y = torch.stack(found)
        rows.append(y.amax(0) if mode == "max" else y.sum(0) / (len(found) if mode == "mean" else 1))
    return torch.stack(rows)


def nets(mode: str, padding: int | None, weighted: bool, **options) -> tuple[nn.Module, nn.Module]:
    """(a model, the same by hand): the weights of a bag come from a layer, too."""
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(ROWS, 3, mode=mode, padding_idx=padding, dtype=torch.float64, **options)
    head, gate = nn.Linear(3, 2, dtype=torch.float64), nn.Linear(1, 3, dtype=torch.float64)
    scale = lambda m, u: m.gate(u) if weighted else None  # noqa: E731
    layers = {"bag": bag, "head": head} | ({"gate": gate} if weighted else {})
    return (
        Net(lambda m, t, u: m.head(torch.tanh(m.bag(t, per_sample_weights=scale(m, u)))), **layers),
        Net(lambda m, t, u: m.head(torch.tanh(bag_by_hand(t, m.bag.weight, mode, padding, scale(m, u)))), **layers),
    )


@pytest.mark.parametrize("options", [{}, {"include_last_offset": True}], ids=["", "last"])
@pytest.mark.parametrize("mode, weighted", [("sum", False), ("sum", True), ("mean", False), ("max", False)])
def test_values(mode, weighted, options):
    model, by_hand = nets(mode, 2 if options else 2 - ROWS, weighted, **options)
    x, y = (INDICES, torch.rand(4, 1, dtype=torch.float64)), torch.tensor([0, 1, 1, 0])
    loss = nn.CrossEntropyLoss()
    torch.testing.assert_close(model(*x), by_hand(*x))
    found = fxcurv.compile(model, loss, [BatchGrad(), DiagGGNExact(), DiagHessian()])(x, y)
    with torch.no_grad():
        model.bag.weight[2] = torch.nan  # nobody reads it
        assert found.loss == fxcurv.compile(model, loss)(x, y).loss
        model.bag.weight[2] = 0
    true = Oracle(by_hand, loss, x, y)
    close(found.grad, true.grad(), "grad")
    close(found.grad_batch, true.grad_batch(), "grad_batch")
    close(found.diag_ggn_exact, true.diag_ggn_exact(), "diag_ggn_exact")
    close(found.diag_h, true.diag_h(), "diag_h")
