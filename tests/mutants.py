"""How much the fast set finds: mutants of the compiler's core, by cosmic-ray, against the tests that reach their line.

    pip install cosmic-ray pytest-cov
    python tests/mutants.py reach                  # which tests reach which line: the fast set under coverage, once
    python tests/mutants.py try --last 300         # one line of .mutants/tried.jsonl per mutant; goes on where it stopped
    python tests/mutants.py count

A mutant is a place, drawn evenly from all of them, and one of the changes that cosmic-ray knows for it. Annotations are no
places. The fast set kills it if one of its tests that reach the line fails; tests of many functions come before many of one, the
quick before the slow, until --seconds of CPU are spent. What survives meets the slow tests of the same functions.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import resource
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
    subprocess.run(["cosmic-ray", "init", config, session], cwd=ROOT, check=True, capture_output=True)
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


def reach() -> None:
    """Run the fast set under coverage with a context per test, and note every test's name and CPU seconds."""
    KEPT.mkdir(exist_ok=True)
    sources = [f"--cov={folder}" for folder in CORE]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "COVERAGE_FILE": str(KEPT / "coverage")}
    pytest = [sys.executable, "-m", "pytest", "-q"]
    run = [*pytest, "-p", "choose_fast", *sources, "--cov-context=test", "--cov-report="]
    subprocess.run(run, cwd=ROOT, env=environment, check=False)
    names = [*pytest, "--collect-only", "-m", "", "-n", "0"]
    listed = subprocess.run(names, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    (KEPT / "all.txt").write_text("\n".join(line for line in listed.splitlines() if "::" in line))


class Reached:
    """Which tests reach a line, and what they cost."""

    def __init__(self) -> None:
        import coverage

        self.data = coverage.CoverageData(str(KEPT / "coverage"))
        self.data.read()
        notes = (
            json.loads(line) for file in (ROOT / ".fast").glob("*.jsonl") for line in file.read_text().splitlines()
        )
        self.cost = {f"tests/{test}": seconds for test, seconds in notes}
        self.everything = defaultdict(list)
        for test in (KEPT / "all.txt").read_text().splitlines():
            self.everything[test.partition("[")[0]].append(test)

    def fast(self, file: str, line: int) -> list[str]:
        contexts = self.data.contexts_by_lineno(str(ROOT / file)).get(line, [])
        return widely({c.partition("|")[0] for c in contexts if c}, lambda test: self.cost.get(test, 1.0))

    def slow(self, fast: list[str]) -> list[str]:
        """All other parameters of the functions that reach a line."""
        functions = {test.partition("[")[0] for test in fast}
        left = {test for function in functions for test in self.everything[function]} - set(fast)
        return widely(left, lambda test: zlib.crc32(test.encode()))


def widely(tests, cost) -> list[str]:
    """The cheapest test of every function, then the second of every function, and so on."""
    of = defaultdict(list)
    for test in sorted(tests, key=cost):
        of[test.partition("[")[0]].append(test)
    ranked = ((place, cost(test), test) for found in of.values() for place, test in enumerate(found))
    return [test for _, _, test in sorted(ranked)]


def fails(tests: list[str], seconds: int) -> bool | None:
    """Whether one of the tests fails; None where the time was spent before."""
    if not tests:
        return False
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.dont_write_bytecode = True
        import pytest

        os._exit(
            int(pytest.main(["-x", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]))
        )
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == -24 else code != 0  # SIGXCPU


def try_one(mutant: tuple[str, int, str, int], reached: Reached, seconds: int) -> dict[str, object]:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    file, line, change, number = mutant
    path = ROOT / file
    before, times = path.read_text(), path.stat()
    fast = reached.fast(file, line)
    slow = reached.slow(fast)
    try:
        path.write_text(mutate_code(before, get_operator(change)(), number))
        killed = fails(fast[:200], seconds)
        killed_slow = None if killed else fails(slow[:100], 2 * seconds)
    finally:
        path.write_text(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return {"mutant": mutant, "reached": len(fast), "fast": killed, "slow": killed_slow}


def check_unchanged(reached: Reached, places: list[tuple[str, int, str, int]], seconds: int) -> None:
    """Stop where tests fail of code that nothing has changed: they would kill every mutant."""
    for file, line, *_ in places:
        tests = reached.fast(file, line)[:20]
        if fails(tests, 5 * seconds) is not False:
            raise SystemExit(f"these tests fail without a mutant: {' '.join(tests)}")


def count(tried: list[dict]) -> str:
    fast = sum(bool(t["fast"]) for t in tried)
    slow = sum(bool(t["slow"]) for t in tried)
    return (
        f"{len(tried)} mutants: the fast set kills {fast}, the slow tests {slow} more; {len(tried) - fast - slow} live"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["reach", "try", "count"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--last", type=int, default=300)
    parser.add_argument("--seconds", type=int, default=90)
    asked = parser.parse_args()
    log = KEPT / "tried.jsonl"
    if asked.do == "reach":
        return reach()
    tried = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if asked.do == "try":
        for name in HEAVY.split():
            __import__(name)
        reached, known = Reached(), {tuple(t["mutant"]) for t in tried}
        check_unchanged(reached, mutants(asked.seed)[:5], asked.seconds)
        for mutant in mutants(asked.seed)[: asked.last]:
            if mutant not in known:
                tried.append(try_one(mutant, reached, asked.seconds))
                with log.open("a") as file:
                    file.write(json.dumps(tried[-1]) + "\n")
                print(count(tried), tried[-1], flush=True)
    print(count(tried))


if __name__ == "__main__":
    main()
