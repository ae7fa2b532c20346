"""Images go channels last only where the library's kernels are known to be sound there: see `sound` in passes/channels_last.py.

All models here are in float64, which oneDNN has no kernels for: nothing in this file can reach the one at fault.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxcurv
from fxcurv.extensions import GGNMP, HMP, KFAC, PCHMP, BatchGrad, BatchL2Grad, DiagGGNExact, DiagHessian
from fxcurv.passes.channels_last import sound

aten = torch.ops.aten
CLASSES = 3
LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize(
    ("weight", "stride", "groups", "expected"),
    [
        ((32, 1, 5, 5), (1, 1), 1, True),  # the benchmark's MNIST CNN, 3C3D and All-CNN-C
        ((64, 3, 5, 5), (1, 1), 1, True),
        ((128, 96, 3, 3), (1, 1), 1, True),
        ((96, 96, 3, 3), (2, 2), 1, True),
        ((192, 192, 3, 3), (2, 2), 1, True),
        ((128, 64, 1, 1), (2, 2), 1, True),  # a ResNet's shortcut
        ((8, 4, 1, 1), (1, 1), 1, True),
        ((8, 4, 1, 1), (2, 2), 1, False),  # its small form's
        ((16, 4, 1, 1), (2, 2), 1, False),
        ((4, 16, 1, 1), (2, 2), 1, False),
        ((16, 8, 1, 1), (2, 2), 1, False),  # fills a vector of AVX2, not of AVX-512
        ((16, 20, 1, 1), (1, 2), 1, False),
        ((64, 3, 7, 7), (2, 2), 1, False),
        ((32, 16, 1, 1), (2, 2), 2, True),
        ((32, 8, 1, 1), (2, 2), 2, False),  # groups of 8 inputs
        ((16, 16, 1, 1), (2, 2), 2, False),  # groups of 8 outputs
        ((32, 1, 1, 1), (2, 2), 32, False),
    ],
)
def test_which_convolutions_may_go_channels_last(weight: tuple, stride: tuple, groups: int, expected: bool) -> None:
    assert sound(weight, stride, groups) is expected


# ---- what runs ------------------------------


class Block(nn.Module):
    """Of a residual network, with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1))
        self.shortcut = nn.Conv2d(4, 6, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.shortcut(x) + self.f(x))


def net() -> nn.Module:
    """Convolutions that go channels last between others that do not."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), Block(), nn.ConvTranspose2d(6, 4, 2, 2), nn.Sigmoid(),
        nn.AvgPool2d(2), nn.Conv2d(4, 4, 1, 2, groups=2), nn.Flatten(), nn.LazyLinear(CLASSES),
    ).double()  # fmt: skip


def batch(n: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 3, 8, 8, dtype=torch.float64), torch.randint(CLASSES, (n,))


class Convolutions(TorchDispatchMode):
    """Whether each convolution that runs reads images or weights with their channels last, and may.

    Derivatives under `vmap` and those of a graph that is being traced are seen as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in (aten.convolution, aten.convolution_backward):
            backward = packet is aten.convolution_backward
            x, weight = args[1:3] if backward else args[:2]
            stride, groups = (args[4], args[9]) if backward else (args[3], args[8])
            last = any(torch._prims_common.suggest_memory_format(t) is torch.channels_last for t in (x, weight))
            self.seen.append((last, sound(weight.shape, stride, groups)))
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        assert any(last for last, _ in self.seen), "no image went channels last"
        assert any(not allowed for _, allowed in self.seen)
        assert all(allowed for last, allowed in self.seen if last)


EXTENSIONS = [BatchGrad(), BatchL2Grad(), DiagGGNExact(), DiagHessian(), KFAC()]


def test_no_strided_convolution_of_partial_vectors_reads_channels_last() -> None:
    model, (x, y) = net(), batch()
    model(x)
    compiled = fxcurv.compile(model, LOSS, EXTENSIONS)
    compiled(x, y)
    for given in (x, x[:2]):
        with Convolutions() as ran:
            compiled(given, y[: len(given)])
        ran.check()


