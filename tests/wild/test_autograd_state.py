"""What a forward pass tells autograd past the ops that it runs: hooks on nodes, on saved tensors, `.data =`, inference mode.

Without the self-check: what a trace does not see is refused by itself, or right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from against_oracle import close
from oracle import Oracle
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxcurv
from fxcurv.errors import CaptureError, CustomFunctionError
from fxcurv.extensions import BatchGrad, DiagHessian


class Net(nn.Module):
    """linear, tanh, a function, linear."""

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.run = nn.Linear(4, 5), nn.Linear(5, 3), run

    def forward(self, x):
        return self.last(self.run(torch.tanh(self.first(x))))


def compiled(run: Callable[[torch.Tensor], torch.Tensor], *asked: Any):
    torch.manual_seed(0)
    net, loss = Net(run).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 3
    return fxcurv.compile(net, loss, [BatchGrad(), *asked], check=None), Oracle(net, loss, x, y), x, y


def hook(h):
    z = h * h
    z.grad_fn.register_hook(lambda given, _: tuple(None if g is None else 3 * g for g in given))
    return z


def prehook(h):
    z = h * h
    z.grad_fn.register_prehook(lambda gs: tuple(3 * g for g in gs))
    return z


def hook_of_several(h):
    z = h * h
    torch.autograd.graph.register_multi_grad_hook((z,), lambda gs: None)
    return z


def rounded_when_saved(h):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.round(), lambda t: t):
        return (2 * h).exp()


def rounded_in_place(h):
    z = 4 * h
    z.data = z.data.round()
    return z


def cut_in_place(h):
    z = h * 1.0
    z.detach_()
    return z * h


def cut_by_a_function(h):
    z = h * 1.0
    return torch.detach_(z) * h


REFUSED = {
    hook: r"grad_fn.register_hook", prehook: r"grad_fn.register_prehook", hook_of_several: "register_multi_grad_hook",
    rounded_when_saved: "saved_tensors_hooks", rounded_in_place: r"\.data =",
    cut_in_place: "detach_", cut_by_a_function: "detach_",
}  # fmt: skip


@pytest.mark.parametrize("run", REFUSED, ids=lambda f: f.__name__)
def test_refused_with_the_line(run):
    made, _, x, y = compiled(run)
    with pytest.raises(CaptureError, match=rf"(?s){REFUSED[run]}.*test_autograd_state.py.*in {run.__name__}.*Way out"):
        made(x, y)
    (2 * x).requires_grad_().sum().data.zero_()  # all is as it was
    torch.nn.Parameter(x).data = 2 * x


@torch.inference_mode()
def scale_of(h):
    return h.abs().mean(1, keepdim=True)


def inference(h):
    with torch.inference_mode():
        scale = h.exp()
        with torch.inference_mode(False):
            inner = h.sin()
    return h * scale.clone() + scale_of(h).clone() * h + inner


def harmless(h):
    """A constant that is cut, a look at a node, memory that is saved elsewhere."""
    ones = torch.ones(5).double().detach_()
    seen = 2.0 if "Tanh" in h.grad_fn.name() else 3.0
    with torch.autograd.graph.save_on_cpu():
        h = (h * ones).exp() * seen
    return checkpoint(torch.sin, h, use_reentrant=False)


@pytest.mark.parametrize("run", [inference, harmless], ids=lambda f: f.__name__)
def test_right(run):
    made, oracle, x, y = compiled(run, DiagHessian())
    result = made(x, y)
    close(result.grad_batch, oracle.grad_batch(), "grad_batch")
    close(result.diag_h, oracle.diag_h(), "diag_h")


class Reversed(torch.autograd.Function):
    """Returns its input as it is."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return -0.5 * g


class Nested(torch.autograd.Function):
    """Its backward calls a function whose derivative is not that of its forward."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 0.3 * Reversed.apply(g)


def test_a_function_that_calls_another_in_its_backward():
    made, oracle, x, y = compiled(Nested.apply)
    close(made(x, y).grad_batch, oracle.grad_batch(), "grad_batch")
    made, _, x, y = compiled(Nested.apply, DiagHessian())
    with pytest.raises(CustomFunctionError, match="'Nested' calls another custom function in its backward"):
        made(x, y)


def test_a_function_that_returns_its_input():
    made, oracle, x, y = compiled(lambda h: Reversed.apply(h) * h, DiagHessian())
    result = made(x, y)
    close(result.grad_batch, oracle.grad_batch(), "grad_batch")
    close(result.diag_h, oracle.diag_h(), "diag_h")
