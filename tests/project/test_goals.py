"""`bench/run.py --check-goals` names what is short of a goal, and nothing else."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("tqdm", reason="of the extra `demo`")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    for name in ("cases", "run"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # the tests' own
    return import_module("run")


def row(implementation, ratio, peak, quantity="KFAC", allocator="default", note=""):
    return {
        "problem": "c", "quantity": quantity, "implementation": implementation, "ratio": ratio, "peak_mib": peak,
        "allocator": allocator, "note": note,
    }  # fmt: skip


def test_what_is_short(script):
    goals = [{"problem": "c", "quantity": "KFAC", "goal": "1.6", "goal_keep": "1.5", "goal_peak": "1.1"}]
    unit, kept = [row("plain", "1", "10.0")], row("plain", "1", "10.0", allocator="keep")
    assert script.short([*unit, row("fxcurv", "1.6", "11.0"), row("backpack", "9", "99")], goals) == []
    (slow,) = script.short([*unit, row("fxcurv", "1.601", "11.0")], goals)
    assert slow == "c KFAC: 1.601× the plain gradient, goal 1.6×"
    (large,) = script.short([*unit, row("fxcurv", "1.5", "11.1")], goals)
    assert large == "c KFAC: peak 11.1 MiB, goal 1.1× the plain gradient's 10.0 MiB"
    assert len(script.short([kept, row("fxcurv", "1.55", "9", allocator="keep")], goals)) == 1
    (none,) = script.short([*unit, row("fxcurv", "", "", note="failed: MemoryError")], goals)
    assert none == "c KFAC: no figure (failed: MemoryError)"
    assert script.short([kept], goals) == ["c KFAC: no figure (not offered)"]
    other = [row("plain", "1", "1", "KFRA"), row("fxcurv", "99", "99", "KFRA")]
    assert script.short(other, goals) == []


def test_every_goal_is_of_something_that_is_measured(script):
    goals = script.read(ROOT / "bench" / "goals.csv")
    assert {g["problem"] for g in goals} <= set(script.PROBLEMS)
    assert {g["quantity"] for g in goals} <= set(script.QUANTITIES)
    assert len({(g["problem"], g["quantity"]) for g in goals}) == len(goals)
    assert all(float(g[column] or 1) > 0 for g in goals for column in ("goal", "goal_keep", "goal_peak"))


def test_the_exit_status(tmp_path):
    """Of a file of rows: 1 and a line where a figure is short, 0 where none is."""
    results = min((ROOT / "bench" / "results").glob("*-2c.csv"))  # the first, which has every problem
    head, *lines = results.read_text(encoding="utf-8").splitlines()
    for ratio, status in ((99, 1), (0.01, 0)):
        plain, line = (
            next(line for line in lines if line.startswith(f"c,KFAC,{name},")) for name in ("plain", "fxcurv")
        )
        line = line.split(",")
        line[head.split(",").index("ratio")] = str(ratio)
        path = tmp_path / f"{ratio}.csv"
        path.write_text("\n".join((head, plain, ",".join(line))), encoding="utf-8")
        command = [sys.executable, ROOT / "bench" / "run.py", "--check-goals", "--from", path]
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        assert ("SHORT c KFAC: 99× the plain gradient, goal 1.6×" in done.stdout) is bool(status)
