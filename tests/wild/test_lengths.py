"""Lengths of sequences and sizes of images that vary from call to call: one program for all, or what fixes them is named."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle
from torch import Tensor, nn
from torch.nn import functional as F

import fxcurv
from fxcurv.errors import ArgumentError
from fxcurv.extensions import KFAC, BatchGrad, BatchL2Grad, DiagGGNExact, DiagGGNMC, SqrtGGNMC, SumGradSquared


class Decoder(nn.Module):
    """Token indices [N, T] to logits [N, classes, T], positions by a table; the head is the embedding."""

    def __init__(self, classes: int = 7, width: int = 4, longest: int = 40):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(classes, width), nn.Embedding(longest, width)
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(h)).chunk(3, 2))
        h = h + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return F.linear(h, self.tokens.weight).transpose(1, 2)


class Logits(nn.Module):
    """Positions of all samples flattened together, as in many training loops."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(x).cumsum(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).flatten(0, 1)


BEFORE = {"logits": Logits.logits, "head": lambda f: f.flatten(0, 1)}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = (
            nn.Conv2d(2, 3, 3, stride=2),
            nn.GroupNorm(1, 3),
            nn.Conv2d(3, 2, 2, padding=1),
        )
        self.head = nn.Linear(2 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.max_pool2d(torch.relu(self.norm(self.first(x))), 2))
        return self.head(F.adaptive_avg_pool2d(h, 2).flatten(1))


def tokens(n: int, t: int) -> tuple[Tensor, Tensor]:
    return torch.randint(7, (n, t)), torch.randint(7, (n, t))


def flat_tokens(n: int, t: int) -> tuple[Tensor, Tensor]:
    x, y = tokens(n, t)
    return x, y.flatten()


def images(n: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, h, w, dtype=torch.float64), torch.randint(3, (n,))


