"""`sample="token"`: every position of the output is a sample. Against loops over the positions' own losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net, flat_cross_entropy, labels, param
from oracle import Oracle, derivative, plain_mathematics
from torch import Tensor, nn

import fxcurv
from fxcurv import errors
from fxcurv.extensions import (
    KFAC,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

N, T, CLIP = 2, 3, 0.05
FIRST = [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), ClippedGrad(CLIP)]


@dataclasses.dataclass
class Tokens:
    """A model whose loss has a term `loss_at(f, y, n, t)` for every sample and position."""

    model: nn.Module
    loss: Callable[..., Tensor]
    inputs: Any
    y: Tensor
    loss_at: Callable[[Tensor, Tensor, int, int], Tensor]
    batch_dim: Any = 0
    positions: int = T


def attention(sequence_first: bool = False, merged: bool = False, channels: bool = False) -> nn.Module:
    """Causal self-attention on tokens, a weight behind another op, and a layer that is used twice."""

    def run(m: Any, tokens: Tensor) -> Tensor:
        x = m.emb(tokens.t() if sequence_first else tokens)
        x = x + m.lin(torch.tanh(m.lin(x)))
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        f = F.linear(x, m.w * m.scale)
        f = f.transpose(0, 1) if sequence_first else f
        f = f.flatten(0, 1) if merged else f
        return f.transpose(1, 2) if channels else f

    return Net(run, emb=nn.Embedding(4, 3), lin=nn.Linear(3, 3), w=param(4, 3), scale=param(4, 1))


def mean_cross_entropy(f: Tensor, y: Tensor, n: int, t: int) -> Tensor:
    return F.cross_entropy(f[n, t], y[n, t]) / (N * T)


def plain() -> Tokens:
    return Tokens(attention(), flat_cross_entropy, labels(N, T), labels(N, T, classes=4), mean_cross_entropy)


def ragged() -> Tokens:
    """Some positions do not count, and one sample has none that does."""
    y = labels(N, T, classes=4)
    y[0, 1:], y[1] = -100, torch.tensor([2, -100, 1])
    counted = int((y != -100).sum())

    def at(f: Tensor, y: Tensor, n: int, t: int) -> Tensor:
        return F.cross_entropy(f[n, t], y[n, t]) / counted if y[n, t] != -100 else f.sum() * 0

    return Tokens(attention(), flat_cross_entropy, labels(N, T), y, at)


def shifted() -> Tokens:
    """A language model's loss: position t predicts token t + 1, so the last one has no loss."""

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f[:, :-1].reshape(-1, 4), y[:, 1:].reshape(-1), reduction="sum")

    def at(f: Tensor, y: Tensor, n: int, t: int) -> Tensor:
        return F.cross_entropy(f[n, t], y[n, t + 1]) if t + 1 < T else f.sum() * 0

    return Tokens(attention(), loss, labels(N, T), labels(N, T, classes=4), at)


