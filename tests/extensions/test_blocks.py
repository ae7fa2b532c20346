"""`kronecker.Blocks` against dense matrices."""

import pytest
import torch
from torch import nn

import fxcurv
from fxcurv.errors import ArgumentError
from fxcurv.extensions import EKFAC, KFLR
from fxcurv.kronecker import Arrangement, Blocks, Eigenbasis, Kronecker, dense, eigenbasis, solve


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.head = nn.Embedding(5, 4), nn.ConvTranspose1d(4, 2, 2), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(self.embed(x).mT)).flatten(1))


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    x, y = torch.randint(5, (30, 3)), torch.randint(3, (30,))
    return fxcurv.compile(Net().double(), nn.CrossEntropyLoss(), [KFLR(), EKFAC(fisher="empirical")], check=None)(x, y)


@pytest.fixture(params=["kflr", "ekfac"])
def factors(request, result):
    return getattr(result, request.param)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_blocks_are_their_dense_matrix(factors):
    blocks = Blocks(factors)
    full, d = torch.block_diag(*(dense(f) for f in factors.values())), blocks.shape[0]
    eye, v = torch.eye(d).double(), torch.randn(d, 4, generator=torch.Generator().manual_seed(1)).double()
    close(blocks.dense(), full)
    close(blocks @ v, full @ v)
    close(blocks @ v[:, 0], full @ v[:, 0])
    damped = full + 0.1 * eye
    close(blocks.solve(v, 0.1), torch.linalg.solve(damped, v))
    close(blocks.inverse(0.1).dense(), torch.linalg.inv(damped))
    close(blocks.sqrt().dense() @ blocks.sqrt().dense(), full)
    close(blocks.logdet(0.1), torch.logdet(damped))
    close(blocks.trace(), full.trace())
    close(torch.cat([t.flatten() for t in blocks.diag().values()]), full.diagonal())
    close(torch.cat([t.flatten() for t in blocks.inverse(0.1).diag().values()]), torch.linalg.inv(damped).diagonal())
    close(blocks.quadratic(v), (v * (full @ v)).sum(0))
    named = {n: t.reshape(4, *f.arrangement.shape) for (n, f), t in zip(
        factors.items(), v.t().split([len(dense(f)) for f in factors.values()], 1), strict=True
    )}  # fmt: skip
    close(torch.cat([t.flatten(1) for t in (blocks @ named).values()], 1).t(), full @ v)
    close(blocks.quadratic(named), (v * (full @ v)).sum(0))
    assert blocks.dtype == torch.float64 and blocks.T is blocks and set(blocks) == set(factors)


def test_samples_have_the_covariance(result):
    part = {n: f for n, f in result.kflr.items() if n.startswith("conv")}
    inverse = Blocks(part).inverse(0.5)
    draws = inverse.sample(200_000, torch.Generator().manual_seed(0))
    flat = torch.cat([t.flatten(1) for t in draws.values()], 1)
    torch.testing.assert_close(flat.t() @ flat / len(flat), inverse.dense(), rtol=0, atol=0.03)


def test_damping_by_factors(result):
    b, a = result.kflr["head.weight"]
    pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
    want = torch.kron(b + 0.3 / pi * torch.eye(3).double(), a + 0.3 * pi * torch.eye(8).double())
    one = Blocks({"head.weight": result.kflr["head.weight"], "head.bias": result.kflr["head.bias"]})
    bias = result.kflr["head.bias"][0] + 0.09 * torch.eye(3).double()
    close(one.damped(0.09, pi=True).dense(), torch.block_diag(want, bias))
    v = torch.ones(27).double()
    close(one.solve(v, 0.09, pi=True), torch.linalg.solve(torch.block_diag(want, bias), v))
    with pytest.raises(ArgumentError, match="eigenbasis"):
        Blocks(result.ekfac).solve(
            {n: torch.zeros(f.arrangement.shape).double() for n, f in result.ekfac.items()}, 0.1, pi=True
        )


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_factors_that_are_indefinite_by_rounding_give_no_nan(scale):
    torch.manual_seed(0)
    rows = torch.randn(3, 40)
    b, a = scale * rows[:, :8].t() @ rows[:, :8], rows.t() @ rows
    assert scale == 0 or torch.linalg.eigvalsh(a).min() < 0
    arrangement = Arrangement((8, 40), (8, 40), (0,), (1,))
    for factors in (
        Kronecker([b, a], arrangement),
        Eigenbasis([torch.eye(8), torch.eye(40), a[:8] - 1e-6], arrangement),
    ):
        blocks = Blocks({"w": factors})
        v = torch.randn(320)
        found = [blocks.sqrt() @ v, blocks.solve(v, 1e-6), blocks.sample(3)["w"], blocks.logdet(1e-6)]
        found += (
            [blocks.solve(v, 1e-6, pi=True), blocks.logdet(1e-6, pi=True)] if isinstance(factors, Kronecker) else []
        )
        assert all(t.isfinite().all() for t in found)
        assert blocks.logdet() == -torch.inf


