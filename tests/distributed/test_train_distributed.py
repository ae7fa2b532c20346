"""The training of the example takes the same steps on one process and on several; what the benchmark counts is the least."""

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
def test_what_travels_is_the_least(tmp_path):
    """It exits with 1 above 1.05 of the least."""
    table = run(ROOT / "bench" / "distributed.py", "--models", "cnn", "--out", "counted.csv", folder=tmp_path)
    rows = (tmp_path / "counted.csv").read_text().splitlines()
    assert len(rows) == 5 == len(table.splitlines())
    assert all(int(row.split(",")[2]) <= 2 for row in rows[1:])
