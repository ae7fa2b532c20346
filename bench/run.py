"""Measure fxcurv beside its peers: ``python bench/run.py``; ``bench/README.md`` says how and why."""

import argparse
import gc
import os
import statistics
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import cases
import models
import torch
from cases import QUANTITIES, Problem, Quantity
from measure import (
    Entry,
    Row,
    add_common,
    machine,
    percentiles,
    place,
    print_rows,
    read,
    set_up,
    version,
    within,
    write,
)
from peers import plain, wanted
from torch import Tensor, nn
from tqdm import tqdm

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "benchmark.md"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
KEY = ("problem", "quantity", "implementation")
NUMBERS = ("median_ms", "p10_ms", "p90_ms", "ratio", "peak_mib")
COLUMNS = (
    *(*KEY, *NUMBERS, "rounds", "note"),
    *("allocator", "device", "threads", "cpu", "cores", "torch", "fxcurv", "peer", "date"),
)
PACKAGES = {
    "backpack": "backpack-for-pytorch", "curvlinops": "curvlinops-for-pytorch", "func": "torch", "opacus": "opacus",
    "asdl": "asdfghjkl",
}  # fmt: skip
OTHERS = ("func", "curvlinops", "opacus", "asdl")
PROBLEMS = cases.PROBLEMS | models.PROBLEMS


# ---------------------------------------------------------------- measuring


def differs(one: dict[tuple[str, str], float], other: dict[tuple[str, str], float], name: str) -> str:
    """Where two fingerprints disagree, `other` that of `name`, as text; empty where they agree in what both have."""
    for key in one.keys() & other.keys():
        if abs(one[key] - other[key]) > 1e-3 * max(abs(one[key]), abs(other[key])) + 1e-12:
            return f"differs from {name} in {'/'.join(key)}: {one[key]:.4g} against {other[key]:.4g}"
    return ""


def placed(name: str, device: torch.device, quick: bool) -> Problem:
    """A problem whose model and batch are made on the CPU, the same for all devices, and moved; `quick`: a tiny one."""
    problem = PROBLEMS[name]
    build = models.TINY.get(name, problem.build) if quick else problem.build

    def moved() -> tuple[nn.Module, Tensor, Tensor]:
        model, x, y = build()
        few = slice(4 if quick else None)
        return model.to(device), x[few].to(device), y[few].to(device)

    return replace(problem, build=moved)


def measure(problem: str, quantity: str, args: argparse.Namespace, progress: tqdm) -> list[Entry]:
    """All implementations of one quantity on one problem, the plain gradient first."""
    torch.compiler.reset()  # its limit of recompilations counts per function, and all entries share one
    case, how = placed(problem, args.device, args.quick), QUANTITIES[quantity]
    entries = [Entry("plain", args.device)]
    entries[0].prepare(lambda: plain(case), args.limit, compare=False)
    compiled = {f"plain:{backend}": partial(plain, backend=backend) for backend in args.backend}
    builders = {**compiled, **wanted(args.peers, args.backend)}
    for name, build in ((name, build) for name, build in builders.items() if name not in args.without):
        progress.set_postfix_str(f"{problem} {quantity}: prepare {name}")
        entry = Entry(name, args.device)
        if entry.prepare(lambda build=build: build(case, how), args.limit, compare=not how.random):
            entries.append(entry)
    # BackPACK where it has the quantity, else the next peer that does
    reference = next((entry for entry in entries if entry.values and not entry.name.startswith("fxcurv")), entries[0])
    for entry in entries[1:]:
        entry.note = "; ".join(filter(None, (entry.note, differs(entry.values, reference.values, reference.name))))
    interleave(entries, args, progress, f"{problem} {quantity}")
    return entries


def interleave(entries: list[Entry], args: argparse.Namespace, progress: tqdm, what: str) -> None:
    """Round-robin: a round times every entry once, the plain gradient too; the order turns by one each round.

    An entry leaves when its time is used up, but not before three rounds.  Its ratio is the median over
    rounds of its time to the plain gradient's in the same round.
    """
    order = list(entries)
    for turn in range(args.rounds):
        progress.set_postfix_str(f"{what}: round {turn + 1}/{args.rounds}")
        gc.collect()
        gc.disable()
        seconds = {entry.name: entry.time(args.limit) for entry in order}
        gc.enable()
        unit = seconds["plain"]
        for entry in order:
            if unit and seconds[entry.name] and entry.seconds:
                entry.ratios.append(seconds[entry.name] / unit)
        order = [e for e in order if e.name == "plain" or turn < 2 or sum(e.seconds) < args.budget]
        order = [e for e in order if e.implementation is not None]
        if [e.name for e in order] in ([], ["plain"]) and turn >= 2:
            break
        order = order[1:] + order[:1]


