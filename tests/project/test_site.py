"""The documentation builds without a warning, its gallery run."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("index", "guide", "quantities", "api", "gallery/index", "gallery/pruning", "benchmark", "coverage", "models")


@pytest.mark.slow
def test_site(tmp_path):
    """Into a folder of its own; the gallery's own pages go to docs/gallery, where they need not be made again."""
    assert find_spec("sphinx"), "pip install -e '.[docs]', or make test-all, which does so"
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-j",
        "auto",
        "-b",
        "html",
        "-d",
        tmp_path / "trees",
    ]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([*command, ROOT / "docs", tmp_path / "html"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for page in PAGES:
        assert (tmp_path / "html" / f"{page}.html").stat().st_size > 5000
