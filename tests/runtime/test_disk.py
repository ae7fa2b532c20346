"""Programs outlive the process, and none serves another model than its own: every change is held against plain PyTorch."""

import dataclasses
import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from os import getenv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
from fxcurv.errors import ArgumentError, LossError
from fxcurv.extensions import (
    EKFAC,
    GGNMP,
    KFAC,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    Jacobian,
    Variance,
)
from fxcurv.ir.program import Program
from fxcurv.ir.state import Options, Walked
from fxcurv.runtime import disk, programs, shared, written

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 1, 0, 1])
SQUASH = torch.tanh
EXTENSIONS = (BatchGrad(), DiagGGNMC())


class Net(nn.Module):
    """Reads a float, a function, a global, a tensor that is no buffer, a buffer, and whether it is trained."""

    def __init__(self, scale=2.0, act=torch.sigmoid):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("mean", torch.randn(3))
        self.shift, self.scale, self.act = torch.randn(3), scale, act
        self.eval()

    def forward(self, x):
        x = SQUASH(x - self.mean) * (3.0 if self.training else 1.0)
        return self.b(self.act(self.a(x) * self.scale + self.shift))

    def other(self, x):
        return self.b(self.a(x))


def smoothed(amount):
    def loss(f, y):
        return F.cross_entropy(f, y, label_smoothing=amount)

    return loss


def gradients(model, loss, x, y):
    """The individual gradients of a mean over samples, by autograd, a sample at a time."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    each = [
        torch.autograd.grad(loss(model(a), b) / len(x), named.values())
        for a, b in zip(x.split(1), y.split(1), strict=True)
    ]
    return {name: torch.stack(rows) for name, rows in zip(named, zip(*each, strict=True), strict=True)}


class Runs:
    """Compilations that share a folder of programs."""

    def __init__(self, monkeypatch):
        self.captured, own = 0, programs.capture

        def capture(*args):
            self.captured += 1
            return own(*args)

        monkeypatch.setattr(programs, "capture", capture)

    def __call__(self, model, loss=None, extensions=EXTENSIONS, x=X, y=Y, **options):
        """(the result, how often a model was captured for it, the compiled object), held against autograd."""
        shared.forget()
        before, loss = self.captured, loss or nn.CrossEntropyLoss()
        compiled = fxcurv.compile(model, loss, extensions, **options)
        result = compiled(x, y, seed=0)
        if any(isinstance(e, BatchGrad) for e in extensions):
            expected = gradients(model, loss, x, y)
            assert list(expected) == list(result.grad_batch)
            for name, value in expected.items():
                torch.testing.assert_close(result.grad_batch[name], value, rtol=1e-4, atol=1e-6)
        return result, self.captured - before, compiled


@pytest.fixture
def runs(monkeypatch, tmp_path):
    monkeypatch.setattr(fxcurv, "cache_dir", tmp_path / "programs")
    return Runs(monkeypatch)


@pytest.fixture(scope="module")
def written_once(tmp_path_factory):
    """A folder with the program of `Net`, and its result."""
    folder = tmp_path_factory.mktemp("written") / "programs"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(fxcurv, "cache_dir", folder)
        result, captured, compiled = Runs(monkeypatch)(Net())
    assert captured and [f.suffix for f in folder.iterdir()] == [".fxcurv"]
    assert f"on disk: kept in {folder}" in compiled.explain(X, Y).notes
    return folder, result, compiled


@pytest.fixture
def kept(written_once, runs, tmp_path):
    """`runs` on a folder that holds the program of `Net`."""
    shutil.copytree(written_once[0], tmp_path / "programs")
    return runs


def some(names, *quick):
    """All parameters, the others slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def equal(one, other):
    for field in ("grad", *(e.savefield for e in one.extensions)):
        a, b = getattr(one, field), getattr(other, field)
        assert a.keys() == b.keys()
        for name in a:
            values = [[v] if isinstance(v, torch.Tensor) else v for v in (a[name], b[name])]
            assert all(torch.equal(u, v) for u, v in zip(*values, strict=True)), (field, name)
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.output, other.output)


# ---- another process ------------------------------

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(3, 2)

    def forward(self, x):
        return self.scaled(self.a(x))

    def scaled(self, y):
        return 2.0 * y
