"""Two ranks of a mesh have what one process has on the batch of both; and what happens where they disagree, or one fails."""

import pytest
import torch
from processes import each, on_ranks
from subjects import alone, compare, made, mesh_of, part
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fxcurv
from fxcurv.errors import ArgumentError, ExtensionError, FxcurvError, MixedSamplesError, RankError
from fxcurv.extensions import (
    GGNMP,
    HMP,
    KFAC,
    BatchGrad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    SumGradSquared,
    Variance,
)
from fxcurv.ir.private import collectives_of
from fxcurv.rules import Pointwise

SHARDED = (Variance(), BatchGrad())
GGN = (GGNMP(),)
QUICK = [BatchGrad(), SumGradSquared(), Variance(), ClippedGrad(0.05), DiagGGNMC(2), KFAC()]


def spread(rank, mesh, name, sizes, asked, wrap=lambda m: m, **options):
    """(result, compiled, model) of a rank's part of the batch."""
    model, loss, x, y = made(name, sum(sizes))
    compiled = fxcurv.compile(wrap(model), loss, asked, mesh=mesh, **options)
    return compiled(part(x, sizes, rank), part(y, sizes, rank), seed=7), compiled, model


def program_of(compiled):
    return next(iter(vars(compiled._programs.named).values())).program


# ---- numbers ------------------------------


def quick(rank):
    """One model whose normalisers differ, in parts of several sizes, with DDP and without; batch norm in training mode."""
    mesh = mesh_of(2)
    sizes = [5, 2]
    result, compiled, model = spread(rank, mesh, "mlp", sizes, QUICK, DistributedDataParallel, debug=True)
    want, _ = alone("mlp", 7, QUICK)
    compare(result, want, QUICK)
    assert result.sizes == (5, 2) and len(result.output) == sizes[rank] == len(result.grad_batch["0.weight"])
    note = next(iter(vars(compiled._programs.named).values())).note
    assert "loss, output, gradient equal" in note and "samples exchanged" in note
    result.attach()
    torch.testing.assert_close(model[0].weight.grad, want.grad["0.weight"], rtol=1e-9, atol=1e-12)
    _, loss, x, y = made("mlp", 7)
    for others in ([0, 7], [6, 1], [7, 0]):
        compare(compiled(part(x, others, rank), part(y, others, rank), seed=7), want, QUICK)
    assert len(vars(compiled._programs.named)) == 1, "one program serves all sizes"
    return program_of(compiled).spread.buckets


def test_two_ranks_have_what_one_process_has(found):
    a, b = (ranks["quick"] for ranks in found)
    assert a == b and isinstance(a, list), a


def test_every_sum_travels_once(found):
    """Two stages, a collective each: what the loss is divided by, and the rest, each once."""
    first, second = found[0]["quick"]
    assert len(second) == len(set(second))
    assert sum("gradient" in label for label in second) == 4
    assert not any("Variance" in label for label in second), "it is computed from sums that travel anyway"


def normed(rank):
    sizes = [3, 4]
    result, _, model = spread(rank, mesh_of(2), "batch_norm", sizes, [])
    want, other = alone("batch_norm", 7, [])
    compare(result, want, [])
    for (name, got), (_, expected) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_batch_norm_in_training_mode_is_that_of_the_whole_batch(found):
    assert [ranks["normed"] for ranks in found] == [None, None]


