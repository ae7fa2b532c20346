"""The order of the house: a folder, or a file at the top of the package, imports only from those below it.

Nothing lists the order: it exists if the imports have no circle, imports inside functions and for type checkers counted.
docs/architecture.md shows the tree in that order, from the top down, which is held here as well. What an op is stands in
rules/ alone: elsewhere no file names one to decide something.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

import fxcurv
from fxcurv.rules.base import FALLBACK, RULES, Rule

ROOT = Path(fxcurv.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def target_of(module: str, name: str) -> Path:
    """The file of `from module import name`."""
    folder = ROOT.joinpath(*module.split(".")[1:])
    for path in (
        folder / f"{name}.py",
        folder / name / "__init__.py",
        folder.with_suffix(".py"),
        folder / "__init__.py",
    ):
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
            private = [
                a.name for a in node.names if a.name.startswith("_") and target_of(node.module, a.name).stem != a.name
            ]
            assert not private, f"{path}:{node.lineno}: {private}"


# ---- what an op is stands in rules/ ------------------------------

# Captured code is made of ops (front/), and a kernel is one (kernels/). All others ask for a property (`traits`, `Rule`).
ASKING = [p for p in FILES if p.relative_to(ROOT).parts[0] not in ("rules", "front", "kernels")]

NAMED = {
    ("__init__.py", "Contraction"): "a public name",
    ("__init__.py", "Pointwise"): "a public name",
    ("backpack/cut.py", "LossRule"): "the rule of an op of its own, which stands for the loss",
    ("backpack/cut.py", "torch.ops.fxcurv.seam.default"): "that op",
    ("passes/normalize.py", "torch.ops.fxcurv.head.default"): "no op of the model: the mark that front/ leaves at f",
    ("runtime/forward.py", "torch.ops.fxcurv.head.default"): "the same",
    ("runtime/shared.py", "torch.ops.fxcurv.head.default"): "the same",
    ("runtime/stateless.py", "torch.ops.aten.sym_numel.default"): "a size, which Dynamo does not trace",
    (
        "ir/emit.py",
        "torch.ops.aten._efficientzerotensor.default",
    ): "no dense tensor, which a graph cannot hold; made by autograd",
    (
        "ir/mixing.py",
        "torch.ops.aten._native_batch_norm_legit.no_stats",
    ): "below rules/: the way out that a message names",
    ("ir/mixing.py", "torch.ops.aten.nonzero_static.default"): "the same",
    ("ir/mixing.py", "torch.ops.aten.sort.default"): "the same",
    ("ir/mixing.py", "torch.ops.aten.sort.stable"): "the same",
    ("ir/graph.py", "aten.view.default"): "below rules/: a view by sizes is copied as a reshape",
    ("ir/graph.py", "aten._unsafe_view.default"): "the same",
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def decided_by(tree: ast.AST) -> Iterator[str]:
    """Names of ops that are neither called nor put into a graph, names of rules' kinds that are compared."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    kinds = {rule.name for rule in RULES.values()}
    for node in ast.walk(tree):
        parent = parents.get(node)
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            if any(isinstance(p, ast.Attribute) and p.attr == "name" for p in parts):
                yield from (p.value for p in parts if isinstance(p, ast.Constant) and p.value in kinds)
        if isinstance(node, ast.Constant) and re.fullmatch(r"(aten|prims)(\.|::)[\w.]+", str(node.value)):
            yield node.value
        if not isinstance(node, ast.Attribute) or isinstance(parent, ast.Attribute):
            continue
        name = dotted(node)
        if not re.match(r"aten\.|torch\.ops\.\w+\.", name):
            continue
        called = isinstance(parent, ast.Call) and parent.func is node
        made = isinstance(parent, ast.Call) and dotted(parent.func).endswith((".call_function", "_at_front"))
        made |= isinstance(parent, ast.Assign) and all(dotted(t).endswith(".target") for t in parent.targets)
        if not called and not made:
            yield name


def rules_in(tree: ast.AST) -> Iterator[str]:
    """Rules and classes of rules that are imported, and modules of them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("fxcurv.rules"))
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("fxcurv"):
            continue
        for alias in node.names:
            found: Any = getattr(importlib.import_module(str(node.module)), alias.name, None)
            named = isinstance(found, type) and issubclass(found, Rule) and found is not Rule
            named |= isinstance(found, Rule) and found is not FALLBACK
            named |= getattr(found, "__name__", "").startswith("fxcurv.rules.") and not hasattr(found, "__module__")
            if named:
                yield alias.name


def test_no_pass_knows_a_rule_or_an_op_by_name():
    """A pass asks for a property, so that an op is like its siblings once its tables say so."""
    found = set()
    for path in ASKING:
        tree = ast.parse(path.read_text())
        found |= {(path.relative_to(ROOT).as_posix(), name) for name in (*decided_by(tree), *rules_in(tree))}
    assert found == set(NAMED)


def test_no_pass_knows_an_extension_by_name():
    for path in sorted((ROOT / "passes").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fxcurv.extensions"):
                assert node.module in ("fxcurv.extensions", "fxcurv.extensions.base"), path
                assert {a.name for a in node.names} <= {"Extension", "Param"}, path


def test_every_kernel_is_called():
    """By a rule, a candidate or an extension: what no program reaches is no part of the house."""
    kernels = {p for p in (ROOT / "kernels").glob("*.py") if "custom_op(" in p.read_text()}
    called = {found for path in FILES if path.parent.name != "kernels" for found in imports(path)}
    assert kernels and kernels <= called


@pytest.mark.parametrize("code", [
    "if node.target is aten.relu.default: pass",
    "KEEP = {aten.relu.default, aten.tanh.default}",
    "OUT = {torch.ops.aten.bmm.default: 1}",
    "ok = rule.name == 'pointwise'",
    "ok = str(node.target) == 'aten.relu.default'",
    "from fxcurv.rules.pointwise import Pointwise",
    "from fxcurv.rules import pointwise",
    "import fxcurv.rules.pointwise",
    "from fxcurv.backpack.cut import SEAM",
])  # fmt: skip
def test_names_are_found(code):
    tree = ast.parse(code)
    assert [*decided_by(tree), *rules_in(tree)]


@pytest.mark.parametrize("code", [
    "y = aten.relu.default(x)",
    "graph.call_function(aten.relu.default, (x,))",
    "node.target = aten.reshape.default",
    "aten = torch.ops.aten",
    "from fxcurv.rules.base import FALLBACK, RULES, Rule, rule_of",
    "from fxcurv.rules.traits import CUTS",
])  # fmt: skip
def test_what_is_emitted_may_be_named(code):
    tree = ast.parse(code)
    assert not [*decided_by(tree), *rules_in(tree)]
