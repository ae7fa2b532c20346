"""Measure how cost grows with batch, classes, width, depth and length: ``python bench/scaling.py``; see ``bench/README.md``."""

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peers
import torch
from cases import QUANTITIES, Problem
from measure import Entry, Row, add_common, machine, percentiles, place, print_rows, set_up, write
from models import gpt2
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

AXES = ("N", "V", "width", "depth", "T")
Powers = tuple[int, int, int, int, int]  # of the axes
NUMBERS = ("median_ms", "p10_ms", "p90_ms", "peak_mib", "gflop")
COLUMNS = (
    *("net", "quantity", "axis", *AXES, *NUMBERS, "expected_gflop", "expected_peak", "rounds", "note"),
    *("device", "threads", "cpu", "cores", "torch", "fxcurv", "date"),
)


@dataclass(frozen=True)
class Growth:
    """The highest powers of N, V, width, depth and T in a quantity's operations and in its peak of memory."""

    flops: Powers
    peak: Powers


# One column (or a sampled one) goes down the network, whose layers are products with [width, width] matrices; attention is T by T
# in its operations, but not in memory.
ONE = Growth(flops=(1, 0, 2, 1, 2), peak=(1, 0, 2, 1, 1))
# V columns go down, and a stack of them stands.
ALL = Growth(flops=(1, 1, 2, 1, 2), peak=(1, 1, 2, 1, 1))
# Besides, every unit's own column from its activation's curvature, to all layers below it.
UNITS = Growth(flops=(1, 1, 3, 2, 2), peak=(1, 1, 2, 1, 1))
# Each parameter's block alone, forward and back between it and the loss.
BLOCKS = Growth(flops=(1, 0, 2, 2, 2), peak=(1, 0, 2, 1, 1))
GROWTH = {
    **dict.fromkeys(("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"), ONE),
    **dict.fromkeys(("DiagGGNExact", "BatchDiagGGNExact", "KFLR", "SqrtGGNExact"), ALL),
    **dict.fromkeys(("DiagGGNMC", "BatchDiagGGNMC", "KFAC", "SqrtGGNMC"), ONE),
    # A matrix [width, width] goes down.
    "KFRA": Growth(flops=(1, 0, 3, 1, 2), peak=(1, 0, 2, 1, 1)),
    **dict.fromkeys(("DiagHessian", "BatchDiagHessian"), UNITS),
    **dict.fromkeys(("HMP", "GGNMP", "PCHMP"), BLOCKS),
}


@dataclass(frozen=True)
class Net:
    """A network of one width.

    Attributes:
        build: (N, V, width, depth, T) -> model and batch.
        base: The sizes at which the axes meet.
        growth: Of quantities that grow otherwise in this network; None: not measured.
        axes: Those along which it is measured.
    """

    build: Callable[[int, int, int, int, int], tuple[nn.Module, Tensor, Tensor]]
    base: tuple[int, int, int, int, int]
    growth: dict[str, Growth | None]
    axes: tuple[str, ...] = AXES[:-1]


def mlp(n: int, v: int, width: int, depth: int, _: int) -> tuple[nn.Module, Tensor, Tensor]:
    """`depth` hidden layers with tanh, whose second derivative is not zero."""
    modules: list[nn.Module] = []
    for index in range(depth):
        modules += [nn.Linear(width if index else 64, width), nn.Tanh()]
    return nn.Sequential(*modules, nn.Linear(width, v)), torch.randn(n, 64), torch.randint(v, (n,))


