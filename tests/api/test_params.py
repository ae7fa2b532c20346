"""`params=`, of `compile` and of extensions: quantities of some of the parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from oracle import Oracle
from torch import Tensor, nn

import fxcurv
from fxcurv import errors
from fxcurv.backpack import backpack, extend
from fxcurv.extensions import (
    EKFAC,
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    Extension,
    Jacobian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)

N, CLIP = 4, 0.1
CE = nn.CrossEntropyLoss()
BY_ORACLE: dict[str, Extension] = {
    "grad_batch": BatchGrad(),
    "batch_l2": BatchL2Grad(),
    "sum_grad_squared": SumGradSquared(),
    "variance": Variance(),
    "grad_clipped": ClippedGrad(CLIP, over="param"),
    "diag_ggn_exact": DiagGGNExact(),
    "diag_ggn_exact_batch": BatchDiagGGNExact(),
    "diag_h": DiagHessian(),
    "diag_h_batch": BatchDiagHessian(),
    "sqrt_ggn_exact": SqrtGGNExact(),
    "jacobian": Jacobian(),
}
# these have oracles of their own, with which the unrestricted ones are compared elsewhere
BY_WHOLE = [
    BatchGrad(subsampling=[2, 0], savefield="grad_some"), DiagGGNMC(mc_samples=2), BatchDiagGGNMC(), SqrtGGNMC(),
    KFAC(), KFLR(), EKFAC(), GGNMP(), HMP(), PCHMP(),
]  # fmt: skip


class Residual(nn.Module):
    """A body with a branch, and a head; everything is smooth."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.body[0](x))
        return self.head(h + torch.sigmoid(self.body[1](h)))


def build() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Residual().double(), torch.randn(N, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])


def close(actual: Any, expected: Any, names: list[str], what: str) -> None:
    assert list(actual) == names, what
    for name in names:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-8, atol=1e-11, msg=lambda m: f"{what}: {m}")


def check_against_oracle(result: Any, oracle: Oracle, names: list[str], fields: Any) -> None:
    for field in fields:
        expected = oracle.grad_clipped(CLIP, "param") if field == "grad_clipped" else getattr(oracle, field)()
        close(getattr(result, field), expected, names, field)


HEAD, LOWEST = ["head.weight", "head.bias"], ["body.0.weight", "body.0.bias"]
CHOICES: dict[str, tuple[Any, list[str]]] = {
    "name": ("head.bias", ["head.bias"]),
    "prefix": ("head", HEAD),
    "pattern": ("head.*", HEAD),
    "prefix by pattern": ("b*.0", LOWEST),
    "list": (["head.bias", "body.0"], [*LOWEST, "head.bias"]),
    "predicate": (lambda name, p: p.ndim == 1, ["body.0.bias", "body.1.bias", "head.bias"]),
}


@pytest.mark.parametrize("kind", CHOICES)
def test_choices(kind: str) -> None:
    """Of extensions, those of compile's."""
    model, _, _ = build()
    choice, names = CHOICES[kind]
    e = BatchGrad(params=choice)
    assert fxcurv.compile(model, CE, params=choice).covered() == (names, {})
    assert fxcurv.compile(model, CE, [e]).covered() == ([name for name, _ in model.named_parameters()], {e: names})
    assert hash(e) == hash(BatchGrad(params=choice))


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k == "list" else pytest.mark.slow) for k in CHOICES])
def test_choices_of_compile(kind: str) -> None:
    """The gradient and all quantities are of these parameters."""
    model, x, y = build()
    choice, names = CHOICES[kind]
    extensions = {k: BY_ORACLE[k] for k in ("grad_batch", "diag_ggn_exact", "diag_h")}
    result = fxcurv.compile(model, CE, extensions.values(), params=choice, debug=True)(x, y)
    check_against_oracle(result, Oracle(model, CE, x, y, kind="ce"), names, ["grad", *extensions])