"""
SCRIPT = """
import json, sys, torch
import fxcurv
from fxcurv import passes
from fxcurv.extensions import BatchGrad, DiagGGNMC
from net import Net

done = []
export, run = torch.export.export, passes.run
torch.export.export = lambda *args, **kwargs: done.append("export") or export(*args, **kwargs)
passes.run = lambda *args, **kwargs: done.append("passes") or run(*args, **kwargs)
model, loss = Net(), torch.nn.CrossEntropyLoss()
x, y = torch.arange(12.).view(4, 3).cos(), torch.tensor([0, 1, 1, 0])
compiled = fxcurv.compile(model, loss, [BatchGrad(), DiagGGNMC()])
torch.manual_seed(3)
result = compiled(x, y)
drawn = torch.rand(()).item()
for n in range(4):
    expected = torch.autograd.grad(loss(model(x[n:n + 1]), y[n:n + 1]) / 4, list(model.parameters()))
    for name, g in zip(result.grad_batch, expected, strict=True):
        torch.testing.assert_close(result.grad_batch[name][n], g)
values = [t.tolist() for field in (result.grad, result.grad_batch, result.diag_ggn_mc) for t in field.values()]
again = compiled(x, y)
print(json.dumps([sorted(set(done)), values, result.loss.item(), drawn, compiled.explain(x, y).notes]))
"""


def process(folder):
    root = str(Path(fxcurv.__file__).parent.parent)
    environment = {
        **os.environ,
        "FXCURV_CACHE_DIR": str(folder / "programs"),
        "PYTHONPATH": f"{root}{os.pathsep}{folder}",
    }
    ran = subprocess.run(
        [sys.executable, str(folder / "script.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_second_process_traces_nothing(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "script.py").write_text(SCRIPT)
    done, values, loss, drawn, _ = process(tmp_path)
    assert done == ["export", "passes"]
    done, again, *more, notes = process(tmp_path)
    assert done == []
    assert (again, more) == (values, [loss, drawn])
    assert any("read from" in note and "checked when it was made" in note for note in notes)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2.0 * y", "3.0 * y"),
        pytest.param("2.0 * y", "2.0 * y  # the same", marks=pytest.mark.slow),
        pytest.param("torch.manual_seed(0)", "self.hidden = 1; torch.manual_seed(0)", marks=pytest.mark.slow),
    ],
)
def test_an_edited_file_makes_another_program(runs, tmp_path, monkeypatch, old, new):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "edited_net", raising=False)
    for text, captured in ((NET, True), (NET, False), (NET.replace(old, new), True)):
        (tmp_path / "edited_net.py").write_text(text)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)  # a second is its clock
        importlib.invalidate_caches()
        sys.modules.pop("edited_net", None)
        module = importlib.import_module("edited_net")
        assert bool(runs(module.Net(), x=X, y=Y % 2, extensions=(BatchGrad(),))[1]) == captured


@pytest.mark.slow
def test_a_process_whose_source_has_changed_traces_again(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "script.py").write_text(SCRIPT)
    _, values, *_ = process(tmp_path)
    (tmp_path / "net.py").write_text(NET.replace("2.0 * y", "3.0 * y"))  # what it gives is compared with autograd there
    done, other, *_ = process(tmp_path)
    assert done == ["export", "passes"]
    assert other != values


# ---- what makes another program ------------------------------


def test_read(kept, written_once):
    result, captured, compiled = kept(Net())
    assert captured == 0
    equal(result, written_once[1])
    x, y = torch.randn(7, 3), torch.randint(3, (7,))
    again = compiled(x, y, seed=0)
    for name, value in gradients(compiled.model, nn.CrossEntropyLoss(), x, y).items():
        torch.testing.assert_close(again.grad_batch[name], value, rtol=1e-4, atol=1e-6)
    assert kept.captured == 0
    with torch.no_grad():
        compiled.model.shift.mul_(2)  # read at every call
        compiled.model.a.weight.mul_(2)
    compiled.model.scale = 1.5  # compared at every call
    for name, value in gradients(compiled.model, nn.CrossEntropyLoss(), x, y).items():
        torch.testing.assert_close(compiled(x, y).grad_batch[name], value, rtol=1e-4, atol=1e-6)
    assert kept.captured == 1


def tied():
    model = Net()
    model.b = model.a
    return model


def equal_but_not_tied():
    model = Net()
    model.b.load_state_dict(model.a.state_dict())
    return model


def frozen():
    model = Net()
    model.a.weight.requires_grad_(False)
    return model


CHANGES = {
    "a float": lambda patch: (Net(scale=3.0),),
    "a function": lambda patch: (Net(act=torch.tanh),),
    "a lambda": lambda patch: (Net(act=lambda x: 2 * x),),
    "a global": lambda patch: patch.setattr(sys.modules[__name__], "SQUASH", torch.cos) or (Net(),),
    "a method": lambda patch: patch.setattr(Net, "forward", Net.other) or (Net(),),
    "training": lambda patch: (Net().train(),),
    "dtype": lambda patch: (Net().double(),),
    "tied": lambda patch: (tied(),),
    "frozen": lambda patch: (frozen(),),
    "the loss": lambda patch: (Net(), smoothed(0.2)),
    "an option of an extension": lambda patch: (Net(), None, (BatchGrad(), DiagGGNMC(mc_samples=2))),
    "an extension": lambda patch: (Net(), None, (BatchGrad(),)),
    "the version of PyTorch": lambda patch: patch.setitem(vars(torch), "__version__", "2.13.0+other") or (Net(),),
}


@pytest.mark.parametrize("change", some(CHANGES, "a float", "the loss", "tied"))
def test_a_change_makes_another_program(kept, change, monkeypatch):
    disk._process.cache_clear()
    model, *rest = CHANGES[change](monkeypatch)
    x = X.to(next(model.parameters()).dtype)
    if "shift" in vars(model):
        model.shift = model.shift.to(x.dtype)
    _, captured, compiled = kept(model, *rest, x=x)
    assert captured
    assert len(list(Path(fxcurv.cache_dir).iterdir())) == 2, compiled.explain(x, Y).notes
    _, captured, _ = kept(model, *rest, x=x)  # and that one is found again
    disk._process.cache_clear()
    assert captured == 0


class Nested(nn.Module):
    """Linear layers and one activation, held where `places` says."""

    def __init__(self, places):
        super().__init__()
        torch.manual_seed(0)
        parts = {"l": nn.Linear(3, 3), "a": nn.ReLU(), "b": nn.Linear(3, 3)}
        self.steps = nn.ModuleList([nn.Sequential(*(parts[p] for p in place)) for place in places])

    def forward(self, x):
        for step in self.steps:
            x = x + step(x)
        return x


def test_where_modules_are_held(runs):
    """The same modules with the same parameters, one of them in another place, or twice."""
    for places in (["lab"], ["laba"], ["la", "b"], ["l", "ab"]):
        assert runs(Nested(places), extensions=(BatchGrad(),))[1], places
    assert runs(Nested(["la", "b"]), extensions=(BatchGrad(),))[1] == 0


class Imports(Net):
    def forward(self, x):
        import factor_of_a_test

        return super().forward(x) * factor_of_a_test.FACTOR


def test_a_file_that_only_a_call_imports(runs, tmp_path, monkeypatch):
    """What a trace reads there is noted nowhere, so the file is."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for factor, captured in ((2.0, True), (2.0, False), (3.0, True)):
        (tmp_path / "factor_of_a_test.py").write_text(f"FACTOR = {factor}\n")
        sys.modules.pop("factor_of_a_test", None)
        importlib.import_module("factor_of_a_test")
        assert bool(runs(Imports(), extensions=(BatchGrad(),))[1]) == captured
    sys.modules.pop("factor_of_a_test", None)


