"""Ops as PyTorch's own pairs of kernels: the same numbers as their mathematics, and no tensor of positions by positions."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle, plain_mathematics
from torch import nn

import fxcurv
from fxcurv.extensions import (
    HMP,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SumGradSquared,
    Variance,
)

N, T, D, H, C = 3, 7, 4, 2, 5
KERNEL = "scaled_dot_product_attention"


def causal(x):
    return {"is_causal": True}


def hidden(x):
    """The third query attends to nothing."""
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    mask[2] = False
    return {"attn_mask": mask}


def per_sample(x):
    return {"attn_mask": x.detach().sum(2)[:, None, None].expand(x.shape[0], 1, T, T)}


def padded(x):
    """As a tokenizer's mask: the last positions of every sequence but the first are hidden, from all heads."""
    keep = torch.arange(T) < T - torch.arange(x.shape[0])[:, None]
    return {"attn_mask": keep[:, None, None].expand(x.shape[0], 1, T, T)}


def scaled(x):
    return {"scale": 0.3}


def grouped(x):
    return {"enable_gqa": True, "is_causal": True}


class Attention(nn.Module):
    """A layer of attention between norms, [N, T, D] to [N, C]."""

    def __init__(self, options=causal, groups=H, dropout=0.0):
        super().__init__()
        self.options, self.groups, self.dropout = options, groups, dropout
        self.norm, self.last = nn.LayerNorm(D), nn.LayerNorm([T, D], elementwise_affine=False)
        self.q, self.k, self.v = (
            nn.Linear(D, D),
            nn.Linear(D, D // H * groups, bias=False),
            nn.Linear(D, D // H * groups),
        )
        self.out = nn.Linear(D, C)

    def forward(self, x):
        h = self.norm(x)
        heads = (f(h).unflatten(-1, (-1, D // H)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(*heads, dropout_p=self.dropout, **self.options(x))
        return self.out(F.gelu(self.last(x + y.transpose(1, 2).flatten(2)))).mean(1)


def build(*args, **kwargs):
    torch.manual_seed(0)
    return Attention(*args, **kwargs).double(), torch.randn(N, T, D, dtype=torch.float64), torch.tensor([4, 0, 1])


def close(actual, expected, tol=1e-9):
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tol, atol=tol * value.abs().max().item() + 1e-12)


def fused(compiled, *args) -> Counter:
    return Counter(op for op, _, why in compiled.lower(*args).program.analysis.said if not why)


def of_two_positions(compiled, *args) -> list:
    """Values of which two axes are as long as a sequence, or one as long as its square."""
    vals = [n.meta.get("val") for n in compiled.lower(*args).graph_module.graph.nodes]
    shapes = [v.shape for v in vals if isinstance(v, torch.Tensor)]
    return [s for s in shapes if s.count(T) > 1 or any(isinstance(k, int) and k % T**2 == 0 for k in s)]


ASKED = [BatchGrad(), DiagGGNExact()]
SLOW = pytest.mark.slow


def compile(model, asked=ASKED):  # noqa: A001
    """Without the program's own check: the oracle checks more."""
    return fxcurv.compile(model, F.cross_entropy, asked, check=None)


@pytest.mark.parametrize(
    "options", [padded, *(pytest.param(o, marks=SLOW) for o in (hidden, causal, per_sample, scaled))]
)
def test_masks(options):
    model, x, y = build(options)
    compiled = compile(model)
    result = compiled(x, y)
    assert fused(compiled, x, y) == {KERNEL: 1, "layer_norm": 2}
    with plain_mathematics():
        oracle = Oracle(model, F.cross_entropy, x, y, kind="ce")
        close(result.grad_batch, oracle.grad_batch())
        close(result.diag_ggn_exact, oracle.diag_ggn_exact())
    again = compiled(x[:2], y[:2])
    assert compiled.recompiles == []
    with plain_mathematics():
        close(again.grad_batch, Oracle(model, F.cross_entropy, x[:2], y[:2], kind="ce").grad_batch())


@SLOW
def test_grouped_queries():
    model, x, y = build(grouped, groups=1)
    compiled = compile(model)
    result = compiled(x, y)
    assert fused(compiled, x, y)[KERNEL] == 1
    oracle = Oracle(model, F.cross_entropy, x, y, kind="ce")
    close(result.grad_batch, oracle.grad_batch())
    close(result.diag_ggn_exact, oracle.diag_ggn_exact())


@SLOW
def test_one_sample():
    model, x, y = build()
    result = compile(model)(x[:1], y[:1])
    oracle = Oracle(model, F.cross_entropy, x[:1], y[:1], kind="ce")
    close(result.grad_batch, oracle.grad_batch())
    close(result.diag_ggn_exact, oracle.diag_ggn_exact())


def test_no_tensor_of_positions_by_positions():
    model, x, y = build()
    asked = [BatchGrad(), BatchL2Grad(), SumGradSquared(), DiagGGNMC()]
    assert of_two_positions(compile(model, asked), x, y) == []


@SLOW
def test_the_mathematics_has_one():
    model, x, y = build()
    assert of_two_positions(compile(model, [HMP()]), x, y)


@SLOW
def test_mathematics_where_something_looks_inside():
    model, x, y = build(hidden)
    compiled = compile(model, [*ASKED, DiagHessian()])
    result = compiled(x, y)
    assert fused(compiled, x, y) == {}
    with plain_mathematics():
        oracle = Oracle(model, F.cross_entropy, x, y, kind="ce")
        close(result.grad_batch, oracle.grad_batch())
        close(result.diag_ggn_exact, oracle.diag_ggn_exact())
        close(result.diag_h, oracle.diag_h())
    said = f"in mathematics: {KERNEL} in the model, because DiagHessian needs its second derivative"
    assert said in " ".join(str(compiled.explain(x, y)).split())


def test_each_op_is_asked_for_by_itself():
    """Below the parameters whose curvature is asked for, nothing looks inside."""
    model, x, y = build()
    compiled = compile(model, [BatchGrad(), DiagHessian(params="out")])
    result = compiled(x, y)
    assert fused(compiled, x, y) == {KERNEL: 1, "layer_norm": 2}
    assert f"as PyTorch's kernels: layer_norm (2), {KERNEL} (1)" in str(compiled.explain(x, y))
    with plain_mathematics():
        oracle = Oracle(model, F.cross_entropy, x, y, kind="ce")
        close(result.diag_h, {k: v for k, v in oracle.diag_h().items() if k.startswith("out")})


@SLOW
def test_results_are_differentiated_again():
    model, x, y = build(hidden)
    compiled = compile(model, [Variance()])
    found = compiled(x, y, create_graph=True)
    actual = torch.autograd.grad(sum(v.sum() for v in found.variance.values()), list(model.parameters()))
    with plain_mathematics():
        rows = []
        for k in range(N):
            value = F.cross_entropy(model(x[k : k + 1]), y[k : k + 1]) / N
            rows.append(torch.autograd.grad(value, list(model.parameters()), create_graph=True))
        total = sum(torch.stack(p).var(0, unbiased=False).sum() for p in zip(*rows, strict=True))
        expected = torch.autograd.grad(total, list(model.parameters()))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10)


@SLOW
def test_dropout_is_one_mask():
    """Of all columns: the identities of the loss as columns add up to the gradient."""
    model, x, y = build(dropout=0.5)
    compiled = compile(model, [BatchGrad()])
    result = compiled(x, y)
    assert KERNEL not in fused(compiled, x, y)
    close({k: v.sum(0) for k, v in result.grad_batch.items()}, result.grad)
    assert "its dropout is one mask" in " ".join(str(compiled.explain(x, y)).split())


class OverHeads(nn.Module):
    """Samples and heads in one axis, as [1, N H, T, D]; or samples as the queries of keys that are parameters."""

    def __init__(self, memory=False):
        super().__init__()
        self.memory, self.mix, self.out = memory, nn.Linear(D, D), nn.Linear(D, C)
        self.keys = nn.Parameter(torch.randn(1, 1, T, D)) if memory else None

    def forward(self, x):
        h = torch.tanh(self.mix(x))
        if self.memory:
            return self.out(F.scaled_dot_product_attention(h.mean(1)[None, None], self.keys, self.keys)[0, 0])
        h = h.unflatten(2, (H, -1)).transpose(1, 2).reshape(1, -1, T, D // H)
        h = F.scaled_dot_product_attention(h, h, 2 * h)
        return self.out(h.reshape(-1, H, T, D // H).transpose(1, 2).flatten(2)).mean(1)


@SLOW
@pytest.mark.parametrize("memory", [False, True])
def test_where_the_samples_are(memory):
    torch.manual_seed(0)
    model, (_, x, y) = OverHeads(memory).double(), build()
    compiled = compile(model)
    result = compiled(x, y)
    assert fused(compiled, x, y)[KERNEL] == (not memory)
    oracle = Oracle(model, F.cross_entropy, x, y, kind="ce")
    close(result.grad_batch, oracle.grad_batch())
    close(result.diag_ggn_exact, oracle.diag_ggn_exact())


@SLOW
def test_group_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(16, C)).double()
    x, y = torch.randn(N, 2, 4, 4, dtype=torch.float64), torch.tensor([4, 0, 1])
    compiled = compile(model)
    result = compiled(x, y)
    kernels = [str(n.target) for n in compiled.lower(x, y).graph_module.graph.nodes]
    assert kernels.count("aten.native_layer_norm_backward.default") == 1
    oracle = Oracle(model, F.cross_entropy, x, y, kind="ce")
    close(result.grad_batch, oracle.grad_batch())
    close(result.diag_ggn_exact, oracle.diag_ggn_exact())
    again = compile(model, [Variance()])(x, y, create_graph=True).variance["1.weight"]
    (found,) = torch.autograd.grad(again.sum(), model[0].weight)
    rows = []
    for k in range(N):
        value = F.cross_entropy(model(x[k : k + 1]), y[k : k + 1]) / N
        rows += torch.autograd.grad(value, model[1].weight, create_graph=True)
    (expected,) = torch.autograd.grad(torch.stack(rows).var(0, unbiased=False).sum(), model[0].weight)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@SLOW
def test_inside_torch_compile_and_exported():
    model, x, y = build(padded)
    compiled = compile(model)
    plain = compiled(x, y)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x, y):
        return compiled(x, y).grad_batch

    close(step(x, y), plain.grad_batch)
    exported = compiled.export(x, y).module()(x, (y,), torch.tensor(0))
    close(exported["diag_ggn_exact"], plain.diag_ggn_exact)


@SLOW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    """As far from float64 as the dtype is."""
    model, x, y = build(hidden)
    exact = compile(model)(x, y)
    compiled = fxcurv.compile(model.to(dtype), F.cross_entropy, ASKED)
    found = compiled(x.to(dtype), y)
    assert fused(compiled, x.to(dtype), y)[KERNEL] == 1
    for field in ("grad_batch", "diag_ggn_exact"):
        for name, value in getattr(exact, field).items():
            off = (getattr(found, field)[name].double() - value).norm() / value.norm()
            assert off < 16 * torch.finfo(dtype).eps, (field, name, off)


class Interacting(nn.Module):
    """Batch norm that mixes the samples, then attention of [N, 1, T, D], or to keys that are parameters."""

    def __init__(self, memory):
        super().__init__()
        self.memory, self.norm, self.out = memory, nn.BatchNorm1d(D, track_running_stats=False), nn.Linear(D, C)
        self.keys = nn.Parameter(torch.randn(1, 1, T, D))

    def forward(self, x):
        h = self.norm(x.mean(1))
        if self.memory:
            return self.out(F.scaled_dot_product_attention(h[None, None], self.keys, 2 * self.keys)[0, 0])
        h = h[:, None, None] * self.keys
        return self.out(F.scaled_dot_product_attention(h, h, h).mean((1, 2)))


@SLOW
@pytest.mark.parametrize("memory", [False, True])
def test_where_samples_interact(memory):
    torch.manual_seed(0)
    model, (_, x, y) = Interacting(memory).double(), build()
    compiled = compile(model, [DiagGGNExact()])
    result = compiled(x, y).diag_ggn_exact
    assert fused(compiled, x, y)[KERNEL] == (not memory)
    params = dict(model.named_parameters())
    with plain_mathematics():
        f = lambda *p: torch.func.functional_call(model, dict(zip(params, p, strict=True)), (x,)).flatten()  # noqa: E731
        jacobians = torch.autograd.functional.jacobian(f, tuple(p.detach() for p in params.values()))
        z = model(x).detach()
    hessian = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, y), z).reshape(z.numel(), -1)
    for name, j in zip(params, jacobians, strict=True):
        j = j.flatten(1)
        torch.testing.assert_close(result[name].flatten(), (j * (hessian @ j)).sum(0), rtol=1e-8, atol=1e-12)
