"""A program over parts of a batch gives the numbers of the whole: its placements are right, and enough for collectives.

`run_split` is all that a pass for several devices would do, written as an interpreter: it runs the emitted graph on each
part of the batch in lock step, adds up `Partial` values where an op needs them complete, and joins what is `Shard`.
"""

import pytest
import torch
from torch import fx, nn
from torch.nn.functional import mse_loss
from torch.utils import _pytree as pytree

import fxcurv
from fxcurv import passes
from fxcurv.errors import InternalError
from fxcurv.extensions import (
    KFAC,
    KFLR,
    KFRA,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    Dots,
    Projected,
    Quadratic,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)
from fxcurv.ir.emit import number_of_samples
from fxcurv.ir.graph import to_reshape
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Shard, samples_back, samples_first
from fxcurv.kronecker import Blocks
from fxcurv.passes.counts import counts
from fxcurv.passes.placements import placements

ASKED = {
    "first": [BatchGrad(), SumGradSquared(), Variance(), BatchL2Grad(), DiagGGNExact(), DiagGGNMC(), KFAC(), KFLR()],
    "hessian": [DiagHessian()],
    "more": [BatchDiagGGNExact(), SqrtGGNExact(), BatchDiagGGNMC(2), ClippedGrad(0.1), KFRA()],
    "joint": [KFLR(joint=True, weight_sharing=s, savefield=f"kflr_{s}") for s in ("backpack", "expand", "reduce")],
}


def lowered(model, loss, extensions, x, y):
    """The program after `extract`, its counts spelled out and its values placed."""
    compiled = fxcurv.compile(model, loss, extensions, debug=True)
    program = compiled.lower(x, y, after="extract").program
    for step in (counts, placements):
        program = step(program)
        passes.verify(program, step.__name__)
    for node in program.graph.nodes:
        to_reshape(node)  # as `simplify` does: one sample has other strides than several
    return program


def bind(program, model, x, y, seed):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **program.constants}
    given = {"input": x, "target": y, "seed": torch.tensor(seed)}
    return [given[i.kind] if i.kind in given else tensors[i.name] for i in program.inputs]


def run_split(program, model, x, y, cuts, seed=7):
    """field -> parameter name -> value, of a batch that is cut into parts of `cuts` samples."""
    flats = [bind(program, model, a, b, seed) for a, b in zip(x.split(cuts), y.split(cuts), strict=True)]
    starts = [sum(cuts[:k]) for k in range(len(cuts))]
    parts = [{} for _ in cuts]
    bound = [iter(flat) for flat in flats]
    for node in program.graph.nodes:
        complete = {a: sum(part[a] for part in parts) for a in node.meta.get("complete", ())}
        for k, part in enumerate(parts):
            if node.op == "placeholder":
                part[node] = next(bound[k])
            elif node.op == "get_attr":
                part[node] = getattr(program.gm, node.target)
            elif node.target is number_of_samples:
                part[node] = sum(cuts)
            elif "first" in node.meta:
                part[node] = torch.tensor(starts[k])
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), {**part, **complete}.__getitem__)
                part[node] = node.target(*args, **kwargs)
    join = lambda node: joined(node, [part[node] for part in parts]) if isinstance(node, fx.Node) else node  # noqa: E731
    return {field: {n: pytree.tree_map(join, r) for n, r in of.items()} for field, of in program.results.items()}


def joined(node, values):
    """The value of the whole batch."""
    where = node.meta["across"]
    if where == PARTIAL:
        return sum(values)
    if where == REPLICATE:
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], rtol=0, atol=0)
        return values[0]
    assert isinstance(where, Shard), f"{node} is {where}"
    return samples_back(torch.cat([samples_first(v, where) for v in values]), where)


def mlp():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, nn.CrossEntropyLoss(), torch.randn(7, 4).double(), torch.randint(3, (7,))


def weighted():
    """Class weights and ignored samples: the parts' normalisers differ."""
    model, _, x, y = mlp()
    return model, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5]).double(), ignore_index=2), x, y


def smoothed():
    """Class weights at the target and at all others."""
    model, _, x, y = mlp()
    weight = torch.tensor([1.0, 3.0, 0.5]).double()
    return model, nn.CrossEntropyLoss(weight=weight, ignore_index=2, label_smoothing=0.1), x, y


def squares():
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 2)).double()
    return model, nn.MSELoss(), torch.randn(7, 4).double(), torch.randn(7, 2).double()


def own_mean():
    """A loss that divides by a size itself."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    loss = lambda f, y: mse_loss(f, y, reduction="sum") / f.shape[0] + mse_loss(f, y)  # noqa: E731
    return model, loss, torch.randn(7, 4).double(), torch.randn(7, 2).double()


def cnn():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()
    return model, nn.CrossEntropyLoss(), torch.randn(5, 2, 4, 4).double(), torch.randint(3, (5,))


class Tied(nn.Module):
    """An embedding that is also the head."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        hidden = torch.tanh(self.inner(self.embed(tokens)))
        return (hidden @ self.embed.weight.t()).transpose(1, 2)


def tied():
    return Tied().double(), nn.CrossEntropyLoss(), torch.randint(6, (5, 3)), torch.randint(6, (5, 3))


MODELS = {f.__name__: f for f in (mlp, weighted, smoothed, squares, own_mean, cnn, tied)}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]()


