"""Measure the kernels against the machine's ceilings: ``python bench/kernels.py``; ``bench/README.md`` says how."""

import argparse
import gc
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kernel_cases import KERNELS, Kernel, Layer, Make
from measure import (
    Row,
    add_common,
    allow_tf32,
    at_most,
    machine,
    percentiles,
    place,
    print_rows,
    reason,
    set_up,
    synchronize,
    version,
    within,
    write,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

KEY = ("kernel", "shape", "dtype", "implementation")
NUMBERS = ("median_ms", "p10_ms", "p90_ms", "gflops", "gbytes", "percent")
COLUMNS = (
    *(
        *KEY,
        "arguments",
        *NUMBERS,
        "limit",
        "flops",
        "bytes",
        "ceiling_gflops",
        "ceiling_gbytes",
        "error",
        "rounds",
        "note",
    ),
    *("device", "threads", "cpu", "cores", "torch", "triton", "fxcurv", "date"),
)
IMPLEMENTATIONS = ("fxcurv", "reference", "compiled", "naive")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
# Largest error of a kernel, in units of the largest value of its reference in float64.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 2e-2}
MIB = 1 << 20


@dataclass(frozen=True)
class Scale:
    """Sizes that suit a device.

    Attributes:
        flops: Of one call: the batch is halved until a kernel needs no more,
        bytes: nor the individual gradients that it does not keep, [V, N, O, I] in float32.
        square: Rows of the matrix product that is the ceiling of operations.
        copy: Bytes of the copy that is the ceiling of traffic; also written between rounds to empty the caches.
    """

    flops: float
    bytes: float
    square: int
    copy: int


SCALES = {"cpu": Scale(2e10, 512 * MIB, 2048, 256 * MIB), "cuda": Scale(2e12, 16384 * MIB, 8192, 1024 * MIB)}
QUICK = Scale(2e7, 4 * MIB, 256, 4 * MIB)


@dataclass
class Case:
    """A kernel at a layer, in a precision.

    Attributes:
        shape: The layer's name and the number of samples taken.
        flops: Operations of a call.
        bytes: Of its arguments and its result.
    """

    kernel: str
    shape: str
    dtype: str
    arguments: tuple[Any, ...]
    flops: int
    bytes: int
    calls: dict[str, Callable[..., Tensor]]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- sizes


def work(call: Callable[..., Tensor], make: Make, kernel: Kernel, layer: Layer, n: int) -> tuple[int, int]:
    """(FLOPs, minimal bytes) of a call at `n` samples, without making the arguments."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        arguments = kernel.arguments(make, layer, n)
        result = call(*arguments)
    tensors = [leaf for leaf in pytree.tree_leaves((arguments, result)) if isinstance(leaf, Tensor)]
    return counter.get_total_flops(), sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def definition(name: str) -> Callable[..., Any]:
    """The reference of a kernel."""
    beside = KERNELS[name].beside
    module = importlib.import_module(f"fxcurv.kernels.{beside or name}")
    return module.reference_conv if beside else module.reference


def prepare(name: str, layer: Layer, dtype: str, wanted: list[str], scale: Scale, device: torch.device) -> Case:
    """The case at the largest batch within the scale."""
    kernel, make = KERNELS[name], Make(device, DTYPES[dtype])
    reference = definition(name)
    calls = {
        "fxcurv": getattr(torch.ops.fxcurv, name),
        "reference": reference,
        "compiled": torch.compile(reference, dynamic=False),
        "naive": kernel.naive,
    }
    n = layer.batch
    flops, moved = work(calls["fxcurv"], make, kernel, layer, n)
    while n > 1 and (flops > scale.flops or 4 * layer.columns * n * layer.outputs * layer.i > scale.bytes):
        n //= 2
        flops, moved = work(calls["fxcurv"], make, kernel, layer, n)
    torch.manual_seed(0)
    chosen = {key: call for key, call in calls.items() if call is not None and key in wanted}
    return Case(name, f"{layer.name}, N={n}", dtype, kernel.arguments(make, layer, n), flops, moved, chosen)


# ---------------------------------------------------------------- measuring


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Let products of float32 be rounded to TF32, or not; afterwards they are exact."""
    allow_tf32(dtype == "tf32")
    try:
        yield
    finally:
        allow_tf32(False)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time of one call; on CUDA between two events on its stream."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1e3


def ceilings(scale: Scale, dtype: str, device: torch.device) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s read and written by a large copy), the best of ten calls."""
    a = torch.randn(scale.square, scale.square, device=device, dtype=DTYPES[dtype])
    out = torch.empty_like(a)
    source = torch.zeros(scale.copy // 4, device=device)
    target = torch.zeros_like(source)
    with precision(dtype):
        product = min(seconds(lambda: torch.mm(a, a, out=out), device) for _ in range(10))
        copy = min(seconds(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * scale.square**3 / product, 2 * scale.copy / copy


def exact(case: Case) -> list[Tensor]:
    """The results of the kernel's definition in float64."""
    wide = [leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in case.arguments]
    return pytree.tree_leaves(definition(case.kernel)(*wide))


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error, of each result in units of its largest value."""
    units = [e.abs().max().clamp_min(1e-300) for e in expected]
    errors = [(f.double() - e).abs().max() / u for f, e, u in zip(found, expected, units, strict=True)]
    return torch.stack(errors).max().item()


def warm_up(case: Case, limit: float, device: torch.device) -> None:
    """Call everything twice and compare it with the definition; what fails leaves with its reason."""
    expected = None
    try:
        with at_most(limit):
            expected = exact(case)
    except Exception as error:  # out of memory, or of time
        case.notes |= dict.fromkeys(case.calls, f"not compared: {reason(error)}")
    for name, call in list(case.calls.items()):
        try:
            with at_most(limit):
                call(*case.arguments)
                result = call(*case.arguments)
                synchronize(device)
        except Exception as error:
            del case.calls[name]
            case.notes[name] = reason(error)
            continue
        if expected is not None:
            case.errors[name] = distance(pytree.tree_leaves(result), expected)
            if not case.errors[name] <= TOLERANCE[case.dtype]:
                case.notes[name] = f"differs from the reference in float64 by {case.errors[name]:.1e}"
        del result


def interleave(case: Case, args: argparse.Namespace, scale: Scale) -> None:
    """A round times everything once, with empty caches, in an order that turns."""
    flush = torch.empty(scale.copy // 4, device=args.device)
    order = list(case.calls)
    case.seconds = {name: [] for name in order}
    for turn in range(args.rounds):
        gc.collect()
        for name in order:
            if turn >= 3 and sum(case.seconds[name]) > args.budget:
                continue
            flush.zero_()
            with at_most(args.limit):
                case.seconds[name].append(seconds(lambda name=name: case.calls[name](*case.arguments), args.device))
        order = order[1:] + order[:1]


# ---------------------------------------------------------------- rows


def to_rows(case: Case, ceiling: tuple[float, float], shared: Row) -> list[Row]:
    """A row per implementation; `percent`: of the speed that the ceiling which limits the kernel allows."""
    bounds = {"GEMM": case.flops / ceiling[0], "bandwidth": case.bytes / ceiling[1]}
    limit = max(bounds, key=lambda name: bounds[name])
    sizes = " ".join("x".join(map(str, leaf.shape)) for leaf in case.arguments if isinstance(leaf, Tensor))
    rows = []
    for name in [name for name in IMPLEMENTATIONS if name in case.seconds or name in case.notes]:
        row: Row = dict.fromkeys(COLUMNS, "") | shared | percentiles(case.seconds.get(name, []))
        row |= dict(zip(KEY, (case.kernel, case.shape, case.dtype, name), strict=True))
        row |= {"arguments": sizes, "flops": case.flops, "bytes": case.bytes, "limit": limit if case.bytes else ""}
        row |= {"note": case.notes.get(name, "")}
        row |= {"ceiling_gflops": f"{ceiling[0] / 1e9:.4g}", "ceiling_gbytes": f"{ceiling[1] / 1e9:.4g}"}
        if name in case.errors:
            row["error"] = f"{case.errors[name]:.1e}"
        if row["median_ms"]:
            median = float(row["median_ms"]) / 1e3
            row["gflops"], row["gbytes"] = f"{case.flops / median / 1e9:.4g}", f"{case.bytes / median / 1e9:.4g}"
            row["percent"] = f"{100 * bounds[limit] / median:.1f}"
        rows.append(row)
    return rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser, rounds=20)
    add = parser.add_argument
    add("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS, metavar="NAME")
    add("--against", nargs="*", choices=IMPLEMENTATIONS[1:], help="default: all, but compiled under --quick")
    add("--dtypes", nargs="+", choices=DTYPES, help="default: float32, on CUDA bfloat16 and tf32 too")
    add("--budget", type=float, default=3, help="seconds after which an implementation gets no more rounds")
    add("--plot", type=Path, help="draw the roofline to this file")
    add("--quick", action="store_true", help="one small shape each, whether it runs, no figures")
    args = parser.parse_args()
    args.dtypes = args.dtypes or (["float32", "tf32", "bfloat16"] if args.device.type == "cuda" else ["float32"])
    if args.against is None:
        args.against = [name for name in IMPLEMENTATIONS[1:] if not (args.quick and name == "compiled")]
    args.rounds = min(args.rounds, 3) if args.quick else args.rounds
    return args


def run(args: argparse.Namespace) -> list[Row]:
    """Measure all that was asked for; the file is written after every shape."""
    set_up(args.device, args.threads)
    scale = QUICK if args.quick else SCALES[args.device.type]
    shared = machine(args.device, args.threads) | {"triton": version("triton") or "none"}
    path = args.out / f"{place(shared)}-kernels.csv"
    ceiling = {dtype: ceilings(scale, dtype, args.device) for dtype in args.dtypes}
    rows: list[Row] = []
    most = 1 if args.quick else None
    jobs = [(i, n, d) for n in args.kernels for i in range(len(KERNELS[n].layers[:most])) for d in args.dtypes]
    # The kernels' first layers before their second ones, so that no kernel is left out for want of time.
    jobs.sort(key=lambda job: job[0])
    with tqdm(jobs, dynamic_ncols=True, unit="shape") as progress:
        for index, name, dtype in within(progress, args.seconds):
            layer = KERNELS[name].layers[index]
            progress.set_postfix_str(f"{name} {layer.name} {dtype}")
            torch.compiler.reset()
            try:
                case = prepare(name, layer, dtype, ["fxcurv", *args.against], scale, args.device)
                with precision(dtype):
                    warm_up(case, args.limit, args.device)
                    interleave(case, args, scale)
            except Exception as error:  # a kernel's failure is a finding: the others are still measured
                case = Case(name, layer.name, dtype, (), 0, 0, {}, notes={"fxcurv": reason(error)})
            rows += to_rows(case, ceiling[dtype], shared)
            write(path, COLUMNS, rows, KEY[:1])
    print(f"\n{path}\n")
    return rows


def main() -> int:
    """Measure, print, draw; 1 where a kernel failed or differs from its definition."""
    args = arguments()
    rows = run(args)
    print_rows(rows, (*KEY, "arguments", *NUMBERS, "limit", "error", "note"), NUMBERS)
    if args.plot:
        importlib.import_module("plots").roofline(rows, args.plot)
    wrong = [row for row in rows if row["implementation"] == "fxcurv" and (row["note"] or not row["median_ms"])]
    for row in wrong:
        print("CHECK", row["kernel"], row["shape"], row["dtype"], row["note"])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
