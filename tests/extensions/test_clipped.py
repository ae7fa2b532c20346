"""Bounds of clipped sums: one number, one per parameter, and tensors that are written to between calls."""

from __future__ import annotations

import pytest
import torch
from case_tools import mlp
from oracle import Oracle
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import ExtensionError
from fxcurv.extensions import BatchGrad, ClippedGrad

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def subject():
    torch.manual_seed(0)
    return (
        mlp().double(),
        nn.CrossEntropyLoss(reduction="sum"),
        torch.randn(5, 4).double(),
        torch.tensor([0, 2, 1, 1, 0]),
    )


def check(found: dict[str, Tensor], rows: dict[str, Tensor], bounds: dict[str, float], together: bool) -> None:
    own = {name: g.flatten(1).norm(dim=1) for name, g in rows.items()}
    whole = torch.stack(list(own.values())).norm(dim=0)
    for name, g in rows.items():
        weights = (bounds[name] / (whole if together else own[name])).clamp(max=1)
        assert weights.min() < 1
        torch.testing.assert_close(found[name], torch.einsum("n,n...->...", weights, g))


@pytest.mark.parametrize("over", ["all", "param"])
def test_a_tensor_is_read_at_every_call(over):
    model, loss, x, y = subject()
    rows, bound = Oracle(model, loss, x, y, kind="ce").grad_batch(), torch.tensor(0.2)
    compiled = fxcurv.compile(model, loss, [ClippedGrad(bound, over=over)])
    for value in (0.2, 0.05, 0.6):
        bound.fill_(value)
        check(compiled(x, y).grad_clipped, rows, dict.fromkeys(NAMES, bound.item()), over == "all")
    assert not compiled.recompiles


def test_bounds_by_parameter():
    model, loss, x, y = subject()
    rows, bounds = (
        Oracle(model, loss, x, y, kind="ce").grad_batch(),
        dict(zip(NAMES, (0.1, 0.02, 0.3, 0.05), strict=True)),
    )
    changing = {**bounds, "2.weight": torch.tensor(0.3).double()}
    asked = [ClippedGrad(bounds, over="param"), ClippedGrad(changing, over="param", savefield="changing"), BatchGrad()]
    compiled = fxcurv.compile(model, loss, asked)
    check(compiled(x, y).grad_clipped, rows, bounds, False)
    changing["2.weight"].fill_(0.01)
    result = compiled(x, y)
    check(result.grad_clipped, rows, bounds, False)
    check(result.changing, rows, {**bounds, "2.weight": 0.01}, False)


@pytest.mark.parametrize(("bound", "over", "words"), [
    (torch.ones(2), "all", "no dimensions"),
    (torch.tensor(-1.0), "all", "positive"),
    ({"0.weight": 0.0}, "param", "of '0.weight'.*positive"),
    ({"0.weight": 1.0}, "all", "over='param'"),
    ("1", "all", "positive"),
])  # fmt: skip
def test_wrong_bounds(bound, over, words):
    with pytest.raises(ExtensionError, match=words):
        ClippedGrad(bound, over=over)


def test_a_parameter_without_a_bound():
    model, loss, x, y = subject()
    with pytest.raises(ExtensionError, match="no bound for parameter '0.bias'"):
        fxcurv.compile(model, loss, [ClippedGrad({"0.weight": 1.0}, over="param")])(x, y)


def test_a_norm_that_is_no_number_leaves_nothing_unclipped() -> None:
    """One layer's gradient is NaN: the other's is scaled by NaN too, and not summed as it is."""
    torch.manual_seed(0)

    class Root(nn.Module):
        def forward(self, x):
            return torch.where(x > 1e9, (x - x).sqrt(), x)

    model = nn.Sequential(nn.Linear(3, 2), Root(), nn.Linear(2, 2)).double()
    x, y = torch.randn(3, 3).double(), torch.tensor([0, 1, 1])
    result = fxcurv.compile(model, nn.CrossEntropyLoss(), [ClippedGrad(0.1)], check=None)(x, y)
    assert result.sample_norms.isnan().all()
    assert all(g.isnan().all() for g in result.grad_clipped.values())
