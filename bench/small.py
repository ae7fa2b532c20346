"""Small and dense models, every quantity in the same rounds as the plain gradient: ``python bench/small.py``.

Where a call takes a millisecond, what disturbs the machine for a second is larger than what is compared. `run.py` measures one
quantity after another, each beside the plain gradient; here all of them are in one process and in one round, and a figure is
the ratio of two medians. Exit status 1 if one is short of `goals.csv`.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

from cases import PROBLEMS, QUANTITIES
from measure import Entry, add_common, machine, print_rows, read, set_up
from peers import fxcurv, plain
from run import interleave
from tqdm import tqdm

# The rows of the goals for the logistic regression and the MLP.
ROWS = (
    *(
        "Gradient",
        "BatchGrad",
        "BatchL2Grad",
        "SumGradSquared",
        "Variance",
        "FirstOrderAll",
        "DiagGGNExact",
        "DiagGGNMC",
    ),
    *("KFAC", "KFLR", "DiagHessian", "HMP"),
)
HEAD = ("problem", "quantity", "median_ms", "ratio", "goal", "note")


def measured(problem: str, args: argparse.Namespace, progress: tqdm) -> list[Entry]:
    """The plain gradient, then the quantities, timed in turns."""
    case = PROBLEMS[problem]
    entries = [Entry(name, args.device) for name in ("plain", *args.extensions)]
    for entry in entries:
        progress.set_postfix_str(f"{problem}: prepare {entry.name}")
        build = partial(plain, case) if entry.name == "plain" else partial(fxcurv, case, QUANTITIES[entry.name])
        entry.prepare(build, args.limit, compare=False)
    interleave(entries, args, progress, problem)
    return entries


def rows(problem: str, entries: list[Entry]) -> list[dict[str, str]]:
    """A row per quantity: its median, the ratio of it to the plain gradient's, its goal."""
    goals = {
        row["quantity"]: row["goal"] for row in read(Path(__file__).parent / "goals.csv") if row["problem"] == problem
    }
    unit, found = statistics.median(entries[0].seconds), []
    for entry in entries:
        row = dict.fromkeys(HEAD, "") | {"problem": problem, "quantity": entry.name, "goal": goals.get(entry.name, "")}
        row["note"] = entry.note
        if entry.seconds:
            median = statistics.median(entry.seconds)
            row |= {"median_ms": f"{1e3 * median:.4g}", "ratio": f"{median / unit:.3f}"}
        found.append(row)
    return found


def main() -> int:
    """Measure, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser, rounds=100)
    parser.add_argument("--problems", nargs="+", default=["a", "e"], choices=PROBLEMS)
    parser.add_argument("--extensions", nargs="+", default=ROWS, choices=QUANTITIES, metavar="NAME")
    parser.add_argument("--budget", type=float, default=20, help="seconds after which a quantity gets no more rounds")
    args = parser.parse_args()
    set_up(args.device, args.threads)
    found = []
    with tqdm(args.problems, dynamic_ncols=True, unit="problem") as progress:
        for problem in progress:
            found += rows(problem, measured(problem, args, progress))
    shared = machine(args.device, args.threads)
    print(f"\n{shared['cpu']}, {shared['threads']} threads, PyTorch {shared['torch']}, {args.rounds} rounds\n")
    print_rows(found, HEAD, HEAD[2:5])
    short = [row for row in found if row["goal"] and (not row["ratio"] or float(row["ratio"]) > float(row["goal"]))]
    for row in short:
        print(f"SHORT {row['problem']} {row['quantity']}: {row['ratio'] or row['note']}, goal {row['goal']}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
