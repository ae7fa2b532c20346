"""Passes keep what a program computes; what is asked for together is computed once."""

from __future__ import annotations

import functools
import operator
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from asked import exact, first, sampled
from torch import Tensor, fx, nn

import fxcurv
from fxcurv import passes
from fxcurv.extensions import (
    BatchDiagGGNExact,
    BatchGrad,
    DiagGGNExact,
    DiagGGNMC,
    Jacobian,
)
from fxcurv.ir import emit
from fxcurv.ir.pieces import forget as forget_pieces

aten = torch.ops.aten
MANY = [*first(), *exact(), *sampled(2), Jacobian()]


# ---- models ------------------------------


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


class Shared(nn.Module):
    """A layer called twice, a residual sum and a weight that reaches its op through another."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.norm, self.scale = nn.LayerNorm(4), nn.Parameter(torch.randn(3, 1))

    def forward(self, x):
        h = self.norm(torch.tanh(self.inner(x)) + x)
        return F.linear(self.inner(h), self.last.weight * self.scale, self.last.bias)


class Tokens(nn.Module):
    """An embedding tied to the head, at several positions."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(torch.tanh(self.mix(self.table(x))), self.table.weight).transpose(1, 2)


MODELS = {
    "cnn": lambda: (cnn(), F.cross_entropy, torch.randn(4, 1, 8, 8), torch.tensor([0, 2, 1, 1])),
    "shared": lambda: (Shared(), F.mse_loss, torch.randn(3, 4), torch.randn(3, 3)),
    "sequence": lambda: (Shared(), F.mse_loss, torch.randn(3, 2, 4), torch.randn(3, 2, 3)),
    "tokens": lambda: (Tokens(), F.cross_entropy, torch.randint(5, (3, 4)), torch.randint(5, (3, 4))),
    "huber": lambda: (Shared(), F.smooth_l1_loss, torch.randn(3, 4), torch.randn(3, 3)),
}


def build(name):
    torch.manual_seed(0)
    model, loss, x, y = MODELS[name]()
    cast = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    return model.double(), loss, cast(x), cast(y)


# ---- before and after ------------------------------


class Snapshot:
    """What a program computes after one pass, as a graph of its own that runs."""

    def __init__(self, name, program):
        graph, values = fx.Graph(), {}
        graph.graph_copy(program.graph, values)
        self.names, nodes = zip(*self._named(program), strict=True)
        graph.output(tuple(values[n] for n in nodes))
        self.name, self.gm, self.inputs = name, fx.GraphModule(program.gm, graph), list(program.inputs)

    @staticmethod
    def _named(program):
        yield "loss", program.loss
        yield from ((f"output{k}", n) for k, n in enumerate(program.output_leaves))
        for field, results in program.results.items():
            yield from ((f"{field} of {param}", n) for param, n in results.items())
        yield from program.extras.items()

    def run(self, model, x, y, program, run=None) -> dict[str, Tensor]:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **program.constants}
        given = {"input": x, "target": y, "seed": torch.tensor(7)}
        flat = [given[i.kind] if i.kind in given else tensors[i.name] for i in self.inputs]
        with torch.no_grad():
            return dict(zip(self.names, (run or fx.Interpreter(self.gm).run)(*flat), strict=True))


@functools.cache
def observed(name):
    """(compiled, program, a Snapshot after every pass) of all twelve extensions."""
    model, loss, x, y = build(name)
    taken = []

    def watched(step):
        def run(program):
            program = step(program)
            taken.append(Snapshot(step.__name__, program))
            return program

        run.__name__ = step.__name__
        return run

    with pytest.MonkeyPatch.context() as patch:
        for pipeline in ("ANALYSIS", "PIPELINE"):
            patch.setattr(passes, pipeline, [watched(p) for p in getattr(passes, pipeline)])
        compiled = fxcurv.compile(model, loss, MANY, debug=True)
        return compiled, compiled.lower(x, y), taken


