"""Calls inside a compiled training step, the emitted graph under a backend, and the exported program: all as in eager."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from asked import every, products
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

import fxcurv
from fxcurv import extensions as ext
from fxcurv.errors import ArgumentError


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3),
    ).double()  # fmt: skip


PRODUCTS = {type(e) for e in products()}


def mlp(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def images(n: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(n, 1, 6, 6, dtype=torch.float64), torch.randint(3, (n,))
    for t in (x, y):
        torch._dynamo.mark_dynamic(t, 0)
    return x, y


def features(n: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6, dtype=dtype), torch.randint(3, (n,))


def same(a, b, **tolerance) -> None:
    """Equal pytrees, to rounding."""
    (left, spec), (right, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    assert spec == other and left
    for p, q in zip(left, right, strict=True):
        torch.testing.assert_close(p, q, **tolerance)


def compiled_step(make, model, backend="aot_eager", **options):
    """(the compiled step, the same in eager on a copy of the model, a counter of frames)."""
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    return torch.compile(make(model), backend=counter, **{"fullgraph": True, **options}), make(twin), counter


# ---- inside a step ------------------------------


def newton(extensions):
    """A step that uses the gradient and returns every quantity; products are called."""

    def make(model):
        compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), extensions)

        def step(x, y, seed):
            result = compiled(x, y, seed=seed)
            fields = {}
            for e in extensions:
                field = result[e]
                if type(e) in PRODUCTS:
                    field = {name: field[name](torch.ones_like(p)[None]) for name, p in model.named_parameters()}
                fields[e.savefield] = dict(field) if isinstance(field, Mapping) else field
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p -= 0.1 * result.grad[name]
            return result.loss, fields

        return step

    return make


def check_steps(extensions, steps: int) -> None:
    model = cnn()
    step, eager, counter = compiled_step(newton(extensions), model)
    for k in range(steps):
        x, y = images(8 if k < steps - 1 else 5)
        same(step(x, y, torch.tensor(k)), eager(x, y, torch.tensor(k)), rtol=1e-10, atol=1e-12)
    assert counter.frame_count == 1, "one program for all batches, the smaller last one too"
    assert not counters["graph_break"]


def test_twenty_steps_with_several_quantities():
    """One frame, no graph break, no recompile for the smaller last batch; random columns by the seed."""
    check_steps([ext.BatchGrad(), ext.DiagGGNMC(), ext.Variance(), ext.KFAC(), ext.GGNMP()], 20)


@pytest.mark.slow
@pytest.mark.parametrize("extension", every(cnn()), ids=lambda e: type(e).__name__)
def test_every_quantity(extension):
    check_steps([extension], 20)


def test_numbers_of_entries_are_products_of_sizes():
    """Those of the columns that a convolution's factors are made of depend on the batch size, by an op that Dynamo refuses."""
    compiled = fxcurv.compile(cnn(), F.cross_entropy, extensions=[ext.KFLR()])

    def step(x, y):
        return pytree.tree_leaves({name: factors for name, factors in compiled(x, y).kflr.items()})

    traced = torch.compile(step, fullgraph=True, backend="eager")
    batch = images(5)
    torch.testing.assert_close(traced(*batch), step(*batch))


def test_a_mode_or_a_frozen_parameter_is_another_program():
    model = mlp()
    model.insert(1, nn.Dropout(0.5))
    compiled = fxcurv.compile(model.eval(), nn.CrossEntropyLoss(), [ext.SumGradSquared()])
    step = torch.compile(lambda x, y: compiled(x, y).sum_grad_squared, fullgraph=True, backend="eager")
    x, y = features(8)
    first = step(x, y)
    same(first, compiled(x, y).sum_grad_squared)
    model[0].weight.requires_grad_(False)
    assert set(step(x, y)) == set(first) - {"0.weight"}
    model.train()
    torch.manual_seed(0)
    dropped = step(x, y)
    assert not torch.allclose(dropped["3.weight"], first["3.weight"])


