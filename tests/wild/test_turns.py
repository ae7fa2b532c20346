"""`outputs=False`: the numbers of the whole batch, and never a value of the size of all samples' logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from case_tools import Net
from oracle import Oracle
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxcurv
from fxcurv.errors import ArgumentError, ExtensionError, MixedSamplesError
from fxcurv.extensions import (
    GGNMP,
    KFAC,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)


class Tied(nn.Module):
    """Token indices [N, T] to logits [N, classes, T]; the head is the embedding."""

    def __init__(self, classes: int, width: int = 4):
        super().__init__()
        self.tokens, self.norm, self.inner = nn.Embedding(classes, width), nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        q = self.inner(self.norm(h)).unflatten(2, (2, -1)).transpose(1, 2)
        h = h + F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
        return F.linear(h, self.tokens.weight).transpose(1, 2)


class Largest(TorchDispatchMode):
    """The entries of the largest value that an op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that a call has allocated at once, by the allocator's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = call()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del held
    return most


def data(n: int, t: int, classes: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randint(classes, (n, t)), torch.randint(classes, (n, t))
    y[0, 1] = y[-1] = -100  # the parts' normalisers differ
    return x, y


def test_first_order_and_curvature() -> None:
    torch.manual_seed(0)
    model, loss = Tied(11).double(), nn.CrossEntropyLoss()
    x, y = data(5, 3, 11)
    first = [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), ClippedGrad(max_norm=0.1)]
    curved = [SqrtGGNMC(), DiagGGNMC(), KFAC()]
    result = fxcurv.compile(model, loss, [*first, *curved], outputs=False)(x, y, seed=3)
    oracle = Oracle(model, loss, x, y)
    torch.testing.assert_close(result.loss, oracle.loss())
    for field in ("grad", "grad_batch", "batch_l2", "sum_grad_squared", "variance", "grad_clipped"):
        torch.testing.assert_close(getattr(result, field), getattr(oracle, field)(), rtol=1e-8, atol=1e-11)
    assert oracle.recover(result.sqrt_ggn_mc).residual < 1e-8
    whole = fxcurv.compile(model, loss, curved, check=None)(x, y, seed=3)  # the same draws
    for field in ("sqrt_ggn_mc", "diag_ggn_mc", "kfac"):
        for name, value in getattr(whole, field).items():
            torch.testing.assert_close(list(getattr(result, field)[name]), list(value), rtol=1e-9, atol=1e-12)
    with pytest.raises(AttributeError, match="outputs=False"):
        result.output  # noqa: B018


def padded(m: Any, words: Tensor, kept: Tensor) -> Tensor:
    """A mask that is looked up by the numbers of the samples and of the keys, and joined with the causal one (transformers)."""
    h = m.words(words)
    n, t = words.shape
    rows, keys = torch.arange(n)[:, None, None, None], torch.arange(t)[None, None, None, :]
    mask = kept.bool()[rows, keys] & (keys <= torch.arange(t)[None, None, :, None])
    return m.head(F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], attn_mask=mask)[:, 0])


def test_a_mask_looked_up_by_numbers_of_samples() -> None:
    torch.manual_seed(0)
    model = Net(padded, words=nn.Embedding(7, 4), head=nn.Linear(4, 7)).double()
    kept = torch.ones(5, 3, dtype=torch.long)
    kept[1, 0] = kept[4, :2] = 0
    x, y = (torch.randint(7, (5, 3)), kept), torch.randint(7, (5, 3))
    loss = lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten())  # noqa: E731
    result, oracle = fxcurv.compile(model, loss, [BatchGrad()], outputs=False)(x, y), Oracle(model, loss, x, y)
    torch.testing.assert_close(result.grad_batch, dict(oracle.grad_batch()))
    torch.testing.assert_close(result.grad, dict(oracle.grad()))


