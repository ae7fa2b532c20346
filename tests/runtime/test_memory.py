"""Peaks of memory: what a call allocates at a time, counted from the allocator's own record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxcurv
from fxcurv import extensions as ext
from fxcurv.runtime.memory import alone


def peak(call: Callable[[], Any]) -> tuple[int, Any]:
    """(the most bytes that `call` has allocated at a time, what it returned)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        returned = call()
    found, stack = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    live: dict[int, int] = {}
    now = most = 0
    for _, address, size in sorted(found, key=lambda event: event[0]):
        if size > 0:
            live[address] = size
            now += size
            most = max(most, now)
        else:
            now -= live.pop(address, 0)  # what stood before the call may be freed in it
    return most, returned


def test_peak_counts_what_is_alive_at_a_time() -> None:
    def call() -> Tensor:
        a = torch.empty(1000, dtype=torch.float64)
        del a
        b = torch.empty(3000, dtype=torch.float64)
        return torch.empty(2000, dtype=torch.float64).set_(b)

    most, _ = peak(call)
    assert most == 8 * 5000


# ---- columns beyond the budget ------------------------------


def all_cnn_c(width: int, side: int, classes: int, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """All-CNN-C (Springenberg et al. 2015) without dropout; the published one has width 96, for images of side 32."""
    torch.manual_seed(0)
    w = width
    layers = [(3, w, 3, 1, 1), (w, w, 3, 1, 1), (w, w, 3, 2, 1), (w, 2 * w, 3, 1, 1), (2 * w, 2 * w, 3, 1, 1)]
    layers += [(2 * w, 2 * w, 3, 2, 1), (2 * w, 2 * w, 3, 1, 0), (2 * w, 2 * w, 1, 1, 0), (2 * w, classes, 1, 1, 0)]
    modules = [module for layer in layers for module in (nn.Conv2d(*layer), nn.ReLU())]
    model = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return model, torch.rand(n, 3, side, side), torch.randint(classes, (n,))


# (sizes of the problem, the columns' budget, the limit on all); a sweep carries 7 of 19 columns, and 14 of 99
SMALL, REAL = ((12, 16, 20, 8), 2 << 20, 4 << 20), ((96, 32, 100, 16), 1 << 28, 2 << 28)


@pytest.mark.parametrize(
    ("extension", "sizes", "budget", "limit"),
    [
        pytest.param(ext.DiagGGNExact(), *SMALL, id="diagonal-small"),
        pytest.param(ext.KFLR(), *SMALL, id="factors-small"),
        pytest.param(ext.DiagGGNExact(), *REAL, marks=pytest.mark.slow, id="diagonal-real"),
        pytest.param(ext.KFLR(), *REAL, marks=pytest.mark.slow, id="factors-real"),
    ],
)
def test_many_classes(extension: Any, sizes: tuple[int, ...], budget: int, limit: int) -> None:
    """Columns go down in sweeps, and all that a call holds stays below a limit that they would exceed together."""
    model, x, y = all_cnn_c(*sizes)
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [extension], memory_budget=budget)
    assert compiled.lower(x, y).walked.sweeps > 1
    compiled(x, y)
    assert peak(lambda: compiled(x, y))[0] <= limit


# ---- reductions beside the plain gradient ------------------------------

REDUCTIONS = [ext.BatchL2Grad(), ext.SumGradSquared(), ext.DiagGGNExact(), ext.DiagGGNMC(), ext.KFAC(), ext.KFLR()]
SLOW = [ext.Variance(), ext.ClippedGrad(0.01), ext.DiagHessian()]


def net_3c3d() -> tuple[nn.Module, Tensor, Tensor]:
    """3C3D at a quarter of its width, of 16 images [3, 32, 32]."""
    torch.manual_seed(0)

    def stage(*arguments: int) -> list[nn.Module]:
        return [nn.Conv2d(*arguments), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]

    dense = [nn.Linear(32 * 3 * 3, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)]
    model = nn.Sequential(*stage(3, 16, 5), *stage(16, 24, 3), *stage(24, 32, 3, 1, 1), nn.Flatten(), *dense)
    return model, torch.rand(16, 3, 32, 32), torch.randint(10, (16,))


@pytest.mark.parametrize(
    "extension", [*REDUCTIONS, *(pytest.param(e, marks=pytest.mark.slow) for e in SLOW)], ids=lambda e: type(e).__name__
)
def test_reductions_take_little_more_than_the_gradient(extension: Any) -> None:
    """At most 1.5 times the gradient's peak, or two stacks of the columns of one sweep above it, and the results."""
    model, x, y = net_3c3d()
    loss = nn.CrossEntropyLoss()
    gradient, _ = peak(lambda: torch.autograd.grad(loss(model(x), y), list(model.parameters())))
    compiled = fxcurv.compile(model, loss, [extension])
    compiled(x, y)
    most, result = peak(lambda: compiled(x, y))
    program = compiled.lower(x, y)
    widest = 16 * 16 * 28 * 28 * 4  # bytes of the first convolution's output
    assert program.walked.sweeps == 1
    stack = widest * sum(program.walked.columns.values())
    results = sum(t.nbytes for t in pytree.tree_leaves(getattr(result, extension.savefield)))
    assert most <= max(1.5 * gradient, gradient + 2 * stack) + results


def test_memory_that_nothing_else_holds() -> None:
    """A tensor, or a view of one; whoever holds either, another view or a part keeps it from being written over."""
    with torch.no_grad():
        given = torch.randn(4)
        for make in (lambda t: t, lambda t: t.view(2, 2), lambda t: t[1:], lambda t: t.view(2, 2).view(1, 4)):
            box, also = [make(given.clone())], []
            assert alone(box)
            also.append(box[0])
            assert not alone(box)
            also[0] = box[0][:1]
            assert not alone(box)
            also[0] = box[0].untyped_storage()
            assert not alone(box)
            also.clear()
            assert alone(box)
            owner = given.clone()
            box[0] = make(owner)
            assert not alone(box)
            del owner
            assert alone(box)
