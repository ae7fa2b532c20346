"""Two ranks: batches in parts, sharded parameters that are gathered in the graph, layers' factors on one rank, refusals."""

import time
import unittest.mock

import pytest
import torch
from processes import each, on_ranks
from subjects import alone, compare, made, mesh_of, part
from test_ranks import raised
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fxcurv
from fxcurv.extensions import EKFAC, GGNMP, HMP, KFAC, BatchGrad, SqrtGGNMC, SumGradSquared, Variance
from fxcurv.ir.private import pytree
from fxcurv.ir.shards import End
from fxcurv.kronecker import Blocks
from fxcurv.rules.traits import over_ranks

# ---- micro-batches ------------------------------


FEW = [BatchGrad(), Variance(), KFAC(2)]
CUTS = [[2, 0, 1], [3, 1]], [[0], [7]]


def micro(rank, name="mlp", asked=FEW, cuts=CUTS):
    """Each rank has micro-batches of its own, also of another number; in the first cut rank 1 has fewer.

    Args:
        asked: `Variance` and, third, a sampled quantity among them.
    """
    want, _ = alone(name, 7, asked)
    model, loss, x, y = made(name, 7)
    compiled = fxcurv.compile(model, loss, asked, mesh=mesh_of(2), check=None)
    for cut in cuts:
        sizes = [sum(own) for own in cut]
        mine = list(zip(part(x, sizes, rank).split(cut[rank]), part(y, sizes, rank).split(cut[rank]), strict=True))
        found = fxcurv.accumulate(compiled, mine, seed=7)
        compare(found, want, asked, output=False)
        assert found.sizes == tuple(sizes)
    drawn = pytree.tree_leaves(fxcurv.accumulate(compiled, mine)[asked[2]])[0]  # of sampled columns
    torch.manual_seed(rank)
    summed = fxcurv.over(compiled, mine)  # each batch has columns of its own
    for key, p in want.variance.items():
        torch.testing.assert_close(summed.variance[key], p, rtol=1e-9, atol=1e-12)
    if mine and rank == 0:
        mine = []
    return raised(lambda: fxcurv.accumulate(compiled, mine)), drawn.sum().item()


def test_micro_batches_on_ranks(found):
    (a, drawn), (b, also) = (ranks["micro"] for ranks in found)
    assert a[0] == "ArgumentError" and "no batch at all" in a[1] and b[0] == "RankError"
    assert drawn == also, "the first rank draws the seed of all"


def all_micro(rank):
    for name in ("cnn", "squares", "transformer"):
        micro(
            rank, name, [BatchGrad(), Variance(), SqrtGGNMC(1), *([KFAC(2), EKFAC(2)] if name != "transformer" else [])]
        )


@pytest.mark.slow
def test_every_model_in_micro_batches():
    on_ranks(2, all_micro, limit=900)


# ---- sharded parameters ------------------------------


LAYERS = 4


class Held(TorchDispatchMode):
    """The most bytes of gathered parameters that are alive at once, and of how many gathers."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.gathers = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.gathers += 1
            self.note(out)
        self.most = max(self.most, self.alive())
        return out

    def alive(self):
        """Bytes that are alive; the backend's thread lets go of what it has sent a moment later, the program does not."""
        for _ in range(50):
            now = sum(size for ref, size in self.live.values() if not ref.expired())
            if now <= self.most:
                break
            time.sleep(0.01)
        return now

    def note(self, t):
        storage = t.untyped_storage()
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def call(self, compiled, *args):
        """A call, with what is made of a gather counted too."""
        ended = End.__call__

        def noted(target, flat):
            found = ended(target, flat)
            for t in found:
                self.note(t)
            return found

        with self, unittest.mock.patch.object(End, "__call__", noted):
            return compiled(*args, seed=7)


