"""What is right and what is refused of the rows of `packages.py`: the table in docs/people.md.

    python tests/models/coverage_packages.py --results packages.json          # what has not run; may be stopped, goes on
    python tests/models/coverage_packages.py --results packages.json --rows "CLIP's loss"
    python tests/models/coverage_packages.py --results packages.json --write  # the table, of what has run

Needs the packages of the extra `models`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "people.md"
BEGIN, END = "<!-- coverage:begin -->", "<!-- coverage:end -->"
COLUMNS = {
    "grad": "gradient",
    "first": "`BatchGrad`, `Variance`",
    "ggn": "`DiagGGNExact`",
    "hessian": "`DiagHessian`",
    "products": "`GGNMP`, `HMP`",
}
SIZES = (3, 2, 1)


def verdicts(name: str) -> dict[str, str]:
    """"family mode" -> "right", "refused: ..." or "wrong: ..."; together, and one by one where together raises."""
    from packages import PACKAGES, as_imported

    _, row = PACKAGES[name]
    found: dict[str, str] = {}
    for mode in ("eval", "train") if row.trains else ("eval",):
        families = ["grad", *row.asks.split()]
        with as_imported():
            together = _verdict(row, families, mode == "train")
            alone = together if together == "right" else _verdict(row, ["grad"], mode == "train")
            for family in families:  # where there is no gradient, there is nothing
                same = together == "right" or alone.startswith("refused: CaptureError")
                found[f"{family} {mode}"] = alone if same or family == "grad" else _verdict(row, [family], mode == "train")
    return found


def _verdict(row, families: list[str], training: bool) -> str:
    from fxcurv.errors import FxcurvError

    try:
        dataclasses.replace(row, asks=" ".join(families)).check(SIZES, training)
    except FxcurvError as error:
        return f"refused: {type(error).__name__}: {error}"
    except Exception as error:  # a cell of its own in the table, which is to show it
        return f"wrong: {type(error).__name__}: {error}"
    return "right"


def table(results: dict[str, dict[str, str]]) -> str:
    """Markdown: a row per model, a column per family."""
    from packages import PACKAGES

    notes: dict[str, int] = {}
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in PACKAGES:
        cells = [_cell(results.get(name, {}), family, notes) for family in COLUMNS]
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
    if kind == "right":
        return "✓"
    lines = [line.strip() for line in why.splitlines() if line.strip() and not line.strip().startswith("File ")]
    text = " ".join(lines)[:400].replace(str(ROOT), "").replace("|", "\\|")
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
    for name in given.rows or [name for name in PACKAGES if name not in results]:
        results[name] = verdicts(name)
        given.results.write_text(json.dumps(results, indent=1))
        print(name, {k: v[:300] for k, v in results[name].items()}, flush=True)


if __name__ == "__main__":
    main()
