"""The README's code runs, in order, and prints what the README says it prints."""

from __future__ import annotations

import contextlib
import io
import linecache
import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The user's file, as errors name it.
NAME = "train.py"


def examples() -> list[tuple[str, str]]:
    """(code, printed output) of every Python block; the output stands in the text block behind it."""
    blocks = [(kind, body) for kind, body in BLOCK.findall(README.read_text(encoding="utf-8")) if kind]
    found = []
    for k, (kind, body) in enumerate(blocks):
        following = blocks[k + 1] if k + 1 < len(blocks) else ("", "")
        if kind == "python":
            found.append((body, following[1] if following[0] == "text" else ""))
    return found


def run(code: str, namespace: dict) -> str:
    """Run a block as if it stood in a file of its own; returns what it prints."""
    linecache.cache[NAME] = (len(code), None, code.splitlines(keepends=True), NAME)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, NAME, "exec"), namespace)
    return out.getvalue()


def lasting(text: str) -> list[str]:
    """What is printed, without the times and the tables of costs, which change with the cost model."""
    text = re.sub(r"(checked|compiled in): .*", "", text, flags=re.DOTALL)
    return [line for line in text.strip().splitlines() if not line.startswith(tuple("┏┃┡│├└"))]


def test_readme_has_examples():
    assert len(examples()) >= 8


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    with torch.random.fork_rng():
        for code, expected in examples():
            printed = run(code, namespace)
            assert lasting(printed) == lasting(expected), code


if __name__ == "__main__":  # writes the printed output into the README
    text, names = README.read_text(encoding="utf-8"), {"__name__": "readme"}
    parts, printed = [], ""
    for piece in re.split(r"(^```\w*\n.*?^```$)", text, flags=re.MULTILINE | re.DOTALL):
        kind, body = (BLOCK.match(piece) or re.match("()()", "")).groups()
        if kind == "python":
            printed = run(body, names)
        parts.append(f"```text\n{printed}```" if kind == "text" else piece)
    README.write_text("".join(parts), encoding="utf-8")
