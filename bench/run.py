"""Measure fxcurv beside its peers: ``python bench/run.py``; ``bench/README.md`` says how and why."""

import argparse
import csv
import gc
import importlib
import os
import re
import resource
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

# Inductor's pool of compile workers would stay alive beside the timings.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's remarks would tear the progress bar

import torch
from cases import PROBLEMS, QUANTITIES, Quantity
from peers import Fields, Implementation, plain, wanted
from torch import Tensor, nn
from tqdm import tqdm

HERE = Path(__file__).parent
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
KEY = ("problem", "quantity", "implementation")
COLUMNS = (
    *KEY,
    *("median_ms", "p10_ms", "p90_ms", "ratio", "peak_mib", "rounds", "note"),
    *("allocator", "threads", "cpu", "cores", "torch", "fxcurv", "peer", "date"),
)
PACKAGES = {"backpack": "backpack-for-pytorch", "curvlinops": "curvlinops-for-pytorch", "func": "torch"}
MIB = 1 << 20
Row = dict[str, Any]


# ---------------------------------------------------------------- measuring


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError when the body runs longer (noticed between two operations)."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"took over {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def storages() -> dict[int, int]:
    """Address -> bytes of the CPU storages that tensors in Python refer to."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) not in (Tensor, nn.Parameter) or thing.device.type != "cpu":
            continue
        try:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        except RuntimeError:  # a tracing wrapper without memory
            continue
    return found


def allocations(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """(address, bytes) of the CPU allocations, and with bytes < 0 of the frees, in order."""
    events = []
    stack = list(profile.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.name == "[memory]" and event.extra_fields.device.type == "cpu":
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(events, key=lambda event: event[0])]


def peak_memory(call: Callable[[], Any], standing: dict[int, int]) -> tuple[float, Any]:
    """Peak MiB above what stood before the implementation was built, and what the call returned.

    A running sum of the call's own allocations, plus the storages that the implementation carried over from
    earlier calls and still has: a result whose memory is used again is no less a result.
    """
    carried = {address: size for address, size in storages().items() if address not in standing}
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        raw = call()
    live: dict[int, int] = {}
    now = peak = 0
    for address, size in allocations(profile):
        if size > 0:
            live[address] = size
            now += size
            peak = max(peak, now)
        else:
            now -= live.pop(address, 0)
    after = storages()
    kept = sum(size for address, size in carried.items() if address in after and address not in live)
    return (peak + kept) / MIB, raw


def fingerprint(fields: Fields) -> dict[tuple[str, str], float]:
    """One number per field and parameter, by which two implementations' values are compared."""
    return {
        (field, name): sum(part.detach().double().abs().sum().item() for part in parts(value))
        for field, values in fields.items()
        for name, value in values.items()
    }


def parts(value: Any) -> list[Tensor]:
    """The tensors of a result: itself, or the factors of a list."""
    return [value] if isinstance(value, Tensor) else list(value)


def differs(one: dict[tuple[str, str], float], other: dict[tuple[str, str], float]) -> str:
    """Where two fingerprints disagree, as text; empty where they agree in what both have."""
    for key in one.keys() & other.keys():
        if abs(one[key] - other[key]) > 1e-3 * max(abs(one[key]), abs(other[key])) + 1e-12:
            return f"differs from BackPACK in {'/'.join(key)}: {one[key]:.4g} against {other[key]:.4g}"
    return ""


class Entry:
    """An implementation under measurement, and what came of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.implementation: Implementation | None = None
        self.seconds: list[float] = []
        self.ratios: list[float] = []
        self.peak: float | None = None
        self.values: dict[tuple[str, str], float] = {}
        self.note = ""

    def prepare(self, build: Callable[[], Implementation | None], limit: float, compare: bool) -> bool:
        """Build, warm up and measure the memory; False where the quantity is not offered."""
        gc.collect()
        standing = storages()
        try:
            with at_most(limit):
                self.implementation = implementation = build()
                if implementation is None:
                    return False
                self.note = implementation.note
                standing |= {given.untyped_storage().data_ptr(): 0 for given in implementation.given}
                for _ in range(2):
                    implementation.reset()
                    implementation.call()
                implementation.reset()
            with at_most(limit):
                self.peak, raw = peak_memory(implementation.call, standing)
            if compare:
                self.values = fingerprint(implementation.fields(raw))
            del raw
            implementation.reset()
        except Exception as error:  # a peer's failure is a finding, whatever it is
            self.fail(error)
        return True

    def time(self, limit: float) -> float | None:
        """Seconds of one call, started from a clean model; what it leaves is dropped outside the clock."""
        if self.implementation is None:
            return None
        try:
            self.implementation.reset()
            with at_most(limit):
                start = time.perf_counter()
                raw = self.implementation.call()
                seconds = time.perf_counter() - start
            del raw
            self.implementation.reset()
        except Exception as error:
            self.fail(error)
            return None
        self.seconds.append(seconds)
        return seconds

    def fail(self, error: Exception) -> None:
        """Leave the cell empty and keep the reason."""
        self.implementation, self.peak, self.seconds, self.ratios = None, None, [], []
        text = re.sub(r"\s+", " ", str(error)).strip()
        self.note = f"failed: {type(error).__name__}: {text[:300]}"


def measure(problem: str, quantity: str, args: argparse.Namespace, progress: tqdm) -> list[Entry]:
    """All implementations of one quantity on one problem, the plain gradient first."""
    torch._dynamo.reset()  # its limit of recompilations counts per function, and all entries share one
    case, how = PROBLEMS[problem], QUANTITIES[quantity]
    entries = [Entry("plain")]
    entries[0].prepare(lambda: plain(case), args.limit, compare=False)
    for name, build in wanted(args.peers, args.backend).items():
        progress.set_postfix_str(f"{problem} {quantity}: prepare {name}")
        entry = Entry(name)
        if entry.prepare(lambda build=build: build(case, how), args.limit, compare=not how.random):
            entries.append(entry)
    reference = next((entry.values for entry in entries if entry.name == "backpack"), {})
    for entry in entries[1:]:
        entry.note = "; ".join(filter(None, (entry.note, differs(entry.values, reference))))
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


def version(package: str) -> str:
    """Installed version, or empty."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def machine(args: argparse.Namespace) -> Row:
    """The columns that all rows of a run share."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    try:
        own = getattr(importlib.import_module("fxcurv"), "__version__", "") or version("fxcurv")
    except ImportError:
        own = ""
    return {
        "allocator": "keep" if args.keep else "default",
        "threads": args.threads,
        "cpu": models[0].strip() if models else "unknown",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "fxcurv": own,
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def to_rows(problem: str, quantity: str, entries: list[Entry], shared: Row) -> list[Row]:
    """One row per entry; empty cells where there is no number."""
    rows = []
    for entry in entries:
        row: Row = dict.fromkeys(COLUMNS, "") | shared
        row |= {"problem": problem, "quantity": quantity, "implementation": entry.name, "note": entry.note}
        row["peer"] = version(PACKAGES.get(entry.name.partition(":")[0], "torch"))
        row["rounds"] = len(entry.seconds)
        if entry.seconds:
            ms = sorted(1e3 * seconds for seconds in entry.seconds)
            row["median_ms"] = f"{statistics.median(ms):.4g}"
            row["p10_ms"], row["p90_ms"] = f"{ms[len(ms) // 10]:.4g}", f"{ms[(len(ms) * 9) // 10]:.4g}"
            row["peak_mib"] = "" if entry.peak is None else f"{entry.peak:.1f}"
        if entry.ratios:
            row["ratio"] = f"{statistics.median(entry.ratios):.4g}"
        rows.append(row)
    return rows


def read(path: Path) -> list[Row]:
    """Rows of a CSV file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[Row]) -> None:
    """Write the rows; those of the same file for other keys stay, so that a run may be done in pieces."""
    new = {tuple(row[key] for key in KEY[:2]) for row in rows}
    rows = [row for row in read(path) if tuple(row[key] for key in KEY[:2]) not in new] + rows
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def file_name(shared: Row) -> str:
    """``<date>-<processor>[-keep].csv``."""
    slug = re.sub(r"[^a-z0-9]+", "-", shared["cpu"].lower()).strip("-")
    keep = "-keep" if shared["allocator"] == "keep" else ""
    return f"{shared['date'][:10]}-{slug}-{shared['cores']}c{keep}.csv"


