"""The garbage collector while a program is made."""

import gc

import pytest
import torch
from torch import nn

import fxcurv
from fxcurv.errors import CaptureError
from fxcurv.extensions import HMP, BatchGrad

collections = {"start": 0, "stop": 0}


def count(phase, info):
    collections[phase] += 1


class Cyclic(nn.Sequential):
    """Its forward pass makes so much that a collection begins, if none is held back."""

    def forward(self, x):
        for _ in range(2000):
            own = []
            own.append(own)
        return super().forward(x)


@pytest.fixture
def counted():
    gc.callbacks.append(count)
    yield
    gc.callbacks.remove(count)
    gc.enable()


@pytest.mark.parametrize("enabled", [True, False])
def test_what_runs_at_a_collection_is_not_the_models(counted, enabled):
    """A callback that changes what it reads would be refused in a model; the collector is afterwards as it was."""
    model, x, y = Cyclic(nn.Linear(3, 2)), torch.randn(4, 3), torch.randn(4, 2)
    (gc.enable if enabled else gc.disable)()
    result = fxcurv.compile(model, nn.MSELoss(), [BatchGrad(), HMP()])(x, y)
    result.hmp["0.weight"](torch.randn(2, 3))
    assert gc.isenabled() is enabled
    torch.testing.assert_close(result.grad_batch["0.weight"].sum(0), result.grad["0.weight"])


def test_the_collector_is_on_again_after_an_error(counted):
    class Refused(Cyclic):
        def forward(self, x):
            collections["start"] += 1
            return super().forward(x) * collections["start"]

    with pytest.raises(CaptureError, match="'collections'"):
        fxcurv.compile(Refused(nn.Linear(3, 2)), nn.MSELoss(), [BatchGrad()])(torch.randn(4, 3), torch.randn(4, 2))
    assert gc.isenabled()


def scaled():
    """A model that scales by what a closure holds, and how to change that."""
    scale = 2.0

    def times_scale(x):
        return x * scale

    class Scaled(nn.Linear):
        def forward(self, x):
            return times_scale(super().forward(x))

    def rescale(value):
        nonlocal scale
        scale = value

    return Scaled(3, 2), rescale


def at_work():
    """A model that takes its factors from a generator of a closure, which is at work before and after the forward pass."""
    scale = 2.0

    def factors():
        while True:
            yield scale

    endless = factors()

    class AtWork(nn.Linear):
        def forward(self, x):
            return super().forward(x) * next(endless)

    def rescale(value):
        nonlocal scale
        scale = value

    return AtWork(3, 2), rescale


@pytest.fixture
def frozen():
    yield gc.freeze
    gc.unfreeze()


def check_rescaled(model, rescale):
    x, y, loss = torch.randn(4, 3), torch.randn(4, 2), nn.MSELoss()
    compiled = fxcurv.compile(model, loss, [BatchGrad()])
    compiled(x, y)
    rescale(3.0)
    torch.testing.assert_close(compiled(x, y).loss, loss(model(x), y).detach())


@pytest.mark.parametrize("make", [scaled, at_work])
def test_a_changed_closure_is_seen(make):
    check_rescaled(*make())


def test_a_changed_closure_is_seen_in_a_frozen_heap(frozen):
    """`gc.freeze()`, which servers and data loaders call, hides objects from the collector."""
    model, rescale = scaled()
    frozen()
    check_rescaled(model, rescale)


def test_a_generator_that_a_frozen_heap_hides_is_refused(frozen):
    model, rescale = at_work()
    frozen()
    with pytest.raises(CaptureError, match=r"factors.*gc.freeze\(\)"):
        check_rescaled(model, rescale)