@pytest.mark.parametrize("damping", [(1e-9, 1e-9), 1e-12])
def test_solving_with_factors_that_are_indefinite_by_rounding(damping):
    """Damping far below the rounding: the solution is finite, and no direction is turned round."""
    torch.manual_seed(0)
    rows = torch.randn(3, 40)
    factors = Kronecker([rows[:, :8].t() @ rows[:, :8], rows.t() @ rows], Arrangement((8, 40), (8, 40), (0,), (1,)))
    for _ in range(4):
        v = torch.randn(8, 40)
        found = solve(factors, v, damping)
        assert found.isfinite().all() and (v * found).sum() > 0
    with pytest.raises(ArgumentError, match="singular"):
        solve(factors, v, 0.0)


def test_a_basis_goes_on_from_an_earlier_one(result):
    """Nothing changes where the factors have not; where they have, steps tend to the new eigenvectors, orthogonal throughout."""
    factors = result.kflr["head.weight"]
    first = eigenbasis(factors)
    close(dense(eigenbasis(factors, first)), dense(factors))
    gen = torch.Generator().manual_seed(3)
    values = [torch.linspace(1, 3, len(f)).double() ** 2 for f in factors]
    near = [torch.eye(len(f)).double() + 0.05 * torch.randn(len(f), len(f), generator=gen).double() for f in factors]
    turns = [torch.linalg.qr(t)[0] for t in near]
    moved = [q @ q1 @ v.diag() @ q1.T @ q.T for q, q1, v in zip(first[:2], turns, values, strict=True)]
    moved = Kronecker(moved, factors.arrangement)
    off = []
    for steps in (1, 5, 200):
        basis = eigenbasis(moved, first, steps)
        off.append(float((dense(basis) - dense(moved)).norm()))
        close(basis[-1].sum(), dense(moved).trace())
        for q in basis[:2]:
            close(q.T @ q, torch.eye(len(q)).double())
    assert off[0] > off[1] > 1e3 * off[2]
    starts = Blocks({"w": moved}, start=Blocks({"w": factors}), steps=200)
    close(starts.inverse(0.1).dense(), torch.linalg.inv(dense(moved) + 0.1 * torch.eye(len(dense(moved))).double()))
    close(starts.damped(0.1, pi=True).dense(), Blocks({"w": moved}).damped(0.1, pi=True).dense())
    with pytest.raises(ArgumentError, match="start is of"):
        eigenbasis(result.kflr["head.bias"], first)


def test_what_blocks_refuse(result):
    blocks = Blocks(result.kflr)
    for wrong, says in (
        ({"a": torch.zeros(1)}, "one tensor for each"),
        (torch.zeros(3), "multiply a dict"),
        (1.0, "not float"),
    ):
        with pytest.raises(ArgumentError, match=says):
            blocks @ wrong
    singular = Kronecker([torch.tensor([1.0, 0.0, 2.0]).diag()], Arrangement((3,), (3,), (0,)))
    with pytest.raises(ArgumentError, match="singular"):
        Blocks({"bias": singular}).inverse()
    for turn in torch.randn(40, 2, 2, generator=torch.Generator().manual_seed(0)).double():
        one = turn[:1]
        by_rounding = Kronecker([one.T @ one], Arrangement((2,), (2,), (0,)))
        with pytest.raises(ArgumentError, match="singular"):
            Blocks({"bias": by_rounding}).inverse()
        assert Blocks({"bias": by_rounding}).logdet() == -torch.inf
    with pytest.raises(ArgumentError, match="not negative"):
        blocks.logdet(-1)
    with pytest.raises(ArgumentError, match="pass the field of KFAC"):
        Blocks(result.grad)