# ---------------------------------------------------------------- rows


def to_rows(problem: str, quantity: str, entries: list[Entry], shared: Row) -> list[Row]:
    """One row per entry; empty cells where there is no number."""
    rows = []
    for entry in entries:
        row: Row = dict.fromkeys(COLUMNS, "") | shared
        row |= {"problem": problem, "quantity": quantity, "implementation": entry.name, "note": entry.note}
        row["peer"] = version(PACKAGES.get(entry.name.partition(":")[0], "torch"))
        row |= percentiles(entry.seconds)
        if entry.seconds:
            row["peak_mib"] = "" if entry.peak is None else f"{entry.peak:.1f}"
        if entry.ratios:
            row["ratio"] = f"{statistics.median(entry.ratios):.4g}"
        rows.append(row)
    return rows


# ---------------------------------------------------------------- tables


def best(rows: list[Row], families: tuple[str, ...]) -> Row | None:
    """The fastest row with a number among these families."""
    found = [r for r in rows if r["ratio"] and r["implementation"].partition(":")[0] in families]
    return min(found, key=lambda row: float(row["ratio"]), default=None)


def cell(default: list[Row], keep: list[Row], families: tuple[str, ...]) -> str:
    """``ratio [ratio with keep] / MiB name``; a dash where there is none."""
    row, kept = best(default, families), best(keep, families)
    if row is None and kept is None:
        return "–"
    text = row["ratio"] if row else "–"
    text += f" [{kept['ratio']}]" if kept else ""
    text += f" / {float((row or kept)['peak_mib']):.0f}" if (row or kept)["peak_mib"] else ""
    return f"{text} {(row or kept)['implementation']}" if "func" in families else text


def markdown(rows: list[Row]) -> str:
    """The tables of docs/benchmark.md: per quantity the ratios, peaks and the goal."""
    lines: list[str] = []
    goals = {(row["problem"], row["quantity"]): row for row in read(HERE / "goals.csv")}
    for problem in dict.fromkeys(row["problem"] for row in rows):
        here = [row for row in rows if row["problem"] == problem]
        units = [row for row in here if row["implementation"] == "plain" and row["median_ms"]]
        units = [row for row in units if row["allocator"] == "default"] or units
        unit = statistics.median(float(row["median_ms"]) for row in units)
        peak = statistics.median(float(row["peak_mib"] or 0) for row in units)
        lines.append(f"\n**{PROBLEMS[problem].title}** (plain gradient: {unit:.3g} ms, peak {peak:.0f} MiB)\n")
        lines.append("| quantity | fxcurv × [keep] / MiB | BackPACK × [keep] / MiB | best other | goal × [keep] |")
        lines.append("|---|---|---|---|---|")
        for quantity in (name for name in QUANTITIES if any(row["quantity"] == name for row in here)):
            split = {
                kind: [row for row in here if row["quantity"] == quantity and row["allocator"] == kind]
                for kind in ("default", "keep")
            }
            families = (("fxcurv",), ("backpack",), OTHERS)
            cells = [cell(split["default"], split["keep"], family) for family in families]
            goal = goals.get((problem, quantity), {"goal": "", "goal_keep": ""})
            wish = goal["goal"] + (f" [{goal['goal_keep']}]" if goal["goal_keep"] else "")
            lines.append(f"| {quantity} | {' | '.join(cells)} | {wish} |")
    return "\n".join(lines).strip("\n")


def write_tables(rows: list[Row]) -> None:
    """Put the tables between their markers in the document."""
    head, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    _, tail = rest.split(END)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{markdown(rows)}\n{END}{tail}", encoding="utf-8")


def slower(rows: list[Row]) -> list[str]:
    """The fxcurv rows that failed, differ from a peer's or are slower, as sentences."""
    found = []
    for row in (row for row in rows if row["implementation"] == "fxcurv"):
        where = ("problem", "quantity", "allocator")
        beside = [other for other in rows if all(other[key] == row[key] for key in where)]
        peer = best(beside, ("backpack",))
        name = f"{row['problem']} {row['quantity']}"
        if not row["ratio"]:
            found.append(f"{name}: fxcurv has no number ({row['note']})")
        elif "differs" in row["note"]:
            found.append(f"{name}: {row['note']}")
        elif peer and float(row["ratio"]) > float(peer["ratio"]):
            found.append(f"{name}: fxcurv {row['ratio']}×, {peer['implementation']} {peer['ratio']}×")
    return found