def time_first(t: int, n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(t, n, 3, dtype=torch.float64), torch.randn(t, n, 2, dtype=torch.float64)


def next_token(logits: Tensor, y: Tensor) -> Tensor:
    """The loss of all positions but the last, of the tokens that come next."""
    return F.cross_entropy(logits[:, :, :-1].transpose(1, 2).flatten(0, 1), y[:, 1:].flatten(), ignore_index=0)


def flat_squares(f: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(torch.tanh(f.flatten(0, 1)) * 2, y.flatten(0, 1))


def programs(compiled: fxcurv.api.Compiled) -> int:
    return len(compiled.recompiles) + 1


def against_oracle(result, model: nn.Module, loss, x: Tensor, y: Tensor, **options) -> None:
    oracle = Oracle(model, loss, x, y, **options)
    torch.testing.assert_close(result.loss, oracle.loss())
    for field in ("grad", "grad_batch", "batch_l2", "sum_grad_squared"):
        actual, expected = getattr(result, field, None), getattr(oracle, field)()
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-11)
    if hasattr(result, "sqrt_ggn_mc"):
        recovered = oracle.recover(result.sqrt_ggn_mc)
        assert recovered.residual < 1e-8
        for name, p in result.sqrt_ggn_mc.items():
            torch.testing.assert_close(result.diag_ggn_mc[name], p.square().sum((0, 1)))


QUICK = {"flat", "time first", "images"}
FIRST = [BatchGrad(), BatchL2Grad(), SumGradSquared()]
CASES = {
    "decoder": (Decoder, nn.CrossEntropyLoss(), tokens, {1: "T"}, {}, [(4, 6), (3, 9), (5, 5), (1, 7)]),
    "next": (Decoder, next_token, tokens, {1: "T"}, {}, [(4, 6), (3, 9), (2, 3)]),
    "flat": (Logits, nn.CrossEntropyLoss(), flat_tokens, {1: "T"}, BEFORE, [(4, 6), (3, 10), (6, 4), (5, 5), (1, 8)]),
    "images": (Images, nn.CrossEntropyLoss(), images, {2: "H", 3: "W"}, {}, [(4, 9, 10), (3, 14, 11), (1, 12, 17)]),
    "time first": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), flat_squares, time_first, {0: "T"}, {"out_dim": 1},
        [(5, 4), (8, 3), (3, 3)],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_one_program_for_all_lengths(name: str) -> None:
    build, loss, data, dynamic, oracle, sizes = CASES[name]
    torch.manual_seed(0)
    model = build().double()
    compiled = fxcurv.compile(model, loss, FIRST, dynamic_shapes=dynamic, batch_dim=oracle.get("out_dim", 0))
    for each in sizes:
        x, y = data(*each)
        against_oracle(compiled(x, y), model, loss, x, y, **oracle)
    assert programs(compiled) == 1
    assert compiled.explain(x, y).lengths.startswith("symbolic (captured at ")


@pytest.mark.slow
def test_second_length_makes_the_program() -> None:
    """An epoch of many lengths makes two programs; what is drawn and factored is what a program of this length gives."""
    torch.manual_seed(0)
    model, loss = Decoder().double(), nn.CrossEntropyLoss()
    extensions = [BatchGrad(), BatchL2Grad(), SqrtGGNMC(), DiagGGNMC(), KFAC()]
    compiled = fxcurv.compile(model, loss, extensions)
    lengths = [6, *(t for t in range(2, 20) if t != 6)]
    for t in lengths:
        x, y = tokens(3, t)
        result = compiled(x, y, seed=t)
        if t in (6, 2, 11):
            against_oracle(result, model, loss, x, y)
    assert programs(compiled) == 2
    assert compiled.explain(x, y).lengths == "symbolic (captured at 2)"
    alone = fxcurv.compile(model, loss, extensions, check=None)(x, y, seed=t)
    for name, factors in alone.kfac.items():
        torch.testing.assert_close(list(result.kfac[name]), list(factors), rtol=1e-9, atol=1e-12)
    with pytest.raises(IndexError):  # the table of positions ends
        model(tokens(3, 41)[0])
    with pytest.raises(ArgumentError):
        compiled(*tokens(3, 41))


def test_marked_by_pytorch() -> None:
    torch.manual_seed(0)
    model, loss = Logits().double(), nn.CrossEntropyLoss()
    compiled = fxcurv.compile(model, loss, [BatchGrad()])
    x, y = flat_tokens(3, 5)
    torch._dynamo.mark_dynamic(x, 1)
    compiled(x, y)
    x, y = flat_tokens(4, 7)
    against_oracle(compiled(x, y), model, loss, x, y, **BEFORE)
    assert programs(compiled) == 1


@pytest.mark.parametrize("shapes", [{"x": {1: "T"}}, ({1: "T"}, None), ({2: "T"},)])
def test_shapes_that_are_not_those_of_the_inputs(shapes) -> None:
    compiled = fxcurv.compile(Logits(), nn.CrossEntropyLoss(), dynamic_shapes=shapes)
    with pytest.raises(ArgumentError, match="dynamic_shapes"):
        compiled(*flat_tokens(3, 5))


@pytest.mark.slow
def test_a_loop_over_positions_fixes_them() -> None:
    """Every length has its program then, and the report says what fixed it."""
    torch.manual_seed(0)
    model, loss = Recurrent().double(), nn.MSELoss()
    compiled = fxcurv.compile(model, loss, [BatchGrad()])
    for t in (2, 3):
        x, y = torch.randn(2, t, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
        against_oracle(compiled(x, y), model, loss, x, y)
    assert programs(compiled) == 2
    said = compiled.explain(x, y).lengths
    assert said.startswith("fixed by aten.") and "in module 'rnn'" in said


@pytest.mark.slow
def test_a_column_for_every_entry_fixes_them() -> None:
    torch.manual_seed(0)
    model, loss = Logits().double(), nn.CrossEntropyLoss()
    compiled = fxcurv.compile(model, loss, [DiagGGNExact()], dynamic_shapes={1: "T"})
    for t in (3, 2):
        x, y = flat_tokens(2, t)
        found = compiled(x, y).diag_ggn_exact
        alone = fxcurv.compile(model, loss, [DiagGGNExact()], check=None)(x, y).diag_ggn_exact
        torch.testing.assert_close(found, alone)
    assert programs(compiled) == 2
    assert compiled.explain(x, y).lengths.startswith("fixed by ")


class Scaled(nn.Module):
    """Reads a size as a number, which `torch.export` lets through in some places and not in others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum(1) / float(x.shape[1]) ** 0.5


@pytest.mark.slow
def test_a_number_made_of_a_length() -> None:
    torch.manual_seed(0)
    model, loss = Scaled().double(), nn.MSELoss()
    compiled = fxcurv.compile(model, loss, [BatchGrad()])
    for t in (3, 5, 4):
        x, y = torch.randn(2, t, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
        against_oracle(compiled(x, y), model, loss, x, y)
