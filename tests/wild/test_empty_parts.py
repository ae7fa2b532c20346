"""Values without entries between a parameter and the loss: what a slice leaves over, as of heads that are turned as a whole.

Phi-3 of `transformers` joins such a slice to the rest, at its default `partial_rotary_factor` of one.
"""

from __future__ import annotations

import pytest
import torch
from case_tools import Net
from situations import ASKED, Situation, numbers
from torch import Tensor, nn

ALL = "first ggn hessian products hessian_batch kron"


def turned(h: Tensor, turns: int) -> Tensor:
    """Heads [N, T, heads, d], of which the first `turns` entries are turned."""
    whole, rest = h[..., :turns], h[..., turns:]
    left, right = whole.chunk(2, -1)
    return torch.cat([whole * 0.5 + torch.cat([-right, left], -1) * 0.3, rest], -1)


def heads(m, x):
    h = turned(torch.tanh(m.first(x)).view(-1, 3, 2, 2).transpose(1, 2), 2)
    return m.last(h.transpose(1, 2).flatten(2)).flatten(1)


def reshaped(m, x):
    h = torch.tanh(m.first(x))
    nothing = h[:, 4:].reshape(x.shape[0], 2, 0).transpose(1, 2).flatten(1)
    return m.last(torch.cat([nothing, h], 1))


def summed(m, x):
    h = torch.tanh(m.first(x))
    return m.last(h) + h[:, 4:].square().sum(1, keepdim=True)


def multiplied(m, x):
    h = torch.tanh(m.first(x))
    return m.last(h) + h[:, 4:] @ m.empty


def stacked(m, x):
    h = torch.tanh(m.first(x))
    return m.last(torch.cat([h, torch.stack([h[:, 4:], h[:, :0]], 1).flatten(1)], 1))


def split(m, x):
    h = torch.tanh(m.first(x))
    none, all_of_it = h.split([0, 4], 1)
    return m.last(all_of_it) + none.exp().sum(-1, keepdim=True)


def net(middle, **modules):
    return lambda: Net(middle, first=nn.Linear(3, 4), last=nn.Linear(4, 2), **modules)


MSE = nn.MSELoss()
ROWS = {
    "heads": Situation("", net(heads), MSE, numbers(3, 3), numbers(6), ALL.removesuffix(" kron"), quick=True),
    "a reshape": Situation("", net(reshaped), MSE, numbers(3), numbers(2), ALL, quick=True),
    "a sum": Situation("", net(summed), MSE, numbers(3), numbers(2), ALL),
    "a linear layer": Situation(
        "", lambda: Net(lambda m, x: m.last(x[:, :3].tanh()) + m.none(x[:, 3:]), last=nn.Linear(3, 2), none=nn.Linear(0, 2)), MSE,
        numbers(3), numbers(2), "first ggn",
    ),
    "a product": Situation(
        "", lambda: Net(multiplied, first=nn.Linear(3, 4), last=nn.Linear(4, 2), empty=nn.Parameter(torch.zeros(0, 2))), MSE,
        numbers(3), numbers(2), "first ggn",
    ),
    "a stack": Situation("", net(stacked), MSE, numbers(3), numbers(2), ALL),
    "a split": Situation("", net(split), MSE, numbers(3), numbers(2), ALL),
}  # fmt: skip


# of PyTorch, about parameters without entries
@pytest.mark.filterwarnings("ignore:Initializing zero-element", r"ignore:var\(\)")
@pytest.mark.parametrize(
    "name", [n if row.quick else pytest.param(n, marks=pytest.mark.slow) for n, row in ROWS.items()]
)
def test_without_entries(name: str) -> None:
    assert set(ROWS[name].asks.split()) < set(ASKED)
    ROWS[name].check((3, 1))
