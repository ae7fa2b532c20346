"""One thread per test process, since pytest-xdist takes the cores; and which parameters of a test the fast set keeps.

`fast.json` holds, per test file and function, the parameters that `make test` runs: the others get the marker `slow`.
A function that it does not name is run whole. What chose them is in README.md beside this file.
"""

import gc
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
HERE = Path(__file__).parent
FAST = json.loads((HERE / "fast.json").read_text())
DONE = itertools.count(1)


def pytest_runtest_setup(item):
    """No test gets the program of another one: it may have changed a pass, or a rule; nor pieces, if one changes code."""
    if "fxcurv.runtime.shared" in sys.modules:
        sys.modules["fxcurv.runtime.shared"].forget()
    _forget_pieces(item)


def pytest_runtest_teardown(item):
    """What tests leave in PyTorch's caches is some million objects at the end, which each collection would go through."""
    _forget_pieces(item)
    if next(DONE) % 50 == 0:
        gc.collect()
        gc.freeze()


def _forget_pieces(item):
    if "monkeypatch" in getattr(item, "fixturenames", ()) and "fxcurv.ir.pieces" in sys.modules:
        sys.modules["fxcurv.ir.pieces"].forget()


@pytest.hookimpl(tryfirst=True)  # before pytest takes the marked ones out
def pytest_collection_modifyitems(items):
    for item in items:
        kept = FAST.get(str(item.path.relative_to(HERE)), {}).get(item.originalname)
        if kept is not None and item.name.removeprefix(item.originalname).strip("[]") not in kept:
            item.add_marker(pytest.mark.slow)
