"""Hold the choice of `select` against what candidates take: ``python bench/selection.py``; see ``bench/README.md``."""

import argparse
import gc
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_cases import CONVOLUTIONS, Layer
from kernels import seconds
from measure import Row, add_common, at_most, machine, percentiles, place, print_rows, reason, set_up, within, write
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from tqdm import tqdm

import fxcurv.cost
from fxcurv.contractions.candidates import TOGETHER
from fxcurv.contractions.contract import Spec
from fxcurv.contractions.factors import Arrange, Conv, Dense, Factor
from fxcurv.contractions.sizes import dims
from fxcurv.cost import Cost, Machine
from fxcurv.ir.placement import Shard
from fxcurv.passes.select import ranked

SPECS = (Spec(2, "vn"), Spec(2, "vp"), Spec(2, "v"), Spec(1, "v"))
# Several reductions of one P: by one op, or each by its own candidate.
SETS = tuple(
    tuple(Spec(*kind) for kind in kinds) for k in (2, 3) for kinds in itertools.combinations(TOGETHER.kinds, k)
)
POSITIONS, SIZES, COLUMNS = (1, 4, 16, 64, 256, 1024, 4096), (8, 64, 512, 4096), (1, 10)
# The choice is good if it takes at most this, of what the fastest takes; and how many have to be.
NEAR, SHARE = 1.2, 0.9
# A candidate may need more than the cheapest one, or there would be little to choose; how much more is still measured.
WORST = 16

KEY = ("constants",)
NUMBERS = ("V", "N", "S", "O", "I", "predicted_ms", "median_ms", "ratio", "p10_ms", "p90_ms", "rounds")
COLUMNS_OF_FILE = (
    *(
        "layer",
        "V",
        "N",
        "S",
        "O",
        "I",
        "reduction",
        "candidate",
        "predicted_ms",
        "median_ms",
        "ratio",
        "chosen",
        "fastest",
    ),
    *(
        "p10_ms",
        "p90_ms",
        "rounds",
        "constants",
        "note",
        "device",
        "threads",
        "cpu",
        "cores",
        "torch",
        "fxcurv",
        "date",
    ),
)
Run = Callable[[list[Factor]], Any]


@dataclass
class Case:
    """Ways to compute one thing, in the order of their predicted times: the first is what `select` takes.

    Attributes:
        shape: V, N, S, O, I.
        make: A sampler of tensors -> the factors.
        ways: Name -> predicted cost and what computes it.
    """

    layer: str
    reduction: str
    shape: dict[str, int]
    make: Callable[[Callable[..., Tensor]], list[Factor]]
    ways: dict[str, tuple[Cost, Run]]


# ---------------------------------------------------------------- cases


def linear(layer: Layer, n: int, make: Callable[..., Tensor]) -> list[Factor]:
    """The use of a linear layer at S positions."""
    core = (1, layer.outputs, layer.inputs)
    shape = (layer.outputs, layer.inputs)
    a, g = make(n, layer.s, 1, layer.inputs), make(layer.columns, n, layer.s, 1, layer.outputs)
    return [Dense(a, g, Arrange(core, (0, 1, 2), shape))]


def convolution(layer: Layer, n: int, make: Callable[..., Tensor]) -> list[Factor]:
    """The use of a convolution of images."""
    geometry = [tuple(sizes) for sizes in layer.geometry]
    a = make(n, layer.inputs, layer.side, layer.side)
    g = make(layer.columns, n, layer.outputs, layer.out, layer.out)
    weight = (layer.outputs, layer.inputs, *geometry[0])
    return [Conv(a, g, Shard(0), *geometry, 1, False, (0, 0), weight)]


def layers(quick: bool) -> list[Layer]:
    """The grid of linear layers, and convolutions of real networks, each with all numbers of columns."""
    if quick:
        small = Layer("convolution", 2, 4, 8, side=6, kernel=3)
        return [small, *(Layer("linear", 4, 8, 8, s, columns=v) for s, v in ((1, 2), (16, 2), (16, 1)))]
    grid = itertools.product(POSITIONS, SIZES, SIZES, COLUMNS)
    found = [Layer("linear", 64, i, o, s, columns=v) for s, o, i, v in grid]
    return found + [replace(c, columns=v) for c in CONVOLUTIONS for v in COLUMNS]


