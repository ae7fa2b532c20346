"""Models that other libraries have put hooks on: what no program runs is refused, and the message says which hook it is."""

import pytest
import torch
from torch import nn

import fxcurv
from fxcurv.errors import CaptureError
from fxcurv.extensions import BatchGrad

pytestmark = pytest.mark.filterwarnings("ignore")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def called(model):
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    return fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad()])(x, y)


@pytest.mark.parametrize("name", ["GradSampleModule", "GradSampleModuleFastGradientClipping"])
def test_opacus(name):
    wrapper = getattr(pytest.importorskip("opacus.grad_sample"), name)
    model = network()
    for hooked in (wrapper(model), model):  # hooks stay on the model itself
        with pytest.raises(
            CaptureError, match=r"has the backward hook '\w+\.capture_backprops_hook'.*\nWay out: remove it"
        ):
            called(hooked)


def test_opacus_without_hooks():
    wrapper = pytest.importorskip("opacus.grad_sample").GradSampleModuleNoOp
    assert called(wrapper(network())).grad_batch["_module.0.weight"].shape == (5, 4, 3)


def test_torchjd():
    model = network()
    engine = pytest.importorskip("torchjd.autogram").Engine(model, batch_dim=0)
    with pytest.raises(CaptureError, match="(?s)the hook 'Hook' of a Linear reads Hook.*Way out: remove the hook"):
        called(model)
    del engine  # takes its hooks with it
    assert called(model).grad_batch["0.weight"].shape == (5, 4, 3)
