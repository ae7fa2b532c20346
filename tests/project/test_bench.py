"""The benchmarks run, at their smallest, and write rows that lack nothing."""

import csv
import os
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcurv.kernels
from fxcurv.extensions import BatchL2Grad

ROOT = Path(__file__).parents[2]
for package in ("tqdm", "matplotlib"):
    pytest.importorskip(package, reason="of the extra `demo`")


def run(script, out, *arguments):
    """The rows of the script's only CSV file."""
    command = [sys.executable, ROOT / "bench" / script, "--quick", "--threads", "1", "--out", out, *arguments]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = out.glob("*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    empty = {column for row in rows for column, value in row.items() if not value}
    assert empty == {"note"}
    return rows


def test_kernels(tmp_path):
    """The kernel and its definition with equal work, no error beyond rounding, and a picture."""
    rows = run("kernels.py", tmp_path, "--kernels", "outer_square_sum", "--plot", tmp_path / "roofline.png")
    assert [row["implementation"] for row in rows] == ["fxcurv", "reference"]
    flops, moved = 2 * 2 * 784 * 512, 4 * (2 * 784 + 2 * 512 + 512 * 784)
    assert {(row["flops"], row["bytes"]) for row in rows} == {(str(flops), str(moved))}
    assert all(float(row["error"]) < 1e-5 and float(row["percent"]) > 0 for row in rows)
    assert (tmp_path / "roofline.png").stat().st_size > 1000


def test_documents_have_the_measured_figures(monkeypatch):
    """The tables of docs/benchmark.md are of the newest results, and those of the README are rows of them."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.delitem(sys.modules, "cases", raising=False)  # the tests' own
    script, document = import_module("run"), (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    (name,) = re.findall(r"--write --from (bench/results/\S+\.csv)", document)
    assert script.markdown(script.read(ROOT / name)) in document
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^(\| \w+ \| [\d.]+ / .*) \|$", readme, re.MULTILINE)
    assert rows and all(f"\n{row} | " in document for row in rows)


def test_every_kernel_is_measured(monkeypatch):
    """The table of the benchmark names every kernel that has a definition."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    table = import_module("kernel_cases").KERNELS
    names = [module.name for module in pkgutil.iter_modules(fxcurv.kernels.__path__)]
    modules = {n: import_module(f"fxcurv.kernels.{n}") for n in names if "triton" not in n}
    kernels = {n for n, module in modules.items() if hasattr(module, "reference")}
    beside = {f"{n}_conv" for n, module in modules.items() if hasattr(module, "reference_conv")}
    assert kernels and beside and kernels | beside <= set(table)


def test_selection(tmp_path):
    """What was chosen is what was predicted to be the fastest, of several; ratios are to what was the fastest."""
    rows = run("selection.py", tmp_path, "--rounds", "2")
    cases = {}
    for row in rows:
        cases.setdefault(tuple(row[k] for k in ("layer", "V", "S", "reduction")), []).append(row)
    assert {key[-1] for key in cases} == {
        "2vn", "2vp", "2v", "1v", "1vn+2vn", "1vn+2vp", "2vn+2vp", "1vn+2vn+2vp"
    }  # fmt: skip
    for case in cases.values():
        predicted, median = ([float(row[k]) for row in case] for k in ("predicted_ms", "median_ms"))
        assert len(case) >= 2 and min(median) > 0
        assert [row["chosen"] for row in case] == ["True"] + ["False"] * (len(case) - 1)
        assert predicted == sorted(predicted)
        assert sum(row["fastest"] == "True" for row in case) == 1
        assert [float(row["ratio"]) for row in case] == pytest.approx([m / min(median) for m in median], rel=1e-3)
    # The compiler prices the same layer alike: of the gradient and norms of one column, at 16 positions.
    compiled = fxcurv.compile(nn.Linear(8, 8), nn.MSELoss(), [BatchL2Grad()])
    decided = compiled.lower(torch.randn(4, 16, 8), torch.randn(4, 16, 8)).decisions
    priced = 1e3 * sum(d.seconds for d in decided if d.param == "weight")
    best = cases["linear", "1", "16", "1vn+2vp"][0]
    assert float(best["predicted_ms"]) == pytest.approx(priced, rel=1e-3)
    assert (best["candidate"] == "together") == ("together" in {d.algorithm for d in decided})


def test_scaling(tmp_path):
    """Two points an axis; as many operations as there must be, twice as many for twice the batch."""
    axes = ("N", "V", "width", "depth")
    rows = run("scaling.py", tmp_path, "--nets", "mlp", "--quantities", "SumGradSquared")
    assert [row["axis"] for row in rows] == [axis for axis in axes for _ in range(2)]
    (picture,) = tmp_path.glob("*-mlp.png")
    assert picture.stat().st_size > 1000
    flops = {tuple(int(row[axis]) for axis in axes): 1e9 * float(row["gflop"]) for row in rows}
    assert flops[8, 4, 8, 2] == pytest.approx(2 * flops[4, 4, 8, 2])
    # Products of the forward pass, of the gradient and of the cotangents; and at most those of squared factors.
    weights, inner = 64 * 8 + 8 * 8 + 8 * 4, 8 * 8 + 8 * 4
    plain = 2 * 4 * (2 * weights + inner)
    assert plain - 1 <= flops[4, 4, 8, 2] <= plain + 2 * 4 * weights + 1


def test_against_peers(tmp_path):
    """A model of GPU size in its small form beside the plain gradient."""
    only = ("--problems", "resnet18", "--extensions", "BatchL2Grad", "--peers", "fxcurv", "--rounds", "3")
    rows = run("run.py", tmp_path, *only)
    assert [row["implementation"] for row in rows] == ["plain", "fxcurv"]
    assert rows[0]["ratio"] == "1"
