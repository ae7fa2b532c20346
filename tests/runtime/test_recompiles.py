"""When another program is made, it is counted, and logged with its reason; what fixed a batch size is named."""

from __future__ import annotations

import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import BatchGrad, DiagGGNExact


def flat_squares(f: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(f.flatten(0, -2), y.flatten(0, -2))


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).eval()


def batch(n: int, *axes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *axes, 3, dtype=dtype), torch.randn(n, *axes, 2, dtype=dtype)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "fxcurv"]


def test_another_batch_size_is_no_reason(caplog: pytest.LogCaptureFixture) -> None:
    compiled = fxcurv.compile(build(), flat_squares, [BatchGrad()])
    with caplog.at_level(logging.INFO, "fxcurv"):
        for n in (6, 4, 2, 9):
            compiled(*batch(n, 5))
    assert compiled.recompiles == []
    assert said(caplog) == ["compiled; batch size: symbolic (captured at 6)"]


@pytest.mark.slow
def test_every_reason(caplog: pytest.LogCaptureFixture) -> None:
    """The nearest program is the one that least is different from."""
    model = build()
    compiled = fxcurv.compile(model, flat_squares)
    reasons: list[str] = []

    def calls(reason: str, *arguments: Tensor, **options: bool) -> None:
        with caplog.at_level(logging.INFO, "fxcurv"):
            caplog.clear()
            compiled(*arguments, **options)
            compiled(*arguments, **options)
        reasons.append(reason)
        assert compiled.recompiles == reasons
        (message,) = said(caplog)
        assert message.startswith(f"compiled again, because {reason}; batch size: ")

    compiled(*batch(4, 5))
    calls(
        "input 0 is float32[n, 7, 3] instead of float32[n, 5, 3]; target 0 is float32[n, 7, 2] instead of float32[n, 5, 2]",
        *batch(4, 7),
    )
    compiled(*batch(1, 5))  # one sample runs by the program for more
    assert compiled.recompiles == reasons
    calls("create_graph=True", *batch(4, 7), create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        calls("autocast is torch.bfloat16", *batch(4, 5))
    model.train()
    calls(
        "the model is in training mode; the model's '0' is in training mode; the model's '1' is in training mode, and 1 more",
        *batch(4, 5),
    )
    model.eval()
    model[2].bias.requires_grad_(False)
    calls("'2.bias' is frozen", *batch(4, 5))
    model[2].bias.requires_grad_(True)
    model[2] = nn.Linear(4, 2, bias=False).eval()
    calls("other parameters or buffers", *batch(4, 5))
    model[1] = nn.Identity().eval()
    calls("other modules", *batch(4, 5))
    model[2] = nn.Linear(4, 1, bias=False).eval()
    x, y = batch(4, 5)
    calls(
        "target 0 is float32[n, 5, 1] instead of float32[n, 5, 2]; "
        "'2.weight' is float32[1, 4] instead of float32[2, 4]",
        x, y[..., :1],
    )  # fmt: skip


def test_another_sequence_length_is() -> None:
    compiled = fxcurv.compile(build(), flat_squares)
    for length in (5, 7, 5):
        compiled(*batch(4, length))
    (reason,) = compiled.recompiles
    assert reason.startswith("input 0 is float32[n, 7, 3] instead of float32[n, 5, 3]; target 0 is ")


def test_other_values_are_a_reason() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.linear(x) * scale

    compiled = fxcurv.compile(Scaled(), nn.MSELoss())
    x, y = batch(4)
    for scale in (1.0, 2.0, 1.0):
        compiled((x, scale), y)
    assert compiled.recompiles == ["another structure of inputs and targets, or other values in them"]


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 2), Four())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Four(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 2)[: len(x)] + torch.zeros(len(x) // 4 * 4, 2) if len(x) != 4 else x.view(4, 2)


def test_what_fixed_the_batch_size() -> None:
    """The op, its module and the user's line, in the report and as the reason of the next program."""
    compiled = fxcurv.compile(Fixed(), nn.MSELoss(), [DiagGGNExact()])
    note = compiled.explain(*batch(4)).batch
    assert re.match(r"fixed at 4 by .* in module 'inner.1', File .*test_recompiles.py\", line \d+, in forward: ", note)
    assert "if len(x) != 4" in note
    compiled(*batch(4))
    assert compiled.recompiles == []
    compiled(*batch(8))
    assert compiled.recompiles == [f"batch size 8, and the program is {note}"]


def test_what_fixed_it_while_an_op_was_traced() -> None:
    """A shape of the model itself, which holds for one batch size only."""

    class PerSample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("scale", torch.randn(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale

    note = fxcurv.compile(PerSample(), nn.MSELoss(), [BatchGrad()]).explain(*batch(4)).batch
    assert note.startswith("fixed at 4 by aten.mul.Tensor, File ")
    assert note.endswith("return self.linear(x) * self.scale")
