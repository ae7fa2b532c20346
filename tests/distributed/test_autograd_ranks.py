"""Two ranks: results that are differentiated again, results on parameters, and graphs under a backend of torch.compile."""

import pytest
import torch
from processes import each, on_ranks
from subjects import compare, made, mesh_of, part
from test_ranks import raised
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxcurv
from fxcurv.extensions import KFAC, BatchL2Grad, DiagGGNExact, DiagGGNMC, Variance

SIZES = [[5, 2], [0, 7]]
ASKED = [Variance(), DiagGGNExact(), BatchL2Grad(), KFAC()]


def scalar(result, weights):
    """Of everything: sums (loss, squares of the gradient, variances, diagonals, factors), and what is per sample."""
    sums = result.loss * 3 + sum(g.square().sum() for g in result.grad.values())
    for field in ("variance", "diag_ggn_exact"):
        sums = sums + sum((w * t).sum() for w, t in zip(weights, result._fields[field].values(), strict=True))
    sums = sums + sum(f.square().sum() for factors in result.kfac.values() for f in factors)
    return sums + sum(t.exp().sum() for t in result.batch_l2.values()) + result.output.square().sum()


def derivatives(compiled, model, x, y, weights):
    """(first derivatives in the parameters, in the input, second ones in the parameters along the gradient)."""
    x = x.clone().requires_grad_()
    result = compiled(x, y, seed=7, create_graph=True)
    params = list(model.parameters())
    *first, of_x = torch.autograd.grad(scalar(result, weights), [*params, x], create_graph=True)
    along = torch.autograd.grad(sum(t.square().sum() for t in first), params)
    return [t.detach() for t in first], of_x.detach(), list(along)


def again(rank):
    """Derivatives of results are those of one process."""
    torch.manual_seed(3)
    model, loss, x, y = made("mlp", 7)
    weights = [torch.randn_like(p) for p in model.parameters()]
    want = derivatives(fxcurv.compile(model, loss, ASKED, check=None), model, x, y, weights)
    compiled = fxcurv.compile(DistributedDataParallel(model), loss, ASKED, mesh=mesh_of(2))
    for sizes in SIZES:
        first, of_x, along = derivatives(compiled, model, part(x, sizes, rank), part(y, sizes, rank), weights)
        torch.testing.assert_close(first, want[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(of_x, part(want[1], sizes, rank), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(along, want[2], rtol=1e-9, atol=1e-11)


def attached(rank):
    """An optimizer's step by what `attach` leaves on parameters, DDP or not."""
    model, loss, x, y = made("squares", 7)
    fxcurv.compile(model, loss, [Variance()], check=None)(x, y).attach()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for wrap in (lambda m: m, DistributedDataParallel):
        here, loss, x, y = made("squares", 7)
        compiled = fxcurv.compile(wrap(here), loss, [Variance()], mesh=mesh_of(2), check=None)
        compiled(part(x, [5, 2], rank), part(y, [5, 2], rank)).attach()
        torch.optim.SGD(here.parameters(), lr=0.1).step()
        for p, q in zip(here.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(p.variance, q.variance, rtol=1e-9, atol=1e-12)


def backends(rank, name="aot_eager", cuts=SIZES):
    """The graph with its collectives under a backend."""
    asked = [Variance(), DiagGGNMC(2), KFAC()]
    model, loss, x, y = made("mlp", 7)
    want = fxcurv.compile(model, loss, asked, check=None)(x, y, seed=7)
    compiled = fxcurv.compile(model, loss, asked, mesh=mesh_of(2), check=None, backend=name)
    for sizes in cuts:
        compare(compiled(part(x, sizes, rank), part(y, sizes, rank), seed=7), want, asked)


def step(rank, name="aot_eager", cuts=SIZES):
    """A training step under torch.compile(fullgraph=True), whose calls are ops of it, takes the steps of one process."""
    model, loss, x, y = made("squares", 7)
    alone, *_ = made("squares", 7)
    asked = [Variance(), DiagGGNMC(2), KFAC(), BatchL2Grad()]
    compiled, plain = (
        fxcurv.compile(model, loss, asked, mesh=mesh_of(2)),
        fxcurv.compile(alone, loss, asked, check=None),
    )

    def taken(of, model, x, y, seed):
        result = of(x, y, seed=seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = result.variance[name].sqrt() + result.diag_ggn_mc[name]
                p -= 0.1 * (result.grad[name] / (noise + 1)).sin()
        return result.loss * 2, result.kfac["0.weight"][0].sum(), result.batch_l2["0.weight"]

    fast = torch.compile(taken, fullgraph=True, backend=name)
    for k, sizes in enumerate(cuts):
        found = fast(compiled, model, part(x, sizes, rank), part(y, sizes, rank), torch.tensor(k))
        first, second, rows = taken(plain, alone, x, y, k)
        torch.testing.assert_close(found, (first, second, part(rows, sizes, rank)), rtol=1e-9, atol=1e-12)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def inductor(rank):
    backends(rank, "inductor", SIZES[:1])
    step(rank, "inductor", [[5, 2], [5, 2]])


def refused(rank):
    """What sharded parameters do not do, and one rank's factors."""
    model, loss, x, y = made("squares", 2)
    x, y, mesh = part(x, [1, 1], rank), part(y, [1, 1], rank), mesh_of(2)
    fully_shard(model, mesh=mesh)
    return {
        "create_graph": raised(lambda: fxcurv.compile(model, loss, mesh=mesh)(x, y, create_graph=True)),
        "backend": raised(lambda: fxcurv.compile(model, loss, mesh=mesh, backend="inductor")(x, y)),
        "layers": raised(
            lambda: fxcurv.compile(nn.Linear(3, 2), loss, [KFAC(assign="layers")], mesh=mesh, backend="inductor")
        ),
    }


def everything(rank):
    return each((again, attached, backends, step, refused), rank)


@pytest.fixture(scope="module")
def found():
    return on_ranks(2, everything)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["again", "attached", "backends", "step"])
def test_two_ranks_have_what_one_process_has_also_with(found, name):
    assert [ranks[name] for ranks in found] == [None, None], found[0][name]


@pytest.mark.slow
def test_what_is_not_done_with_shards_is_refused_by_name(found):
    for ranks in found:
        for key, (kind, message) in ranks["refused"].items():
            assert (
                kind == "ArgumentError" and "use 'eager'" in message if key == "layers" else "fully_shard" in message
            ), key


@pytest.mark.slow
def test_inductor_compiles_a_graph_with_collectives():
    on_ranks(2, inductor, limit=900)
