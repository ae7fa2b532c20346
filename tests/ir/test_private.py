"""What is private in PyTorch is used in `fxcurv/ir/private.py` alone, with a row per name that holds in this version."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from fxcurv.ir import private

ROOT = Path(__file__).parents[2]
PACKAGE = sorted(path for path in (ROOT / "fxcurv").rglob("*.py") if path.name != "private.py")
AROUND = sorted(path for folder in ("tests", "bench", "examples") for path in (ROOT / folder).rglob("*.py"))

# What tests, benchmarks and examples may use beside what has a row, which no user's call depends on.
AROUND_ONLY = {
    "torch._dynamo.config",
    "torch._dynamo.mark_dynamic",
    "torch._dynamo.testing.CompileCounterWithBackend",
    "torch._dynamo.utils.counters",
    "torch._inductor.aoti_compile_and_package",
    "torch._inductor.aoti_load_package",
    "torch._prims_common.suggest_memory_format",
    "torch._subclasses.FakeTensorMode",
    "torch._standard_gamma",
    "torch._weight_norm",
    "torch.backends.cuda.matmul.fp32_precision",
    "torch.nn.functional.embedding_bag",
    "torch.nn.functional.group_norm",
    "torch.nn.functional.multi_margin_loss",
    "torch.nn.functional.multilabel_margin_loss",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.modules.conv._ConvNd",
    "torch.ops.aten._upsample_bilinear2d_aa",
    "torch.testing._internal.common_methods_invocations",
    "._buffers",
}

# Private attributes of the objects that this package handles.
OBJECTS = (
    torch.Tensor, torch.UntypedStorage, torch.autograd.Function, fx.Node, fx.Graph, fx.GraphModule, fx.Tracer, nn.Module(),
    torch.ops.aten.add.Tensor, private.ShapeEnv, torch.export.ExportedProgram,
)  # fmt: skip
ATTRIBUTES = {name for thing in OBJECTS for name in dir(thing)} | {"_expr", "_hint"}
ATTRIBUTES = {name for name in ATTRIBUTES if name.startswith("_") and not name.startswith("__")}


def is_private(name: str) -> bool:
    """Whether a dotted name of PyTorch has a part that its documentation has not."""
    parts = name.split(".")
    hidden = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return hidden or "experimental" in parts or "higher_order" in parts


class Uses(ast.NodeVisitor):
    """Collects (line, name): dotted names of PyTorch that are private or patched, and attributes as "._name"."""

    def __init__(self, tree: ast.AST):
        self.found: list[tuple[int, str]] = []
        self.alias = {"torch": "torch"}
        self.visit(tree)

    def visit_Import(self, node):
        for alias in node.names:
            if alias.name.split(".")[0] == "torch":
                self._note(node, alias.name)
                self.alias[alias.asname or "torch"] = alias.name if alias.asname else "torch"

    def visit_ImportFrom(self, node):
        if (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                self.alias[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                self._note(node, f"{node.module}.{alias.name}")

    def visit_Assign(self, node):
        name = self._dotted(node.value)
        if name and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            self.alias[node.targets[0].id] = name  # aten = torch.ops.aten
        self.generic_visit(node)

    def visit_Attribute(self, node):
        name = self._dotted(node)
        if name:
            self._note(node, name)
            return
        if node.attr in ATTRIBUTES and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            self.found.append((node.lineno, f".{node.attr}"))
        self.generic_visit(node)

    def visit_Call(self, node):
        called = ast.unparse(node.func)
        patches = called.endswith((".setattr", ".delattr", "patch", "patch.object", "patch.dict", "patch.multiple"))
        if (patches or called in ("getattr", "setattr", "hasattr", "delattr")) and node.args:
            texts = [self._text(argument) for argument in node.args[:2]]
            owner = self._dotted(node.args[0])
            if texts[0] and texts[0].startswith("torch."):
                self._note(node, texts[0], patches)
            elif owner and len(texts) > 1 and texts[1]:
                self._note(node, f"{owner}.{texts[1]}", patches)
            elif len(texts) > 1 and texts[1] in ATTRIBUTES:
                self.found.append((node.lineno, f".{texts[1]}"))
        self.generic_visit(node)

    def _note(self, node: ast.AST, name: str, patched: bool = False) -> None:
        if patched or is_private(name):
            self.found.append((node.lineno, name))

    def _dotted(self, node: ast.AST) -> str:
        """The full name of an expression like `torch.a.b`, or ""."""
        if isinstance(node, ast.Name):
            return self.alias.get(node.id, "")
        if isinstance(node, ast.Attribute):
            base = self._dotted(node.value)
            return f"{base}.{node.attr}" if base else ""
        return ""

    @staticmethod
    def _text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):  # what is known of it
            return node.values[0].value if node.values and isinstance(node.values[0], ast.Constant) else ""
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def uses(path: Path) -> Iterator[tuple[str, str]]:
    for line, name in Uses(ast.parse(path.read_text())).found:
        yield f"{path.relative_to(ROOT)}:{line}", name


def has_row(name: str) -> bool:
    """Whether a use is of something with a row, or of an operator whose name starts so."""
    begins = any(name == row or name.startswith(f"{row}.") for row in private.SEEN)
    begins = begins or name.startswith(".") and any(row.endswith(name) for row in private.SEEN)
    return begins or name.startswith("torch.ops.") and any(row.startswith(name) for row in private.SEEN)


def test_the_package_uses_nothing_private_elsewhere():
    """Operators are named where their rules are."""
    named = [use for path in PACKAGE for use in uses(path)]
    assert [use for use in named if not (use[1].startswith("torch.ops.") and has_row(use[1]))] == []


def test_tests_benchmarks_and_examples_use_what_has_a_row():
    allowed = tuple(AROUND_ONLY)
    named = [use for path in AROUND if path != Path(__file__) for use in uses(path)]
    assert [use for use in named if not (has_row(use[1]) or use[1].startswith(allowed))] == []


def test_every_row_is_used():
    text = Path(private.__file__).read_text().split("check(SEEN", 1)[1]
    text += "".join(path.read_text() for path in PACKAGE)
    unused = [name for name in private.SEEN if name.split(".")[-1].rstrip("23d") not in text]
    assert unused == []


def test_every_row_was_seen_here():
    """Fails on a version that was not tried, whose smoke then says whether its number may be added."""
    version = ".".join(torch.__version__.split(".")[:2])
    if version in private.TRIED:
        assert [name for name, seen in private.SEEN.items() if version not in seen] == []
    imported = [name for _, name in Uses(ast.parse(Path(private.__file__).read_text())).found]
    assert [name for name in imported if not has_row(name)] == []


@pytest.mark.parametrize(
    "code",
    [
        "from torch._ops import OpOverload",
        "import torch.fx.experimental.proxy_tensor",
        "import torch\ntorch._C._storage_Use_Count(1)",
        "from torch import fx\nfx._symbolic_trace",
        "def f(storage):\n    return storage._cdata",
        "import torch\nwith mock.patch.object(torch, 'ctc_loss', f): pass",
        "from torch.fx.proxy import TracerBase\nwith mock.patch.object(TracerBase, 'create_arg', f): pass",
        "mock.patch('torch.ctc_loss', f)",
        "def test(monkeypatch):\n    import torch\n    monkeypatch.setattr(torch.nn.functional, 'linear', f)",
        "getattr(op, '_schema', None)",
        "import torch\naten = torch.ops.aten\naten._softmax.default",
        "import torch\ngetattr(torch.ops.aten, f'_adaptive_avg_pool{d}d')",
    ],
)
def test_the_search_finds(code):
    assert Uses(ast.parse(code)).found


def test_a_missing_name_is_an_error_at_import():
    code = (
        "import torch, torch._dynamo, torch._inductor\n"
        "del torch._C._storage_Use_Count\n"
        "import fxcurv\n"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    last = done.stderr.strip().splitlines()
    assert done.returncode == 1 and any(line.startswith("ImportError: fxcurv uses private parts") for line in last)
    assert any("torch._C._storage_Use_Count, seen in PyTorch 2.11" in line for line in last) and "Way out:" in last[-1]
    assert torch.__version__ in done.stderr


@pytest.mark.parametrize("missing", ["torch._no_such_module.thing", "torch._ops.NoSuchClass", "torch.Tensor._no_such"])
def test_each_missing_name_is_named(missing):
    with pytest.raises(ImportError, match=missing.replace(".", r"\.") + ", seen in PyTorch 2.13"):
        private.check({missing: ("2.13",)}, "2.13.0")


def test_a_newer_pytorch_gives_one_warning():
    code = "import torch\ntorch.__version__ = '2.99.1'\nimport fxcurv, fxcurv.ir.private, fxcurv.backpack"
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fxcurv was tried with PyTorch 2.11 to") == 1 and "2.99.1" in done.stderr


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", f"{private.TRIED[-1]}.9", f"{private.TRIED[-1]}.0a0+git1"])
def test_a_tried_pytorch_gives_none(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        private.check({}, version)


def test_patches_need_a_row():
    with pytest.raises(LookupError, match="torch.matmul is patched without a row"):
        private.patched("torch.matmul", None)
