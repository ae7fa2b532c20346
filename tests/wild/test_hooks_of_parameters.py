"""Hooks of parameters (`p.register_hook`) change the gradient that plain PyTorch gives: refused by name, whenever they come."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxcurv
import fxcurv.backpack
from fxcurv.errors import CaptureError
from fxcurv.extensions import BatchGrad


def halve(g):
    return 0.5 * g


def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, torch.randn(5, 3), torch.arange(5) % 2


@pytest.mark.parametrize("calls", [0, 1, 3])  # before the first, after it, and where calls take the short way
@pytest.mark.parametrize("outputs", [True, False])
def test_a_hook_added_at_any_time(calls: int, outputs: bool) -> None:
    model, x, y = case()
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad()], outputs=outputs)
    for _ in range(calls):
        compiled(x, y)
    hook = model[2].weight.register_hook(halve)
    for _ in range(2):
        with pytest.raises(CaptureError, match=r"'weight' of module '2' \(Linear\) has the hook 'halve'"):
            compiled(x, y)
    hook.remove()
    for _ in range(3):
        first = compiled(x, y)
    again = model[2].weight.register_hook(halve)  # the table of its hooks is the same object as before
    with pytest.raises(CaptureError, match="'halve'"):
        compiled(x, y)
    again.remove()
    want = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model[2].weight)[0]
    torch.testing.assert_close(first.grad["2.weight"], want)


def test_a_hook_on_a_parameter_of_the_loss() -> None:
    model, x, y = case()

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, f, y):
            return self.scale * nn.functional.cross_entropy(f, y)

    loss = Scaled()
    compiled = fxcurv.compile(model, loss, loss_params=True)
    compiled(x, y), compiled(x, y)
    loss.scale.register_hook(halve)
    with pytest.raises(CaptureError, match="'scale' of the model or loss .Scaled. has the hook 'halve'"):
        compiled(x, y)


def test_inside_torch_compile() -> None:
    model, x, y = case()
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad()])
    step = torch.compile(lambda x, y: compiled(x, y).grad_batch["0.weight"], backend="eager", fullgraph=True)
    model[0].weight.register_hook(halve)  # Dynamo guards no hooks, so it is seen where the step is compiled
    with pytest.raises(Exception, match="has the hook 'halve'"):
        step(x, y)


def test_the_drop_in() -> None:
    model, x, y = case()
    model, loss = fxcurv.backpack.extend(model), fxcurv.backpack.extend(nn.CrossEntropyLoss())
    with fxcurv.backpack.backpack(BatchGrad()):
        loss(model(x), y).backward()
    model[0].weight.register_hook(halve)
    with pytest.raises(CaptureError, match="has the hook 'halve'"), fxcurv.backpack.backpack(BatchGrad()):
        loss(model(x), y).backward()
