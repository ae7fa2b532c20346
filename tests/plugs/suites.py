"""Other projects' own tests, with what they have ("theirs") and with fxcurv in its place ("ours").

    python tests/plugs/suites.py vivit --source ~/vivit --to vivit        # both, and what differs
    python tests/plugs/suites.py vivit --source ~/vivit --to vivit --way ours --part 1/8 -k linalg

`--source` is a checkout of the project (`SUITES` says of what), since releases come without tests; the release itself is
installed (`pip install fxcurv[plugs]`). Outcomes are appended to `<to>/ours.jsonl` and `<to>/theirs.jsonl`; a run goes on behind
those that are there. Only tests whose outcome differs are printed, and counts: docs/plugs.md has them.

In the processes that run the tests this file is a plugin of pytest. It puts fxcurv in place, and for both ways alike what today's
libraries no longer have: `torch.symeig`, and MNIST, which is a download, from scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

WAYS = "theirs", "ours"


@dataclass(frozen=True)
class Suite:
    """A project's tests."""

    package: str  # as pip calls it
    checkout: str  # where the tests are from
    tests: tuple[str, ...]  # files or folders in it
    install: Callable[[], None]
    alone: bool = False  # the checkout has the package itself in its root: its tests run elsewhere, on the release
    other: str = "$^"  # what is not run: tests of backends that neither way has


def _laplace() -> None:
    """fxcurv's backends wherever laplace-torch and its tests name those on curvlinops, the default."""
    import laplace.curvature

    from fxcurv.plugs import laplace as ours

    for name in ("Interface", "GGN", "EF", "Hessian"):
        _everywhere("laplace", getattr(laplace.curvature, f"Curvlinops{name}"), getattr(ours, f"Fxcurv{name}"))


def _opacus() -> None:
    """Gradients of samples by fxcurv in the mode "hooks", the default."""
    from opacus.grad_sample import GradSampleModule

    from fxcurv.backpack.opacus import FxcurvGradSampleModule

    _everywhere("opacus", GradSampleModule, FxcurvGradSampleModule)


def _backpack() -> None:
    import fxcurv.backpack

    fxcurv.backpack.install()


SUITES = {
    "laplace": Suite(
        "laplace-torch",
        "github.com/aleximmer/Laplace, 44ea62a",
        (
            "tests/test_curv_backends_curvlinops.py", "tests/test_curv_backends_interface.py", "tests/test_laplace.py",
            "tests/test_baselaplace.py", "tests/test_lllaplace.py", "tests/test_subnetlaplace.py",
            "tests/test_functional_laplace.py", "tests/test_functional_laplace_unit.py", "tests/test_subset_params.py",
            "tests/test_jacobians.py", "tests/test_serialization.py",
        ),
        _laplace,
        alone=True,
        other=r"\[.*(Asdl|BackPack)",
    ),
    "opacus": Suite(
        "opacus",
        "the release, which has its tests in it",
        tuple(f"opacus/tests/{t}_test.py" for t in ("privacy_engine", "batch_memory_manager", "gradient_accumulation")),
        _opacus,
    ),
    "cockpit": Suite("cockpit-for-pytorch", "github.com/f-dangel/cockpit, v1.0.2", ("tests",), _backpack, alone=True),
    "vivit": Suite("vivit-for-pytorch", "github.com/f-dangel/vivit, 1.0.0", ("test",), _backpack, alone=True),
}  # fmt: skip


def _everywhere(package: str, theirs: Any, ours: Any) -> None:
    """Every module of a package that has `theirs` gets `ours`."""
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(package + "."):
            for key, value in list(vars(module).items()):
                if value is theirs:
                    setattr(module, key, ours)


# ---- the plugin ------------------------------


def _mend() -> None:
    import torch

    result = collections.namedtuple("symeig", "eigenvalues eigenvectors")

    def symeig(matrix: Any, eigenvectors: bool = False, upper: bool = True) -> Any:
        values, vectors = torch.linalg.eigh(matrix, UPLO="U" if upper else "L")
        return result(values, vectors if eigenvectors else matrix.new_empty(0))

    torch.symeig = torch.Tensor.symeig = symeig  # type: ignore[attr-defined]
    try:
        import torchvision
        from sklearn.datasets import load_digits
    except ImportError:
        return
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    images = (torch.nn.functional.interpolate(images, (28, 28)) - 0.1307) / 0.3081

    class MNIST(torch.utils.data.TensorDataset):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(images, torch.tensor(digits.target))

    torchvision.datasets.MNIST = MNIST