@pytest.mark.slow
def test_no_value_of_all_logits() -> None:
    """Not even a quarter of them; a plain step holds several."""
    torch.manual_seed(0)
    model, loss, (n, t, classes) = Tied(300), nn.CrossEntropyLoss(), (8, 16, 300)
    x, y = data(n, t, classes)
    extensions = [BatchL2Grad(), SumGradSquared(), ClippedGrad(max_norm=0.1), DiagGGNMC()]
    compiled = fxcurv.compile(model, loss, extensions, outputs=False, check=None)
    compiled(x, y)
    with Largest() as largest:
        compiled(x, y, seed=1)
    assert largest.entries <= 2 * n * t * classes // 4  # the gradient, and a column of the curvature
    with Largest() as plain:
        loss(model(x), y).backward()
    assert plain.entries >= n * t * classes
    alone = fxcurv.compile(model, loss, outputs=False, check=None)
    alone(x, y)
    assert (
        peak(lambda: alone(x, y)) < peak(lambda: torch.autograd.grad(loss(model(x), y), list(model.parameters()))) / 2
    )


def test_what_it_does_not_compute() -> None:
    model, loss = Tied(11), nn.CrossEntropyLoss()
    with pytest.raises(ExtensionError, match="GGNMP with outputs=False"):
        fxcurv.compile(model, loss, [GGNMP()], outputs=False)
    with pytest.raises(ArgumentError, match="outputs=False"):
        fxcurv.compile(model, loss, outputs=False, sample="token")
    compiled = fxcurv.compile(model, loss, outputs=False)
    x, y = data(4, 3, 11)
    for arguments in ({"create_graph": True}, {"params": dict(model.named_parameters())}):
        with pytest.raises(ArgumentError, match="outputs=False"):
            compiled(x, y, **arguments)
    with pytest.raises(ArgumentError, match="empty"):
        compiled(x[:0], y[:0])
    contrastive = lambda f, y: F.cross_entropy(f @ f.t(), y)  # noqa: E731
    with pytest.raises(MixedSamplesError, match="needs samples of other parts.*without outputs=False"):
        fxcurv.compile(nn.Linear(3, 2), contrastive, outputs=False)(torch.randn(4, 3), torch.randint(4, (4,)))


@pytest.mark.parametrize("ignored", [-100, 1])
def test_weights_of_classes_and_label_smoothing(ignored: int) -> None:
    """The weight of a sample's class is looked up in a table that has no samples."""
    torch.manual_seed(0)
    weight = torch.tensor([1.0, 3.0, 0.5]).double()
    model, loss = nn.Linear(4, 3).double(), nn.CrossEntropyLoss(weight, ignore_index=ignored, label_smoothing=0.2)
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 3
    result = fxcurv.compile(model, loss, [BatchGrad(), DiagGGNExact()], outputs=False)(x, y)
    oracle = Oracle(model, loss, x, y)
    for name in ("weight", "bias"):
        torch.testing.assert_close(result.grad[name], oracle.grad()[name])
        torch.testing.assert_close(result.grad_batch[name], oracle.grad_batch()[name])
        torch.testing.assert_close(result.diag_ggn_exact[name], oracle.diag_ggn_exact()[name])


def test_batch_norm_needs_sums_between() -> None:
    """Its mean is a sum that all parts wait for; running statistics are those of the whole batch."""
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double(), nn.CrossEntropyLoss()
    same = copy.deepcopy(model)
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randint(2, (9,))
    result = fxcurv.compile(model, loss, outputs=False)(x, y)
    loss(same(x), y).backward()
    for name, p in same.named_parameters():
        torch.testing.assert_close(result.grad[name], p.grad)
    for name, buffer in same.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)


def test_a_cache_that_holds_nothing_yet() -> None:
    """An empty vector before values with more axes, as in models of `transformers`, has no samples to keep apart."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.empty(0, dtype=x.dtype), self.inner(x)], -2).sum(1)

    torch.manual_seed(0)
    model, loss, x, y = Cached().double(), nn.CrossEntropyLoss(), torch.randn(5, 2, 3).double(), torch.arange(5) % 3
    result = fxcurv.compile(model, loss, [BatchL2Grad()], outputs=False)(x, y)
    oracle = Oracle(model, loss, x, y)
    torch.testing.assert_close(result.grad, oracle.grad())
    torch.testing.assert_close(result.batch_l2, oracle.batch_l2())
