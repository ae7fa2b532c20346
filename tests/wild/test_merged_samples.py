"""Samples of different sizes, merged into one tensor: graphs, whose entries a vector assigns (`compile(sample_index=)`)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from against_oracle import close
from oracle import Oracle
from situations import Situation, classes, parametrized
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import ArgumentError, ExtensionError, LossError, MixedSamplesError
from fxcurv.extensions import (
    KFAC,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    Jacobian,
    SumGradSquared,
    Variance,
)

SIZES = (3, 2, 1, 2)


class Graphs(nn.Module):
    """Messages by `index_add`, a pool, and a head; a row of the output per graph."""

    def __init__(self, pool: str = "mean", norm: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.pool, self.norm, self.dropout = pool, norm or nn.Identity(), nn.Dropout(dropout)

    def pooled(self, h: Tensor, of: Tensor, n: int) -> Tensor:
        if self.pool == "one-hot":
            return F.one_hot(of, n).to(h.dtype).T @ h
        if self.pool == "max":
            index = of.unsqueeze(1).expand_as(h)
            return torch.zeros(n, h.shape[1], dtype=h.dtype).scatter_reduce(0, index, h, "amax", include_self=False)
        total = torch.zeros(n, h.shape[1], dtype=h.dtype).index_add(0, of, h)
        count = torch.zeros(n, dtype=h.dtype).index_add(0, of, torch.ones_like(h[:, 0]))
        return total / count.unsqueeze(1) if self.pool == "mean" else total

    def forward(self, x: Tensor, edges: Tensor, of: Tensor, like: Tensor) -> Tensor:
        h = self.first(x).tanh()
        h = h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])
        h = self.dropout(self.norm(self.second(h)).tanh())
        return self.head(self.pooled(h, of, len(like)))


def graphs(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(nodes [V, 3], edges [2, E], the graph of each node [V], a row per graph): rings in both directions."""
    sizes = SIZES[:n]
    of = torch.repeat_interleave(torch.arange(n), torch.tensor(sizes))
    starts = [sum(sizes[:k]) for k in range(n)]
    pairs = [(s + k, s + (k + 1) % size) for s, size in zip(starts, sizes, strict=True) for k in range(size)]
    return torch.randn(len(of), 3), torch.tensor(pairs).T, of, torch.zeros(n)