def masked() -> Tokens:
    """Losses without reduction, weighted by a mask that is a target."""
    keep = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]])

    def loss(f: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(f.transpose(1, 2), y, reduction="none")
        return (each * keep).sum() / keep.sum()

    def at(f: Tensor, y: Tensor, n: int, t: int) -> Tensor:
        return F.cross_entropy(f[n, t], y[n, t]) * keep[n, t] / keep.sum()

    return Tokens(attention(), loss, labels(N, T), labels(N, T, classes=4), at)


def sequence_first() -> Tokens:
    def at(f: Tensor, y: Tensor, n: int, t: int) -> Tensor:
        return F.cross_entropy(f[t, n], y[t, n]) / (N * T)

    return Tokens(attention(True), flat_cross_entropy, labels(T, N), labels(T, N, classes=4), at, batch_dim=1)


def merged() -> Tokens:
    """The model's own output is [N T, C]."""

    def at(f: Tensor, y: Tensor, n: int, t: int) -> Tensor:
        return F.cross_entropy(f[n * T + t], y[n * T + t]) / (N * T)

    model = attention(merged=True)
    return Tokens(model, nn.CrossEntropyLoss(), labels(N, T), labels(N * T, classes=4), at)


def classes_second() -> Tokens:
    """Outputs [N, C, T], as `cross_entropy` takes them."""

    def at(f: Tensor, y: Tensor, n: int, t: int) -> Tensor:
        return F.cross_entropy(f[n, :, t], y[n, t]) / (N * T)

    return Tokens(attention(channels=True), F.cross_entropy, labels(N, T), labels(N, T, classes=4), at)


def squares() -> Tokens:
    """Numbers [N, T, D]: the last axis is one prediction."""
    model = Net(lambda m, x: m.out(m.cell(x)[0]), cell=nn.GRU(2, 3, batch_first=True), out=nn.Linear(3, 2))
    loss = nn.MSELoss()

    def at(f: Tensor, y: Tensor, n: int, t: int) -> Tensor:
        return (f[n, t] - y[n, t]).square().sum() / (N * T * 2)

    return Tokens(model, loss, torch.randn(N, T, 2), torch.randn(N, T, 2), at)


def images() -> Tokens:
    """Positions on two axes."""

    def at(f: Tensor, y: Tensor, n: int, t: int) -> Tensor:
        return F.cross_entropy(f[n, :, t // 2, t % 2], y[n, t // 2, t % 2]) / (N * 4)

    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, 3, 1))
    return Tokens(model, F.cross_entropy, torch.randn(N, 1, 3, 3), labels(N, 2, 2), at, positions=4)


KINDS = [plain, ragged, shifted, masked, sequence_first, merged, classes_second, squares, images]
BY_DEFAULT = {ragged}


def built(make: Callable[[], Tokens]) -> Tokens:
    torch.manual_seed(0)
    tokens = make()
    double = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
    tokens.model.double()
    tokens.inputs, tokens.y = double(tokens.inputs), double(tokens.y)
    return tokens


def looped(tokens: Tokens) -> dict[str, Tensor]:
    """Name -> [N, T, *P]: each position's own loss, differentiated by itself."""
    params = dict(tokens.model.named_parameters())
    with plain_mathematics(), torch.enable_grad():
        f = tokens.model(tokens.inputs)
        rows = [
            derivative(tokens.loss_at(f, tokens.y, n, t), list(params.values()))
            for n in range(N) for t in range(tokens.positions)
        ]  # fmt: skip
        total = derivative(tokens.loss(f, tokens.y), list(params.values()))
    found = {
        k: torch.stack(column).unflatten(0, (N, -1)) for k, column in zip(params, zip(*rows, strict=True), strict=True)
    }
    for g, whole in zip(found.values(), total, strict=True):  # the terms are all of the loss
        torch.testing.assert_close(g.sum((0, 1)), whole)
    return found


def check(result: Any, tokens: Tokens) -> None:
    g = looped(tokens)
    squared = {k: v.flatten(2).square().sum(2) for k, v in g.items()}
    norms = sum(squared.values()).sqrt()
    scale = torch.where(norms > CLIP, CLIP / norms, 1)
    expected = {
        "grad": {k: v.sum((0, 1)) for k, v in g.items()},
        "grad_batch": g,
        "batch_l2": squared,
        "sum_grad_squared": {k: v.square().sum((0, 1)) for k, v in g.items()},
        "variance": {k: v.flatten(0, 1).var(0, correction=0) for k, v in g.items()},
        "grad_clipped": {k: torch.einsum("nt...,nt->...", v, scale) for k, v in g.items()},
    }
    torch.testing.assert_close(result.sample_norms, norms)
    for field, values in expected.items():
        actual = getattr(result, field)
        assert list(actual) == list(values), field
        for k, v in values.items():
            torch.testing.assert_close(actual[k], v, rtol=1e-8, atol=1e-12, msg=lambda m, w=f"{field} {k}": f"{w}: {m}")


@pytest.mark.parametrize(
    "make", [pytest.param(m, id=m.__name__, marks=[] if m in BY_DEFAULT else pytest.mark.slow) for m in KINDS]
)
def test_individual_gradients(make: Callable[[], Tokens]) -> None:
    tokens = built(make)
    options = {"batch_dim": tokens.batch_dim, "sample": "token", "debug": True}
    check(fxcurv.compile(tokens.model, tokens.loss, FIRST, **options)(tokens.inputs, tokens.y), tokens)


@pytest.mark.slow
def test_columns_beyond_the_memory_budget() -> None:
    """The positions go down in parts."""
    tokens = built(plain)
    compiled = fxcurv.compile(tokens.model, tokens.loss, FIRST, sample="token", memory_budget=1)
    assert compiled.explain(tokens.inputs, tokens.y).sweeps > 2
    check(compiled(tokens.inputs, tokens.y), tokens)


@pytest.mark.slow
def test_other_batch_sizes() -> None:
    tokens = built(plain)
    compiled = fxcurv.compile(tokens.model, tokens.loss, FIRST, sample="token")
    check(compiled(tokens.inputs, tokens.y), tokens)
    whole = compiled(tokens.inputs, tokens.y).grad_batch
    alone = compiled(tokens.inputs[1:], tokens.y[1:]).grad_batch
    more = compiled(tokens.inputs[[0, 1, 1]], tokens.y[[0, 1, 1]]).grad_batch
    for k, g in whole.items():
        torch.testing.assert_close(alone[k] / N, g[1:])
        torch.testing.assert_close(more[k] * 3 / N, g[[0, 1, 1]])


@pytest.mark.slow
def test_sums_over_samples_are_the_same() -> None:
    """The Gauss-Newton and the Hessian do not ask what a sample is."""
    tokens = built(plain)
    extensions = [DiagGGNExact(), DiagHessian(), BatchGrad(params="lin")]
    result = fxcurv.compile(tokens.model, tokens.loss, extensions, sample="token", debug=True)(tokens.inputs, tokens.y)
    oracle = Oracle(tokens.model, tokens.loss, tokens.inputs, tokens.y, kind="ce", class_dim=-1)
    g = looped(tokens)
    for k, expected in oracle.diag_ggn_exact().items():
        torch.testing.assert_close(result.diag_ggn_exact[k], expected)
        torch.testing.assert_close(result.diag_h[k], oracle.diag_h()[k])
    assert list(result.grad_batch) == ["lin.weight", "lin.bias"]
    for k, value in result.grad_batch.items():
        torch.testing.assert_close(value, g[k])


@pytest.mark.slow
def test_unreached_parameters_have_zeros() -> None:
    model = Net(lambda m, x: m.a(x), a=nn.Linear(2, 3), b=nn.Linear(2, 3)).double()
    x, y = torch.randn(N, T, 2, dtype=torch.float64), labels(N, T)
    result = fxcurv.compile(model, flat_cross_entropy, FIRST, sample="token")(x, y)
    torch.testing.assert_close(result.grad_batch["b.bias"], torch.zeros(N, T, 3, dtype=torch.float64))
    torch.testing.assert_close(result.batch_l2["b.bias"], torch.zeros(N, T, dtype=torch.float64))


# ---- what does not exist ------------------------------


LINEAR = nn.Linear(2, 3)


def own_scale(f: Tensor, y: Tensor) -> Tensor:
    return flat_cross_entropy(f * LINEAR.bias, y)


REFUSED: dict[str, tuple[Callable[..., Tensor], Any, str]] = {
    "pooled": (lambda f, y: F.cross_entropy(f.mean(1), y[:, 0]), BatchGrad(), "cross_entropy.*joins positions"),
    "pooled squares": (lambda f, y: f.sum(1).square().sum(), BatchGrad(), "joins positions"),
    "largest": (lambda f, y: f.abs().amax(1).sum(), BatchGrad(), "joins positions"),
    "smoothness": (lambda f, y: (f[:, 1:] - f[:, :-1]).square().sum(), BatchGrad(), "joins positions"),
    "own scale": (own_scale, BatchGrad(), "read more of the model than its output"),
    "roots": (flat_cross_entropy, SqrtGGNExact(), "SqrtGGNExact is not defined"),
    "blocks": (flat_cross_entropy, KFAC(), "KFAC is not defined"),
    "per sample": (flat_cross_entropy, BatchDiagGGNExact(), "BatchDiagGGNExact is not defined"),
    "subsampling": (flat_cross_entropy, BatchGrad(subsampling=[0]), "index the result"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    loss, extension, words = REFUSED[name]
    model = Net(lambda m, x: m.linear(x), linear=LINEAR)
    with pytest.raises(errors.FxcurvError, match=f"(?s){words}"):
        fxcurv.compile(model, loss, [extension], sample="token")(torch.randn(N, T, 2), labels(N, T))


def test_refused_outputs() -> None:
    x, y = torch.randn(N, 2), labels(N)
    with pytest.raises(errors.LossError, match="no axis of positions"):
        fxcurv.compile(LINEAR, F.cross_entropy, [BatchGrad()], sample="token")(x, y)
    model = Net(lambda m, x: (m.linear(x), m.linear(2 * x)), linear=LINEAR)
    both = lambda f, y: flat_cross_entropy(f[0], y) + flat_cross_entropy(f[1], y)  # noqa: E731
    with pytest.raises(errors.LossError, match="one output that the loss reads, not 2"):
        fxcurv.compile(model, both, [BatchGrad()], sample="token")(torch.randn(N, T, 2), labels(N, T))
    with pytest.raises(errors.ArgumentError, match="sample='word'"):
        fxcurv.compile(LINEAR, F.cross_entropy, sample="word")