def ways(specs: tuple[Spec, ...], factors: list[Factor], constants: Machine) -> dict[str, tuple[Cost, Run]]:
    """Of one reduction the candidates; of several the one op for all, and the best candidates one after another."""
    if len(specs) == 1:
        return {c.name: (cost, partial(alone, c.run, specs[0])) for c, cost in ranked(specs[0], factors, constants)}
    if not TOGETHER.applies(specs, factors):
        return {}
    apart = [ranked(spec, factors, constants)[0] for spec in specs]
    total = sum((cost for _, cost in apart[1:]), apart[0][1])
    runs = tuple(partial(alone, c.run, spec) for (c, _), spec in zip(apart, specs, strict=True))
    found = {
        "apart": (total, partial(each, runs)),
        "together": (TOGETHER.cost(specs, factors), partial(TOGETHER.run, specs)),
    }
    return dict(sorted(found.items(), key=lambda way: way[1][0].seconds(constants)))


def alone(run: Callable[..., Tensor], spec: Spec, factors: list[Factor]) -> Tensor:
    """One candidate, without weights."""
    return run(spec, factors, None)


def each(runs: tuple[Run, ...], factors: list[Factor]) -> list[Any]:
    """Several, one after another."""
    return [run(factors) for run in runs]


def case_of(layer: Layer, specs: tuple[Spec, ...], args: argparse.Namespace) -> Case | str:
    """The case at the largest batch within the limits, or why there is none."""
    use = convolution if layer.side else linear
    n = layer.batch
    while True:
        factors = use(layer, n, partial(torch.empty, device="meta"))
        found = ways(specs, factors, args.constants)
        if len(found) < 2:
            return "nothing to choose"
        operations = [cost.flops for cost, _ in found.values()]
        memory = dims(factors[0]).inputs + max(cost.fresh for cost, _ in found.values())
        if min(operations) <= args.flops and max(operations) <= WORST * args.flops and memory <= args.bytes:
            break
        if n == 1:
            return "beyond the limits at one sample"
        n //= 2
    d = dims(factors[0])
    shape = {"V": d.v, "N": d.n, "S": d.s, "O": d.o, "I": d.i}
    name = "+".join(f"{spec.power}{spec.reduce}" for spec in specs)
    return Case(layer.name, name, shape, partial(use, layer, n), found)


# ---------------------------------------------------------------- measuring


def emitted(run: Run, factors: list[Factor]) -> Callable[..., Any]:
    """The nodes that `select` emits for it, a function of the factors' tensors."""
    leaves, tree = pytree.tree_flatten(factors)
    graph = make_fx(lambda *tensors: run(pytree.tree_unflatten(list(tensors), tree)), tracing_mode="fake")(*leaves)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def measure(case: Case, args: argparse.Namespace) -> list[Row]:
    """A row per candidate: after two calls to warm up, rounds that call each once, in an order that turns."""
    torch.manual_seed(0)
    factors = case.make(partial(torch.randn, device=args.device))
    tensors = pytree.tree_leaves(factors)
    took: dict[str, list[float]] = {name: [] for name in case.ways}
    calls, notes = {}, dict.fromkeys(case.ways, "")
    for name, (_, run) in case.ways.items():
        try:
            with at_most(args.limit):
                calls[name] = emitted(run, factors)
                for _ in range(2):
                    seconds(partial(calls[name], *tensors), args.device)
        except Exception as error:  # a candidate's failure is a finding: the others are still measured
            calls.pop(name, None)
            notes[name] = reason(error)
    order = list(calls)
    gc.collect()
    for turn in range(args.rounds):
        for name in order:
            if turn < 3 or sum(took[name]) < args.budget:
                took[name].append(seconds(partial(calls[name], *tensors), args.device))
        order = order[1:] + order[:1]
    return to_rows(case, took, notes, args.constants)


def to_rows(case: Case, took: dict[str, list[float]], notes: dict[str, str], constants: Machine) -> list[Row]:
    """The rows of a case; `ratio`: of a candidate's median to the fastest one's."""
    found = {name: percentiles(each) for name, each in took.items()}
    medians = {name: float(row["median_ms"]) for name, row in found.items() if row["rounds"]}
    fastest, chosen = min(medians, key=lambda name: medians[name], default=""), next(iter(case.ways))
    rows = []
    for name, (cost, _) in case.ways.items():
        row: Row = {"layer": case.layer, **case.shape, "reduction": case.reduction, "candidate": name, **found[name]}
        row["predicted_ms"] = f"{1e3 * cost.seconds(constants):.4g}"
        row["ratio"] = f"{medians[name] / medians[fastest]:.4g}" if name in medians else ""
        row |= {"chosen": name == chosen, "fastest": name == fastest, "note": notes[name]}
        rows.append(row)
    return rows