def test_attach_accumulates_and_sets_fields():
    def make(model):
        compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [ext.DiagGGNExact()])

        def step(x, y):
            for p in model.parameters():
                p.grad = None
            for k in range(2):  # gradient accumulation
                compiled(x[k::2], y[k::2]).attach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            with torch.no_grad():
                for p in model.parameters():
                    p -= p.grad / (p.diag_ggn_exact + 1)
            return [p.grad for p in model.parameters()]

        return step

    step, eager, _ = compiled_step(make, mlp())
    for _ in range(3):
        x, y = features(8)
        same(step(x, y), eager(x, y), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "rtol"), [("SGD", 1e-10), pytest.param("Adam", 1e-5, marks=pytest.mark.slow)])
def test_optimizers(name, rtol):
    """PyTorch breaks the graph at its own optimizers' `step`; compiled, its Adam counts steps in float32."""

    def make(model):
        compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [ext.DiagGGNExact()])
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)

        def step(x, y):
            for p in model.parameters():
                p.grad = None
            loss = compiled(x, y).attach().loss
            optimizer.step()
            return loss

        return step

    step, eager, _ = compiled_step(make, mlp(), fullgraph=False)
    for _ in range(3):
        x, y = features(8)
        same(step(x, y), eager(x, y), rtol=rtol, atol=1e-12)


def test_autocast():
    def make(model):
        compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [ext.DiagGGNExact()])

        def step(x, y):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result = compiled(x, y)
            return result.grad, result.diag_ggn_exact

        return step

    step, eager, _ = compiled_step(make, mlp(torch.float32))
    x, y = features(8, torch.float32)
    same(step(x, y), eager(x, y))
    single = fxcurv.compile(mlp(torch.float32), nn.CrossEntropyLoss())(x, y).grad["0.weight"]
    assert not torch.equal(step(x, y)[0]["0.weight"], single), "autocast has reached the program"


def test_results_are_differentiated_again(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)

    def make(model):
        compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [ext.SumGradSquared()])

        def step(x, y):
            result = compiled(x, y, create_graph=True)
            total = sum(v.sum() for v in result.sum_grad_squared.values())
            return torch.autograd.grad(total, list(model.parameters()))

        return step

    step, eager, _ = compiled_step(make, mlp())
    x, y = features(8)
    same(step(x, y), eager(x, y), rtol=1e-10, atol=1e-12)


def test_running_statistics_are_updated_once():
    def make(model):
        compiled = fxcurv.compile(model, nn.CrossEntropyLoss())
        return lambda x, y: compiled(x, y).loss

    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    twin = copy.deepcopy(model)
    step, eager = torch.compile(make(model), fullgraph=True, backend="aot_eager"), make(twin)
    for _ in range(2):
        x, y = features(8)
        same(step(x, y), eager(x, y))
    same(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert model[1].num_batches_tracked == 2


def test_a_generator_breaks_the_graph():
    """It cannot enter a graph, so the call runs in eager."""
    compiled = fxcurv.compile(mlp(), nn.CrossEntropyLoss(), [ext.DiagGGNMC()])
    x, y = features(4)
    step = torch.compile(lambda g: compiled(x, y, generator=g).diag_ggn_mc, backend="eager")
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    same(step(draw()), compiled(x, y, generator=draw()).diag_ggn_mc)


# ---- a backend ------------------------------


def check_backend(backend, extensions, **tolerance):
    model = cnn()
    plain = fxcurv.compile(model, nn.CrossEntropyLoss(), extensions)
    other = fxcurv.compile(model, nn.CrossEntropyLoss(), extensions, backend=backend)
    for n in (8, 8, 5):
        x, y = torch.randn(n, 1, 6, 6, dtype=torch.float64), torch.randint(3, (n,))
        a, b = plain(x, y, seed=1), other(x, y, seed=1)
        for e in extensions:
            if type(e) not in PRODUCTS:
                same(dict(a[e]), dict(b[e]), **tolerance)
        same(a.grad, b.grad, **tolerance)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_backend_computes_the_same(backend):
    """Compiled once for all batch sizes."""
    counter = CompileCounterWithBackend(backend)
    extensions = [ext.BatchGrad(), ext.DiagGGNMC(), ext.Variance(), ext.KFAC()]
    check_backend(counter, extensions, rtol=1e-9, atol=1e-11)
    assert counter.frame_count == 1
    assert not counters["graph_break"]


def test_a_backend_differentiates_again():
    model = mlp()
    x, y = features(6)
    found = []
    for backend in ("eager", "aot_eager"):
        compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [ext.SumGradSquared()], backend=backend)
        total = sum(v.sum() for v in compiled(x, y, create_graph=True).sum_grad_squared.values())
        found.append(torch.autograd.grad(total, list(model.parameters())))
    same(*found, rtol=1e-10, atol=1e-12)