def layered(wide, mesh, again=True):
    """Layers, a bucket each, and a head that is the root's."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(wide, wide), nn.Tanh()) for _ in range(LAYERS)]
    model = nn.Sequential(*layers, nn.Linear(wide, 3)).double()
    for layer in layers if mesh is not None else ():
        fully_shard(layer, mesh=mesh, reshard_after_forward=again)
    return fully_shard(model, mesh=mesh) if mesh is not None else model


def first_order(model, x, y):
    """(gradients, sums of squares, variances) by a loop over samples; the loss is a mean."""
    each = []
    for k in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[k : k + 1]), y[k : k + 1]) / len(x)
        each.append(torch.autograd.grad(loss, list(model.parameters())))
    stacks = {
        name: torch.stack(gs) for (name, _), gs in zip(model.named_parameters(), zip(*each, strict=True), strict=True)
    }
    squares = {name: g.square().sum(0) for name, g in stacks.items()}
    return {
        "grad": {name: g.sum(0) for name, g in stacks.items()},
        "sum_grad_squared": squares,
        "variance": {name: squares[name] / len(x) - g.mean(0).square() for name, g in stacks.items()},
    }


def gathered(rank, count=2, shape=(2,), modes=(True,)):
    """At no time are more than two layers' parameters whole; results are computed in shards. `modes`: `reshard_after_forward`."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    torch.manual_seed(1)
    x, y = torch.randn(count, 15).double(), torch.randint(3, (count,))
    want, found = first_order(layered(15, None), x, y), {}
    for again in modes:
        compiled = fxcurv.compile(
            layered(15, mesh, again), nn.CrossEntropyLoss(), [SumGradSquared(), Variance()], mesh=mesh, check=None
        )
        mine = part(x, [1] * count, rank), part(y, [1] * count, rank)
        compiled(*mine, seed=7)  # the first call captures the whole model
        held = Held()
        result = held.call(compiled, *mine)
        for field, values in want.items():
            for name, value in values.items():
                got = getattr(result, field)[name]
                assert isinstance(got, DTensor), (field, name)
                torch.testing.assert_close(got.full_tensor(), value, rtol=1e-9, atol=1e-12)
        program = compiled._programs.latest.program
        assert program.spread.shards == {(field, name) for field, values in want.items() for name in values}
        sums = [n.meta["val"].numel() for n in program.graph.nodes if over_ranks(n) == "sum"]
        assert sum(sums) < 5, "the loss and what it is divided by; all else is left in shards"
        pieces = -(-15 // shape[-1]) * shape[-1]  # a layer's rows, filled up
        held_between = [n.meta["val"][0].shape for n in program.graph.nodes if over_ranks(n) == "hold"]
        assert held_between == ([(8 - rank % 2, 15)] * (LAYERS - 1) if again == 2 and shape == (4,) else [])
        found[again] = held.most / (8 * (pieces * 15 + pieces)), held.gathers
    return found


def check_gathers(found):
    for again in [mode for mode in found if mode]:
        most, gathers = found[again]
        assert most <= 2, "two buckets: the one that is used, and the next one"
        assert gathers == LAYERS + 1 + (LAYERS - 1), (
            "forward, the root's once, and backward, where the first layer needs no weight"
        )
    if False in found:
        most, gathers = found[False]
        assert most < LAYERS, "kept for the backward pass where it is read there: not the first layer's, nor biases"
        assert gathers == LAYERS + 1, "once"


def test_sharded_parameters_are_gathered_a_bucket_at_a_time(found):
    for ranks in found:
        check_gathers(ranks["gathered"])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=["fsdp", "hsdp"])
def test_four_ranks_gather_a_bucket_at_a_time(shape):
    for found in on_ranks(4, gathered, 4, shape, (True, False, 2), limit=600):
        check_gathers(found)


