"""PyTorch Geometric's layers on merged graphs: a sample is a graph, and its `Batch` is the input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_oracle import close
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.errors import MixedSamplesError
from fxcurv.extensions import GGNMP, BatchGrad, DiagGGNExact, Variance

data = pytest.importorskip("torch_geometric.data")
layers = pytest.importorskip("torch_geometric.nn")

pytestmark = pytest.mark.slow

CONVOLUTIONS = {
    "sage": lambda: layers.SAGEConv(3, 4),
    "gin": lambda: layers.GINConv(nn.Sequential(nn.Linear(3, 4), nn.Tanh())),
    "gcn": lambda: layers.GCNConv(3, 4),
    "gcn without loops": lambda: layers.GCNConv(3, 4, add_self_loops=False),
    "gat": lambda: layers.GATConv(3, 2, heads=2),
}
POOLS = ("global_add_pool", "global_mean_pool", "global_max_pool")


class Graphs(nn.Module):
    """The pool counts the graphs itself where no size is given: the number is a value of the data, and is N."""

    def __init__(self, convolution: str, pool: str, sized: bool = False) -> None:
        super().__init__()
        self.convolution, self.head, self.pool = CONVOLUTIONS[convolution](), nn.Linear(4, 2), getattr(layers, pool)
        self.sized = sized

    def forward(self, graphs):
        h = self.convolution(graphs.x, graphs.edge_index).tanh()
        return self.head(self.pool(h, graphs.batch, **({"size": graphs.num_graphs} if self.sized else {})))


def merged(*sizes: int):
    made = []
    for v in sizes:
        ends = torch.arange(v)
        made.append(data.Data(x=torch.randn(v, 3).double(), edge_index=torch.stack([ends, (ends + 1) % v])))
    return data.Batch.from_data_list(made)


@pytest.mark.parametrize(
    ("convolution", "pool"), [*((c, POOLS[1]) for c in CONVOLUTIONS), *(("sage", p) for p in POOLS[::2])]
)
def test_equals_the_oracle(convolution: str, pool: str) -> None:
    torch.manual_seed(0)
    model = Graphs(convolution, pool).double()
    compiled = fxcurv.compile(
        model, F.cross_entropy, [BatchGrad(), Variance(), DiagGGNExact(), GGNMP()], sample_index="batch"
    )
    for sizes in ((3, 4, 2), (2, 3), (3,)):
        graphs, y = merged(*sizes), torch.arange(len(sizes)) % 2
        found, true = compiled(graphs, y), Oracle(model, F.cross_entropy, graphs, y)
        for field in ("grad", "grad_batch", "variance", "diag_ggn_exact"):
            close(getattr(found, field), getattr(true, field)(), field)
        for name, block in true.ggn().items():
            v = torch.ones_like(found.grad[name])
            close({name: found.ggnmp[name](v)}, {name: (block @ v.flatten()).reshape(v.shape)}, "ggnmp")


def test_equal_kinds_of_graphs_share_a_program() -> None:
    torch.manual_seed(0)
    for sized in (True, False):
        compiled = fxcurv.compile(
            Graphs("gcn", POOLS[0], sized).double(), F.cross_entropy, [BatchGrad()], sample_index="batch"
        )
        for _ in range(3):
            compiled(merged(3, 2), torch.tensor([0, 1]))
        assert not compiled.recompiles


def test_an_edge_between_graphs_is_refused() -> None:
    graphs = merged(3, 2)
    graphs.edge_index[1, 0] = 4
    compiled = fxcurv.compile(Graphs("sage", POOLS[0]).double(), F.cross_entropy, [BatchGrad()], sample_index="batch")
    with pytest.raises(MixedSamplesError, match="edge 0 of edge_index connects samples 0 and 1"):
        compiled(graphs, torch.tensor([0, 1]))