# ---------------------------------------------------------------- rows


def summary(rows: list[Row]) -> list[Row]:
    """Per reduction, and for all: how many choices there were, and the share of them that were near the fastest."""
    chosen = [row for row in rows if row["chosen"]]
    table = []
    for name in (*dict.fromkeys(row["reduction"] for row in chosen), "all"):
        ratios = [float(row["ratio"] or "inf") for row in chosen if name in (row["reduction"], "all")]
        near = sum(ratio <= NEAR for ratio in ratios) / len(ratios)
        table.append({"reduction": name, "cases": len(ratios), "share": f"{near:.3f}", "worst": f"{max(ratios):.4g}"})
    return sorted(table, key=lambda row: (row["reduction"] == "all", len(row["reduction"])))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser, rounds=7)
    add = parser.add_argument
    add(
        "--flops",
        type=float,
        default=2**31,
        help="operations of the cheapest candidate: the batch is halved until then",
    )
    add("--bytes", type=float, default=2**29, help="the same for what any candidate allocates, and the factors")
    add("--budget", type=float, default=0.5, help="seconds after which a candidate gets no more rounds")
    add("--calibrate", action="store_true", help="choose by measured constants, not by the defaults")
    add("--quick", action="store_true", help="a few tiny shapes: whether it runs, no figures")
    args = parser.parse_args()
    args.rounds = min(args.rounds, 3) if args.quick else args.rounds
    return args


def run(args: argparse.Namespace) -> list[Row]:
    """Measure all cases, in random order so that a part of them is a fair sample."""
    set_up(args.device, args.threads)
    kind = args.device.type
    args.constants = fxcurv.cost.calibrate(kind) if args.calibrate else fxcurv.cost.machine(args.device)
    shared = machine(args.device, args.threads) | {"constants": "measured" if args.calibrate else "defaults"}
    path: Path = args.out / f"{place(shared)}-selection.csv"
    left: dict[str, int] = {}
    jobs: list[Case] = []
    for layer, specs in itertools.product(layers(args.quick), (*((spec,) for spec in SPECS), *SETS)):
        case = case_of(layer, specs, args)
        if isinstance(case, Case):
            jobs.append(case)
        else:
            left[case] = left.get(case, 0) + 1
    random.Random(0).shuffle(jobs)
    rows: list[Row] = []
    with torch.no_grad(), tqdm(jobs, dynamic_ncols=True, unit="case") as progress:
        for index, case in enumerate(within(progress, args.seconds)):
            progress.set_postfix_str(f"{case.layer} {case.reduction} {case.shape}")
            rows += [{**shared, **row} for row in measure(case, args)]
            if index % 50 == 0:
                write(path, COLUMNS_OF_FILE, rows, KEY)
    write(path, COLUMNS_OF_FILE, rows, KEY)
    for why, count in left.items():
        print(f"no case: {count} of {len(jobs) + sum(left.values())}, {why}")
    print(f"\n{path}\n")
    return rows


def main() -> int:
    """Measure and print; 1 where a candidate failed, or too few choices are near the fastest."""
    args = arguments()
    rows = run(args)
    far = sorted((row for row in rows if row["chosen"] and row["ratio"]), key=lambda row: -float(row["ratio"]))
    shown = ("reduction", "layer", "V", "N", "S", "O", "I", "candidate", "predicted_ms", "median_ms", "ratio")
    print("the worst choices, each above the fastest candidate")
    worst = []
    for row in far[:10]:
        same = [r for r in rows if r["fastest"] and all(r[k] == row[k] for k in shown[:7])]
        worst += [row, *(r for r in same if r is not row)]
    print_rows(worst, shown, NUMBERS)
    print(f"\nshare of the choices within {NEAR} of the fastest")
    table = summary(rows)
    print_rows(table, ("reduction", "cases", "share", "worst"), ("cases", "share", "worst"))
    failed = [row for row in rows if row["note"]]
    for row in failed:
        print("CHECK", row["layer"], row["reduction"], row["candidate"], row["note"])
    enough = bool(table) and float(table[-1]["share"]) >= SHARE
    if not enough and not args.quick:
        print(f"CHECK fewer than {SHARE:.0%} of the choices are within {NEAR} of the fastest")
    return 1 if failed or not (enough or args.quick) else 0


if __name__ == "__main__":
    sys.exit(main())
