"""What is right and what is refused of the rows of `packages.py`: the table in docs/people.md.

    python tests/models/coverage_packages.py --results packages.json          # what has not run; may be stopped, goes on
    python tests/models/coverage_packages.py --results packages.json --rows "CLIP's loss"
    python tests/models/coverage_packages.py --results packages.json --write  # the table, of what has run

Needs the packages of the extra `models`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "people.md"
BEGIN, END = "<!-- coverage:begin -->", "<!-- coverage:end -->"
SIZES = (3, 2, 1)
# each entry of a parameter costs the oracle a derivative of its own
SECOND = ("Hessian", "products")


def sizes_of(name: str, families: list[str]) -> tuple[int, ...]:
    from packages import LARGE

    return SIZES[1:] if name in LARGE and set(families) & set(SECOND) else SIZES


def tolerance_of(name: str) -> float:
    from packages import SINGLE

    return 1e-4 if name in SINGLE else 1e-8


def jobs_of(name: str) -> list[tuple[str, list[str]]]:
    """(mode, families that share a program)."""
    from model_checks import GROUPS
    from packages import PACKAGES

    first = [family for family in GROUPS if family not in SECOND]
    modes = ("eval", "train") if PACKAGES[name][1].trains else ("eval",)
    return [(mode, families) for mode in modes for families in (first, list(SECOND))]


def verdicts(name: str, mode: str, families: list[str]) -> dict[str, str]:
    """What "family mode" is: "right", "refused: ..." or "wrong: ..."; together, and one by one where together raises."""
    from package_checks import LEFT
    from packages import as_imported

    found: dict[str, str] = {}
    with as_imported():
        together = _verdict(name, families, mode == "train")
        alone = together
        if together != "right" and not together.startswith("refused: CaptureError"):
            alone = _verdict(name, ["gradient"], mode == "train")
        for family in families:  # where there is no gradient, there is nothing
            same = together == "right" or alone.startswith("refused: CaptureError") or family == "gradient"
            verdict = alone if same else _verdict(name, [family], mode == "train")
            if verdict.startswith("refused") and not alone.startswith("refused") and family in LEFT:
                left = _verdict(name, [LEFT[family]], mode == "train")
                verdict = f"right {LEFT[family]}" if left == "right" else left
            found[f"{family} {mode}"] = verdict
    return found


def _verdict(name: str, families: list[str], training: bool) -> str:
    from package_checks import check
    from packages import PACKAGES

    from fxcurv.errors import FxcurvError

    try:
        check(PACKAGES[name][1], families, sizes_of(name, families), training, tolerance_of(name))
    except FxcurvError as error:
        return f"refused: {type(error).__name__}: {error}"
    except Exception as error:  # a cell of its own in the table, which is to show it
        return f"wrong: {type(error).__name__}: {error}"
    return "right"


def table(results: dict[str, dict[str, str]]) -> str:
    """Markdown: a row per model, a column per family."""
    from model_checks import GROUPS
    from packages import PACKAGES

    notes: dict[str, int] = {}
    lines = ["| | " + " | ".join(GROUPS) + " |", "|---" * (len(GROUPS) + 1) + "|"]
    for name in PACKAGES:
        cells = [_cell(results.get(name, {}), family, notes) for family in GROUPS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"[{k}] {text}  " for text, k in notes.items())])


def _cell(found: dict[str, str], family: str, notes: dict[str, int]) -> str:
    seen: dict[str, list[str]] = {}
    modes = [mode for mode in ("eval", "train") if f"{family} {mode}" in found]
    for mode in modes:
        seen.setdefault(_mark(found[f"{family} {mode}"], notes), []).append(mode)
    if not seen:
        return "·"
    return ", ".join(mark if own == modes else f"{mark} {' '.join(own)}" for mark, own in seen.items())


def _mark(verdict: str, notes: dict[str, int]) -> str:
    kind, _, why = verdict.partition(": ")
    if kind.startswith("right"):
        return kind.replace("right", "✓")
    lines = [line.strip() for line in why.splitlines() if line.strip() and not line.strip().startswith("File ")]
    text = " ".join(lines).replace(str(ROOT), "").replace("|", "\\|")
    text = re.sub(r"\w+(, \w+)* (\(per sample\) )?(does not exist|is not defined)", "none of it is defined", text)[:400]
    return f"{'–' if kind == 'refused' else '✗'}[{notes.setdefault(text, len(notes) + 1)}]"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rows", nargs="*")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    for folder in ("oracle", "cases", "models", "wild"):
        sys.path.insert(0, str(ROOT / "tests" / folder))
    from packages import PACKAGES

    results = json.loads(given.results.read_text()) if given.results.exists() else {}
    if given.write:
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{rest.partition(END)[2]}")
        return
    for name in given.rows or PACKAGES:
        for mode, families in jobs_of(name):
            known = results.setdefault(name, {})
            if given.rows or not all(f"{family} {mode}" in known for family in families):
                found = verdicts(name, mode, families)
                known.update(found)
                given.results.write_text(json.dumps(results, indent=1))
                print(name, {k: v[:300] for k, v in found.items()}, flush=True)


if __name__ == "__main__":
    main()
