"""What PyTorch branches on inside a model: `torch.cond`, masks that may be causal, ops whose sizes PyTorch does not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from case_tools import Net
from situations import numbers, parametrized, together
from test_derivatives_inside import Inside
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import BatchGrad, DiagGGNExact
from fxcurv.rules import REWRITES

aten, MSE = torch.ops.aten, nn.MSELoss()
SCALE = torch.tensor([0.1, 0.03, 0.07])


def chosen(m: Any, x: Tensor) -> Tensor:
    """One branch or the other, as x says; each reads parameters of its own."""
    h = torch.cond(x.sum() > 0, lambda x: torch.tanh(m.a(x)), lambda x: torch.sin(m.b(x)), (x,))
    return m.head(h)


def safe(m: Any, x: Tensor) -> Tensor:
    """What the branch that is not taken computes is not a number."""
    h = m.a(x)
    return m.head(torch.cond((h < -100).all(), lambda h: h.sqrt() + h.log(), lambda h: torch.tanh(h), (h,)))


def several(m: Any, x: Tensor) -> Tensor:
    """By a parameter's value, with a structure of results."""
    out = torch.cond(
        m.a.weight[0, 0] > 0, lambda h: {"y": h.tanh(), "z": h + 1}, lambda h: {"y": h.sin(), "z": 2 * h}, (m.a(x),)
    )
    return m.head(out["y"] * out["z"])


def quantised(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.fake_quantize_per_tensor_affine(m.a(x), 0.25, 0, -8, 7))


def quantised_finely(m: Any, x: Tensor) -> Tensor:
    """Scales that float32 rounds: PyTorch's kernels know no other, whatever the dtype of what they quantise."""
    w = torch.fake_quantize_per_channel_affine(m.a.weight, m.scale, m.zero, 0, -8, 7)
    h = torch.fake_quantize_per_tensor_affine(torch.nn.functional.linear(x, w, m.a.bias), 0.1, 0, -8, 7)
    return m.head(torch.fake_quantize_per_tensor_affine(h.tanh(), m.scale[1], m.zero[0], -8, 7))


def parts() -> dict[str, nn.Module]:
    return {"a": nn.Linear(2, 3), "b": nn.Linear(2, 3), "head": nn.Linear(3, 2)}


def two() -> dict[str, nn.Module]:
    return {"a": nn.Linear(2, 3), "head": nn.Linear(3, 2)}


def decoder() -> nn.Module:
    layer = nn.TransformerDecoderLayer(4, 2, 3, dropout=0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    run = lambda m, x, memory: m.layers(x, memory, tgt_mask=m.mask)  # noqa: E731
    return Net(run, layers=nn.TransformerDecoder(layer, 1), mask=mask)


def transformer() -> nn.Module:
    inner = nn.Transformer(4, 2, 1, 1, 3, dropout=0.0, batch_first=True)
    run = lambda m, x, y, mask: m.inner(x, y, src_mask=mask[0], tgt_mask=mask[0])  # noqa: E731
    return Net(run, inner=inner)


def sequences(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 3, 4), torch.randn(n, 3, 4), torch.ones(n, 3, 3).triu(1).bool()


WORDS = numbers(3, 4)
ROWS = {
    "cond": Inside("", lambda: Net(chosen, **parts()), MSE, numbers(2), numbers(2), "first ggn hessian products"),
    "cond, by the operands alone": Inside(
        "", lambda: Net(safe, **two()), MSE, numbers(2), numbers(2), "first ggn hessian"
    ),
    "cond, several results": Inside(
        "", lambda: Net(several, **two()), MSE, numbers(2), numbers(2), "first ggn hessian products"
    ),
    "a decoder and its mask": Inside("", decoder, MSE, together(WORDS, WORDS), WORDS, "first"),
    "a transformer and a mask that is an input": Inside("", transformer, MSE, sequences, WORDS, "first"),
    "fake quantisation on fine grids": Inside(
        "",
        lambda: Net(quantised_finely, scale=SCALE, zero=SCALE.int(), **two()),
        MSE,
        numbers(2),
        numbers(2),
        "first ggn hessian products",
    ),
    "fake quantisation": Inside("", lambda: Net(quantised, **two()), MSE, numbers(2), numbers(2), "first ggn products"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_grids_of_pytorch(dtype: torch.dtype) -> None:
    """What stands for the ops has their values to the bit, also those that are clamped."""
    torch.manual_seed(0)
    x = 3 * torch.randn(50, 3).to(dtype)
    scale, zero = torch.tensor([0.1, 0.03, 0.25]), torch.tensor([3, 1, 4], dtype=torch.int32)
    for op, *args in (
        (aten.fake_quantize_per_tensor_affine_cachemask.default, 0.1, 3),
        (aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default, scale[1:2], zero[:1], torch.ones(1)),
        (aten.fake_quantize_per_channel_affine_cachemask.default, scale, zero, 1),
    ):
        for found, true in zip(REWRITES[op](x, *args, -8, 17), op(x, *args, -8, 17), strict=True):
            assert found.dtype == true.dtype and torch.equal(found, true), op


@pytest.fixture
def if_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the oracle: PyTorch's gradient of `torch.cond` is a constant, even with create_graph=True."""
    monkeypatch.setattr(torch, "cond", lambda pred, yes, no, operands: (yes if pred else no)(*operands))


@pytest.mark.usefixtures("if_else")
@pytest.mark.parametrize("name", parametrized(ROWS))
def test_branch(name: str) -> None:
    ROWS[name].check((3, 1), ROWS[name].trains)


@pytest.mark.slow
@pytest.mark.usefixtures("if_else")
@pytest.mark.parametrize("name", ROWS)
def test_branch_in_training_mode(name: str) -> None:
    ROWS[name].check((2, 5), True)


def test_the_branch_may_change() -> None:
    """One program for both."""
    torch.manual_seed(0)
    model = Net(chosen, **parts()).double()
    compiled, y = fxcurv.compile(model, MSE, [BatchGrad()], check=None), torch.randn(3, 2).double()
    for sign in (1, -1):
        x = sign * torch.rand(3, 2).double()
        result = compiled(x, y)
        found = torch.autograd.grad(MSE(model(x), y), list(model.parameters()), allow_unused=True)
        for (name, p), g in zip(model.named_parameters(), found, strict=True):
            torch.testing.assert_close(result.grad[name], torch.zeros_like(p) if g is None else g)
    assert compiled.recompiles == []


def test_the_batch_is_a_number_where_an_op_needs_it() -> None:
    compiled = fxcurv.compile(Net(quantised, **two()), MSE, [DiagGGNExact()])
    for n in (3, 2):
        compiled(torch.randn(n, 2), torch.randn(n, 2))
    (reason,) = compiled.recompiles
    assert "fixed at 3 by aten.fake_quantize" in reason and __file__ in reason
