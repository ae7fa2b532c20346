"""How much the fast set finds: mutants of the compiler's core, by cosmic-ray.

    pip install cosmic-ray
    PYTHONPATH=tests python -m pytest -p choose_fast -n 2      # notes what the fast tests cost, in .fast/
    python tests/mutants.py try --last 60                      # a line of .mutants/tried.jsonl per mutant; goes on
    python tests/mutants.py count

Run it in a copy of the repository: it writes to fxcurv/, and takes it back. A mutant is a place, drawn evenly from all of them,
and one of the changes that cosmic-ray knows for it. Annotations are no places. First run the fast tests of the folder that
mirrors the mutant's, those of files that have its module's name before the others and the quick before the slow; if it lives,
all other fast tests; if it lives still, the slow tests of the same folder and of all cases, by turns. Each stage ends at the
first failure, or when --seconds of CPU are spent, which is noted: such a mutant was not killed, but could be.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import zlib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEPT = ROOT / ".mutants"
CORE = ["fxcurv/rules", "fxcurv/passes", "fxcurv/contractions", "fxcurv/walks"]
# Imported before the fork, so that no mutant pays for them.
HEAVY = "torch torch._dynamo torch.export torch.fx torch.func torch.distributions networkx rich.console numpy pytest"
ON_ALL_CASES = ["extensions/test_quantities.py", "extensions/test_products.py", "extensions/test_kfac.py",
                "wild/test_batch_sizes.py", "models/test_random_models.py"]  # fmt: skip


def annotations(path: Path) -> set[tuple[int, int]]:
    """Places (line, column) inside annotations of a file, which nothing evaluates."""
    tree = ast.parse(path.read_text())
    notes = [n.annotation for n in ast.walk(tree) if isinstance(n, (ast.arg, ast.AnnAssign)) and n.annotation]
    notes += [n.returns for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.returns]
    found = set()
    for note in notes:
        for line in range(note.lineno, (note.end_lineno or note.lineno) + 1):
            first = note.col_offset if line == note.lineno else 0
            last = note.end_col_offset if line == note.end_lineno else 200
            found.update((line, column) for column in range(first, (last or 0) + 1))
    return found


def mutants(seed: int) -> list[tuple[str, int, str, int]]:
    """(file, line, change, its number in the file) of one mutant per place, in a random order."""
    config, session = KEPT / "config.toml", KEPT / "session.sqlite"
    config.write_text(
        f'[cosmic-ray]\nmodule-path = {CORE}\ntimeout = 1.0\ntest-command = "true"\n[cosmic-ray.distributor]\nname = "local"\n'
    )
    session.unlink(missing_ok=True)
    command = [Path(sys.executable).parent / "cosmic-ray", "init", config, session]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    query = "select module_path, start_pos_row, start_pos_col, operator_name, occurrence from mutation_specs"
    places = defaultdict(list)
    for file, line, column, change, number in sqlite3.connect(session).execute(query):
        places[file, line, column].append((change, number))
    silent = {file: annotations(ROOT / file) for file, _, _ in places}
    draw = random.Random(seed)
    chosen = [
        (file, line, *draw.choice(sorted(changes)))
        for (file, line, column), changes in sorted(places.items())
        if (line, column) not in silent[file]
    ]
    draw.shuffle(chosen)
    return chosen


class Ordered:
    """A plugin: the tests of a stage in their order, without those that `ran` before."""

    def __init__(self, order, ran=frozenset()) -> None:
        self.order, self.ran = order, ran

    def pytest_collection_modifyitems(self, items) -> None:
        items[:] = sorted((item for item in items if item.path.parent.name not in self.ran), key=self.order)


def fails(paths: list[Path], marked: str, plugin: Ordered, seconds: int) -> bool | None:
    """Whether a test fails; None where the time was spent before."""
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.dont_write_bytecode = True
        import pytest

        quiet = ["-x", "-q", "-n", "0", "-m", marked, "-p", "no:cacheprovider"]
        os._exit(int(pytest.main([*quiet, *map(str, paths)], plugins=[plugin])))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == -24 else code not in (0, 5)  # SIGXCPU; 5: there are no such tests


def stages(file: str, seconds: int) -> dict[str, bool | None]:
    """What each stage says of the mutant in `file`: near, fast, slow; the last is the first that kills it."""
    tests, stem = ROOT / "tests", Path(file).stem
    folder = "extensions" if file.startswith("fxcurv/walks") else Path(file).parent.name
    notes = (json.loads(line) for path in (ROOT / ".fast").glob("*.jsonl") for line in path.read_text().splitlines())
    cost = dict(notes)
    by_cost = lambda item: (stem not in item.path.stem, cost.get(item.nodeid.removeprefix("tests/"), 1.0))  # noqa: E731
    by_turns = lambda item: (stem not in item.path.stem, zlib.crc32(item.nodeid.encode()))  # noqa: E731
    asked = {
        "near": ([tests / folder], "not slow", Ordered(by_cost)),
        "fast": ([tests], "not slow", Ordered(by_cost, {folder})),
        "slow": ([tests / folder, *(tests / name for name in ON_ALL_CASES)], "slow", Ordered(by_turns)),
    }
    said: dict[str, bool | None] = {}
    for name, (paths, marked, plugin) in asked.items():
        said[name] = fails(paths, marked, plugin, seconds)
        if said[name]:
            break
    return said


def try_one(mutant: tuple[str, int, str, int], seconds: int) -> dict[str, object]:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    file, _, change, number = mutant
    path = ROOT / file
    before, times = path.read_text(), path.stat()
    try:
        path.write_text(mutate_code(before, get_operator(change)(), number))
        return {"mutant": mutant, **stages(file, seconds)}
    finally:
        path.write_text(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def interval(killed: int, of: int) -> str:
    """Wilson's, of 95%."""
    z, p = 1.96, killed / of
    middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return f"{100 * (middle - half) / (1 + z * z / of):.0f}% to {100 * (middle + half) / (1 + z * z / of):.0f}%"


def count(tried: list[dict]) -> str:
    fast = sum(bool(t["near"] or t.get("fast")) for t in tried)
    slow = sum(bool(t.get("slow")) for t in tried)
    spent = sum(not any(t.values()) and None in t.values() for t in tried)
    text = f"{len(tried)} mutants: the fast set kills {fast}, the slow tests {slow} more; "
    text += f"{len(tried) - fast - slow} live, of {spent} the time was spent"
    return text + (
        f"; of those that are killed the fast set kills {interval(fast, fast + slow)}" if fast + slow else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["try", "count"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--last", type=int, default=300)
    parser.add_argument("--seconds", type=int, default=900)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the mutant is taken back
    KEPT.mkdir(exist_ok=True)
    log = KEPT / "tried.jsonl"
    tried = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if asked.do == "try":
        sys.path.insert(0, str(ROOT))
        for name in HEAVY.split():
            __import__(name)
        known = {tuple(t["mutant"]) for t in tried}
        for mutant in mutants(asked.seed)[: asked.last]:
            if mutant not in known:
                tried.append(try_one(mutant, asked.seconds))
                with log.open("a") as file:
                    file.write(json.dumps(tried[-1]) + "\n")
                print(tried[-1], flush=True)
    print(count(tried))


if __name__ == "__main__":
    main()
