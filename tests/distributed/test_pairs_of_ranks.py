"""Inner products of samples of several ranks: each has the rows of its own samples, and columns for those of all ranks."""

import pytest
import torch
from processes import each, on_ranks
from subjects import made, mesh_of, part
from test_ranks import raised
from torch import nn
from torch.distributed.fsdp import fully_shard

import fxcurv
from fxcurv.extensions import NTK, Dots, EighGGN, GramGGN, GramGrad, Variance

ASKED = [GramGrad(), NTK(), EighGGN(top=3)]
ROOTS = [GramGGN(), GramGGN(mc_samples=2, savefield="gram_mc"), GramGrad(), Variance()]
CUTS = ([5, 2], [0, 7])
FIELDS = ("gram_grad", "gram_ggn", "gram_mc", "ntk", "variance")


def alone(name, asked, n=7):
    model, loss, x, y = made(name, n)
    return fxcurv.compile(model, loss, asked, check=None)(x, y, seed=7)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def paired(rank, name, asked=ASKED, wrap=False, cuts=CUTS):
    want = alone(name, asked)
    model, loss, x, y = made(name, 7)
    if wrap:
        fully_shard(model[0], mesh=mesh_of(2))
        fully_shard(model, mesh=mesh_of(2))
    compiled = fxcurv.compile(model, loss, asked, mesh=mesh_of(2))
    for sizes in cuts:
        result = compiled(part(x, sizes, rank), part(y, sizes, rank), seed=7)
        for field in [f for f in FIELDS if f in {e.savefield for e in asked}]:
            for key, value in getattr(want, field).items():
                same(result.whole(field)[key], value)
        if "gram_grad" in want._fields:
            assert next(iter(result.gram_grad.values())).shape == (sizes[rank], 7), "rows of its own samples alone"
        if "eigh_ggn" in want._fields:
            eigenpairs(result, want)
    assert len(vars(compiled._programs.named)) == 1, "one program serves all sizes"


def eigenpairs(result, want):
    same(result.eigh_ggn_values, want.eigh_ggn_values)
    same(result.whole("eigh_ggn_second"), want.eigh_ggn_second)
    got, expected = ({n: plain(t) for n, t in r.eigh_ggn.items()} for r in (result, want))
    signs = sum((got[n] * expected[n]).flatten(1).sum(1) for n in expected).sign()
    for n, vectors in expected.items():
        same(got[n] * signs.reshape(-1, *[1] * (vectors.ndim - 1)), vectors)
    same(result.whole("eigh_ggn_first") * signs, want.eigh_ggn_first)


def plain(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def perceptron(rank):
    paired(rank, "squares")


def roots(rank):
    """Beside quantities that are summed, and of sampled columns, which are those of one process."""
    paired(rank, "squares", ROOTS, cuts=CUTS[:1])


def sharded(rank):
    paired(rank, "squares", [GramGrad(), EighGGN(top=3)], wrap=True, cuts=CUTS[:1])


def convolution(rank):
    paired(rank, "cnn", [GramGrad(), NTK(), EighGGN(top=3)])


def tied(rank):
    """Of an embedding that is also the head, P itself travels."""
    _, loss, x, y = made("transformer", 7)
    vectors = {n: torch.ones(1, *p.shape).double() for n, p in made("transformer", 7)[0].named_parameters()}
    asked = [GramGrad(), NTK(), Dots(vectors)]
    paired(rank, "transformer", asked)


def differentiated(rank):
    """What a rank makes of its rows has a derivative in the samples of the other, too."""
    sizes, weight = [5, 2], torch.linspace(1, 2, 49).double().reshape(7, 7)

    def total(result, rows):
        return sum((t.square() * weight[rows]).sum() for t in result.gram_grad.values())

    model, loss, x, y = made("squares", 7)
    whole = fxcurv.compile(model, loss, [GramGrad()], check=None)(x, y, create_graph=True)
    want = torch.autograd.grad(total(whole, slice(0, 7)), list(model.parameters()))
    compiled = fxcurv.compile(model, loss, [GramGrad()], mesh=mesh_of(2), check=None)
    result = compiled(part(x, sizes, rank), part(y, sizes, rank), create_graph=True)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for got, expected in zip(torch.autograd.grad(total(result, rows), list(model.parameters())), want, strict=True):
        same(got, expected)


def broken(rank):
    """A rank that raises while the program runs: the other raises too, and the next call works."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    loss, x, y = nn.CrossEntropyLoss(), torch.randint(5, (4, 2)), torch.randint(2, (4,))
    want = fxcurv.compile(model, loss, [GramGrad()], check=None)(x, y).gram_grad["2.weight"]
    compiled = fxcurv.compile(model, loss, [GramGrad()], mesh=mesh_of(2), check=None)
    mine = part(x, [3, 1], rank), part(y, [3, 1], rank)
    compiled(*mine)
    found = raised(lambda: compiled(mine[0] + 5 * rank, mine[1]))
    same(compiled(*mine).whole("gram_grad")["2.weight"], want)
    return found


def refused(rank):
    model, loss, _, _ = made("squares", 7)
    return raised(lambda: fxcurv.compile(model, loss, [NTK()], mesh=mesh_of(2), backend="inductor"))


RUN = (perceptron, differentiated, broken, refused)
SLOW = (roots, sharded, convolution, tied)


def some(rank):
    return each(RUN, rank)


def others(rank):
    return each(SLOW, rank)


@pytest.fixture(scope="module")
def found():
    """For each of two ranks, what every function gave."""
    return on_ranks(2, some, limit=900)


@pytest.mark.parametrize("what", [fn.__name__ for fn in RUN])
def test_pairs_across_ranks(found, what):
    for ranks in found:
        assert not isinstance(ranks[what], str), ranks[what]


def test_a_rank_that_raises_has_all_raise(found):
    one, other = (ranks["broken"] for ranks in found)
    assert one[0] == "RankError" and other[0] == "ArgumentError", (one, other)


def test_other_backends_are_refused(found):
    for ranks in found:
        kind, message = ranks["refused"]
        assert kind == "ArgumentError" and "NTK" in message and "use 'eager'" in message


@pytest.mark.slow
def test_pairs_of_other_kinds():
    for ranks in on_ranks(2, others, limit=900):
        for what in ranks.values():
            assert not isinstance(what, str), what
