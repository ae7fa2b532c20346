"""The cost model's constants: what they weigh, which ones hold, and that they decide."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import fxcurv
from fxcurv import cost
from fxcurv.extensions import BatchL2Grad

# Operations cost nothing, or bytes.
COMPUTES = cost.Machine(flops=math.inf, bandwidth=1.0, fresh=math.inf, dispatch=0.0)
MOVES = cost.Machine(flops=1.0, bandwidth=math.inf, fresh=math.inf, dispatch=0.0)


@pytest.fixture
def undone():
    yield
    cost.calibrate("cpu", cost.CPU)


def test_seconds():
    machine = cost.Machine(flops=2.0, bandwidth=4.0, fresh=8.0, dispatch=0.5)
    assert cost.Cost(6, 20, 32, 3).seconds(machine) == 3 + 5 + 4 + 1.5
    assert cost.Cost(6, 20, 32, 3).seconds(dataclasses.replace(machine, fresh=math.inf)) == 3 + 5 + 1.5


def test_defaults_hold_until_calibrated(undone):
    device = torch.device("cpu")
    assert cost.machine(device) == cost.CPU
    assert cost.machine(torch.device("cuda")) == cost.H100
    found = cost.calibrate()
    assert found is cost.measured() is cost.machine(device)
    assert found.flops > 0 and found.bandwidth > 0
    assert dataclasses.replace(found, flops=cost.CPU.flops, bandwidth=cost.CPU.bandwidth) == cost.CPU
    assert cost.machine(torch.device("cuda")) == cost.H100
    with pytest.raises(ValueError, match="cpu, cuda"):
        cost.calibrate("tpu")


def test_constants_decide(undone):
    """Norms where individual gradients are fewer operations than Gram matrices, and more bytes."""
    n, k, s, o, i = 3, 2, 4 * 5, 32, 32
    model, x, y = nn.Conv2d(k * i, k * o, 1, groups=k), torch.randn(n, k * i, 4, 5), torch.randn(n, k * o, 4, 5)

    def decided(compiled):
        (found,) = [d for d in compiled.lower(x, y).decisions if (d.param, d.extension) == ("weight", "BatchL2Grad")]
        return found.algorithm, found.seconds, dict(found.rejected)

    cost.calibrate("cpu", MOVES)
    compiled = fxcurv.compile(model, nn.MSELoss(), [BatchL2Grad()])
    gradients, grams = 2 * n * s * k * o * i, 2 * n * k * s * s * (o + i)
    assert decided(compiled) == ("materialise", gradients, {"Gram": grams})
    cost.calibrate("cpu", COMPUTES)
    assert decided(compiled)[0] == "materialise"  # a program that exists stays as it is
    again = fxcurv.compile(model, nn.MSELoss(), [BatchL2Grad()])
    assert decided(again)[0] == "Gram"
