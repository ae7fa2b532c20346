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
from fxcurv.extensions import (
    KFAC,
    KFLR,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SumGradSquared,
    Variance,
)
from fxcurv.ir.emit import number_of_samples
from fxcurv.ir.placement import PARTIAL, REPLICATE, Shard, samples_back, samples_first
from fxcurv.passes.counts import counts
from fxcurv.passes.placements import placements

FIRST = [BatchGrad(), SumGradSquared(), Variance(), BatchL2Grad(), DiagGGNExact(), DiagGGNMC(), KFAC(), KFLR()]


def lowered(model, loss, extensions, x, y):
    """The program after `extract`, its counts spelled out and its values placed."""
    compiled = fxcurv.compile(model, loss, extensions, debug=True)
    program = compiled.lower(x, y, after="extract").program
    for step in (counts, placements):
        program = step(program)
        passes.verify(program, step.__name__)
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
                read = lambda a, part=part: complete.get(a, part[a])  # noqa: E731
                part[node] = node.target(*fx.node.map_arg(node.args, read), **fx.node.map_arg(node.kwargs, read))
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


def squares():
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 2)).double()
    return model, nn.MSELoss(), torch.randn(7, 4).double(), torch.randn(7, 2).double()


def own_mean():
    """A loss that divides by a size itself."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, lambda f, y: mse_loss(f, y, reduction="sum") / f.shape[0] + mse_loss(f, y), torch.randn(7, 4).double(), torch.randn(7, 2).double()


def cnn():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)
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


MODELS = {f.__name__: f for f in (mlp, weighted, squares, own_mean, cnn, tied)}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]()


def without(name):
    """`KFAC` and `KFLR` have no factors for a weight that is both an embedding and a head."""
    return [e for e in FIRST if not (name == "tied" and isinstance(e, KFAC | KFLR))]


@pytest.mark.parametrize("extensions", ["first", "hessian"])
@pytest.mark.parametrize("name", MODELS)
def test_parts_of_a_batch_give_the_whole(name, extensions):
    model, loss, x, y = build(name)
    asked = without(name) if extensions == "first" else [DiagHessian()]
    program = lowered(model, loss, asked, x, y)
    whole = fxcurv.compile(model, loss, asked)(x, y, seed=7)
    for cuts in ([len(x) - 3, 3], [1, len(x) - 3, 2]):
        found = run_split(program, model, x, y, cuts)
        assert set(found) == {"grad", *(e.savefield for e in asked)}
        for field, values in found.items():
            for param, value in values.items():
                torch.testing.assert_close(value, getattr(whole, field)[param], rtol=1e-9, atol=1e-12)