def test_only_calls_read_what_is_kept(kept):
    """Which check it; an exported program, and a compiled step, have one of their own."""
    shared.forget()
    compiled = fxcurv.compile(Net(), nn.CrossEntropyLoss(), EXTENSIONS)
    before = kept.captured
    compiled.lower(X, Y)
    assert kept.captured > before


@pytest.mark.slow
def test_closures_of_one_function(runs):
    for amount, captured in ((0.1, True), (0.3, True), (0.1, False)):
        assert bool(runs(Net(), smoothed(amount), (BatchGrad(),))[1]) == captured


class Inner(Net):
    """Makes a function in its forward pass, which reads what that holds."""

    def forward(self, x):
        factors = {"twice": 2.0}

        def scaled(t):
            return sum([t * factors[name] for name in factors])

        return super().forward(scaled(x))


def test_functions_that_end_with_the_forward_pass_are_no_state(runs):
    assert [bool(runs(Inner())[1]) for _ in range(2)] == [True, False]


@pytest.mark.slow
def test_a_size_that_is_a_number(runs):
    """Batches of any size share a program that allows it, and none that does not."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x) * float(len(x))

    def loss(f, y):
        return F.cross_entropy(f, y)

    for n, captured in ((4, True), (6, True), (4, False), (6, False)):
        shared.forget()
        model, before = Fixed(), runs.captured
        x, y = X.repeat(2, 1)[:n], Y.repeat(2)[:n]
        result = fxcurv.compile(model, loss, [BatchGrad()])(x, y)
        expected = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
        for g, want in zip(result.grad.values(), expected, strict=True):
            torch.testing.assert_close(g, want)
        assert (runs.captured > before) == captured


class Hidden(nn.Module):
    """Reads a float where no trace sees it."""

    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.scale = nn.Linear(3, 3), scale

    def forward(self, x):
        return self.a(x) * object.__getattribute__(self, "scale")


def test_what_no_trace_sees_is_found_by_the_check(runs):
    runs(Hidden(2.0))
    assert runs(Hidden(2.0))[1] == 0
    with pytest.warns(RuntimeWarning, match="is not this model's"):
        assert runs(Hidden(3.0))[1]  # whose gradients are compared
    assert runs(Hidden(3.0))[1] == 0


# ---- what is not kept ------------------------------


class Counted(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Custom(Net):
    def forward(self, x):
        return Double.apply(super().forward(x))


class Listed(Net):
    """Reads a tensor that a list holds, in no order that its code says."""

    def __init__(self):
        super().__init__()
        self.masks = [torch.ones(3)]

    def forward(self, x):
        for mask in self.masks:
            x = x * mask
        return super().forward(x)


class Environment(Net):
    def forward(self, x):
        return super().forward(x) * float(os.environ.get("NO_SUCH_VARIABLE", "1"))


class Opaque(Net):
    """Holds an object that no other process can compare."""

    def __init__(self):
        super().__init__()
        self.known = {"all": iter(())}

    def forward(self, x):
        return super().forward(x) if self.known else x


class Getenv(Net):
    def forward(self, x):
        return super().forward(x) * float(getenv("NO_SUCH_VARIABLE", "1"))


def evaluated():
    return Net(act=eval("lambda x: 2 * x"))


def hooked():
    model = Net()
    model.a.register_forward_hook(lambda module, args, output: output * 2)
    return model


def made_of_text():
    space = {"nn": nn, "torch": torch}
    exec("class Made(nn.Linear):\n    def forward(self, x):\n        return super(Made, self).forward(x) * 2", space)
    return space["Made"](3, 3)


REFUSED = {
    "every call changes": (Counted, ()), "custom autograd function": (Custom, ()), "that a list": (Listed, ()),
    "os.environ": (Environment, ()), "compared by identity": (Opaque, ()), "hooks": (hooked, ()),
    "was made while the program ran": (made_of_text, ()), "the code of <lambda> was made while": (evaluated, ()),
    "reads os.environ": (Getenv, ()), "a product is a program of its own": (Net, (GGNMP(),)),
}  # fmt: skip


@pytest.mark.parametrize("why", some(REFUSED, "custom autograd function", "hooks"))
def test_what_is_not_kept_is_said(runs, why):
    build, extensions = REFUSED[why]
    _, _, compiled = runs(build(), extensions=extensions or (BatchGrad(),))
    (note,) = [n for n in compiled.explain(X, Y).notes if n.startswith("on disk: not kept, because ")]
    assert why in note, note
    assert not list(Path(fxcurv.cache_dir).glob("*"))


@pytest.mark.slow
def test_nothing_is_kept_unless_a_folder_is_named(runs, monkeypatch, tmp_path):
    monkeypatch.setattr(fxcurv, "cache_dir", None)
    _, _, compiled = runs(Net())
    assert not [n for n in compiled.explain(X, Y).notes if "on disk" in n]
    assert not list(tmp_path.iterdir())


# ---- what goes wrong ------------------------------


@pytest.mark.parametrize("content", some(("cut off", "changed", "none"), "cut off"))
def test_a_file_that_cannot_be_read_is_written_again(kept, content):
    (file,) = Path(fxcurv.cache_dir).iterdir()
    data = file.read_bytes()
    middle = len(data) // 2
    spoiled = {"cut off": data[:middle], "changed": data[:middle] + b"?" + data[middle + 1 :], "none": b""}[content]
    file.write_bytes(spoiled)
    with pytest.warns(RuntimeWarning, match="cannot be read") as warned:
        assert kept(Net())[1]
    assert len(warned) == 1
    assert list(Path(fxcurv.cache_dir).iterdir()) == [file]
    assert kept(Net())[1] == 0


def test_a_file_under_the_name_of_another(kept):
    (file,) = Path(fxcurv.cache_dir).iterdir()
    _, captured, _ = kept(Net(), extensions=(BatchGrad(),))
    (other,) = set(Path(fxcurv.cache_dir).iterdir()) - {file}
    assert captured
    file.replace(other)
    with pytest.warns(RuntimeWarning, match="under another name"):
        assert kept(Net(), extensions=(BatchGrad(),))[1]


def test_what_is_no_path():
    with pytest.raises(ArgumentError, match="cache_dir = 5"):
        disk.folder(5)
    assert disk.folder("~/programs").path == Path.home() / "programs"


@pytest.mark.slow
def test_a_full_disk_breaks_no_call(runs, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        _, _, compiled = runs(Net())
    assert not list(Path(fxcurv.cache_dir).iterdir())
    assert any("No space left" in note for note in compiled.explain(X, Y).notes)


def test_the_files_used_last_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "MOST", 3)
    folder = disk.Disk(tmp_path)
    for k in range(5):
        folder._write(tmp_path / f"{k}.fxcurv", b"")
        os.utime(tmp_path / f"{k}.fxcurv", (k, k))
    folder._write(tmp_path / "last.fxcurv", b"")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["3.fxcurv", "4.fxcurv", "last.fxcurv"]


def described(folder):
    (file,) = folder.iterdir()
    return file, json.loads(file.read_bytes().split(b"\n")[1])["program"]


def test_what_a_file_says_is_not_run(written_once):
    """Not a name that would become code, nor a text that SymPy would evaluate, nor a class of anybody's."""
    _, good = described(written_once[0])
    assert written.read(good, EXTENSIONS, Options())[0].loss is not None

    def refused(change):
        bad = json.loads(json.dumps(good))
        change(bad)
        with pytest.raises((ValueError, AttributeError, KeyError)):
            program, _ = written.read(bad, EXTENSIONS, Options())
            assert program.fake_mode.shape_env.guards  # made when they are asked for

    refused(lambda bad: bad["graph"][0].__setitem__(2, "x=print(1)"))
    refused(lambda bad: bad["graph"][-2].__setitem__(4, {"dict": [["x=print(1), y", 1]]}))
    refused(lambda bad: bad["graph"][-2].__setitem__(2, ["debugprims", "x", "default"]))
    refused(lambda bad: bad["guards"].__setitem__(slice(None), [{"expr": ["Integral", ["print(1)"]]}]))
    refused(lambda bad: bad["fields"].__setitem__("notes", {"new": ["subprocess", "Popen", {}]}))
    refused(lambda bad: bad["fields"].__setitem__("notes", {"new": ["fxcurv.api", "Compiled", {}]}))


