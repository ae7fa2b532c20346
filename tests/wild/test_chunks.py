"""Head and loss for some positions after the others (`outputs=False`): the numbers of the whole, no output of all positions."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Oracle
from test_turns import peak
from torch import Tensor, nn
from torch.nn import functional as F

import fxcurv
from fxcurv.errors import ArgumentError
from fxcurv.extensions import (
    KFAC,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNMC,
    SumGradSquared,
    Variance,
)
from fxcurv.ir import chunked
from fxcurv.runtime import turns

FIRST = [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), ClippedGrad(max_norm=0.1)]
CURVED = [DiagGGNMC(), KFAC(others="exact")]
N, T, CLASSES = 8, 7, 11


class Tokens(nn.Module):
    """Token indices [N, T] to logits [N, T, classes]."""

    def __init__(self, classes: int, width: int, tied: bool):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(classes, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, classes, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.tokens(x)))


class Decoder(nn.Module):
    """A block of causal attention with two heads, and a table of positions."""

    def __init__(self, classes: int, width: int, length: int):
        super().__init__()
        self.tokens, self.at = nn.Embedding(classes, width), nn.Parameter(torch.randn(length, width))
        self.qkv, self.proj, self.norm = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.at
        q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(h)).chunk(3, 2))
        h = h + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return F.linear(h, self.tokens.weight)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two positions, also where all would fit, and values written over whatever their size."""
    for module in (chunked, importlib.import_module("fxcurv.passes.chunks")):
        monkeypatch.setattr(module, "ROOM", 2 * CLASSES * 8)
    monkeypatch.setattr(chunked, "LEAST", 4)
    monkeypatch.setattr(turns, "LARGE", 1)


def rows(f: Tensor, y: Tensor, **how: Any) -> Tensor:
    return F.cross_entropy(f.flatten(0, 1), y.flatten(), **how)


def batch() -> tuple[Tensor, Tensor]:
    x, y = torch.randint(CLASSES, (N, T)), torch.randint(CLASSES, (N, T))
    y[0, 1] = y[-1] = -100
    return x, y


def nodes(compiled: Any) -> list[chunked.Chunked]:
    """What runs by chunks in the one program."""
    graph = compiled._programs.named.program_0.program.graph
    return [n.target for n in graph.nodes if isinstance(n.target, chunked.Chunked)]


def check(model: nn.Module, loss: Callable, first: list, curved: list) -> Any:
    """All fields against the oracle; what is sampled against the program of the whole output, with the same draws."""
    x, y = batch()
    before = {name: p.clone() for name, p in model.named_parameters()}
    compiled = fxcurv.compile(model, loss, [*first, *curved], outputs=False)
    result, oracle = compiled(x, y, seed=3), Oracle(model, loss, x, y)
    torch.testing.assert_close(result.loss, oracle.loss())
    for field in ("grad", *(e.savefield for e in first)):
        torch.testing.assert_close(getattr(result, field), getattr(oracle, field)(), rtol=1e-8, atol=1e-11)
    whole = fxcurv.compile(model, loss, curved, check=None)(x, y, seed=3) if curved else None
    for field in (e.savefield for e in curved):
        for name, value in getattr(whole, field).items():
            torch.testing.assert_close(list(getattr(result, field)[name]), list(value), rtol=1e-9, atol=1e-12)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    return compiled


def test_a_tied_head(small: None) -> None:
    torch.manual_seed(0)
    compiled = check(Tokens(CLASSES, 4, tied=True).double(), rows, FIRST, [DiagGGNMC()])
    (node,) = nodes(compiled)
    assert node.count == T and node.size([torch.zeros(2, T, 4) if p else None for p in node.given]) == 2
    program = compiled._programs.named.program_0.program
    vals = [
        n.meta["val"] for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor) and n.op != "placeholder"
    ]
    assert all(program.batch.per_sample(v) < T * CLASSES for v in vals), "no output of all positions"
    assert f"{T} positions of the output" in str(compiled.explain(*batch()))


def test_a_norm_before_the_head_in_several_columns(small: None) -> None:
    """Where columns times the width are more than the vocabulary, the norm's backward runs by chunks too."""
    torch.manual_seed(0)
    compiled = check(Tokens(CLASSES, 4, tied=False).double(), rows, [BatchGrad()], [DiagGGNMC(mc_samples=4)])
    (node,) = nodes(compiled)
    assert "native_layer_norm_backward" in str(node.part.graph)


def test_over_a_data_set(small: None) -> None:
    torch.manual_seed(0)
    model, (x, y) = Tokens(CLASSES, 4, tied=True).double(), batch()
    loader = [(x[:3], y[:3]), (x[3:], y[3:])]
    summed = fxcurv.compile(model, functools.partial(rows, reduction="sum"), [BatchL2Grad()], outputs=False)
    found = fxcurv.over(summed, loader, progress=False, reduction="sum")
    expected = Oracle(model, functools.partial(rows, reduction="sum"), x, y)
    torch.testing.assert_close(found.grad, expected.grad(), rtol=1e-8, atol=1e-11)
    with pytest.raises(ArgumentError, match="outputs=False keeps none"):
        fxcurv.over(fxcurv.compile(model, rows, [BatchL2Grad()], outputs=False), loader, progress=False)


