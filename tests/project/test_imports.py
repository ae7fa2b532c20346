"""The order of the house: a folder, or a file at the top of the package, imports only from those below it.

Nothing lists the order: it exists if the imports have no circle, imports inside functions and for type checkers counted.
docs/architecture.md shows the tree in that order, from the top down, which is held here as well.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import networkx as nx
import pytest

import fxcurv

ROOT = Path(fxcurv.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def target_of(module: str, name: str) -> Path:
    """The file of `from module import name`."""
    folder = ROOT.joinpath(*module.split(".")[1:])
    for path in (folder / f"{name}.py", folder / name / "__init__.py", folder.with_suffix(".py"), folder / "__init__.py"):
        if path.exists():
            return path
    raise AssertionError(f"{module} is no module of the package")


def imports(path: Path):
    """The package's files that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            if (node.module or "").split(".")[0] == "fxcurv":
                yield from (target_of(node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (target_of(a.name, "") for a in node.names if a.name.split(".")[0] == "fxcurv")


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def circle(graph: nx.DiGraph) -> list:
    try:
        return nx.find_cycle(graph)
    except nx.NetworkXNoCycle:
        return []


def rooms() -> nx.DiGraph:
    pairs = {(room(path), room(found)) for path in FILES for found in imports(path)}
    return nx.DiGraph([(a, b) for a, b in pairs if a != b])


def test_no_two_files_import_each_other():
    inside = [(p, q) for p in FILES for q in imports(p) if p != q and q.name != "__init__.py"]
    assert circle(nx.DiGraph([(str(p.relative_to(ROOT)), str(q.relative_to(ROOT))) for p, q in inside])) == []


def test_folders_have_an_order():
    assert circle(rooms()) == []


def test_the_documents_show_the_order():
    text = (ROOT.parent / "docs" / "architecture.md").read_text()
    shown = re.findall(r"^  (\w+)(?:/|\.py) ", text, re.M)
    assert set(shown) == {room(p) for p in FILES} - {"__init__"}
    folders = [name for name in shown if (ROOT / name).is_dir()]
    for above, below in rooms().edges:
        if above in folders and below in folders:
            assert folders.index(above) < folders.index(below), f"{above} imports {below}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_stay_in_their_file(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fxcurv":
            private = [a.name for a in node.names if a.name.startswith("_") and target_of(node.module, a.name).stem != a.name]
            assert not private, f"{path}:{node.lineno}: {private}"