def test_every_field_of_a_program_is_written_or_known_not_to_be():
    """So that a new one is not forgotten."""
    other = {"gm", "inputs", "batch", "buffers", "output_template", "options", "covers", "analysis", "walked", "check_module",
             "verdicts", "rules", "fake_mode"}  # fmt: skip
    made = {"extensions", "constants", "python", "heads", "checks", "served"}
    refused = {"conditions", "borrowing", "observed", "reads"}
    of_passes = {"pieces", "blanks", "stale", "spread"}
    fields = {f.name for f in dataclasses.fields(Program)}
    assert fields == {*written._PLAIN, *other, *made, *refused, *of_passes}
    of_the_walk = {"uses", "weights", "arrivals", "products", "averaged", "wanted"}
    assert {f.name for f in dataclasses.fields(Walked)} == {
        "direct",
        "columns",
        "residuals",
        "parts",
        "sweeps",
        *of_the_walk,
    }


# ---- all else that a program is asked for ------------------------------


@pytest.mark.slow
def test_a_report_and_its_graph_are_the_same(kept, written_once):
    made, read = written_once[2], kept(Net())[2]
    one, other = made.explain(X, Y), read.explain(X, Y)
    for field in ("rows", "totals", "plain", "columns", "sweeps", "fallbacks", "said", "batch", "output", "python"):
        assert getattr(one, field) == getattr(other, field), field
    graphs = [c.lower(X, Y).program.gm.print_readable(print_output=False) for c in (made, read)]
    shown = [re.sub(r"\bs\d+", "s", text) for text in graphs]  # symbols have names of their own
    assert shown[0] == shown[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "extension", [BatchL2Grad(), Variance(), DiagGGNExact(), KFAC(), EKFAC(), BatchDiagHessian(), Jacobian()],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
def test_every_quantity_is_read_as_it_was_written(runs, extension, training):
    class Noisy(Net):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5, self.training))

    def run():
        torch.manual_seed(5)
        return runs(Noisy().train(training), extensions=(extension,))

    result, captured, _ = run()
    assert captured
    again, captured, compiled = run()
    assert captured == 0
    equal(again, result)
    compiled(X[:3], Y[:3])
    assert runs.captured == 1


