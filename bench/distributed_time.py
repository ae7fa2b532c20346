"""Time a step on two gloo processes against plain DDP's: ``python bench/distributed_time.py``, which takes two minutes at most.

Each process has a part of the batch of its own, and one thread. In the same processes, in turns: the forward and backward pass
of `DistributedDataParallel`, and a call of fxcurv under `mesh=` for each set of quantities. A round is a few steps of each, in an
order that turns by one from round to round, between barriers; its time is that of the slower process. A row is the median over
rounds of what fxcurv takes relative to DDP's step of the same round, and the quartiles, which say how quiet the machine was.
The exit status is 1 where a ratio is above its goal.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from distributed import MODELS, QUANTITIES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fxcurv

PROCESSES = 2
GOALS = {"gradient": 1.05, "first order": 1.15}
ROUNDS = range(5, 201)
STEPS = 3


@dataclass(frozen=True)
class Row:
    """What a step takes, in milliseconds, relative to DDP's; `low` and `high`: quartiles of the ratio."""

    model: str
    quantities: str
    batch: int
    rounds: int
    ddp_ms: float
    ms: float
    ratio: float
    low: float
    high: float
    goal: float


def steps_of(model: str, batch: int) -> dict[str, Callable[[], object]]:
    """A step of DDP, and one for each set of quantities, on equal models and the same samples of this process."""
    torch.manual_seed(0)
    net, loss, mesh = MODELS[model](), nn.CrossEntropyLoss(), init_device_mesh("cpu", (PROCESSES,))
    torch.manual_seed(1 + dist.get_rank())
    x, y = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))
    wrapped = DistributedDataParallel(copy.deepcopy(net))

    def ddp() -> None:
        wrapped.zero_grad()
        loss(wrapped(x), y).backward()

    found: dict[str, Callable[[], object]] = {"ddp": ddp}
    for quantities in GOALS:
        compiled = fxcurv.compile(net, loss, QUANTITIES[quantities], mesh=mesh, check=None)
        found[quantities] = lambda compiled=compiled: compiled(x, y, seed=0)  # type: ignore[misc]
    return found


def timed(step: Callable[[], object], count: int) -> float:
    """Seconds of a step, on the slower process."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(count):
        step()
    seconds = torch.tensor((time.perf_counter() - start) / count)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def measured(model: str, batch: int, seconds: float) -> list[Row]:
    """The rows of a model, from as many rounds as fit into so many seconds."""
    steps = steps_of(model, batch)
    for step in steps.values():
        timed(step, 2)
    once = sum(timed(step, STEPS) for step in steps.values()) * STEPS
    rounds = min(max(int(seconds / once), ROUNDS[0]), ROUNDS[-1])
    names, taken = list(steps), {name: list[float]() for name in steps}
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            taken[name].append(timed(steps[name], STEPS))
    return [_row(model, name, batch, taken) for name in GOALS]


def _row(model: str, name: str, batch: int, taken: dict[str, list[float]]) -> Row:
    ratios = [ours / theirs for ours, theirs in zip(taken[name], taken["ddp"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    ddp, ms = (1000 * statistics.median(taken[key]) for key in ("ddp", name))
    return Row(model, name, batch, len(ratios), *(round(v, 3) for v in (ddp, ms, middle, low, high)), GOALS[name])


def on_rank(rank: int, folder: str, args: argparse.Namespace) -> None:
    """Measure, and let the first rank write the rows."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    rows = [row for model in args.models for row in measured(model, args.batch, args.seconds / len(args.models))]
    dist.destroy_process_group()
    if rank == 0:
        torch.save(rows, Path(folder) / "rows")


def main() -> None:
    """Measure, and print and write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, default=64, help="samples of each process")
    parser.add_argument("--seconds", type=float, default=80, help="of all measurements, beside start and compilation")
    parser.add_argument("--out", type=Path, help="a CSV file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_rank, (folder, args), PROCESSES)
        rows: list[Row] = torch.load(Path(folder) / "rows", weights_only=False)
    columns = [f.name for f in fields(Row)]
    table = [[str(value) for value in astuple(row)] for row in rows]
    for line in [columns, *table]:
        print("  ".join(cell.rjust(11) for cell in line))
    if args.out is not None:
        with args.out.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *table])
    sys.exit(any(row.ratio > row.goal for row in rows))


if __name__ == "__main__":
    main()
