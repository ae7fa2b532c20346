"""Memory that is used again: a smaller batch, of one sample or none, writes its own part of it and nothing else."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from kernel_samples import LAYOUTS, laid_out
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import BatchDiagGGNExact, BatchGrad, SqrtGGNExact
from fxcurv.kernels import outer_batch_conv, outer_square_sum, outer_square_sum_conv

recycle = importlib.import_module("fxcurv.passes.recycle")  # the package has the pass under this name
BAND = 64


def t(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def within(expected: Tensor, run: Any) -> None:
    """`run(out)` with `out` between two bands of memory: all of it is written, and the bands stay."""
    memory = torch.full((expected.numel() + 2 * BAND,), torch.nan, dtype=torch.float64)
    memory[:BAND] = memory[BAND + expected.numel() :] = -7.0
    out = memory[BAND : BAND + expected.numel()].view(expected.shape)
    run(out)
    assert (memory[:BAND] == -7).all() and (memory[BAND + expected.numel() :] == -7).all()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(2, 3, 4, 5, 3), (1, 1, 1, 1, 1), (2, 0, 3, 2, 2), (0, 2, 3, 2, 2), (2, 2, 0, 3, 2)])
def test_products_write_within(sizes: tuple, layout: str) -> None:
    v, n, s, o, i = sizes
    a, g, w = (laid_out(f, layout) for f in (t(n, s, i), t(v, n, s, o), t(v, n)))
    for per_sample in (True, False):
        expected = outer_square_sum.reference(a, g, w, per_sample)
        within(expected, lambda out, each=per_sample: outer_square_sum.into(a, g, w, each, out=out))


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_convolutions_write_within(n: int, groups: int, last: bool) -> None:
    geometry = [3, 2], [2, 1], [1, 0], [1, 2], groups
    x, g, w = t(n, 4, 7, 5), t(2, n, 6, 4, 3), t(2, n)
    if last:
        x, g = x.contiguous(memory_format=torch.channels_last), g.movedim(2, -1).contiguous().movedim(-1, 2)
    p = t(2, n, 6, 4 // groups, 3, 2)
    for column, sample in itertools.product(range(2), range(n)):
        p[column, sample] = _weight(x[sample], g[column, sample], geometry)
    within(p, lambda out: outer_batch_conv.into(x, g, *geometry, out=out))
    squares = (p.square() * w[:, :, None, None, None, None]).sum(0)
    for per_sample, expected in ((True, squares), (False, squares.sum(0))):
        within(expected, lambda out, each=per_sample: outer_square_sum_conv.into(x, g, w, each, *geometry, out=out))


def _weight(x: Tensor, g: Tensor, geometry: tuple) -> Tensor:
    """A sample's gradient of a convolution's weight, by autograd."""
    _, *rest, groups = geometry
    weight = t(6, 4 // groups, 3, 2).requires_grad_()
    y = nn.functional.conv2d(x[None].contiguous(), weight, None, *rest, groups)
    return torch.autograd.grad(y, weight, g[None])[0]


# ---- a program's results ------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)).double()


def batch(n: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(n)
    return t(n, 2, 6, 6), torch.randint(3, (n,))


def test_a_smaller_batch_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to one sample and up again, in the memory of the largest; what lies beyond a batch's part stays."""
    monkeypatch.setattr(recycle, "WORTHWHILE", 1)
    model, extensions = net(), [BatchGrad(), BatchDiagGGNExact(), SqrtGGNExact()]
    compiled, loss = fxcurv.compile(model, nn.CrossEntropyLoss(), extensions), nn.CrossEntropyLoss()
    result = compiled(*batch(5))
    for n in (3, 2, 5):
        memory = list(compiled._programs.named.program_0.pool._kept.values())
        assert memory
        for tensor in memory:
            tensor.fill_(-7.0)
        x, y = batch(n)
        result = compiled(x, y, out=result)
        assert all((m[m.numel() * n // 5 :] == -7).all() for m in memory), "beyond the batch's part"
        fresh = fxcurv.compile(model, loss, extensions)(x, y)
        for field in (e.savefield for e in extensions):
            for name, value in getattr(fresh, field).items():
                torch.testing.assert_close(getattr(result, field)[name], value, rtol=1e-12, atol=1e-13)
        for name, param in model.named_parameters():
            each = [torch.autograd.grad(loss(model(a[None]), b[None]) / n, param)[0] for a, b in zip(x, y, strict=True)]
            torch.testing.assert_close(result.grad_batch[name], torch.stack(each))
    assert all(not len(rows) for rows in compiled(x[:0], y[:0], out=result).grad_batch.values())
