"""What the benchmarks share: clocks, peaks of memory, columns that say where a run was made, CSV files."""

import argparse
import csv
import gc
import importlib
import math
import os
import re
import resource
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

# Inductor's pool of compile workers would stay alive beside the timings.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's remarks would tear the progress bar

import torch
from peers import Fields, Implementation
from torch import Tensor, nn

MIB = 1 << 20
Row = dict[str, Any]


# ---------------------------------------------------------------- clocks


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


def within(jobs: Sequence[Any], seconds: float) -> Iterator[Any]:
    """The jobs, as long as this time has not passed; what is left out is said."""
    start = time.monotonic()
    for done, job in enumerate(jobs):
        if time.monotonic() - start > seconds:
            print(f"\nLEFT OUT: {len(jobs) - done} of {len(jobs)}, since {seconds:g} s have passed", flush=True)
            return
        yield job


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def percentiles(seconds: list[float]) -> Row:
    """Median, p10 and p90 in milliseconds and the number of rounds; empty where there is no time."""
    row: Row = {"median_ms": "", "p10_ms": "", "p90_ms": "", "rounds": len(seconds)}
    if seconds:
        ms = sorted(1e3 * each for each in seconds)
        row["median_ms"] = f"{statistics.median(ms):.4g}"
        row["p10_ms"], row["p90_ms"] = f"{ms[len(ms) // 10]:.4g}", f"{ms[(len(ms) * 9) // 10]:.4g}"
    return row


def reason(error: Exception) -> str:
    """A failure as the text of a cell."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"failed: {type(error).__name__}: {text[:300]}"


# ---------------------------------------------------------------- memory


def storages(device: torch.device) -> dict[int, int]:
    """Address -> bytes of the device's storages that tensors in Python refer to."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) not in (Tensor, nn.Parameter) or thing.device.type != device.type:
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


def peak_memory(call: Callable[[], Any], standing: dict[int, int], device: torch.device) -> tuple[float, Any]:
    """Peak MiB above what stood before the implementation was built, and what the call returned.

    A running sum of the call's own allocations (on CUDA the allocator keeps it), plus the storages that the
    implementation carried over from earlier calls and still has: a result whose memory is used again is no
    less a result.
    """
    carried = {address: size for address, size in storages(device).items() if address not in standing}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) - sum(carried.values())
        raw = call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB, raw
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
    after = storages(device)
    kept = sum(size for address, size in carried.items() if address in after and address not in live)
    return (peak + kept) / MIB, raw


def bound_memory() -> None:
    """Let an allocation beyond the machine's memory fail in the call instead of ending the process."""
    info = Path("/proc/meminfo")
    if info.exists():
        available = int(re.search(r"MemAvailable:\s*(\d+)", info.read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.9 * available), resource.RLIM_INFINITY))


def allow_tf32(allowed: bool) -> None:
    """Whether CUDA may round factors in float32 to TF32, in products and in convolutions alike."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def set_up(device: torch.device, threads: int) -> None:
    """What a run does first: its threads, exact products, and the memory that an allocation may not go beyond.

    On CUDA the allocator raises by itself, and the libraries' workspaces are taken here, so that no entry pays.
    """
    torch.set_num_threads(threads)
    allow_tf32(False)
    if device.type == "cuda":
        square = torch.ones(64, 64, device=device)
        torch.mm(square, square)
        synchronize(device)
    else:
        bound_memory()


# ---------------------------------------------------------------- an implementation under measurement


def fingerprint(fields: Fields) -> dict[tuple[str, str], float]:
    """One number per field and parameter, by which two implementations' values are compared."""
    return {
        (field, name): sum(
            torch.linalg.vector_norm(part.detach(), 1, dtype=torch.float64).item() for part in parts(value)
        )
        for field, values in fields.items()
        for name, value in values.items()
    }


def parts(value: Any) -> list[Tensor]:
    """The tensors of a result: itself, or the factors of a list."""
    return [value] if isinstance(value, Tensor) else list(value)


class Entry:
    """An implementation under measurement, and what came of it."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.implementation: Implementation | None = None
        self.seconds: list[float] = []
        self.ratios: list[float] = []
        self.peak: float | None = None
        self.values: dict[tuple[str, str], float] = {}
        self.note = ""

    def prepare(self, build: Callable[[], Implementation | None], limit: float, compare: bool) -> bool:
        """Build, warm up and measure the memory; False where the quantity is not offered."""
        gc.collect()
        standing = storages(self.device)
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
                self.peak, raw = peak_memory(implementation.call, standing, self.device)
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
            synchronize(self.device)
            with at_most(limit):
                start = time.perf_counter()
                raw = self.implementation.call()
                synchronize(self.device)
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
        self.note = reason(error)


# ---------------------------------------------------------------- rows and files


def version(package: str) -> str:
    """Installed version, or empty."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def machine(device: torch.device, threads: int) -> Row:
    """The columns that all rows of a run share."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    try:
        own = getattr(importlib.import_module("fxcurv"), "__version__", "") or version("fxcurv")
    except ImportError:
        own = ""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": threads,
        "cpu": models[0].strip() if models else "unknown",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "fxcurv": own,
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def place(shared: Row) -> str:
    """``<date>-<processor or accelerator>``: how the files of a run begin."""
    name = f"{shared['cpu']}-{shared['cores']}c" if shared["device"] == "cpu" else shared["device"]
    return f"{shared['date'][:10]}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"


def read(path: Path) -> list[Row]:
    """Rows of a CSV file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, columns: tuple[str, ...], rows: list[Row], key: tuple[str, ...]) -> None:
    """Write the rows; those that the file has for other values of `key` stay, so that a run may be done in pieces."""
    new = {tuple(str(row[name]) for name in key) for row in rows}
    rows = [row for row in read(path) if tuple(row.get(name, "") for name in key) not in new] + rows
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def print_rows(rows: list[Row], head: tuple[str, ...], numbers: tuple[str, ...]) -> None:
    """These columns of all rows as aligned text, those of `numbers` to the right."""
    table = [head, *(tuple(str(row[column])[:100] for column in head) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    for line in table:
        cells = (f"{text:{'>' if head[i] in numbers else '<'}{widths[i]}}" for i, text in enumerate(line))
        print("  ".join(cells).rstrip())


def add_common(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The arguments that all benchmarks take."""
    add = parser.add_argument
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=rounds, help="timed calls of each implementation")
    add("--limit", type=float, default=120, help="seconds to build and warm up, and for any later call")
    add("--seconds", type=float, default=math.inf, help="begin nothing new after this time")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV file")