def asked_of(name, which):
    """The extensions; a weight that is embedding and head has no Kronecker factors, KFRA crosses pooling on one process alone."""
    without = {"tied": KFAC | KFLR, "cnn": KFRA}.get(name, ())
    return [e for e in ASKED[which] if not isinstance(e, without)]


QUICK = [("mlp", "first"), ("weighted", "first"), ("tied", "hessian")]
SLOW = [(m, a) for m in MODELS for a in ("first", "hessian") if (m, a) not in QUICK] + [
    ("mlp", "more"),
    ("cnn", "more"),
]
SLOW += [("cnn", "joint")]


@pytest.mark.parametrize(("name", "which"), [*QUICK, *(pytest.param(*p, marks=pytest.mark.slow) for p in SLOW)])
def test_parts_of_a_batch_give_the_whole(name, which):
    model, loss, x, y = build(name)
    asked = asked_of(name, which)
    program = lowered(model, loss, asked, x, y)
    whole = fxcurv.compile(model, loss, asked)(x, y, seed=7)
    for cuts in ([len(x) - 3, 3], [1, len(x) - 3, 2]):
        found = run_split(program, model, x, y, cuts)
        assert set(found) == {"grad", *(e.savefield for e in asked)}
        for field, values in found.items():
            for param, value in values.items():
                got, want = pytree.tree_leaves(value), pytree.tree_leaves(getattr(whole, field)[param])
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_noise_counts_from_the_first_sample():
    """Without the first sample's number, every part would draw what the first part draws."""
    model, loss, x, y = build("mlp")
    program = lowered(model, loss, [DiagGGNMC()], x, y)
    assert sum("first" in n.meta for n in program.graph.nodes) == 1
    whole = run_split(program, model, x, y, [len(x)])["diag_ggn_mc"]
    for node in program.graph.nodes:
        node.meta.pop("first", None)
    wrong = run_split(program, model, x, y, [3, 4])["diag_ggn_mc"]
    assert any(not torch.allclose(wrong[name], value) for name, value in whole.items())


def test_means_and_sizes_read_one_node():
    """After `counts` no value is computed with a size but by the one node that stands for the number of samples."""
    program = lowered(*build("own_mean")[:2], [Variance()], *build("own_mean")[2:])
    (count,) = program.graph.find_nodes(op="call_function", target=number_of_samples)
    divided = {
        n for n in program.graph.nodes if str(n.target).startswith("aten.div") and isinstance(n.args[1], fx.Node)
    }
    sizes = {n.args[1] for n in divided if not isinstance(n.args[1].meta["val"], torch.Tensor)}
    assert sizes and all(count is s or count in s.all_input_nodes for s in sizes)
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.mean.default)


def test_every_value_has_a_placement_in_the_pipeline():
    model, loss, x, y = build("mlp")
    program = fxcurv.compile(model, loss, [BatchGrad(), KFAC()], debug=True).lower(x, y, after="placements").program
    assert all("across" in n.meta for n in program.graph.nodes if n.op != "output")
    across = {field: {n.meta["across"] for n in pytree.tree_leaves(r)} for field, r in program.results.items()}
    assert across == {"grad": {PARTIAL}, "grad_batch": {Shard(0)}, "kfac": {PARTIAL}}


def test_a_result_in_the_wrong_place_is_an_internal_error():
    model, loss, x, y = build("mlp")
    program = fxcurv.compile(model, loss, [BatchGrad()]).lower(x, y, after="placements").program
    next(iter(program.results["grad_batch"].values())).meta["across"] = Shard(1)
    with pytest.raises(InternalError, match="grad_batch"):
        passes.verify(program, "placements")


def test_a_batch_of_one_size_is_not_split():
    """What is of its samples is `Mixed`, what is of the parameters alone is not."""
    model, loss, x, y = build("mlp")
    program = fxcurv.compile(model, loss, [BatchGrad()], debug=True).lower(x[:1], y[:1], after="placements").program
    places = {n.meta["across"] for r in program.results.values() for n in r.values()}
    assert places == {MIXED}
    assert program.params["0.weight"].meta["across"] == REPLICATE


class Tokens(nn.Module):
    """A table, a layer at shared positions, a convolution."""

    def __init__(self):
        super().__init__()
        self.table, self.conv, self.layer = nn.Embedding(6, 4), nn.Conv1d(4, 5, 2), nn.Linear(5, 3)

    def forward(self, words):
        return torch.tanh(self.layer(self.conv(self.table(words).mT).mT)).mean(1)


@pytest.mark.slow
def test_inner_products_and_projections():
    """Rows per sample that custom ops make, whose places are declared."""
    torch.manual_seed(0)
    model, loss, x, y = Tokens().double(), nn.CrossEntropyLoss(), torch.randint(6, (7, 4)), torch.randint(3, (7,))
    vectors = {name: torch.randn(2, *p.shape).double() for name, p in model.named_parameters()}
    blocks = fxcurv.compile(model, loss, [KFLR(params=["conv", "layer"])], check=None)(x, y).kflr
    asked = [Projected(8), Dots(vectors), Quadratic(metric=Blocks(blocks), params=list(blocks))]
    found = run_split(lowered(model, loss, asked, x, y), model, x, y, [3, 4])
    wanted = fxcurv.compile(model, loss, asked, check=None)(x, y)
    for e in asked:
        for name, value in wanted[e].items():
            torch.testing.assert_close(found[e.savefield][name], value)