@pytest.mark.parametrize("name", MODELS)
def test_every_pass_keeps_the_results(name):
    compiled, program, snapshots = observed(name)
    _, _, x, y = build(name)
    assert [s.name for s in snapshots] == [p.__name__ for p in (*passes.ANALYSIS, *passes.PIPELINE)]
    values = [snapshot.run(compiled.model, x, y, program) for snapshot in snapshots]
    final = values[-1]
    assert {e.savefield for e in MANY} <= {key.split(" of ")[0] for key in final}
    assert {key for before in values for key in before} == set(final)
    for snapshot, before in zip(snapshots, values, strict=True):
        for key, value in before.items():
            message = f"{key} changed after {snapshot.name}: "
            torch.testing.assert_close(value, final[key], rtol=1e-9, atol=1e-11, msg=lambda m, s=message: s + m)
    result = compiled(x, y, seed=7)
    for param, value in result.diag_ggn_mc.items():
        torch.testing.assert_close(value, final[f"diag_ggn_mc of {param}"], rtol=0, atol=0)


def test_extract_makes_what_select_replaces():
    """Contract nodes are there after extract and gone after select."""
    _, _, snapshots = observed("cnn")
    count = {s.name: sum(_is_contract(n) for n in s.gm.graph.nodes) for s in snapshots}
    assert count["propagate"] == count["select"] == count["finish"] == 0
    assert count["extract"] > 0


def _is_contract(node):
    return node.op == "call_function" and isinstance(node.target, fxcurv.contractions.contract.Contract)


class _Declared(fx.Interpreter):
    """Compares what contract nodes compute with the values that they declare."""

    def __init__(self, gm, batch, n):
        super().__init__(gm)
        self.batch, self.n, self.seen = batch, n, 0

    def run_node(self, n):
        value = super().run_node(n)
        if _is_contract(n):
            assert value.shape == torch.Size(self.batch.shape(n.meta["val"], self.n)), n.target
            assert value.dtype == n.meta["val"].dtype, n.target
            self.seen += 1
        return value


@pytest.mark.parametrize("name", MODELS)
def test_a_contract_node_declares_what_it_computes(name):
    compiled, program, snapshots = observed(name)
    _, _, x, y = build(name)
    extracted = next(s for s in snapshots if s.name == "extract")
    assert any(_is_contract(n) for n in extracted.gm.graph.nodes)
    checked = _Declared(extracted.gm, program.batch, x.shape[0])
    extracted.run(compiled.model, x, y, program, run=checked.run)
    assert checked.seen == sum(_is_contract(n) for n in extracted.gm.graph.nodes)


def test_equal_layers_share_traced_pieces(monkeypatch):
    """A deeper model of equal layers traces no more than a shallow one."""
    traced = []
    monkeypatch.setattr(emit, "_trace", lambda *args, trace=emit._trace: traced.append(args[1]) or trace(*args))

    def pieces(depth):
        traced.clear()
        forget_pieces()
        layer = lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)  # noqa: E731
        model = nn.Sequential(*(layer() for _ in range(depth)), nn.Flatten(), nn.Linear(12, 2))
        lowered(model, [BatchGrad(), DiagGGNMC()], torch.randn(2, 3, 4), torch.tensor([0, 1]))
        return len(traced)

    assert pieces(4) == pieces(2) > 0


# ---- shared work ------------------------------


def lowered(model, extensions, x, y, loss=F.cross_entropy):
    return fxcurv.compile(model, loss, extensions).lower(x, y)


def calls(program, op) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.target is op]


def walk(program) -> list[fx.Node]:
    """Convolutions of the backward walk: those that give the cotangent of an input."""
    return [n for n in calls(program, aten.convolution_backward.default) if n.args[-1][0]]


def test_twelve_extensions_share_one_forward_and_one_walk():
    compiled, program, _ = observed("cnn")
    convolutions = sum(isinstance(m, nn.Conv2d) for m in compiled.model)
    assert len(calls(program, aten.convolution.default)) == convolutions
    # nothing needs the cotangent of the data
    assert len(walk(program)) == convolutions - 1
    assert len(calls(program, aten.max_pool2d_with_indices.default)) == 1
    assert len(calls(program, aten.tanh.default)) == 1
    # the head's forward; its transpose is a product of another kind
    assert len(calls(program, aten.linear.default)) + len(calls(program, aten.addmm.default)) <= 1