# ---------------------------------------------------------------- tables


def best(rows: list[Row], families: tuple[str, ...]) -> Row | None:
    """The fastest row with a number among these families."""
    found = [r for r in rows if r["ratio"] and r["implementation"].partition(":")[0] in families]
    return min(found, key=lambda row: float(row["ratio"]), default=None)


def print_table(rows: list[Row]) -> None:
    """All rows as aligned text."""
    head = (*KEY, "median_ms", "p10_ms", "p90_ms", "ratio", "peak_mib", "note")
    table = [head, *(tuple(str(row[column])[:100] for column in head) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    for line in table:
        cells = (f"{text:{'>' if 3 <= i < 8 else '<'}{widths[i]}}" for i, text in enumerate(line))
        print("  ".join(cells).rstrip())


def cell(default: list[Row], keep: list[Row], families: tuple[str, ...]) -> str:
    """``ratio [ratio with keep] / MiB name``; a dash where there is none."""
    row, kept = best(default, families), best(keep, families)
    if row is None and kept is None:
        return "–"
    text = row["ratio"] if row else "–"
    text += f" [{kept['ratio']}]" if kept else ""
    text += f" / {float((row or kept)['peak_mib']):.0f}" if (row or kept)["peak_mib"] else ""
    return f"{text} {(row or kept)['implementation']}" if "func" in families else text


def print_markdown(rows: list[Row]) -> None:
    """The README's table: per quantity the ratios, peaks and the goal."""
    goals = {(row["problem"], row["quantity"]): row for row in read(HERE / "goals.csv")}
    for problem in dict.fromkeys(row["problem"] for row in rows):
        here = [row for row in rows if row["problem"] == problem]
        units = [row for row in here if row["implementation"] == "plain" and row["median_ms"]]
        units = [row for row in units if row["allocator"] == "default"] or units
        unit = statistics.median(float(row["median_ms"]) for row in units)
        peak = statistics.median(float(row["peak_mib"] or 0) for row in units)
        print(f"\n**{PROBLEMS[problem].title}** (plain gradient: {unit:.3g} ms, peak {peak:.0f} MiB)\n")
        print("| quantity | fxcurv × [keep] / MiB | BackPACK × [keep] / MiB | best other | goal × [keep] |")
        print("|---|---|---|---|---|")
        for quantity in (name for name in QUANTITIES if any(row["quantity"] == name for row in here)):
            split = {
                kind: [row for row in here if row["quantity"] == quantity and row["allocator"] == kind]
                for kind in ("default", "keep")
            }
            families = (("fxcurv",), ("backpack",), ("func", "curvlinops"))
            cells = [cell(split["default"], split["keep"], family) for family in families]
            goal = goals.get((problem, quantity), {"goal": "", "goal_keep": ""})
            wish = goal["goal"] + (f" [{goal['goal_keep']}]" if goal["goal_keep"] else "")
            print(f"| {quantity} | {' | '.join(cells)} | {wish} |")


def slower(rows: list[Row]) -> list[str]:
    """The fxcurv rows that failed, differ from BackPACK's or are slower, as sentences."""
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


# ---------------------------------------------------------------- command line


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    families = ["fxcurv", "backpack", "func", "curvlinops"]
    add = parser.add_argument
    add("--problems", nargs="+", default=["a", "e", "b", "c"], choices=PROBLEMS, help="default: a e b c")
    add("--extensions", nargs="+", default=list(QUANTITIES), choices=QUANTITIES, metavar="NAME")
    add("--peers", nargs="+", default=families, choices=families, help="the plain gradient always runs")
    add("--backend", nargs="+", default=[], metavar="NAME", help="fxcurv under these torch.compile backends too (inductor)")
    add("--rounds", type=int, default=20, help="timed calls of each implementation")
    add("--budget", type=float, default=20, help="seconds after which an implementation gets no more rounds")
    add("--limit", type=float, default=120, help="seconds to build and warm up, and for any later call")
    add("--threads", type=int, default=2)
    add("--keep", action="store_true", help="an allocator that keeps freed pages")
    add("--out", type=Path, default=HERE / "results")
    add("--from", dest="files", nargs="+", type=Path, help="measure nothing, print the tables of these files")
    add("--markdown", action="store_true", help="print the README's table")
    add("--check", action="store_true", help="exit with 1 if fxcurv fails, differs or is slower")
    return parser.parse_args()


def bound_memory() -> None:
    """Let an allocation beyond the machine's memory fail in the call instead of ending the process."""
    info = Path("/proc/meminfo")
    if info.exists():
        available = int(re.search(r"MemAvailable:\s*(\d+)", info.read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.9 * available), resource.RLIM_INFINITY))


def offered(quantity: Quantity, problem: str) -> bool:
    """All fifteen together are BackPACK's documentation page, whose model is the logistic regression."""
    return quantity is not QUANTITIES["DocsSet"] or problem == "a"


def run(args: argparse.Namespace) -> list[Row]:
    """Measure all that was asked for; the file is written after every quantity."""
    torch.set_num_threads(args.threads)
    bound_memory()
    shared = machine(args)
    path = args.out / file_name(shared)
    jobs = [(p, q) for p in args.problems for q in args.extensions if offered(QUANTITIES[q], p)]
    rows: list[Row] = []
    with tqdm(jobs, dynamic_ncols=True, unit="quantity") as progress:
        for problem, quantity in progress:
            rows += to_rows(problem, quantity, measure(problem, quantity, args, progress), shared)
            write(path, rows)
    print(f"\n{path}\n")
    return rows


def main() -> int:
    """Measure or read, print, check."""
    args = arguments()
    if args.keep and not args.files and any(os.environ.get(name) != value for name, value in KEEP.items()):
        # malloc reads these once, when the process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    rows = [row for path in args.files for row in read(path)] if args.files else run(args)
    (print_markdown if args.markdown else print_table)(rows)
    failures = slower(rows) if args.check else []
    for failure in failures:
        print("CHECK", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