def products(rank):
    """Matrices of a model whose parameters are sharded, after a second call."""
    mesh, asked = mesh_of(2), [GGNMP(), HMP()]
    want, _ = alone("squares", 5, asked)
    model, loss, x, y = made("squares", 5)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    compiled = fxcurv.compile(model, loss, asked, mesh=mesh, check=None)
    for _ in range(2):
        result = compiled(part(x, [3, 2], rank), part(y, [3, 2], rank), seed=7)
    torch.manual_seed(1)
    v, u = torch.randn(want.ggn.shape[0], 2).double(), torch.randn(4, 3).double()
    for got, expected in ((result.ggn, want.ggn), (result.hessian, want.hessian)):
        torch.testing.assert_close(got @ v, expected @ v, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(result.ggnmp["0.weight"](u), want.ggnmp["0.weight"](u), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_products_of_sharded_parameters():
    on_ranks(2, products)


# ---- factors at one rank each ------------------------------


def assigned(rank, count=2):
    """Each layer's factors are at one rank, and a step by them is what one process takes."""
    asked, sizes = [KFAC(2, assign="layers")], ([3, 4] if count == 2 else [3, 0, 2, 2])
    want, _ = alone("mlp", 7, asked)
    model, loss, x, y = made("mlp", 7)
    compiled = fxcurv.compile(model, loss, asked, mesh=mesh_of(count), check=None)
    mine = part(x, sizes, rank), part(y, sizes, rank)
    result = compiled(*mine, seed=7)
    for name, factors in result.kfac.items():
        assert factors.owner.here == (factors.owner.rank == rank) != factors[0].is_meta
        for got, expected in zip(factors if factors.owner.here else (), want.kfac[name], strict=False):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    blocks, alike = Blocks(result.kfac), Blocks(want.kfac)
    steps = [
        (blocks.solve(result.grad, 0.1), alike.solve(want.grad, 0.1)),
        (blocks.solve(result.grad, 0.1, pi=True), alike.solve(want.grad, 0.1, pi=True)),
        (blocks.everywhere().inverse(0.1) @ result.grad, alike.solve(want.grad, 0.1)),
        (blocks.everywhere().diag(), alike.diag()),
    ]
    for got, expected in steps:
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-8, atol=1e-10)
    parts = fxcurv.accumulate(compiled, [mine], seed=7).kfac
    torch.testing.assert_close(
        Blocks(parts).solve(result.grad, 0.1)["0.weight"], steps[0][1]["0.weight"], rtol=1e-8, atol=1e-10
    )
    kinds = [over_ranks(n) for n in compiled._programs.latest.program.graph.nodes if over_ranks(n)]
    return sorted({f.owner.rank for f in result.kfac.values()}), kinds.count("reduce"), raised(blocks.logdet)


def test_factors_at_one_rank_each(found):
    for ranks in found:
        owners, reduced, refused = ranks["assigned"]
        assert owners == [0, 1] and reduced == 2, "of each owner all at once: few numbers wait for the rest"
        assert refused[0] == "ArgumentError" and "everywhere()" in refused[1]


@pytest.mark.slow
def test_factors_at_one_of_four_ranks():
    for owners, reduced, _ in on_ranks(4, assigned, 4, limit=600):
        assert owners == [0, 1] and reduced == 2, "there are two layers"


# ---- refused by name ------------------------------


def meshes(rank):
    """Parameters and inputs that are not where mesh= is; then a call that works."""
    mesh, both = mesh_of(2), init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    _, loss, x, y = made("mlp", 4)
    x, y = part(x, [2, 2], rank), part(y, [2, 2], rank)

    def model():
        return made("mlp", 4)[0]

    def several():
        one = model()
        fully_shard(one[0], mesh=both["b"])
        return fully_shard(one, mesh=mesh)

    rows = parallelize_module(model(), mesh, {"2": RowwiseParallel()})
    parallel = parallelize_module(model(), mesh, {"0": ColwiseParallel()})
    strided = parallelize_module(model(), both["b"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(strided, mesh=both["a"])
    own = DistributedDataParallel(model(), process_group=both.get_group("b"))
    placed = DTensor.from_local(x, mesh, [Shard(0)])
    subjects = {
        "columns": (parallel, x, mesh), "rows": (rows, x, mesh), "both": (strided, x, mesh), "several": (several(), x, mesh),
        "ddp": (own, x, mesh), "input": (model(), placed, mesh), "another": (fully_shard(model(), mesh=mesh), x, both["b"]),
    }  # fmt: skip
    found = {
        key: raised(lambda m=m, inputs=inputs, of=of: fxcurv.compile(m, loss, mesh=of)(inputs, y))
        for key, (m, inputs, of) in subjects.items()
    }
    stage = PipelineStage(model()[2 * rank : 2 * rank + 2], rank, 2, torch.device("cpu"), group=mesh.get_group())
    found["stage"] = raised(lambda: fxcurv.compile(stage, loss, mesh=mesh))
    found["stages"] = raised(
        lambda: fxcurv.compile(stage.submod, loss, mesh=mesh)(x if rank == 0 else x @ x.new_ones(4, 5), y)
    )
    flat = FullyShardedDataParallel(model(), device_id=torch.device("cpu"))
    found["fsdp1"] = raised(lambda: fxcurv.compile(flat, loss, mesh=mesh))
    found["no mesh"] = raised(lambda: fxcurv.compile(fully_shard(model(), mesh=mesh), loss))
    return found, float(fxcurv.compile(model(), loss, mesh=mesh, check=None)(x, y).loss)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("columns", "that fully_shard has not made (tensor parallelism)"),
        ("rows", "tensor parallelism"),
        ("both", "tensor parallel"),
        ("several", "several meshes"),
        ("ddp", "use one mesh"),
        ("input", "x.to_local()"),
        ("another", "on the mesh that compile() gets"),
        ("stage", "pass the whole model"),
        ("stages", "ranks compile different programs: of the modules"),
        ("fsdp1", "use fully_shard"),
        ("no mesh", "pass mesh="),
    ],
)
def test_what_is_on_other_meshes_is_refused(found, key, said):
    for ranks in found:
        name, message = ranks["meshes"][0][key]
        assert name in ("ArgumentError", "RankError") and said in message, (name, message)


def outside(rank):
    """A mesh of some of the processes: of the others' it is refused, and its own have the quantities of their samples."""
    mesh, (model, loss, x, y) = DeviceMesh("cpu", [0]), made("mlp", 4)
    refused = raised(lambda: fxcurv.compile(model, loss, mesh=mesh)) if rank else None
    found = fxcurv.compile(model, loss, mesh=None if rank else mesh, check=None)(x, y)
    return refused, float(found.loss) - float(loss(model(x), y))


def test_a_mesh_of_some_processes(found):
    (nothing, one), ((kind, message), other) = (ranks["outside"] for ranks in found)
    assert nothing is None and max(abs(one), abs(other)) < 1e-12
    assert kind == "ArgumentError" and "this process is no part of mesh=" in message


def test_the_group_works_afterwards(found):
    a, b = (ranks["meshes"][1] for ranks in found)
    assert a == b > 0


# ---- in the same two processes ------------------------------


def everything(rank):
    """All of the above: to start processes takes longer than what they do."""
    return each((micro, gathered, assigned, outside, meshes), rank)


@pytest.fixture(scope="module")
def found():
    """For each of two ranks, what every function gave."""
    ranks = on_ranks(2, everything)
    for here in ranks:
        for what in here.values():
            assert not isinstance(what, str) or "Traceback" not in what, what
    return ranks