def _told(nodeid: str) -> str:
    """A test's name both ways: without addresses, and with what is replaced."""
    return re.sub(r"0x[0-9a-f]+", "0x", nodeid).replace("Fxcurv", "Curvlinops")


class Plugin:
    """Deselect what is there, and write down the rest."""

    def __init__(self, outcomes: Path, part: str, other: str):
        self.outcomes, self.other = outcomes, re.compile(other)
        self.index, self.parts = map(int, part.split("/"))

    def pytest_collection_modifyitems(self, items: list) -> None:
        there = set(read(self.outcomes))
        mine = [i for i in items if not self.other.search(i.nodeid)]
        items[:] = [i for i in mine[self.index - 1 :: self.parts] if _told(i.nodeid) not in there]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = str(report.longrepr).strip().splitlines()[-1][:300] if report.outcome == "failed" else ""
            with self.outcomes.open("a") as file:
                file.write(json.dumps([_told(report.nodeid), report.outcome, why]) + "\n")


def read(outcomes: Path) -> dict[str, tuple[str, str]]:
    """Test -> (outcome, why); a failed teardown counts."""
    found = map(json.loads, outcomes.read_text().splitlines()) if outcomes.exists() else []
    return {_told(test): (outcome, why) for test, outcome, why in found}


def pytest_configure(config: Any) -> None:
    if "FXCURV_SUITE" in os.environ:
        name, way, outcomes, part = json.loads(os.environ["FXCURV_SUITE"])
        _mend()
        if way == "ours":
            SUITES[name].install()
        config.pluginmanager.register(Plugin(Path(outcomes), part, SUITES[name].other))


# ---- the runs ------------------------------


def run(name: str, way: str, source: Path, outcomes: Path, part: str = "1/1", more: list[str] | None = None) -> None:
    """Run a project's tests one way, in a process of its own."""
    suite, here = SUITES[name], Path(__file__).resolve()
    outcomes.parent.mkdir(parents=True, exist_ok=True)
    root = source
    if suite.alone:  # a folder that has the tests alone
        root = outcomes.parent.resolve() / "source"
        root.mkdir(exist_ok=True)
        for top in {Path(test).parts[0] for test in suite.tests}:
            if not (root / top).exists():
                (root / top).symlink_to((source / top).resolve())
    path = [str(here.parent), str(here.parents[2]), str(root), os.environ.get("PYTHONPATH", "")]
    asked = json.dumps([name, way, str(outcomes.resolve()), part])
    options = f"-p suites -p no:cacheprovider -q -W ignore --tb=line --rootdir {root} -c {os.devnull}".split()
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, *suite.tests, *(more or [])], cwd=root, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "FXCURV_SUITE": asked},
    )  # fmt: skip


def compared(folder: Path) -> str:
    """Counts of both ways over the tests that both have run, and the tests that differ."""
    theirs, ours = (read(folder / f"{way}.jsonl") for way in WAYS)
    both = [test for test in theirs if test in ours]
    lines = []
    for way, found in zip(WAYS, (theirs, ours), strict=True):
        counts = collections.Counter(found[test][0] for test in both)
        lines.append(f"{way}: " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())))
    for test in both:
        if theirs[test][0] != ours[test][0]:
            lines.append(f"{theirs[test][0]} -> {ours[test][0]}: {test}: {theirs[test][1] or ours[test][1]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("--source", type=Path, help="a checkout; of Opacus: the site-packages that it is in")
    parser.add_argument("--to", type=Path, required=True, help="a folder for outcomes")
    parser.add_argument("--way", choices=WAYS, help="one of them")
    parser.add_argument("--part", default="1/1", help="k/n: every n-th test from the k-th on")
    asked, more = parser.parse_known_args()  # the rest is for pytest
    print(asked.suite, version(SUITES[asked.suite].package), "with tests of", SUITES[asked.suite].checkout)
    for way in WAYS if asked.way is None else [asked.way]:
        if asked.source is not None:
            run(asked.suite, way, asked.source, asked.to / f"{way}.jsonl", asked.part, more)
    print(compared(asked.to))


if __name__ == "__main__":
    main()