def test_a_head_of_its_own_with_weights_of_classes(small: None) -> None:
    torch.manual_seed(0)
    model, weight = Tokens(CLASSES, 4, tied=False).double(), torch.rand(CLASSES).double()
    assert nodes(check(model, lambda f, y: rows(f, y, weight=weight, label_smoothing=0.1), [], CURVED))


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{"reduction": "sum"}, {"reduction": "sum", "label_smoothing": 0.1}, {"ignore_index": 3}]
)
def test_reductions(small: None, how: dict) -> None:
    torch.manual_seed(0)
    model = Tokens(CLASSES, 4, tied=True).double()
    weighed = lambda f, y: rows(f, y.clamp(min=0), **how)  # noqa: E731
    assert nodes(check(model, weighed, [BatchL2Grad(), Variance()], [DiagGGNMC()]))


@pytest.mark.slow
def test_classes_before_positions(small: None) -> None:
    torch.manual_seed(0)
    assert nodes(check(Tokens(CLASSES, 4, True).double(), lambda f, y: F.cross_entropy(f.mT, y), FIRST, [KFAC()]))


def test_positions_that_the_loss_leaves_out(small: None) -> None:
    """They are left out before the head: of T positions, T - 1 go through it."""
    torch.manual_seed(0)

    def shifted(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f[..., :-1, :].contiguous().view(-1, CLASSES), y[..., 1:].contiguous().view(-1))

    compiled = check(Tokens(CLASSES, 4, tied=True).double(), shifted, [BatchL2Grad(), ClippedGrad(max_norm=0.1)], [])
    (node,) = nodes(compiled)
    assert node.count == T - 1


def test_positions_that_meet_stay_whole(small: None) -> None:
    torch.manual_seed(0)
    model, (x, y) = Tokens(CLASSES, 4, tied=True).double(), batch()
    compiled = fxcurv.compile(model, lambda f, y: rows(f.cumsum(1), y), outputs=False)
    gradient = torch.autograd.grad(rows(model(x).cumsum(1), y), list(model.parameters()))
    torch.testing.assert_close(list(compiled(x, y).grad.values()), list(gradient))
    assert not nodes(compiled) and "is whole, since aten.cumsum" in str(compiled.explain(x, y))


@pytest.mark.parametrize("tied", [True, False])
def test_half_the_peak(tied: bool) -> None:
    """Of the plain gradient; a large vocabulary is most of it."""
    torch.manual_seed(0)
    model, (n, t, classes) = Tokens(20000, 64, tied), (2, 128, 20000)
    x, y = torch.randint(classes, (n, t)), torch.randint(classes, (n, t))
    plain = peak(lambda: torch.autograd.grad(rows(model(x), y), list(model.parameters())))
    for extensions in ([], [BatchL2Grad()]):
        compiled = fxcurv.compile(model, rows, extensions, outputs=False, check=None)
        compiled(x, y)
        assert peak(lambda c=compiled: c(x, y)) < plain / 2


@pytest.mark.parametrize(
    ("extension", "copies"), [(BatchL2Grad(), 3), pytest.param(SumGradSquared(), 4, marks=pytest.mark.slow)]
)
def test_what_a_large_weight_takes(extension: Any, copies: int) -> None:
    """The results, of one sample its P, and no more of that size: squares are written over it."""
    torch.manual_seed(0)
    model, x = Tokens(20000, 256, tied=True), torch.randint(20000, (4, 64))
    compiled = fxcurv.compile(model, rows, [extension], outputs=False, check=None)
    compiled(x, x)
    weight = model.tokens.weight
    assert peak(lambda: compiled(x, x)) < copies * weight.numel() * weight.element_size()


@pytest.mark.slow
@pytest.mark.parametrize("extensions", [[], [BatchL2Grad()], [SumGradSquared()]], ids=["gradient", "norms", "squares"])
def test_memory_grows_with_the_length(extensions: list) -> None:
    """Not with its square: twice the tokens take twice the memory, of 4096 tokens hardly more than a plain gradient's."""
    found = {}
    for t in (2048, 4096):
        torch.manual_seed(0)
        model, x = Decoder(64, 32, t), torch.randint(64, (1, t))
        plain = peak(lambda model=model, x=x: torch.autograd.grad(rows(model(x), x), list(model.parameters())))
        compiled = fxcurv.compile(model, rows, extensions, check=None)
        compiled(x, x)
        found[t] = peak(lambda compiled=compiled, x=x: compiled(x, x))
        assert found[t] < 1.2 * plain
    assert found[4096] < 2.1 * found[2048]