def shuffled(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The nodes of all graphs in any order."""
    x, edges, of, like = graphs(n)
    order = torch.randperm(len(of))
    place = order.argsort()
    return x[order], place[edges], of[order], like


def row(
    pool: str, x=graphs, asks: str = "first ggn hessian products", quick: bool = False, loss=F.cross_entropy, **more
):
    options = {"sample_index": 2, "debug": True}
    return Situation("", lambda: Graphs(pool, **more), loss, x, classes(of=2), asks, bool(more), quick, options=options)


def margins(f: Tensor, y: Tensor) -> Tensor:
    return (1 + (f[:, 0] * (1 - 2 * y)).exp()).log().mean() + f[:, 1].pow(4).sum()


SITUATIONS = {
    "mean": row("mean", asks="first ggn", quick=True),
    "mean, second order": row("mean"),
    "sum": row("sum", shuffled),
    "max": row("max", asks="first ggn products"),
    "one-hot": row("one-hot", shuffled, "first ggn"),
    "a loss of one's own": row("mean", asks="first ggn hessian", loss=margins),
    "dropout": row("mean", asks="first ggn", dropout=0.4),
}


@pytest.mark.parametrize("name", parametrized(SITUATIONS))
def test_equals_the_oracle(name: str) -> None:
    SITUATIONS[name].check((3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", SITUATIONS)
def test_of_one_sample(name: str) -> None:
    SITUATIONS[name].check((1,))


@pytest.mark.slow
def test_in_training_mode() -> None:
    SITUATIONS["dropout"].check((3,), training=True)


def built(n: int = 3, **options) -> tuple[nn.Module, tuple, Tensor]:
    torch.manual_seed(0)
    x, *rest = graphs(n)
    return Graphs(**options).double(), (x.double(), *rest), torch.tensor([0, 1, 1, 0][:n])


def test_what_is_made_of_individual_gradients() -> None:
    model, inputs, y = built()
    some = BatchGrad(subsampling=[2, 0, 2], savefield="some")
    asked = [
        some,
        BatchL2Grad(),
        SumGradSquared(),
        Variance(),
        ClippedGrad(0.1),
        ClippedGrad(0.1, "param", savefield="each"),
    ]
    found = fxcurv.compile(model, F.cross_entropy, asked, sample_index=2)(inputs, y)
    true = Oracle(model, F.cross_entropy, inputs, y)
    for field in ("batch_l2", "sum_grad_squared", "variance"):
        close(getattr(found, field), getattr(true, field)(), field)
    close(found.some, true.grad_batch([2, 0, 2]), "some")
    close(found.grad_clipped, true.grad_clipped(0.1), "grad_clipped")
    close(found.each, true.grad_clipped(0.1, "param"), "each")
    torch.testing.assert_close(found.sample_norms, true.sample_norms())


@dataclass
class Merged:
    """An input as an object."""

    x: Tensor
    edge_index: Tensor
    batch: Tensor


class OfObject(Graphs):
    def forward(self, data: Merged, like: Tensor) -> Tensor:
        return super().forward(data.x, data.edge_index, data.batch, like)


def test_the_index_has_a_position_a_keyword_or_a_name() -> None:
    model, inputs, y = built()
    expected = fxcurv.compile(model, F.cross_entropy, [BatchGrad()], sample_index=2)(inputs, y).grad_batch
    named = dict(zip(("x", "edges", "of", "like"), inputs, strict=True))
    close(
        fxcurv.compile(model, F.cross_entropy, [BatchGrad()], sample_index="of")(named, y).grad_batch,
        expected,
        "keyword",
    )
    other = OfObject().double()
    other.load_state_dict(model.state_dict())
    compiled = fxcurv.compile(other, F.cross_entropy, [BatchGrad()], sample_index="batch")
    close(compiled((Merged(*inputs[:3]), inputs[3]), y).grad_batch, expected, "attribute")
    assert "samples are merged" in str(compiled.explain((Merged(*inputs[:3]), inputs[3]), y))
    crossed = inputs[1].clone()
    crossed[1, 0] = 4
    with pytest.raises(MixedSamplesError, match="edge 0 of edge_index connects samples 0 and 1"):
        compiled((Merged(inputs[0], crossed, inputs[2]), inputs[3]), y)  # also after the first call


def test_samples_that_meet_are_refused() -> None:
    """By an edge that nobody names, or by statistics over the batch; whole-batch quantities exist."""
    model, inputs, y = built()
    crossed = inputs[1].clone()
    crossed[1, 0] = 4
    with pytest.raises(MixedSamplesError, match="BatchGrad"):
        fxcurv.compile(model, F.cross_entropy, [BatchGrad()], sample_index=2)((inputs[0], crossed, *inputs[2:]), y)
    model = Graphs(norm=nn.BatchNorm1d(4)).double().train()
    with pytest.raises(MixedSamplesError, match="batch norm in training mode"):
        fxcurv.compile(model, F.cross_entropy, [BatchGrad()], sample_index=2)(inputs, y)
    true = Oracle(model, F.cross_entropy, inputs, y)
    found = fxcurv.compile(model, F.cross_entropy, [DiagGGNExact()], sample_index=2, update_buffers=False)(inputs, y)
    close(found.diag_ggn_exact, true.diag_ggn_exact(), "diag_ggn_exact")


@pytest.mark.parametrize("extension", [KFAC(), BatchDiagGGNExact(), Jacobian()], ids=lambda e: type(e).__name__)
def test_what_is_not_defined_is_refused(extension) -> None:
    model, inputs, y = built()
    with pytest.raises(ExtensionError, match=f"{type(extension).__name__} is not defined with sample_index="):
        fxcurv.compile(model, F.cross_entropy, [extension], sample_index=2)(inputs, y)


def test_bad_input_is_refused() -> None:
    model, inputs, y = built()
    with pytest.raises(ArgumentError, match="drop batch_dim= and sample="):
        fxcurv.compile(model, F.cross_entropy, [], sample_index=2, batch_dim=1)
    for wrong in (0, 7, "batch"):
        with pytest.raises(ArgumentError, match="no vector of sample numbers"):
            fxcurv.compile(model, F.cross_entropy, [], sample_index=wrong)(inputs, y)
    with pytest.raises(LossError, match="joins rows"):
        pairs = lambda f, y: (f @ f.T).square().mean()  # noqa: E731
        fxcurv.compile(model, pairs, [BatchGrad()], sample_index=2)(inputs, y)
    with pytest.raises(LossError, match="one row per sample"):
        nodes = lambda f, y: f.sum() + y.sum()  # noqa: E731
        fxcurv.compile(model, nodes, [BatchGrad()], sample_index=2)(inputs, torch.zeros(6))


class Graph:
    """One graph whose nodes are the samples, as a node classifier takes it."""

    def __init__(self, n: int):
        generator = torch.Generator().manual_seed(n)
        self.x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
        self.edge_index = torch.stack([torch.arange(n), torch.arange(n).roll(1)])
        self.name = "ring"


class OfNodes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, graph):
        h = self.layer(graph.x)
        return h + torch.zeros_like(h).index_add(0, graph.edge_index[1], h[graph.edge_index[0]])


@pytest.mark.parametrize("dims", [{"x": 0, "edge_index": None}, ({"edge_index": None},)])
def test_dimensions_by_attribute(dims):
    """A graph's nodes are the samples, and its edges are none: what the whole batch has is right."""
    torch.manual_seed(0)
    model, loss = OfNodes().double(), nn.CrossEntropyLoss()
    compiled = fxcurv.compile(model, loss, [DiagGGNExact()], batch_dim=dims)
    for n in (5, 4):
        graph, y = Graph(n), torch.arange(n) % 2
        oracle = Oracle(model, loss, graph, y)
        found = compiled(graph, y)
        for name, wanted in oracle.diag_ggn_exact().items():
            torch.testing.assert_close(found.diag_ggn_exact[name], wanted)


def test_wrong_attributes():
    graph, y = Graph(4), torch.arange(4) % 2
    with pytest.raises(ArgumentError, match=r"batch_dim names \['edges'\], which are no tensors of the Graph"):
        fxcurv.compile(OfNodes().double(), nn.CrossEntropyLoss(), [], batch_dim={"edges": None})(graph, y)
    with pytest.raises(ArgumentError, match=r"per attribute of an input in a dict"):
        fxcurv.compile(OfNodes().double(), nn.CrossEntropyLoss(), [])(graph, y)
    graph.batch = torch.zeros(2, dtype=torch.long)
    with pytest.raises(
        ArgumentError, match="edge_index reaches entry 3, and sample_index= has the samples of 2 entries"
    ):
        fxcurv.compile(OfNodes().double(), nn.CrossEntropyLoss(), [], sample_index="batch")(graph, y)
