"""The training of the example takes the same steps on one process and on several; what the benchmark counts is the least."""

import csv
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: object, folder: Path) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_same_losses(count, tmp_path):
    script = ROOT / "examples" / "train_distributed.py"
    one = run(script, "--steps", 4, folder=tmp_path)
    more = run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        script,
        "--steps",
        4,
        folder=tmp_path,
    )
    losses = [[float(x) for x in re.findall(r"\d\.\d{6,}", out)] for out in (one, more)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-9), losses
    assert (tmp_path / "train_distributed.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_sharded_training_goes_on_from_a_checkpoint_on_another_number_of_processes(tmp_path):
    script = ROOT / "examples" / "fsdp_kfac.py"
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script
    runs = [
        run(script, "--steps", 4, folder=tmp_path),
        run(*torchrun, "--steps", 2, "--checkpoint", "saved", folder=tmp_path),
        run(script, "--steps", 4, "--checkpoint", "saved", folder=tmp_path),
    ]
    alone, first, then = ([float(x) for x in re.findall(r"\d\.\d{6,}", out)] for out in runs)
    assert len(alone) == 4 and alone[3] < alone[0]
    assert [*first, *then] == pytest.approx(alone, rel=1e-8)


def scale_out():
    """The module of the bench that computes on paper."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        return importlib.import_module("scale_out")
    finally:
        sys.path.pop(0)


def test_the_model_on_paper():
    """Its parameters are those of the models, its bytes those that programs send; and its pictures are of what it computes."""
    paper = scale_out()
    for name, millions in (("GPT-2", 123.5), ("ResNet-50", 25.5)):  # weights alone, without tables of positions
        assert sum(layer.parameters for layer in paper.MODELS[name]()) == pytest.approx(millions * 1e6, rel=2e-3)
    mlp = [paper.Layer(128, 784, 16), paper.Layer(128, 128, 16), paper.Layer(10, 128, 16)]
    document = (ROOT / "docs" / "distributed.md").read_text()
    gradient, kfac = (
        int(re.search(rf"\| {row} \| 2 \| ([\d,]+)", document)[1].replace(",", "")) for row in ("gradient", "KFAC")
    )
    assert kfac - gradient == 4 * sum(layer.triangles for layer in mlp)
    rows = list(csv.reader((ROOT / "bench" / "results" / "scale_out_model.csv").read_text().splitlines()))
    assert rows == [list(paper.COLUMNS), *([str(cell) for cell in row] for row in paper.rows(10))]
    assert "not a measurement" in (ROOT / "docs" / "scale-out.svg").read_text()


@pytest.mark.slow
def test_what_travels_is_the_least(tmp_path):
    """It exits with 1 above 1.05 of the least."""
    table = run(ROOT / "bench" / "distributed.py", "--models", "cnn", "--out", "counted.csv", folder=tmp_path)
    rows = list(csv.DictReader((tmp_path / "counted.csv").read_text().splitlines()))
    assert len(rows) == 4 == len(table.splitlines()) - 1
    assert all(int(row["collectives"]) <= 2 for row in rows)
