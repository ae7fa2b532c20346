"""Choose the fast set: fast.json from the CPU seconds that every test takes.

    PYTHONPATH=tests python -m pytest -p choose_fast -n 2          # notes them in .fast/ (or with -m '' for all)
    python tests/choose_fast.py --seconds 585                      # writes tests/fast.json

What fast.json leaves out and the run did not measure stays out.

The first test of each function is worth most, whatever it takes; the k-th of its parameters is worth 1 / k of that. So they are
taken in the order of cost times k until the time is spent, of a function's parameters first those that other functions have not
taken. Tests that read what the same processes gave are taken together: the first of them pays for all.
"""

from __future__ import annotations

import argparse
import collections
import heapq
import json
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NOTES = HERE.parent / ".fast"
# Files of tests in Triton's interpreter, which nothing else runs without a GPU; what is worth more than one function's share.
ALWAYS = {f"kernels/test_kernels{kind}_triton.py::test_in_the_interpreter" for kind in ("", "_layers")}
ALWAYS |= {"extensions/test_products.py::test_second_order", "wild/test_chunks.py::test_a_tied_head"}
ALWAYS |= {"project/test_imports.py::test_no_pass_knows_a_rule_or_an_op_by_name"}
# One test of these, whatever it takes.
ONE = {"extensions/test_quantities.py::test_all_quantities"}
TOGETHER = {"distributed/test_ranks.py", "distributed/test_parts.py"}


def _cpu() -> float:
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    start = _cpu()
    done = yield
    NOTES.mkdir(exist_ok=True)
    with (NOTES / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.jsonl").open("a") as notes:
        notes.write(json.dumps([item.nodeid.removeprefix("tests/"), _cpu() - start]) + "\n")
    return done


def parameters(test: str) -> str:
    return test.partition("[")[2].removesuffix("]")


def chosen(cost: dict[str, float], seconds: float) -> dict[str, list[str]]:
    """function -> the tests of it that are kept."""
    left: dict[str, list[str]] = collections.defaultdict(list)
    for test in cost:
        left[test.partition("[")[0]].append(test)
    always = {f for f in left if f in ALWAYS or f.partition("::")[0] in TOGETHER}
    kept: dict[str, list[str]] = {f: left.pop(f) if f in always else [] for f in list(left)}
    seconds -= sum(cost[test] for tests in kept.values() for test in tests)
    taken: collections.Counter[str] = collections.Counter()

    def rarest(function: str) -> str:
        return min(left[function], key=lambda t: (sum(taken[word] for word in parameters(t).split("-")), cost[t]))

    queue = [(0.0 if f in ONE else cost[rarest(f)], f) for f in left]
    heapq.heapify(queue)
    while queue:
        _, function = heapq.heappop(queue)
        test = rarest(function)
        if cost[test] > seconds:
            continue
        seconds -= cost[test]
        left[function].remove(test)
        kept[function].append(test)
        taken.update(parameters(test).split("-"))
        if left[function]:
            heapq.heappush(queue, (cost[rarest(function)] * (len(kept[function]) + 1), function))
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=585)
    seconds = parser.parse_args().seconds
    cost = dict(json.loads(line) for path in NOTES.glob("*.jsonl") for line in path.read_text().splitlines())
    kept = chosen(cost, seconds)
    whole = collections.Counter(test.partition("[")[0] for test in cost)
    before = json.loads((HERE / "fast.json").read_text())
    fast: dict[str, dict[str, list[str]]] = collections.defaultdict(dict)
    for function, tests in sorted(kept.items()):
        path, _, name = function.partition("::")
        if len(tests) < whole[function] or name in before.get(path, {}):
            fast[path][name] = sorted(map(parameters, tests))
    for path, functions in before.items():
        fast[path] = {name: [] for name in functions if f"{path}::{name}" not in kept} | fast[path]
    (HERE / "fast.json").write_text(json.dumps(fast, indent=1, ensure_ascii=False) + "\n")
    taken = [test for tests in kept.values() for test in tests]
    print(
        f"{len(taken)} of {len(cost)} tests, {sum(cost[test] for test in taken):.0f} of {sum(cost.values()):.0f} seconds"
    )
    print(f"{sum(not tests for tests in kept.values())} of {len(kept)} functions are slow")


if __name__ == "__main__":
    main()
