"""The fast set names tests and parameters that exist."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_fast_set_names_what_exists():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", "-m", "", TESTS]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TESTS.parent).stdout.splitlines()
    found = defaultdict(lambda: defaultdict(set))
    for path, _, name in (line.partition("::") for line in lines if "::" in line):
        function, _, parameters = name.partition("[")
        found[path.removeprefix("tests/")][function].add(parameters.removesuffix("]"))
    for path, functions in json.loads((TESTS / "fast.json").read_text()).items():
        for function, kept in functions.items():
            assert set(kept) <= found[path][function], f"{path}::{function}"