def cnn(n: int, v: int, width: int, depth: int, _: int) -> tuple[nn.Module, Tensor, Tensor]:
    """`depth` convolutions 3x3 with ReLU on images [3, 16, 16], their mean over positions, a linear layer."""
    modules: list[nn.Module] = []
    for index in range(depth):
        modules += [nn.Conv2d(width if index else 3, width, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*modules, nn.AvgPool2d(16), nn.Flatten(), nn.Linear(width, v))
    return model, torch.rand(n, 3, 16, 16), torch.randint(v, (n,))


def decoder(n: int, v: int, width: int, depth: int, t: int) -> tuple[nn.Module, Tensor, Tensor]:
    """`depth` blocks of causal attention and a perceptron on `t` tokens, the head tied to the embedding."""
    return gpt2(v, t, width, depth, heads=4, t=t, batch=n)


NETS = {
    "mlp": Net(mlp, (32, 8, 128, 4, 1), {}),
    # KFRA's matrix would be of all pixels; ReLU has no curvature.
    "cnn": Net(cnn, (16, 8, 16, 4, 1), {"KFRA": None, "DiagHessian": ALL, "BatchDiagHessian": ALL}),
    # What carries all of V T columns, and what looks inside attention, is not measured.
    "decoder": Net(decoder, (1, 256, 128, 4, 1024), {q: None for q, g in GROWTH.items() if g is not ONE}, ("T",)),
}
QUICK = (4, 4, 8, 2, 4)


def measure(net: Net, quantity: str, sizes: tuple[int, ...], args: argparse.Namespace) -> Row:
    """Time, peak and operations of one call of the compiled quantity, and of a product where it gives one."""

    def build() -> tuple[nn.Module, Tensor, Tensor]:
        model, x, y = net.build(*sizes)
        return model.to(args.device), x.to(args.device), y.to(args.device)

    entry = Entry("fxcurv", args.device)
    entry.prepare(partial(peers.fxcurv, Problem("", build), QUANTITIES[quantity]), args.limit, compare=False)
    row: Row = {"gflop": "", "peak_mib": ""}
    if entry.implementation is not None:
        try:
            with FlopCounterMode(display=False) as counter:
                entry.implementation.call()
            row |= {"gflop": f"{counter.get_total_flops() / 1e9:.6g}", "peak_mib": f"{entry.peak:.4g}"}
        except Exception as error:
            entry.fail(error)
    for turn in range(args.rounds):
        if turn < 3 or sum(entry.seconds) < args.budget:
            entry.time(args.limit)
    return row | percentiles(entry.seconds) | {"note": entry.note}


def points(base: tuple[int, ...], axes: tuple[str, ...], quick: bool) -> list[tuple[str, tuple[int, ...]]]:
    """(axis, sizes): along each axis the base times powers of two, from a quarter to four times."""
    factors = (1, 2) if quick else (0.25, 0.5, 1, 2, 4)
    return [
        (axis, tuple(int(size * factor) if name == axis else size for name, size in zip(AXES, base, strict=True)))
        for axis in axes
        for factor in factors
    ]


def slopes(rows: list[Row]) -> list[Row]:
    """Per network, quantity and axis: the powers seen over the last doubling, and those expected."""
    found = []
    for key in dict.fromkeys((row["net"], row["quantity"], row["axis"]) for row in rows):
        line = [row for row in rows if (row["net"], row["quantity"], row["axis"]) == key and not row["note"]]
        summary: Row = dict(zip(("net", "quantity", "axis"), key, strict=True))
        for name in ("median_ms", "gflop", "peak_mib"):
            last = [float(row[name]) for row in line if row[name]][-2:]
            summary[name] = f"{math.log2(last[1] / last[0]):.2f}" if len(last) == 2 and min(last) > 0 else ""
        found.append(summary | {name: line[-1][name] if line else "" for name in ("expected_gflop", "expected_peak")})
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser, rounds=7)
    add = parser.add_argument
    add("--nets", nargs="+", default=list(NETS), choices=NETS)
    add("--quantities", nargs="+", default=list(GROWTH), choices=GROWTH, metavar="NAME")
    add("--budget", type=float, default=2, help="seconds after which a point gets no more rounds")
    add("--plot", type=Path, help="picture, with the network's name before the suffix (default: beside the CSV file)")
    add("--quick", action="store_true", help="tiny networks, two points an axis: whether it runs, no figures")
    args = parser.parse_args()
    args.rounds = min(args.rounds, 3) if args.quick else args.rounds
    return args


def run(args: argparse.Namespace) -> tuple[list[Row], Path]:
    """Measure all points; the file is written after every quantity."""
    set_up(args.device, args.threads)
    shared = machine(args.device, args.threads)
    path = args.out / f"{place(shared)}-scaling.csv"
    rows: list[Row] = []
    jobs = [(name, quantity) for name in args.nets for quantity in args.quantities]
    jobs = [(name, quantity) for name, quantity in jobs if NETS[name].growth.get(quantity, ONE) is not None]
    count = sum(len(points(QUICK, NETS[name].axes, args.quick)) for name, _ in jobs)
    with tqdm(total=count, dynamic_ncols=True, unit="point") as progress:
        for name, quantity in jobs:
            net, seen = NETS[name], {}
            growth = net.growth.get(quantity) or GROWTH[quantity]
            for axis, sizes in points(QUICK if args.quick else net.base, net.axes, args.quick):
                progress.set_postfix_str(f"{name} {quantity} {axis} {sizes}")
                if sizes not in seen:
                    seen[sizes] = measure(net, quantity, sizes, args)
                place_of = AXES.index(axis)
                expected = {"expected_gflop": growth.flops[place_of], "expected_peak": growth.peak[place_of]}
                own = {"net": name, "quantity": quantity, "axis": axis, **dict(zip(AXES, sizes, strict=True))}
                rows.append({**shared, **own, **expected, **seen[sizes]})
                progress.update()
            write(path, COLUMNS, rows, ("net", "quantity"))
    print(f"\n{path}\n")
    return rows, path


def main() -> int:
    """Measure, print the powers, draw; 1 where a quantity failed or its operations grow faster than they must."""
    args = arguments()
    rows, path = run(args)
    table = slopes(rows)
    seen = ("median_ms", "gflop", "peak_mib")
    print("powers over the last doubling: of time, operations, peak; and the highest expected of the last two")
    print_rows(table, ("net", "quantity", "axis", *seen, "expected_gflop", "expected_peak"), seen)
    plot = args.plot or path.with_suffix(".png")
    for net in args.nets:
        own = [row for row in rows if row["net"] == net]
        importlib.import_module("plots").scaling(own, NETS[net].axes, plot.with_name(f"{plot.stem}-{net}{plot.suffix}"))
    failures = [f"{row['net']} {row['quantity']} {row['axis']}: {row['note']}" for row in rows if row["note"]]
    # Terms that the leading one outgrows still weigh (depth - 1 layers for depth), and more in tiny networks.
    failures += [
        f"{row['net']} {row['quantity']}: operations grow with {row['axis']} to the power {row['gflop']}"
        for row in table
        if row["gflop"] and float(row["gflop"]) > row["expected_gflop"] + (0.3 if args.quick else 0.15)
    ]
    for failure in failures:
        print("CHECK", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
