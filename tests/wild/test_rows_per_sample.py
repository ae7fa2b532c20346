"""Inputs that have several rows per sample, next to each other: points on rays, views of an image (`batch_dim=Rows(k)`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from against_oracle import close
from case_tools import Net
from oracle import Oracle
from situations import Situation, classes, numbers, parametrized
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import ArgumentError
from fxcurv.extensions import BatchGrad, DiagGGNExact

POINTS, VIEWS = 3, 2


def rendered(m: Any, points: Tensor) -> Tensor:
    """Colours [rays, 2] of points [rays * POINTS, 3]."""
    density, colour = m.field(torch.tanh(m.body(points))).split([1, 2], -1)
    weight = F.softplus(density).view(-1, POINTS, 1)
    return (weight / weight.sum(1, keepdim=True) * colour.sigmoid().view(-1, POINTS, 2)).sum(1)


def lit(m: Any, points: Tensor, direction: Tensor, scale: Tensor) -> Tensor:
    return rendered(m, points) * m.light(direction) * scale


def turned(m: Any, points: Tensor, direction: Tensor) -> Tensor:
    """The samples are columns: points [3, rays * POINTS], directions [3, rays]."""
    return rendered(m, points.T) * m.light(direction.T)


def viewed(m: Any, images: Tensor) -> Tensor:
    """The mean over the views of each image, as augmentation has them."""
    return m.field(torch.tanh(m.body(images))).unflatten(0, (-1, VIEWS)).mean(1)


def parts(**more: nn.Module) -> dict[str, nn.Module]:
    return {"body": nn.Linear(3, 4), "field": nn.Linear(4, 3), **more}


def points_and_direction(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n * POINTS, 3), torch.randn(n, 3), torch.ones(2) * 0.7


def columns(n: int) -> dict[str, Tensor]:
    return {"points": torch.randn(3, n * POINTS), "direction": torch.randn(3, n)}


ALL = "first ggn hessian products"
SITUATIONS = {
    "rays": Situation(
        "", lambda: Net(rendered, **parts()), nn.MSELoss(), lambda n: torch.randn(n * POINTS, 3), numbers(2), "first hessian",
        quick=True, options={"batch_dim": fxcurv.Rows(POINTS), "debug": True},
    ),
    "beside other inputs": Situation(
        "", lambda: Net(lit, **parts(light=nn.Linear(3, 2))), nn.MSELoss(), points_and_direction, numbers(2), ALL,
        options={"batch_dim": (fxcurv.Rows(POINTS), 0, None)},
    ),
    "along another dimension": Situation(
        "", lambda: Net(turned, **parts(light=nn.Linear(3, 2))), nn.MSELoss(), columns, numbers(2), "first ggn",
        options={"batch_dim": {"points": fxcurv.Rows(POINTS, dim=1), "direction": -1}},
        oracle={"out_dim": 0},
    ),
    "views": Situation(
        "", lambda: Net(viewed, **parts()), nn.CrossEntropyLoss(), lambda n: torch.randn(n * VIEWS, 3), classes(), ALL,
        options={"batch_dim": fxcurv.Rows(VIEWS)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", parametrized(SITUATIONS))
def test_equals_the_oracle(name: str) -> None:
    SITUATIONS[name].check((4, 5, 1))


def batch(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n * POINTS, 3).double(), torch.randn(n, 2).double()


def test_one_program_for_all_batch_sizes() -> None:
    """Also the short way of a repeated call, data sets, and an empty batch."""
    torch.manual_seed(0)
    model = Net(rendered, **parts()).double()
    compiled = fxcurv.compile(model, nn.MSELoss(), [BatchGrad()], batch_dim=fxcurv.Rows(POINTS))
    for n in (4, 4, 4, 3, 2, 7):
        x, y = batch(n)
        close(compiled(x, y).grad_batch, Oracle(model, nn.MSELoss(), x, y).grad_batch(), "grad_batch")
    assert not compiled.recompiles
    assert compiled(*batch(0)).grad_batch["body.weight"].shape == (0, 4, 3)
    parts_of_it = [batch(2), batch(3)]
    x, y = (torch.cat(t) for t in zip(*parts_of_it, strict=True))
    close(fxcurv.over(compiled, parts_of_it).grad, compiled(x, y).grad, "grad")


@pytest.mark.slow
def test_inside_torch_compile_and_exported() -> None:
    torch.manual_seed(0)
    model, asked = Net(viewed, **parts()).double(), [DiagGGNExact()]
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), asked, batch_dim=fxcurv.Rows(VIEWS))
    step = torch.compile(lambda x, y: compiled(x, y).diag_ggn_exact, backend="eager", fullgraph=True)
    x, y = torch.randn(4 * VIEWS, 3).double(), torch.randint(3, (4,))
    exported = compiled.export(x, y).module()
    for n in (4, 5):
        x, y = torch.randn(n * VIEWS, 3).double(), torch.randint(3, (n,))
        close(step(x, y), compiled(x, y).diag_ggn_exact, "compiled")
        close(exported(x, (y,), torch.tensor(0))["diag_ggn_exact"], compiled(x, y).diag_ggn_exact, "exported")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (fxcurv.Rows(4), "input 0 has 6 rows along dimension 0, and batch_dim= says 4 per sample"),
        ((fxcurv.Rows(2), 0), "batch_dim has 2 entries for 1 inputs"),
        (fxcurv.Rows(3, 2), "batch_dim 2 is out of range"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(rows: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        fxcurv.compile(Net(rendered, **parts()), nn.MSELoss(), [], batch_dim=rows)(torch.randn(6, 3), torch.randn(2, 2))


def test_inputs_that_disagree_are_refused() -> None:
    given = {"points": torch.randn(6, 3), "direction": torch.randn(3, 3)}
    compiled = fxcurv.compile(Net(lit, **parts(light=nn.Linear(3, 2))), None, [fxcurv.extensions.Jacobian()],
                              batch_dim={"points": fxcurv.Rows(3)})  # fmt: skip
    with pytest.raises(ArgumentError, match=r"batch sizes \[2, 3\]"):
        compiled(given)


@pytest.mark.parametrize("rows", [(0,), (-1,), (2.0,), (2, 0.5)])
def test_rows_that_are_no_number_are_refused(rows: tuple) -> None:
    with pytest.raises(ArgumentError, match="how many rows a sample has"):
        fxcurv.Rows(*rows)