@pytest.mark.parametrize("name", MODELS)
def test_no_node_is_repeated(name):
    _, program, _ = observed(name)
    seen: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op not in ("call_function", "get_attr") or is_random(node):
            continue
        key = f"{node.target} {node.args} {sorted(node.kwargs.items())}"
        assert key not in seen, f"{node} repeats {seen[key]}: {key}"
        seen[key] = node


def is_random(node):
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


@pytest.mark.parametrize("name", MODELS)
def test_every_node_is_used(name):
    _, program, _ = observed(name)
    dead = [n for n in program.graph.nodes if n.op == "call_function" and not n.users]
    assert not dead


def test_a_second_extension_costs_only_its_own_part():
    """What two extensions need of the walk is emitted once."""
    model, _, x, y = build("cnn")
    one = lowered(model, [DiagGGNExact()], x, y)
    two = lowered(model, [DiagGGNExact(), BatchDiagGGNExact()], x, y)
    assert len(walk(one)) == len(walk(two))
    assert len(calls(one, aten.convolution.default)) == len(calls(two, aten.convolution.default))


def shape_of(program) -> Counter:
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


def as_buffers(model: nn.Module) -> nn.Module:
    """The module with every parameter turned into a buffer."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, p.detach())
    return model


@pytest.mark.parametrize("extensions", [[BatchGrad(), DiagGGNMC()], []], ids=["two", "none"])
def test_frozen_parameters_cost_nothing(extensions):
    """A frozen layer is a layer of constants, and below the lowest trained one the walk does not go."""
    frozen, constant = build("cnn")[0], build("cnn")[0]
    _, _, x, y = build("cnn")
    frozen[0].requires_grad_(False)
    frozen[3].requires_grad_(False)
    as_buffers(constant[0])
    as_buffers(constant[3])
    a, b = lowered(frozen, extensions, x, y), lowered(constant, extensions, x, y)
    assert shape_of(a) == shape_of(b)
    assert not calls(a, aten.convolution_backward.default)
    assert set(a.results["grad"]) == {"7.weight", "7.bias"}


def test_frozen_bias_only():
    model, _, x, y = build("cnn")
    model[3].bias.requires_grad_(False)
    program = lowered(model, [BatchGrad(), DiagGGNExact()], x, y)
    assert "3.bias" not in program.results["grad"]
    assert len(walk(program)) == 1
    assert not any(n.meta.get("origin", {}).get("param") == "3.bias" for n in program.graph.nodes)


def test_a_walk_stops_where_no_one_needs_it():
    """Only the last layer is trained: nothing of the body is transposed."""
    model, _, x, y = build("cnn")
    for p in list(model.parameters())[:-2]:
        p.requires_grad_(False)
    program = lowered(model, [BatchGrad(), DiagGGNExact()], x, y)
    stages = [n for n in program.graph.nodes if n.meta.get("origin", {}).get("stage") == "propagate"]
    assert not [n for n in stages if n.meta["origin"].get("module") in {"0", "1", "2", "3", "4", "5"}]


def test_verify_finds_a_broken_program():
    """A result outside the graph and a value that is missing are named."""
    model, loss, x, y = build("shared")
    compiled = fxcurv.compile(model, loss, [BatchGrad()])
    program = compiled.lower(x, y)
    node = next(n for n in program.graph.nodes if n.op == "call_function" and n.target is not operator.getitem)
    value = node.meta.pop("val")
    with pytest.raises(fxcurv.errors.InternalError, match="after test"):
        passes.verify(program, "test")
    node.meta["val"] = value
    del program.results["grad_batch"]["norm.weight"]
    with pytest.raises(fxcurv.errors.InternalError, match="grad_batch"):
        passes.verify(program, "test")