@pytest.mark.parametrize(
    ("where", "choice", "names"),
    [
        ("extensions", "head", HEAD),
        pytest.param("compile", "body.0", LOWEST, marks=pytest.mark.slow),
        pytest.param("compile", "head", HEAD, marks=pytest.mark.slow),
        pytest.param("extensions", "body.0", LOWEST, marks=pytest.mark.slow),
    ],
)
def test_every_extension(where: str, choice: str, names: list[str]) -> None:
    model, x, y = build()
    every = [*BY_ORACLE.values(), *BY_WHOLE]
    of_compile = choice if where == "compile" else None
    asked = [e if of_compile else dataclasses.replace(e, params=choice) for e in every]
    result = fxcurv.compile(model, CE, asked, params=of_compile, debug=True)(x, y, seed=3)
    oracle = Oracle(model, CE, x, y, kind="ce")
    close(result.grad, oracle.grad(), names if of_compile else list(oracle.params), "grad")
    check_against_oracle(result, oracle, names, BY_ORACLE)
    whole = fxcurv.compile(model, CE, BY_WHOLE)(x, y, seed=3)
    for e in BY_WHOLE:
        actual, expected = getattr(result, e.savefield), getattr(whole, e.savefield)
        assert list(actual) == names
        for name in names:
            if callable(expected[name]):
                vectors = torch.randn(2, *dict(model.named_parameters())[name].shape, dtype=torch.float64)
                torch.testing.assert_close(actual[name](vectors), expected[name](vectors), rtol=1e-8, atol=1e-11)
            elif isinstance(expected[name], Tensor):
                torch.testing.assert_close(actual[name], expected[name])
            else:
                torch.testing.assert_close(list(map(abs, actual[name])), list(map(abs, expected[name])))


def test_matrices_over_some_parameters() -> None:
    """The principal submatrix, in the order of the model."""
    model, x, y = build()
    asked = [GGNMP(params=["head", "body.0.bias"]), HMP(params="body.1")]
    result = fxcurv.compile(model, CE, asked)(x, y)
    oracle = Oracle(model, CE, x, y)
    of = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    for operator, matrix, names in (
        (result.ggn, oracle.ggn_matrix(), ["body.0.bias", *HEAD]),
        (result.hessian, oracle.hessian_matrix(), ["body.1.weight", "body.1.bias"]),
    ):
        index = torch.tensor([k for k, name in enumerate(of) if name in names])
        dense = operator @ torch.eye(len(index), dtype=torch.float64)
        torch.testing.assert_close(dense, matrix[index][:, index])
        vector = {name: torch.randn_like(p) for name, p in model.named_parameters() if name in names}
        flat = torch.cat([v.flatten() for v in vector.values()])
        product = operator @ vector
        assert list(product) == names
        torch.testing.assert_close(torch.cat([v.flatten() for v in product.values()]), dense @ flat)


def test_two_instances() -> None:
    """Each field has its own parameters, and extra results of different parameters have names of their own."""
    model, x, y = build()
    asked = [
        DiagGGNExact(params="head"),
        DiagGGNExact(params="body", savefield="below"),
        ClippedGrad(CLIP, params="head"),
        ClippedGrad(CLIP, savefield="clipped_below", params="body.0"),
        GGNMP(params="head"),
        GGNMP(params="body.1.bias", savefield="low"),
    ]
    result = fxcurv.compile(model, CE, asked, debug=True)(x, y)
    oracle = Oracle(model, CE, x, y)
    names = list(oracle.params)
    close(result.diag_ggn_exact, oracle.diag_ggn_exact(), HEAD, "head")
    close(result.below, oracle.diag_ggn_exact(), names[:-2], "below")
    squares = oracle.batch_l2()
    for norms, clipped, of in (
        (result.sample_norms, result.grad_clipped, HEAD),
        (result.sample_norms_clipped_below, result.clipped_below, LOWEST),
    ):
        expected = sum(squares[name] for name in of).sqrt()
        torch.testing.assert_close(norms, expected)
        scale = (CLIP / expected).clamp(max=1)
        close(
            clipped, {k: torch.einsum("n...,n->...", g, scale) for k, g in oracle.grad_batch().items()}, of, "clipped"
        )
    assert result.ggn.shape == (15, 15)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(result.ggn_low @ eye, oracle.ggn()["body.1.bias"])
    torch.testing.assert_close(result.low["body.1.bias"](eye), oracle.ggn()["body.1.bias"])


