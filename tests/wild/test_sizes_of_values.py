"""Values of the data that become numbers or sizes: masks, counts, `.item()`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net
from situations import classes, numbers, parametrized, together
from test_derivatives_inside import Inside
from torch import Tensor, nn

MSE = nn.MSELoss()
WHOLE = "ggn hessian"


def kept(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.body(x))[x[:, 0] > -0.7]).sum(0, keepdim=True).sin()


def masked_loss(f: Tensor, y: Tensor) -> Tensor:
    loss = (f - y).square().sum(1)
    return loss[y[:, 0] > -0.5].mean()


def selected(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.body(x))
    return m.head(torch.masked_select(h, x[:, :1] < 1).view(-1, 3)).square()


def nonzero(m: Any, x: Tensor) -> Tensor:
    rows = (x[:, 0] > -1).nonzero().squeeze(1)
    (columns,) = torch.where(m.mask)
    return m.head(torch.tanh(m.body(x))[rows][:, columns])


def repeated(m: Any, x: Tensor, counts: Tensor) -> Tensor:
    return m.head(torch.tanh(m.body(x)).repeat_interleave(counts, 0))


def scaled(m: Any, x: Tensor) -> Tensor:
    """A scale as in quantisation, a number, of the parameters: no derivative passes."""
    w = m.body.weight
    scale = w.abs().max().item() / 127
    h = torch.tanh(F.linear(x, w / (1 + scale)))
    return m.head(h * (1 + h.abs().max().item())) * x.abs().max().item()


def branch(m: Any, x: Tensor) -> Tensor:
    h = m.body(x)
    return m.head(torch.tanh(h) if x.sum() > 0 else torch.sin(h))


def counted(m: Any, x: Tensor, length: Tensor) -> Tensor:
    """The longest length of the batch, as packed sequences have it."""
    h = torch.tanh(m.body(x[:, : int(length.max())]))
    return m.head(h.mean(1))


def hashed(m: Any, x: Tensor, which: Tensor) -> Tensor:
    """A mixture of experts by the token's number, with `index_add`."""
    out = torch.zeros_like(x)
    for k, expert in enumerate(m.experts):
        (rows,) = torch.where(which == k)
        out = out.index_add(0, rows, torch.tanh(expert(x[rows])))
    return m.head(out)


def routed(m: Any, x: Tensor) -> Tensor:
    """A mixture of experts by its own router."""
    weight, which = m.router(x).softmax(-1).max(-1)
    out = torch.zeros_like(x)
    for k, expert in enumerate(m.experts):
        rows = torch.where(which == k)[0]
        out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
    return m.head(out)


def parts() -> dict[str, nn.Module]:
    return {"body": nn.Linear(2, 3), "head": nn.Linear(3, 2)}


def experts() -> dict[str, nn.Module]:
    return {"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 2)}


def lengths(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5, 2), torch.arange(n) % 3 + 2


ROWS = {
    "a mask of the data": Inside(
        "", lambda: Net(kept, **parts()), lambda f: f.square().sum(), numbers(2), None, WHOLE, quick=True,
    ),
    "a masked loss": Inside(
        "", lambda: Net(lambda m, x: m.head(m.body(x).tanh()), **parts()), masked_loss, numbers(2), numbers(2), WHOLE,
    ),
    "masked_select": Inside("", lambda: Net(selected, **parts()), lambda f: f.mean(), numbers(2), None, WHOLE),
    "nonzero": Inside(
        "", lambda: Net(nonzero, body=nn.Linear(2, 3), head=nn.Linear(2, 2), mask=torch.tensor([True, False, True])),
        lambda f: f.square().mean(), numbers(2), None, WHOLE,
    ),
    "repeat_interleave": Inside(
        "", lambda: Net(repeated, **parts()), lambda f: f.square().mean(), together(numbers(2), classes(of=3)), None, WHOLE
    ),
    "numbers of parameters": Inside("", lambda: Net(scaled, **parts()), MSE, numbers(2), numbers(2), "grad"),
    "a branch on the data": Inside(
        "", lambda: Net(branch, **parts()), MSE, numbers(2), numbers(2), "first ggn hessian", quick=True,
    ),
    "the longest": Inside("", lambda: Net(counted, **parts()), MSE, lengths, numbers(2), "first ggn hessian"),
    "experts by number": Inside(
        "", lambda: Net(hashed, **experts()), MSE, together(numbers(2), classes(of=2)), numbers(2), WHOLE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", parametrized(ROWS))
def test_value(name: str) -> None:
    ROWS[name].check((4, 1), ROWS[name].trains)