def short(rows: list[Row], goals: list[Row]) -> list[str]:
    """What fxcurv's rows lack of the goals, as sentences: figures above them, and no figure where there should be one.

    Only goals of quantities that were measured count. `goal` is of the default allocator's ratio, `goal_keep` of the
    other's; `goal_peak` of fxcurv's peak to the plain gradient's beside it.
    """
    found = []
    named = {(_place(row), row["allocator"], row["implementation"]): row for row in rows}
    wanted = {_place(goal): goal for goal in goals}
    for unit in (row for row in rows if row["implementation"] == "plain" and _place(row) in wanted):
        kind, goal, where = unit["allocator"], wanted[_place(unit)], " ".join(_place(unit))
        limit, peak = goal["goal" if kind == "default" else "goal_keep"], goal["goal_peak"]
        row = named.get((_place(unit), kind, "fxcurv"), {"ratio": "", "note": "not offered"})
        if not row["ratio"]:
            found += [f"{where}: no figure ({row['note']})"] if limit else []
            continue
        if limit and float(row["ratio"]) > float(limit):
            found.append(f"{where}: {row['ratio']}× the plain gradient, goal {limit}×")
        if peak and float(row["peak_mib"]) > float(peak) * float(unit["peak_mib"]):
            found.append(
                f"{where}: peak {row['peak_mib']} MiB, goal {peak}× the plain gradient's {unit['peak_mib']} MiB"
            )
    return found


def _place(row: Row) -> tuple[str, str]:
    return row["problem"], row["quantity"]


# ---------------------------------------------------------------- command line


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    families = ["fxcurv", "backpack", *OTHERS]
    add_common(parser, rounds=20)
    add = parser.add_argument
    add("--problems", nargs="+", default=["a", "e", "b", "c"], choices=PROBLEMS, help="default: a e b c")
    add("--extensions", nargs="+", default=list(QUANTITIES), choices=QUANTITIES, metavar="NAME")
    add("--peers", nargs="+", default=families, choices=families, help="the plain gradient always runs")
    add(
        "--backend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="fxcurv under these torch.compile backends too (inductor)",
    )
    add("--without", nargs="+", default=[], metavar="NAME", help="leave these implementations out (func:vmap_compile)")
    add("--budget", type=float, default=20, help="seconds after which an implementation gets no more rounds")
    add("--keep", action="store_true", help="an allocator that keeps freed pages")
    add("--quick", action="store_true", help="four samples, small models: whether it runs, no figures")
    add("--from", dest="files", nargs="+", type=Path, help="measure nothing, print the tables of these files")
    add("--markdown", action="store_true", help="print the tables of docs/benchmark.md")
    add("--write", action="store_true", help="write them into it")
    add("--check", action="store_true", help="exit with 1 if fxcurv fails, differs or is slower")
    add("--check-goals", action="store_true", help="print what is short of goals.csv, exit with 1 if something is")
    args = parser.parse_args()
    args.rounds = min(args.rounds, 3) if args.quick else args.rounds
    return args


def offered(quantity: Quantity, problem: str) -> bool:
    """All fifteen together are BackPACK's documentation page, whose model is the logistic regression."""
    return quantity is not QUANTITIES["DocsSet"] or problem == "a"


def run(args: argparse.Namespace) -> list[Row]:
    """Measure all that was asked for; the file is written after every quantity."""
    set_up(args.device, args.threads)
    shared = machine(args.device, args.threads) | {"allocator": "keep" if args.keep else "default"}
    path = args.out / f"{place(shared)}{'-keep' if args.keep else ''}.csv"
    jobs = [(p, q) for p in args.problems for q in args.extensions if offered(QUANTITIES[q], p)]
    rows: list[Row] = []
    with tqdm(jobs, dynamic_ncols=True, unit="quantity") as progress:
        for problem, quantity in within(progress, args.seconds):
            rows += to_rows(problem, quantity, measure(problem, quantity, args, progress), shared)
            write(path, COLUMNS, rows, KEY[:2])
    print(f"\n{path}\n")
    return rows


def main() -> int:
    """Measure or read, print, check."""
    args = arguments()
    if args.keep and not args.files and any(os.environ.get(name) != value for name, value in KEEP.items()):
        # malloc reads these once, when the process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", message="Using a non-full backward hook")
    warnings.filterwarnings("ignore", message="There is a performance drop because")  # vmap's, of what it loops over
    rows = [row for path in args.files for row in read(path)] if args.files else run(args)
    if args.write:
        write_tables(rows)
    elif args.markdown:
        print(markdown(rows))
    else:
        print_rows(rows, (*KEY, *NUMBERS, "note"), NUMBERS)
    failures = [f"CHECK {found}" for found in slower(rows)] if args.check else []
    if args.check_goals:
        failures += [f"SHORT {found}" for found in short(rows, read(HERE / "goals.csv"))]
    print(*failures, sep="\n", end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