def widths(program: Any, module: str) -> set[int]:
    """The numbers of columns V of the cotangents [V, N, features] that the walk carries at a module."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)]
    here = [n for n in nodes if n.meta.get("origin", {}).get("stage") == "propagate" and n.meta["val"].ndim == 3]
    return {int(n.meta["val"].shape[0]) for n in here if n.meta["origin"].get("module") == module}


def test_columns_stop_where_no_one_needs_them() -> None:
    """The gradient goes on alone; without one nothing is below the head at all."""
    model, x, y = build()
    of_head = [DiagGGNExact(params="head.*"), SqrtGGNMC(mc_samples=7, params="head.*")]
    narrow = fxcurv.compile(model, CE, of_head).lower(x, y)
    assert widths(narrow, "body.1") == {1}
    alone = fxcurv.compile(model, CE, of_head, params="head.*").lower(x, y)
    assert not widths(alone, "body.1")
    assert not widths(alone, "body.0")


@pytest.mark.slow
def test_groups_stop_separately() -> None:
    """The sampled columns go further than the exact ones."""
    model, x, y = build()
    wide = fxcurv.compile(model, CE, [DiagGGNExact(), SqrtGGNMC(mc_samples=7)]).lower(x, y)
    assert max(widths(wide, "body.1")) > 8
    both = [DiagGGNExact(params="head.*"), SqrtGGNMC(mc_samples=7, params="body.1")]
    assert max(widths(fxcurv.compile(model, CE, both).lower(x, y), "body.1")) == 8


@pytest.mark.slow
def test_residuals_stop_where_no_one_needs_them() -> None:
    """The Hessian's columns of the ops before the head are none of the head's business."""
    model, x, y = build()
    count = lambda **params: sum(  # noqa: E731
        count for name, count, _ in fxcurv.compile(model, CE, [DiagHessian(**params)]).explain(x, y).columns
        if "residuals" in name
    )  # fmt: skip
    assert count(params="head") == 0
    assert count(params="body.1") == 4
    assert count() == 8


@pytest.mark.slow
def test_a_body_that_the_quantity_could_not_pass() -> None:
    """What is refused for a layer is no obstacle for those after it."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh())
    model = nn.Sequential(body, nn.Linear(4, 3)).double()
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    with pytest.raises(errors.ExtensionError, match=r"0\.1\.weight"):
        fxcurv.compile(model, CE, [KFAC(others="error")])(x, y)
    for e in (KFAC(params="1"), KFLR(params="1"), KFRA(params="1")):
        actual = getattr(fxcurv.compile(model, CE, [e])(x, y, seed=1), e.savefield)
        head = fxcurv.compile(model[1], CE, [dataclasses.replace(e, params=None)])
        expected = getattr(head(body(x).detach(), y, seed=1), e.savefield)
        for name in ("weight", "bias"):
            torch.testing.assert_close(list(actual[f"1.{name}"]), list(expected[name]))


@pytest.mark.slow
def test_kfra_passes_only_the_branch_that_it_needs() -> None:
    model, x, y = build()
    with pytest.raises(errors.ExtensionError, match="joins two branches"):
        fxcurv.compile(model, CE, [KFRA()])(x, y)
    result = fxcurv.compile(model, CE, [KFRA(params="body.1"), KFRA(params="head", savefield="of_head")])(x, y)
    oracle = Oracle(model, CE, x, y)
    h = oracle.h.sum(0)
    torch.testing.assert_close(result.of_head["head.bias"][0], h)
    low = torch.tanh(model.body[0](x))
    slope = torch.sigmoid(model.body[1](low)) * (1 - torch.sigmoid(model.body[1](low)))
    m = model.head.weight.T @ h @ model.head.weight
    expected = torch.einsum("ni,ij,nj->ij", slope, m, slope) / N
    torch.testing.assert_close(result.kfra["body.1.weight"][0], expected.detach())
    torch.testing.assert_close(result.kfra["body.1.weight"][1], (low.T @ low / N).detach())


def test_tied_parameters_have_all_their_names() -> None:
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
            self.last.weight = self.first.weight

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    model = Tied().double()
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    oracle = Oracle(model, CE, x, y)
    for choice in ("first.weight", "last.weight", lambda name, p: name == "last.weight"):
        e = DiagHessian(params=choice)
        assert fxcurv.compile(model, CE, [e]).covered()[1] == {e: ["first.weight"]}
    asked = [DiagHessian(params="last.weight"), BatchGrad(params="last")]
    result = fxcurv.compile(model, CE, asked, debug=True)(x, y)
    close(result.diag_h, oracle.diag_h(), ["first.weight"], "tied")
    close(result.grad_batch, oracle.grad_batch(), ["first.weight", "last.bias"], "by prefix")