@pytest.mark.slow
def test_buffers_are_updated(runs):
    results = []
    for captured in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).train()
        result, found, _ = runs(model, extensions=(DiagGGNExact(),))
        assert bool(found) == captured
        results.append((result, model[1].running_mean, model[1].num_batches_tracked))
    equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[1][2] == 1


@pytest.mark.slow
def test_conditions_on_values_are_checked_again(runs):
    class Weighted(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.register_buffer("weight", torch.tensor(weight))

        def forward(self, f, y):
            return self.weight * F.cross_entropy(f, y)

    runs(Net(), Weighted(1.0), (DiagGGNExact(),))
    assert runs(Net(), Weighted(2.0), (DiagGGNExact(),))[1] == 0
    with pytest.raises(LossError, match="negative sign"):
        runs(Net(), Weighted(-1.0), (DiagGGNExact(),))


@pytest.mark.slow
def test_read_programs_are_exported_and_compiled(kept):
    _, captured, compiled = kept(Net())
    step = torch.compile(lambda x, y: compiled(x, y, seed=torch.tensor(0)).grad_batch["a.weight"], backend="aot_eager")
    expected = gradients(compiled.model, nn.CrossEntropyLoss(), X, Y)["a.weight"]
    torch.testing.assert_close(step(X, Y), expected)
    exported = compiled.export(X, Y).module()
    torch.testing.assert_close(exported(X, (Y,), torch.tensor(0))["grad_batch"]["a.weight"], expected)
    assert captured == kept.captured == 0


@pytest.mark.slow
def test_a_model_of_a_library(runs):
    """GPT-2, with its cache among what it returns: all that it reads of Python can be compared."""
    transformers = pytest.importorskip("transformers", reason="a model of transformers, of the extra `models`")
    sizes = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 8,
        "vocab_size": 11,
        "n_positions": 8,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }

    def loss(output, y):
        return F.cross_entropy(output.logits.flatten(0, 1), y.flatten())

    results = []
    for captured in (True, False):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
        words = torch.randint(11, (3, 5))
        before, compiled = runs.captured, fxcurv.compile(model, loss, EXTENSIONS)
        shared.forget()
        results.append(compiled({"input_ids": words}, words, seed=0))
        assert (runs.captured > before) == captured
    for field in ("grad", "grad_batch", "diag_ggn_mc"):
        one, other = (getattr(r, field) for r in results)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert type(results[1].output.past_key_values) is type(results[0].output.past_key_values)
