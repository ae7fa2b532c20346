"""The drop-in checks its first numbers against plain PyTorch: faults put back are seen, and the check leaves no trace."""

from __future__ import annotations

import contextlib
import random
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcurv.backpack import backpack, extend
from fxcurv.backpack.extensions import BatchGrad, DiagGGNExact, SumGradSquared
from fxcurv.errors import ArgumentError, SelfCheckError
from fxcurv.rules.base import REWRITES, RULES
from fxcurv.rules.pointwise import Pointwise
from fxcurv.runtime import selfcheck

aten = torch.ops.aten
WRONG_TANH = {aten.tanh.default: Pointwise(d1=lambda x, y: 1 - y, d2=lambda x, y: -2 * y * (1 - y * y))}


class Net(nn.Module):
    """Counts its passes, and scales by a number and by a buffer that every pass doubles."""

    def __init__(self, act: nn.Module | None = None, moves: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.last = nn.Linear(4, 5), act or nn.Tanh(), nn.Linear(5, 3)
        self.scale, self.moves = 2.0, moves
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x):
        h = self.scale * self.act(self.first(x))
        if self.moves:
            h = h * self.factor.clone()
            self.factor.mul_(2)
        return self.last(h)


def data(n: int = 6):
    torch.manual_seed(1)
    return torch.randn(n, 4), torch.randint(3, (n,))


def backward(model, *extensions, n: int = 6, **options):
    x, y = data(n)
    loss = extend(nn.CrossEntropyLoss())(model(x), y)
    with backpack(*extensions, **options):
        loss.backward()


@contextlib.contextmanager
def plain_passes():
    """The number of plain passes that checks run."""
    runs, original = [], selfcheck.Check.run

    def counted(self, **options):
        runs.append(1)
        return original(self, **options)

    with mock.patch.object(selfcheck.Check, "run", counted):
        yield runs


@pytest.mark.parametrize("extension", [BatchGrad(), DiagGGNExact()], ids=str)
def test_a_wrong_transpose(extension):
    model = extend(Net())
    with mock.patch.dict(RULES, WRONG_TANH):
        with pytest.raises(SelfCheckError, match="the gradient of 'first"):
            backward(model, extension)
        assert not any(hasattr(p, extension.savefield) or p.grad is not None for p in model.parameters())
        backward(model, extension, check=None)
    assert all(hasattr(p, extension.savefield) for p in model.parameters())


def test_a_wrong_rewrite():
    wrong = {aten.prelu.default: lambda x, w: torch.where(x > 0, x, 0.9 * w * x)}
    with mock.patch.dict(REWRITES, wrong), pytest.raises(SelfCheckError, match="'act' .PReLU(?s:.*)the output"):
        backward(extend(Net(nn.PReLU())))


def test_a_wrong_sum():
    extract = BatchGrad.extract
    scaled = lambda self, param: param.emit(torch.mul, extract(self, param), 1.01)  # noqa: E731
    with (
        mock.patch.object(BatchGrad, "extract", scaled),
        pytest.raises(SelfCheckError, match="grad_batch.*summed over samples"),
    ):
        backward(extend(Net()), BatchGrad())


def test_once_for_every_part():
    model = extend(Net())
    with plain_passes() as runs:
        for extensions, n, expected in (
            ((BatchGrad(),), 6, 1), ((BatchGrad(),), 6, 1), ((BatchGrad(),), 3, 1), ((SumGradSquared(),), 6, 2),
            ((DiagGGNExact(),), 6, 3), ((DiagGGNExact(),), 3, 3), ((), 6, 4),
        ):  # fmt: skip
            backward(model, *extensions, n=n)
            assert len(runs) == expected
    with pytest.raises(ArgumentError, match="check='always'"):
        backpack(check="always")


def test_everything_is_left_as_it_was():
    """Buffers are updated once by a pass, whatever was computed in between; random states do not move."""
    model, plain, y = extend(Net(nn.BatchNorm1d(5), moves=True)), Net(nn.BatchNorm1d(5), moves=True), data()[1]
    (x, _), again = data(), data(3)[0]
    before = random.getstate(), torch.get_rng_state()
    outputs = [model(x), model(again)]
    expected = [plain(x), plain(again)]
    with plain_passes() as runs:
        F.cross_entropy(outputs[0], y).backward()
    assert len(runs) == 1
    F.cross_entropy(expected[0], y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_a_model_that_changed_since_its_pass():
    model, (x, y) = extend(Net()), data()
    loss = F.cross_entropy(model(x), y)
    model.eval()
    model.scale = 3.0
    with plain_passes() as runs, backpack(BatchGrad()):
        loss.backward()
    assert not runs
    plain = Net()
    F.cross_entropy(plain(x), y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_model_that_draws():
    torch.manual_seed(0)
    with plain_passes() as runs:
        backward(extend(Net(nn.Dropout(0.5))), BatchGrad())
    assert not runs


@pytest.mark.parametrize("what", ["a parameter", "an input"])
def test_what_the_user_writes_to_is_no_fault_of_the_program(what):
    """`.data` hides a write from autograd, between the forward and the backward pass."""
    model, (x, y) = extend(Net()), data()
    loss = extend(nn.CrossEntropyLoss())(model(x), y)
    (model.last.weight if what == "a parameter" else x).data.mul_(2)
    with (
        backpack(BatchGrad()),
        pytest.raises(ArgumentError, match="have been written to between its forward and this back"),
    ):
        loss.backward()
    backward(model, BatchGrad())
