"""Every Python block of every document runs, in order, and prints what the document says it prints.

A document's blocks share a namespace. The `text` block behind a Python block is what it prints; blocks in other languages
do not run. `python tests/project/test_documents.py [document ...]` writes what is printed into the documents.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import linecache
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fxcurv
from fxcurv.runtime import shared

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT, ROOT / "docs", ROOT / "examples", ROOT / "bench", ROOT / "tests", ROOT / ".github" / "ISSUE_TEMPLATE")
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in folder.glob("*.md"))
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Directives of the documentation site stand in braces.
LANGUAGES = re.compile(r"python|text|sh|\{[a-z-]+\}.*")
# The user's file, as errors name it.
NAME = "train.py"


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[tuple[str, str]]:
    """(code, printed output) of every Python block; the output stands in the text block behind it."""
    found = FENCE.findall(read(document))
    pairs = zip(found, [*found, ("", "")][1:], strict=True)
    return [(code, after if then == "text" else "") for (kind, code), (then, after) in pairs if kind == "python"]


def run(code: str, namespace: dict) -> str:
    """Run a block as if it stood in a file of its own; returns what it prints."""
    linecache.cache[NAME] = (len(code), None, code.splitlines(keepends=True), NAME)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, NAME, "exec", dont_inherit=True), namespace)
    return out.getvalue()


def lasting(text: str) -> list[str]:
    """What is printed, without the times and the tables of costs, which change with the cost model."""
    text = re.sub(r"(checked|compiled in): .*", "", text, flags=re.DOTALL)
    return [line for line in text.strip().splitlines() if not line.startswith(tuple("┏┃┡│├└"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_says_its_language(document):
    text = read(document)
    assert text.count("\n```") + text.startswith("```") == 2 * len(FENCE.findall(text)), "a fence that is not closed"
    for language, _ in FENCE.findall(text):
        assert LANGUAGES.fullmatch(language), f"```{language}"


@pytest.fixture
def compiler():
    """What a document adds to the compiler is taken away again: with it no other test's programs would go on disk."""
    tables, candidates = [(table, dict(table)) for table in shared.TABLES], list(shared.CANDIDATES)
    folder = fxcurv.cache_dir
    yield
    fxcurv.cache_dir = folder
    for table, known in tables:
        table.clear()
        table.update(known)
    shared.CANDIDATES[:] = candidates


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)])
def test_document(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "backpack"]:
        monkeypatch.delitem(
            sys.modules, name
        )  # a reader's process begins without BackPACK, which other tests have imported
    namespace = {"__name__": "document"}
    with torch.random.fork_rng():
        for code, expected in blocks(document):
            assert lasting(run(code, namespace)) == lasting(expected), code


@pytest.mark.parametrize("module", ["fxcurv.optim", "fxcurv.backpack", "fxcurv.plugs.attribution"])
def test_example_of_a_module(module, tmp_path, monkeypatch):
    """The first block of its docstring, on a model of the reader's; examples of other packages run with these, tests/plugs."""
    monkeypatch.chdir(tmp_path)
    found = importlib.import_module(module)
    (code,) = re.findall(r"^(?:::|Example:)\n+((?:(?: {4}.*)?\n)+)", inspect.getdoc(found) or "", re.MULTILINE)[:1]
    names = {name: getattr(found, name) for name in found.__all__} | {"fxcurv": fxcurv, "nn": torch.nn}
    with torch.random.fork_rng():
        x, y = torch.randn(6, 4), torch.randint(3, (6,))
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
        names |= {"model": torch.nn.Linear(4, 3), "x": x, "y": y}
        names |= dict.fromkeys(("loss", "lossfunc"), torch.nn.CrossEntropyLoss())
        names |= dict.fromkeys(("loader", "train_loader", "query_loader"), data)
        run(textwrap.dedent(code), names)


def test_what_a_user_reads_first_runs():
    """At least these have code: a document that moves takes its test with it."""
    names = ["README", "docs/guide", "docs/quantities", "docs/torch-compile", "docs/from-backpack", "docs/extending"]
    assert all(blocks(f"{name}.md") for name in [*names, "docs/errors"])


def test_the_readme_is_short():
    assert len(read("README.md").encode()) <= 10_000


def test_links_between_documents_lead_somewhere():
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(document))):
            path, _, anchor = link.partition("#")
            if not path.startswith(("http:", "https:")):
                target = ((ROOT / document).parent / path).resolve() if path else ROOT / document
                assert target.exists(), f"{document}: {link}"
                assert not anchor or anchor in anchors(target), f"{document}: {link}"


def anchors(path: Path) -> set[str]:
    """Of a document's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def write(document: str) -> None:
    """Put what the blocks print into the document."""
    names: dict = {"__name__": "document"}
    printed = None

    def renewed(match: re.Match) -> str:
        nonlocal printed
        kind, body = match.groups()
        text = match[0] if kind != "text" or printed is None else f"```text\n{printed}```"
        printed = run(body, names) if kind == "python" else None
        return text

    torch.manual_seed(0)
    text = FENCE.sub(renewed, read(document))
    (ROOT / document).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for document in sys.argv[1:] or [d for d in DOCUMENTS if blocks(d)]:
        print(document)
        write(document)