@pytest.mark.parametrize("extension", [GGNMP(), HMP(), PCHMP()], ids=lambda e: e.savefield)
def test_products_keep_the_layout_as_well(extension: Any) -> None:
    model, (x, y) = net(), batch()
    model(x)
    compiled = fxcurv.compile(model, LOSS, [extension])
    with Convolutions() as ran:
        products = getattr(compiled(x, y), extension.savefield)
        for name in ("0.weight", "3.f.2.weight", "3.shortcut.weight"):
            shape = model.get_parameter(name).shape
            products[name](torch.randn(2, *shape, dtype=torch.float64))
    ran.check()


def test_numbers_where_layouts_meet() -> None:
    model, (x, y) = net(), batch()
    model(x)
    extensions = [BatchGrad(), DiagGGNExact(), DiagHessian()]
    result, oracle = fxcurv.compile(model, LOSS, extensions)(x, y), Oracle(model, LOSS, x, y, kind="ce")
    for field in ("grad", *(e.savefield for e in extensions)):
        for name, expected in getattr(oracle, field)().items():
            torch.testing.assert_close(getattr(result, field)[name], expected, rtol=1e-8, atol=1e-11)


def test_without_a_sound_convolution_nothing_is_copied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 1, 2), nn.Flatten(), nn.LazyLinear(CLASSES)
    ).double()
    x, y = batch()
    model(x)
    program = fxcurv.compile(model, LOSS, [BatchGrad(), DiagGGNExact()]).lower(x, y)
    assert not [n for n in program.graph.nodes if n.kwargs.get("memory_format") is torch.channels_last]
    images = [
        n.meta["val"] for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].ndim == 4
    ]
    assert images and all(t.stride(1) != 1 or t.shape[1] == 1 for t in images if t.shape[2] * t.shape[3] > 1)


def test_images_that_the_user_has_channels_last_stay_so() -> None:
    """As in a plain model, which reads them so, too."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES)).double()
    x, y = batch()
    x = x.contiguous(memory_format=torch.channels_last)
    model(x)
    program = fxcurv.compile(model, LOSS, [BatchGrad()]).lower(x, y)
    (conv,) = [n for n in program.graph.nodes if n.target is aten.convolution.default]
    assert conv.args[0].op == "placeholder" and conv.args[0].meta["val"].stride(1) == 1


PROCESSORS = {
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"},
    "none": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "DNNL_MAX_CPU_ISA": "SSE41"},
}


def copies() -> str:
    """The convolutions and copies of the program of `net`."""
    model, (x, y) = net(), batch()
    model(x)
    program = fxcurv.compile(model, LOSS, [BatchGrad()]).lower(x, y)
    nodes = [n for n in program.graph.nodes if "convolution" in str(n.target) or "clone" in str(n.target)]
    return "\n".join(f"{n.target} {n.args} {n.kwargs}" for n in nodes)


def test_every_processor_gets_the_same_layouts() -> None:
    """The program may run on another one than where it was made; this one may have AVX-512."""
    tests = Path(__file__).parent
    paths = os.pathsep.join(map(str, (tests, *tests.parent.iterdir(), tests.parent.parent)))
    command = [sys.executable, "-c", "import test_layout_guard as t; print(t.copies())"]
    others = [
        subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths} | variables, stdout=subprocess.PIPE, text=True)
        for variables in PROCESSORS.values()
    ]
    here = copies()
    assert "channels_last" in here
    for other in others:
        found, _ = other.communicate(timeout=300)
        assert other.returncode == 0 and found.strip() == here


def test_a_group_norms_gradient_is_asked_for_in_company(monkeypatch):
    """PyTorch's kernel is sound for what a backward pass asks for: the check under `params=` asks for that."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES)
    ).double()
    x, y = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 2, 1])
    asked, grad = [], torch.autograd.grad

    def noted(outputs, inputs, *args, **options):
        asked.append(set(map(id, inputs)))
        return grad(outputs, inputs, *args, **options)

    monkeypatch.setitem(vars(torch.autograd), "grad", noted)
    result = fxcurv.compile(model, LOSS, [BatchGrad()], params="1.weight")(x, y)
    every = set(map(id, model.parameters()))
    assert [ids for ids in asked if id(model[1].weight) in ids] == [every]
    torch.testing.assert_close(result.grad_batch["1.weight"], Oracle(model, LOSS, x, y).grad_batch()["1.weight"])
