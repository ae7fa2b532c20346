"""Collectives begin while the walk goes on and are waited for behind it: by the order of a graph, the program of one rank."""

import importlib

import pytest
import torch
import torch.distributed as dist
from subjects import mesh_of
from torch import nn
from torch.distributed.fsdp import fully_shard

import fxcurv
from fxcurv.extensions import KFAC, SumGradSquared
from fxcurv.ir.origin import stage_of
from fxcurv.rules.traits import over_ranks

distribute_module = importlib.import_module("fxcurv.passes.distribute")  # the package has the pass under this name
WALK = ("forward", "columns", "propagate")
LAYERS = 4


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def nodes_of(monkeypatch, asked, sharded=False):
    """The nodes of a chain of layers whose gradients fill a bucket each."""
    monkeypatch.setattr(distribute_module, "BUCKET", 8 * (6 * 6 + 6))
    torch.manual_seed(0)
    mesh, model = (
        mesh_of(1),
        nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(LAYERS)]).double(),
    )
    for layer in model if sharded else ():
        fully_shard(layer, mesh=mesh)
    compiled = fxcurv.compile(
        fully_shard(model, mesh=mesh) if sharded else model, nn.MSELoss(), asked, mesh=mesh, check=None
    )
    compiled(torch.randn(3, 6).double(), torch.randn(3, 6).double(), seed=0)
    return list(compiled._programs.latest.program.graph.nodes)


def where(nodes, *kinds):
    return [k for k, n in enumerate(nodes) if over_ranks(n) in kinds]


def walk_of(nodes):
    """Where the walk is, behind the forward pass."""
    return [k for k, n in enumerate(nodes) if n.op == "call_function" and stage_of(n) in WALK[1:]]


@pytest.mark.parametrize("asked", [[], [SumGradSquared()]], ids=["gradient", "squares"])
def test_sums_begin_within_the_walk_and_end_behind_it(monkeypatch, asked):
    nodes = nodes_of(monkeypatch, asked)
    walk, begun, waits = walk_of(nodes), where(nodes, "sum"), where(nodes, "wait")
    assert len(begun) >= LAYERS, "a bucket for each layer"
    within = [k for k in begun if k < walk[-1]]
    assert len(within) >= (LAYERS - 1) * (1 + len(asked)), "all but those of the first layer, which the walk ends at"
    assert min(waits) > max(walk), "what is a result alone is waited for in the end"


def test_a_bucket_begins_right_behind_its_last_value(monkeypatch):
    """Between the last value of a bucket and its collective there is no op of the walk; the last layer's is the first one."""
    nodes = nodes_of(monkeypatch, [])
    place = {n: k for k, n in enumerate(nodes)}
    walk = set(walk_of(nodes))
    for k in where(nodes, "sum"):
        values, behind = [nodes[k]], set()
        while values:
            node = values.pop()
            if stage_of(node) == "distribute":
                values += node.all_input_nodes
            else:
                behind.add(place[node])
        last = max((j for v in behind for j in _walked(nodes[v], place, walk)), default=0)
        assert not [j for j in walk if last < j < k], nodes[k]


def _walked(node, place, walk):
    """The nodes of the walk that a value is computed of."""
    found, left = set(), [node]
    while left:
        n = left.pop()
        if n in place and place[n] not in found:
            found.add(place[n])
            left += n.all_input_nodes
    return found & walk


def test_shards_begin_within_the_walk_and_two_are_on_their_way_at_most(monkeypatch):
    nodes = nodes_of(monkeypatch, [], sharded=True)
    walk, begun = walk_of(nodes), where(nodes, "scatter")
    ends = [k for k, n in enumerate(nodes) for i in n.all_input_nodes if over_ranks(i) == "scatter"]
    assert len(begun) == len(ends) == LAYERS
    assert sum(k < walk[-1] for k in begun) >= LAYERS - 1
    for one, end, following in zip(begun, ends, [*begun[1:], len(nodes)], strict=True):
        assert one < end < following
        between = nodes[end + 1 : following] if following < len(nodes) else []
        assert not [n for n in between if stage_of(n) in WALK[1:]], "waited for where the next one begins"


def test_factors_begin_within_the_walk(monkeypatch):
    nodes = nodes_of(monkeypatch, [KFAC(assign="layers")])
    walk, begun = walk_of(nodes), where(nodes, "reduce")
    ends = [k for k, n in enumerate(nodes) for i in n.all_input_nodes if over_ranks(i) == "reduce"]
    assert begun and min(begun) < walk[-1] < min(ends)
