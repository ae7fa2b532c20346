"""The documentation builds without a warning, its gallery run."""

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("index", "guide", "quantities", "api", "gallery/index", "gallery/pruning", "benchmark", "coverage", "models")


PACKAGE = ROOT / "fxcurv"
# Flat files without `__all__` whose names are all public; of the others the reference has what it names.
ALL_PUBLIC = ("fxcurv.errors", "fxcurv.backpack.hessianfree", "fxcurv.backpack.utils", "fxcurv.backpack.custom_module")


# The first two need laplace-torch and Opacus, which may not be there; docs/plugs.md has their names. The last is PyTorch's.
OTHERS = ("fxcurv.plugs.laplace", "fxcurv.backpack.opacus", "fxcurv.ir.private")


def public() -> dict[str, object]:
    """The public names, by where they are found: those of `__all__`, else all of a module that is public."""
    found: dict[str, object] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        listed = "__all__" in {
            t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
        }
        if name in OTHERS or not (listed or name.startswith(ALL_PUBLIC)):
            continue
        module = importlib.import_module(name)
        names = module.__all__ if listed else [
            n for n, o in vars(module).items() if not n.startswith("_") and getattr(o, "__module__", "") == name]  # fmt: skip
        found |= {f"{name}.{n}": getattr(module, n) for n in names}
    return {name: what for name, what in found.items() if callable(what)}


def in_the_reference() -> list[object]:
    """What the directives of docs/api.md document."""
    found: list[object] = []
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for kind, name, options in re.findall(r"^\.\. auto(\w+):: (\S+)\n((?:   :.*\n)*)", text, re.M):
        folder, _, last = name.rpartition(".")
        what = importlib.import_module(name) if kind == "module" else getattr(pkgutil.resolve_name(folder), last)
        found.append(what)
        if kind != "module":
            continue
        members, excluded = (
            {m.strip() for m in "".join(re.findall(rf":{option}:(.*)", options)).split(",")} - {""}
            for option in ("members", "exclude-members")
        )
        listed = members or getattr(what, "__all__", None) or {
            n for n, o in vars(what).items() if getattr(o, "__module__", "") == name}  # fmt: skip
        found += [getattr(what, n) for n in set(listed) - excluded]
    return found


def test_every_public_name_is_in_the_reference():
    documented = in_the_reference()
    missing = [name for name, what in public().items() if not any(what is d for d in documented)]
    assert missing == [
        "fxcurv.backpack.extensions.GGNMP",
        "fxcurv.backpack.extensions.HMP",
    ]  # copies of those of fxcurv.extensions


def test_every_public_name_says_what_it_is():
    """Docstrings, of methods and properties too: autodoc leaves out what has none."""
    silent = [name for name, what in public().items() if not what.__doc__]
    for name, what in public().items():
        for member, how in inspect.getmembers_static(what) if inspect.isclass(what) else []:
            ours = getattr(how.fget if isinstance(how, property) else how, "__module__", "") or ""
            method = isinstance(how, property) or inspect.isroutine(how)
            if (
                method
                and ours.startswith("fxcurv")
                and not member.startswith("_")
                and not inspect.getdoc(getattr(what, member))
            ):
                silent.append(f"{name}.{member}")
    assert silent == []


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