@pytest.mark.slow
def test_differentiable() -> None:
    model, x, y = build()
    result = fxcurv.compile(model, CE, [DiagGGNExact(params="head")])(x, y, create_graph=True)
    total = sum(v.sum() for v in result.diag_ggn_exact.values())
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    whole = fxcurv.compile(model, CE, [DiagGGNExact()])(x, y, create_graph=True).diag_ggn_exact
    expected = torch.autograd.grad(sum(whole[name].sum() for name in HEAD), list(model.parameters()), allow_unused=True)
    for a, b, p in zip(grads, expected, model.parameters(), strict=True):
        zero = torch.zeros_like(p)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


def test_attached_and_explained() -> None:
    model, x, y = build()
    compiled = fxcurv.compile(model, CE, [BatchGrad(params="head"), DiagGGNExact(params="head.bias")])
    rows = {(r.param, r.extension) for r in compiled.explain(x, y).rows}
    own = {row for row in rows if row[1] != "gradient"}
    assert own == {("head.weight", "BatchGrad"), ("head.bias", "BatchGrad"), ("head.bias", "DiagGGNExact")}
    assert {p for p, e in rows if e == "gradient"} == {name for name, _ in model.named_parameters()}
    compiled(x, y).attach()
    assert hasattr(model.head.weight, "grad_batch")
    assert not hasattr(model.head.weight, "diag_ggn_exact")
    assert not hasattr(model.body[0].weight, "grad_batch")
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "asked",
    [
        [BatchGrad(params="head")],
        pytest.param([BatchGrad(params="head"), DiagGGNExact(params="body.0")], marks=pytest.mark.slow),
    ],
    ids=["first order", "second order"],
)
def test_the_drop_in(asked: list[Extension]) -> None:
    model, x, y = build()
    oracle = Oracle(model, CE, x, y)
    expected = {"grad_batch": oracle.grad_batch(), "diag_ggn_exact": oracle.diag_ggn_exact(), "grad": oracle.grad()}
    copied, lossfunc = extend(build()[0]), extend(nn.CrossEntropyLoss())
    loss = lossfunc(copied(x), y)
    with backpack(*asked):
        loss.backward()
    found = dict(copied.named_parameters())
    for name, p in found.items():
        torch.testing.assert_close(p.grad, expected["grad"][name])
    for e, names in zip(asked, (HEAD, LOWEST), strict=False):
        assert [name for name, p in found.items() if hasattr(p, e.savefield)] == names
        for name in names:
            torch.testing.assert_close(getattr(found[name], e.savefield), expected[e.savefield][name])


@pytest.mark.slow
def test_frozen_parameters_are_never_among_them() -> None:
    model, x, y = build()
    compiled = fxcurv.compile(model, CE, [BatchGrad(params="head")], params=["head", "body.1.bias"])
    assert list(compiled(x, y).grad_batch) == HEAD
    model.head.weight.requires_grad_(False)
    result = compiled(x, y)
    assert (list(result.grad), list(result.grad_batch)) == (["body.1.bias", "head.bias"], ["head.bias"])
    model.head.bias.requires_grad_(False)
    with pytest.raises(errors.ArgumentError, match=r"'head' matches no trainable parameter: .*'head.weight'.* frozen"):
        compiled(x, y)


@pytest.mark.parametrize(
    ("of", "choice", "error", "words"),
    [
        ("compile", "haed", errors.ArgumentError, r"compile: params='haed' matches no parameter; close are \['head'"),
        ("compile", ["head", "body.7"], errors.ArgumentError, r"'body.7' matches no parameter.*body\.0"),
        ("compile", lambda name, p: False, errors.ArgumentError, "takes none of the trainable"),
        ("compile", 3, errors.ArgumentError, "pass a name, a prefix"),
        ("compile", [], errors.ArgumentError, "pass a name, a prefix"),
        ("extension", "hea", errors.ExtensionError, "DiagGGNExact: params='hea' matches no parameter; close are"),
        ("extension", "body.1", errors.ExtensionError, r"left out by compile\(params=...\)"),
        ("extension", nn.Linear(1, 1), errors.ExtensionError, "DiagGGNExact.*pass a name, a prefix"),
    ],
)
def test_refused(of: str, choice: Any, error: type, words: str) -> None:
    model, _, _ = build()
    with pytest.raises(error, match=words):
        if of == "compile":
            fxcurv.compile(model, CE, params=choice)
        else:
            fxcurv.compile(model, CE, [DiagGGNExact(params=choice)], params=["head", "body.0"])