def sharded(rank, count=2, name="squares", sizes=(4, 2), shape=(2,), asked=SHARDED):
    """A model of fully_shard: results of [*P] have the mesh and the placements of their parameters, and FSDP goes on.

    The largest part has as many samples as the first weight has rows, with which it must not be confused.
    """
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    want, _ = alone(name, sum(sizes), asked)
    model, loss, x, y = made(name, sum(sizes))
    fully_shard(list(model.children())[-1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    compiled = fxcurv.compile(model, loss, asked, mesh=mesh)
    x, y = part(x, sizes, rank), part(y, sizes, rank)
    result = compiled(x, y, seed=7)
    compare(result, want, asked)
    for name, p in model.named_parameters():
        for value in (result.grad[name], *(result[e][name] for e in asked if isinstance(e, Variance))):
            assert (
                isinstance(value, DTensor) and value.placements == p.placements and value.device_mesh == p.device_mesh
            )
    torch.optim.SGD(result.attach()._model.parameters(), lr=0.1).step()
    model.zero_grad()
    loss(model(x), y).backward()
    after = compiled(x, y, seed=7)
    assert float(after.loss) != float(result.loss), "the step has changed the parameters"
    assert list(vars(compiled._programs.named)) == ["program_0"], compiled._programs._made.keys()


def test_sharded_parameters_have_sharded_results(found):
    for ranks in found:
        assert ranks["sharded"] is None, ranks["sharded"]


def products(rank, name="mlp", asked=GGN, sizes=(4, 3), blocks=1):
    """Products with matrices over all samples and with some blocks, and how many collectives one takes."""
    mesh = mesh_of(2)
    want, _ = alone(name, sum(sizes), asked)
    result, _, model = spread(rank, mesh, name, list(sizes), list(asked), debug=True)
    torch.manual_seed(1)
    taken = set()
    for e in asked:
        got, expected = getattr(result, e.operator), getattr(want, e.operator)
        v = torch.randn(got.shape[0], 3).double()
        before = collectives_of(mesh.get_group())
        torch.testing.assert_close(got @ v, expected @ v, rtol=1e-9, atol=1e-11)
        taken.add(collectives_of(mesh.get_group()) - before)
        for name, p in [*model.named_parameters()][:blocks]:
            for u in (torch.randn(2, *p.shape).double(), torch.randn(p.shape).double()):
                torch.testing.assert_close(result[e][name](u), want[e][name](u), rtol=1e-9, atol=1e-11)
    return taken


def test_a_product_is_added_up_once(found):
    assert [ranks["products"] for ranks in found] == [{1}, {1}]


def all_products(rank):
    return [products(rank, name, (GGNMP(), HMP()), (4, 3), None) for name in ("cnn", "transformer")]


@pytest.mark.slow
def test_all_products():
    assert on_ranks(2, all_products, limit=900) == [[{1}] * 2] * 2


# ---- disagreement and failure ------------------------------


class Refusing(nn.Module):
    """Raises where its rank is the second, while it is captured."""

    def __init__(self, rank):
        super().__init__()
        self.linear, self.rank = nn.Linear(4, 3), rank

    def forward(self, x):
        if self.rank:
            raise ValueError("not today")
        return self.linear(x)


def raised(fn):
    """(class, message) of what `fn` raises."""
    try:
        fn()
    except FxcurvError as error:
        return type(error).__name__, str(error)
    return None


def failing(rank):
    """What every rank raises, and whether the group still works after it."""
    mesh, found = mesh_of(2), {}
    _, loss, x, y = made("mlp", 4)
    x, y = part(x, [2, 2], rank), part(y, [2, 2], rank)

    def call(key, model, asked=(), inputs=x, targets=y, criterion=loss, **options):
        seed = options.pop("seed", None)
        compiled = fxcurv.compile(model, criterion, asked, mesh=mesh, **options)
        found[key] = raised(lambda: compiled(inputs, targets, seed=seed))
        return compiled

    model, other = nn.Linear(4, 3).double(), nn.Linear(4, 3)
    call("extensions", model, [Variance()] if rank else [BatchGrad()])
    call(
        "dtype",
        other if rank else model,
        inputs=x.to((other if rank else model).weight.dtype),
        criterion=nn.CrossEntropyLoss(),
    )
    call("model", nn.Sequential(nn.Linear(4, 3), nn.ReLU() if rank else nn.Tanh()).double())
    call(
        "losses", model, criterion=(lambda f, t: f.exp().sum()) if rank else lambda f, t: f.square().sum() / f.shape[0]
    )
    call("capture", Refusing(rank).double())
    call("seeds", model, [DiagGGNMC(1)], seed=rank)
    call("targets", model, targets=y + 5 * rank)
    call("empty", model, inputs=x[:0], targets=y[:0])
    compiled = fxcurv.compile(nn.Embedding(4, 3).double(), nn.CrossEntropyLoss(), mesh=mesh)
    tokens = torch.tensor([1, 2])
    compiled(tokens, torch.tensor([0, 1]))
    found["in the middle"] = raised(lambda: compiled(tokens + 7 * rank, torch.tensor([0, 1])))
    result = compiled(tokens, torch.tensor([0, 1]))  # the group works, and the program too
    return found, float(result.loss)


def repeated(rank):
    """Calls of a kind that was seen before, by their own numbers of samples, and where one rank fails in one."""
    mesh = mesh_of(2)
    model, loss, x, y = made("mlp", 7)
    compiled = fxcurv.compile(model, loss, QUICK, mesh=mesh)
    want, taken = alone("mlp", 7, QUICK)[0], []
    for sizes in ([5, 2], [5, 2], [5, 2], [4, 3], [5, 2]):
        before = collectives_of(mesh.get_group())
        result = compiled(part(x, sizes, rank), part(y, sizes, rank), seed=7)
        taken.append(collectives_of(mesh.get_group()) - before)
        compare(result, want, QUICK)
    known, (latest, *_) = len(compiled._again), compiled._again
    x, y = part(x, [5, 2], rank), part(y, [5, 2], rank)
    found = {"middle": raised(lambda: compiled(x, y + 5 * rank, seed=7))}
    run = latest.run
    if rank:
        latest.run = lambda *given: run(*given)[: 1 // 0]
    try:
        found["end"] = compiled(x, y, seed=7) is None
    except ZeroDivisionError as error:
        found["end"] = str(error)
    latest.run = run
    found["next"] = raised(lambda: compiled(x, y, seed=7))
    compare(compiled(x, y, seed=7), want, QUICK)
    return taken, known, found


def hooked(rank):
    """A hook on one rank alone, and calls after it is gone: where it was not, a program was made that is not checked yet."""
    model, loss, x, y = made("mlp", 7)
    compiled = fxcurv.compile(model, loss, [], mesh=mesh_of(2))
    want = alone("mlp", 7, [])[0]
    call = lambda sizes: compiled(part(x, sizes, rank), part(y, sizes, rank))  # noqa: E731
    call([5, 2])
    hook = model[0].register_forward_hook(lambda m, given, out: 2 * out) if rank else None
    refused = raised(lambda: call([5, 2]))
    if hook is not None:
        hook.remove()
    for sizes in ([4, 3], [4, 3], [5, 2]):  # the first is no call that was seen before
        compare(call(sizes), want, [])
    return refused


def wrong_rule(rank):
    """A rule that is wrong on both ranks is found by the comparison with plain PyTorch."""
    wrong = Pointwise(d1=lambda x, y: 1 - y)
    try:
        spread(rank, mesh_of(2), "mlp", [5, 2], [], rules={torch.ops.aten.tanh.default: wrong})
    except FxcurvError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refused(rank):
    """What compile() and a call refuse by name, on all ranks alike."""
    mesh, found = mesh_of(2), {}
    model, loss, x, y = made("mlp", 4)
    wrapped = DistributedDataParallel(model)
    for key, fn in {
        "no mesh": lambda: fxcurv.compile(wrapped, loss),
        "a number": lambda: fxcurv.compile(model, loss, mesh=2),
        "backend": lambda: fxcurv.compile(model, loss, [KFAC(assign="layers")], mesh=mesh, backend="inductor"),
        "subsampling": lambda: fxcurv.compile(model, loss, [BatchGrad(subsampling=[0])], mesh=mesh),
        "whole batch": lambda: spread(rank, mesh, "batch_norm", [3, 4], [DiagGGNExact()]),
        "contrastive": lambda: fxcurv.compile(model, lambda f, t: (f @ f.t()).logsumexp(1).sum(), mesh=mesh)(x, y),
    }.items():
        found[key] = raised(fn)
    return found


def everything(rank):
    """All of the above in the same two processes: to start them takes longer than what they do."""
    return each((quick, repeated, hooked, normed, sharded, products, failing, wrong_rule, refused), rank)


@pytest.fixture(scope="module")
def found():
    """For each of two ranks, what every function gave."""
    return on_ranks(2, everything)


@pytest.mark.parametrize(
    ("key", "kinds", "said"),
    [
        ("extensions", (RankError, RankError), "of the extensions, rank 0 has BatchGrad"),
        ("dtype", (RankError, RankError), "torch.float64"),
        ("model", (RankError, RankError), "rank 0 has Tanh in training mode, and rank 1 has ReLU"),
        ("losses", (RankError, RankError), "of the captured ops"),
        ("capture", (RankError, FxcurvError), "not today"),
        ("seeds", (ArgumentError, ArgumentError), "seed= is not the same"),
        ("targets", (RankError, FxcurvError), "rank 1"),
        ("empty", (ArgumentError, ArgumentError), "empty on every rank"),
        ("in the middle", (RankError, ArgumentError), "rank 1 of the mesh raised"),
    ],
)
def test_what_one_rank_raises_all_raise(found, key, kinds, said):
    here = [ranks["failing"][0][key] for ranks in found]
    assert all(here), f"{key} is not refused: {here}"
    for (name, message), kind in zip(here, kinds, strict=True):
        assert kind is FxcurvError and name != "RankError" or name == kind.__name__, (name, message)
    assert said in here[0][1], here[0][1]


def test_a_call_that_was_seen_before_takes_one_message_and_one_sum(found):
    """Who calls, with how many samples and targets that are counted; and all results."""
    for ranks in found:
        taken, known, _ = ranks["repeated"]
        assert known == 1 and taken[1:] == [2, 2, 3, 3], "other sizes are another kind of call, of the same program"


def test_a_rank_that_fails_tells_the_others_in_the_last_sum_or_before_the_next_call(found):
    first, second = (ranks["repeated"][2] for ranks in found)
    assert second["middle"][0] == "ArgumentError" and "cross_entropy" in second["middle"][1]
    assert first["middle"][0] == "RankError" and "rank 1 of the mesh raised" in first["middle"][1]
    assert first["end"] is False and "division" in second["end"], "the first rank has its result"
    for found in (first, second):
        assert found["next"][0] == "RankError" and "failed on this rank alone" in found["next"][1]


def test_what_one_rank_has_to_check_all_check(found):
    for ranks in found:
        assert ranks["hooked"][0] == "RankError" and "of the captured ops" in ranks["hooked"][1]


def test_the_group_works_after_errors(found):
    a, b = (ranks["failing"][1] for ranks in found)
    assert a == b and a == a


def test_the_self_check_is_of_the_batch_of_all_ranks(found):
    for ranks in found:
        assert ranks["wrong_rule"].startswith("SelfCheckError") and "gradient" in ranks["wrong_rule"]


@pytest.mark.parametrize(
    ("key", "kind", "said"),
    [
        ("no mesh", ArgumentError, "pass mesh="),
        ("a number", ArgumentError, "DeviceMesh"),
        ("backend", ArgumentError, "'eager'"),
        ("subsampling", ExtensionError, "mesh="),
        ("whole batch", MixedSamplesError, "mesh="),
        ("contrastive", MixedSamplesError, "mesh="),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(found, key, kind, said):
    for ranks in found:
        assert ranks["refused"][key] is not None, f"{key} is not refused"
        name, message = ranks["refused"][key]
        assert (name == kind.__name__ or name == "RankError") and said in message, (name, message)