def test_what_is_no_vector_damping_start_or_factor(result):
    """By a typed error that says the way out, alike for one block and for all."""
    blocks, one = Blocks(result.kflr), result.kflr["head.weight"]
    v = {n: torch.ones(f.arrangement.shape).double() for n, f in result.kflr.items()}
    sizes = [f.arrangement.shape for f in result.kflr.values()]
    other, nan = Arrangement((8, 3), (8, 3), (0,), (1,)), Kronecker([f * torch.nan for f in one], one.arrangement)
    stacked = Kronecker([torch.stack([f, f]) for f in one], one.arrangement)
    in_basis = Eigenbasis([*eigenbasis(one)[:2], nan[0][0, 0].expand(3, 8)], one.arrangement)
    for wrong, says in (
        (lambda: blocks @ {n: torch.ones(7).double() for n in v}, r"'embed.weight'.*\[7\].*\[5, 4\]"),
        (lambda: blocks @ {n: t.float() for n, t in v.items()}, "float32.*float64"),
        (lambda: blocks @ {n: t.long() for n, t in v.items()}, "int64.*float64"),
        (lambda: blocks @ dict.fromkeys(v, 1.0), "is a float"),
        (lambda: blocks.inverse("a"), "damping='a'"),
        (lambda: blocks.inverse(float("nan")), "damping=nan"),
        (lambda: blocks.solve(v, -0.1), "damping=-0.1.*not negative"),
        (lambda: blocks.scaled(-1), "factor=-1"),
        (lambda: solve(one, v["head.weight"], -0.1), "damping=-0.1.*not negative"),
        (lambda: solve(one, v["head.weight"], (0.1, -0.1)), "damping=-0.1"),
        (lambda: solve(one, v["head.weight"], [0.1]), "a pair is of the two factors"),
        (lambda: solve(result.ekfac["head.weight"], v["head.weight"], (0.1, 0.1)), "a pair is of the two factors"),
        (lambda: solve(one, v["head.weight"].float(), 0.1), "float32"),
        (lambda: Blocks({"w": one}, start=Blocks({"v": one})), "start is of None"),
        (lambda: Blocks({"w": one}, start=Blocks({"w": Kronecker(one[::-1], other)})), "same joint="),
        (lambda: Blocks({"w": one}, start=Blocks({"w": one}), steps=0), "steps=0"),
        (lambda: Blocks(result), r"\['Result'\]: pass the field"),
        (lambda: Blocks({"w": stacked}), "block of 'w'.*those of each model"),
        (lambda: solve(stacked, v["head.weight"], 0.1), "those of each model"),
        (lambda: Blocks({"w": nan}).inverse(0.1), "block of 'w' is not finite"),
        (lambda: Blocks({"w": nan}).logdet(0.1), "block of 'w' is not finite"),
        (lambda: solve(nan, v["head.weight"], 0.1), "not finite"),
        (lambda: Blocks({"w": in_basis}).sqrt(), "block of 'w' is not finite"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=says):
            wrong()
    pair = solve(one, v["head.weight"], [0.3, 0.2])
    close(pair, solve(one, v["head.weight"], (0.3, 0.2)))
    assert [tuple(t.shape) for t in (blocks @ v).values()] == sizes


def test_a_parameter_without_a_dimension_and_vectors_of_every_form():
    arrangement, scale = Arrangement((2,), (2,), (0,)), Arrangement((), (1,), (0,))
    blocks = Blocks(
        {"scale": Kronecker([torch.tensor([[3.0]])], scale), "bias": Kronecker([torch.eye(2)], arrangement)}
    )
    full, v = torch.tensor([3.0, 1.0, 1.0]).diag(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    named = {"scale": v[0], "bias": v[1:].T}
    close(blocks @ v, full @ v)
    close((blocks @ named)["scale"], 3 * v[0])
    close(blocks.quadratic(named), blocks.quadratic(v))
    close(blocks.quadratic({"scale": v[0, 0], "bias": v[1:, 0]}), blocks.quadratic(v[:, 0]))
    assert (blocks @ v[:, :0]).shape == (3, 0)
