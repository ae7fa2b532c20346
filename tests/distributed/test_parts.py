"""Two ranks: batches in parts, sharded parameters that are gathered in the graph, layers' factors on one rank, refusals."""

import traceback

import pytest
import torch
from processes import on_ranks
from subjects import alone, compare, made, mesh_of, part
from test_ranks import raised

import fxcurv
from fxcurv.extensions import EKFAC, KFAC, BatchGrad, SqrtGGNMC, Variance

# ---- micro-batches ------------------------------


FEW = [BatchGrad(), Variance(), KFAC(2), SqrtGGNMC(1)]
CUTS = [[2, 0, 1], [3, 1]], [[0], [7]]


def micro(rank, name="mlp", asked=FEW, cuts=CUTS):
    """Each rank has micro-batches of its own, also of another number; in the first cut rank 1 has fewer."""
    want, _ = alone(name, 7, asked)
    model, loss, x, y = made(name, 7)
    compiled = fxcurv.compile(model, loss, asked, mesh=mesh_of(2))
    for cut in cuts:
        sizes = [sum(own) for own in cut]
        mine = list(zip(part(x, sizes, rank).split(cut[rank]), part(y, sizes, rank).split(cut[rank]), strict=True))
        found = fxcurv.accumulate(compiled, mine, seed=7)
        compare(found, want, asked, output=False)
        assert found.sizes == tuple(sizes)
    drawn = fxcurv.accumulate(compiled, mine).kfac["0.weight"][0]
    torch.manual_seed(rank)
    summed = fxcurv.over(compiled, mine)  # each batch has columns of its own
    for key, p in alone(name, 7, [Variance()])[0].variance.items():
        torch.testing.assert_close(summed.variance[key], p, rtol=1e-9, atol=1e-12)
    if mine and rank == 0:
        mine = []
    return raised(lambda: fxcurv.accumulate(compiled, mine)), drawn.sum().item()


def test_micro_batches_on_ranks(found):
    (a, drawn), (b, also) = (ranks["micro"] for ranks in found)
    assert a[0] == "ArgumentError" and "no batch at all" in a[1] and b[0] == "RankError"
    assert drawn == also, "the first rank draws the seed of all"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "squares", "transformer"])
def test_every_model_in_micro_batches(name):
    asked = [BatchGrad(), Variance(), SqrtGGNMC(1), *([KFAC(2), EKFAC(2)] if name != "transformer" else [])]
    on_ranks(2, micro, name, asked, limit=600)


# ---- in the same two processes ------------------------------


def everything(rank):
    """All of the above: to start processes takes longer than what they do."""
    return {fn.__name__: noted(fn, rank) for fn in (micro,)}


def noted(fn, rank):
    try:
        return fn(rank)
    except Exception:
        return traceback.format_exc()


@pytest.fixture(scope="module")
def found():
    """For each of two ranks, what every function gave."""
    ranks = on_ranks(2, everything)
    for here in ranks:
        for what in here.values():
            assert not isinstance(what, str) or "Traceback" not in what, what
    return ranks