def test_the_users_tensors_are_not_marked():
    x, y = features(6)
    before = set(vars(x))
    fxcurv.compile(mlp(), nn.CrossEntropyLoss(), backend="aot_eager")(x, y)
    assert set(vars(x)) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": 3}, "inductor"),
        ({"mode": "reduce-overhead"}, 'backend="inductor"'),
        ({"dynamic": True}, "torch.compile"),
    ],
)
def test_a_wrong_backend_is_refused(options, words):
    with pytest.raises(ArgumentError, match=words):
        fxcurv.compile(mlp(), nn.CrossEntropyLoss(), **options)


# ---- export ------------------------------


def test_an_exported_program_is_saved_and_loaded(tmp_path):
    """With another batch size, running statistics, factors and a parameter of the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    loss = nn.CrossEntropyLoss(weight=torch.rand(3).double())
    compiled = fxcurv.compile(model, loss, [ext.DiagGGNMC(), ext.BatchGrad(), ext.KFAC()])
    torch.export.save(compiled.export(*features(4)), tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    x, y = features(7)
    found, expected = loaded(x, (y,), torch.tensor(3)), compiled(x, y, seed=3)
    assert set(found) == {"loss", "output", "grad", "diag_ggn_mc", "grad_batch", "kfac"}
    for field in ("loss", "output", "grad", "diag_ggn_mc", "grad_batch"):
        same(found[field], getattr(expected, field))
    for name, factors in found["kfac"].items():
        same(factors, pytree.tree_leaves(expected.kfac[name]))


def test_export_leaves_modes_alone():
    """A frozen layer in evaluation mode, inside a model in training mode; and the loss, which has a mode too."""
    model, loss = mlp(), nn.CrossEntropyLoss()
    model[1].eval()
    loss.train(not model.training)
    modes = [m.training for m in (*model.modules(), loss)]
    fxcurv.compile(model, loss, [ext.BatchGrad()]).export(*features(4))
    assert [m.training for m in (*model.modules(), loss)] == modes


def test_products_are_not_exported():
    with pytest.raises(ArgumentError, match="GGNMP"):
        fxcurv.compile(mlp(), nn.CrossEntropyLoss(), [ext.GGNMP()]).export(*features(4))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_packaged_program_runs_without_fxcurv(tmp_path):
    model = mlp(torch.float32)
    compiled = fxcurv.compile(model, F.cross_entropy, [ext.DiagGGNExact()])
    x, y = features(4, torch.float32)
    program = compiled.export(x, y)
    assert not any("fxcurv" in str(n.target) for n in program.graph.nodes), "no ops of our own"
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "program.pt2"))
    torch.save((x, y, compiled(x, y).diag_ggn_exact["0.weight"]), tmp_path / "data.pt")
    script = textwrap.dedent(f"""
        import sys, torch
        x, y, expected = torch.load({str(tmp_path / "data.pt")!r})
        found = torch._inductor.aoti_load_package({package!r})(x, (y,), torch.tensor(0))
        torch.testing.assert_close(found["diag_ggn_exact"]["0.weight"], expected)
        assert "fxcurv" not in sys.modules
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
