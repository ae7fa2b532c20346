"""Small models: how many ops a quantity takes, and that it is the same number still."""

import operator

import pytest
import torch
from oracle import Oracle
from torch import fx, nn

import fxcurv
from fxcurv.extensions import (
    KFAC,
    KFLR,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from fxcurv.ir.emit import number_of_samples
from fxcurv.ir.graph import is_view
from fxcurv.ir.noise import uniform
from fxcurv.ir.placement import Shard
from fxcurv.rules.shorter import shorter

aten = torch.ops.aten
FREE = {aten.sym_size.int, aten.reshape.default, operator.getitem, operator.mul, number_of_samples}


def logistic_regression(features=784, n=512):
    return nn.Sequential(nn.Linear(features, 10)), torch.randn(n, features), torch.randint(10, (n,))


def mlp(features=784, width=512, n=256):
    layers = nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    return nn.Sequential(*layers), torch.randn(n, features), torch.randint(10, (n,))


# quantity -> at most (nodes, those that compute something) of the logistic regression and of the MLP
COUNTS = {
    None: ((11, 8), (25, 20)),
    BatchGrad: ((17, 9), (43, 23)),
    BatchL2Grad: ((16, 13), (40, 35)),
    SumGradSquared: ((16, 12), (40, 32)),
    Variance: ((23, 18), (59, 50)),
    DiagGGNMC: ((64, 57), (102, 79)),
    DiagGGNExact: ((41, 29), (81, 53)),
    KFAC: ((64, 56), (102, 76)),
    KFLR: ((43, 28), (82, 48)),
}
"""The plain gradient takes 8 kernels and 20, of which one makes the 1 that the loss's derivative in itself is."""


def lowered(build, quantity):
    model, x, y = build()
    asked = [] if quantity is None else [quantity()]
    return fxcurv.compile(model, nn.CrossEntropyLoss(), asked, check=None).lower(x, y)


FAST = {(logistic_regression, BatchL2Grad), (logistic_regression, DiagGGNMC), (mlp, KFLR)}
EACH = [
    pytest.param(build, quantity, marks=() if (build, quantity) in FAST else pytest.mark.slow)
    for build in (logistic_regression, mlp)
    for quantity in COUNTS
]


@pytest.mark.parametrize("build, quantity", EACH)
def test_number_of_ops(build, quantity):
    nodes = [n for n in lowered(build, quantity).graph.nodes if n.op == "call_function"]
    kernels = [n for n in nodes if n.target not in FREE and not is_view(n)]
    most = COUNTS[quantity][build is mlp]
    assert len(nodes) <= most[0] and len(kernels) <= most[1], [n.format_node() for n in nodes]


def test_the_gradient_of_an_mlp_has_the_products_alone():
    """No axis of one column, no expansion, no size is left of the walk."""
    nodes = [n for n in lowered(mlp, None).graph.nodes if n.op == "call_function"]
    assert {n.target for n in nodes if is_view(n) or n.target in FREE} == {aten.t.default, operator.getitem}
    assert [n.target for n in nodes].count(aten.mm.default) == 5  # 3 weights, 2 cotangents


def small(build):
    torch.manual_seed(0)
    model, x, y = build(n=5) if build is logistic_regression else build(features=6, width=7, n=5)
    y[2] = -100  # a sample that does not count
    return model.double(), x.double(), y


@pytest.mark.parametrize("build", [pytest.param(logistic_regression, marks=pytest.mark.slow), mlp])
def test_first_order_and_exact_columns(build):
    model, x, y = small(build)
    asked = [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), DiagGGNExact()]
    oracle = Oracle(model, nn.CrossEntropyLoss(), x, y, kind="ce")
    apart = [[e] for e in asked] if build is logistic_regression else []  # each by its own candidates
    for extensions in (asked, *apart):
        result = fxcurv.compile(model, nn.CrossEntropyLoss(), extensions, debug=True)(x, y)
        for e in extensions:
            torch.testing.assert_close(
                getattr(result, e.savefield), getattr(oracle, e.savefield)(), rtol=1e-9, atol=1e-12
            )
        torch.testing.assert_close(result.grad, oracle.grad(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("build", [pytest.param(logistic_regression, marks=pytest.mark.slow), mlp])
@pytest.mark.parametrize("draws", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_sampled_columns(build, draws):
    """The columns are -s (e_drawn - p), and everything of the same seed is of the same columns."""
    model, x, y = small(build)
    asked = [SqrtGGNMC(mc_samples=draws)]
    columns = fxcurv.compile(model, nn.CrossEntropyLoss(), asked)(x, y, seed=3)
    oracle = Oracle(model, nn.CrossEntropyLoss(), x, y, kind="ce")
    found = oracle.recover(columns.sqrt_ggn_mc)
    assert oracle.draws(found.columns).shape[:2] == (draws, 5)
    diagonal = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagGGNMC(mc_samples=draws)])(x, y, seed=3).diag_ggn_mc
    for name, value in diagonal.items():
        torch.testing.assert_close(value, columns.sqrt_ggn_mc[name].square().sum((0, 1)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "quantity, roots", [pytest.param(KFAC, SqrtGGNMC, marks=pytest.mark.slow), (KFLR, SqrtGGNExact)]
)
def test_kronecker_factors(quantity, roots):
    """Of an MLP's last layer: B of the columns at its output, which are those of its bias; A of its inputs."""
    model, x, y = small(mlp)
    factors = fxcurv.compile(model, nn.CrossEntropyLoss(), [quantity()])(x, y, seed=3)
    columns = getattr(fxcurv.compile(model, nn.CrossEntropyLoss(), [roots()])(x, y, seed=3), roots.savefield)["4.bias"]
    b = torch.einsum("vno,vnp->op", columns, columns)
    a = model[:4](x).detach()
    found = getattr(factors, quantity.savefield)
    torch.testing.assert_close(found["4.weight"][0], b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["4.weight"][1], a.t() @ a / len(x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["4.bias"][0], b, rtol=1e-9, atol=1e-12)


def test_noise_is_the_same_hash():
    """Bit by bit the definition in Python integers: two keyed rounds over the counter."""

    def mixed(x, key):
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x735A2D97 + key) & 0xFFFFFFFF
        return x ^ (x >> 15)

    seed, stream, first = 0x1234_5678_9ABC_DEF0, 2, 7
    got = uniform(
        (torch.tensor(seed), torch.tensor(first)), stream, 2, torch.zeros(3, 2, dtype=torch.float64), Shard(0)
    )
    low, high = (seed + stream * 0x9E3779B1) & 0xFFFFFFFF, (seed >> 31) & 0xFFFFFFFF
    for column in range(2):
        for n in range(3):
            for d in range(2):
                counter = ((first + n) * 2 + d) * 2 + column
                bits = mixed(mixed((counter * 0x2545F491 + low) & 0xFFFFFFFF, high), low)
                assert got[column, n, d].item() == (bits + 0.5) * 2.0**-32


def test_short_forms_under_a_second_derivative():
    """Norms of factors have no second derivative at zero: there the squares are squares."""
    model, x, y = small(mlp)
    asked = [BatchL2Grad()]
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), asked)
    norms = compiled(x, y, create_graph=True).batch_l2
    found = torch.autograd.grad(sum(n.sum() for n in norms.values()), list(model.parameters()))
    per_sample = torch.func.vmap(
        torch.func.grad(
            lambda p, a, b: (
                nn.functional.cross_entropy(
                    torch.func.functional_call(model, p, a.unsqueeze(0)), b.unsqueeze(0), reduction="sum"
                )
                / 4
            )
        ),
        (None, 0, 0),
    )
    params = {k: p.detach() for k, p in model.named_parameters()}
    total = lambda p: sum(g.square().sum() for g in per_sample(p, x, y).values())  # noqa: E731
    expected = torch.func.grad(total)(params)
    for name, value in zip(params, found, strict=True):
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_memory_of_a_part_that_is_read_whole():
    """What puts values together for others too is not taken apart: its parts would stay in memory beside it."""
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    joined = graph.call_function(aten.cat.default, ([a, b],))
    first = graph.call_function(aten.slice.Tensor, (joined, 0, 0, 1))
    for node, rows in ((a, 1), (b, 2), (joined, 3), (first, 1)):
        node.meta["val"] = torch.zeros(rows, 2)
    assert shorter(None, first) is a
    graph.call_function(aten.relu.default, (joined,))
    assert shorter(None, first) is None
