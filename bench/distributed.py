"""Count what travels between the ranks of a mesh: ``python bench/distributed.py --processes 1 2 4``; nothing is timed.

For each model, set of quantities and wrapper, as the ops of a call say on the first of R gloo processes: how many sums over ranks
there are, their bytes, the least that sums need (each [*P] result once, of a symmetric factor a triangle), and the bytes of the
gradient alone. A ring sends 2 (R - 1) / R times these bytes from each rank; under "fsdp" sums of [*P] are reduce-scattered, which
is half of that, and parameters are gathered ("gathered": times (R - 1) / R). Shards are filled up to equal rows, which the ratio
shows. A gather of a few integers, by which ranks agree, comes on top, and a second one for shards.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import fxcurv
from fxcurv.extensions import KFAC, ClippedGrad, DiagGGNMC, Extension, SumGradSquared, Variance
from fxcurv.kronecker import Kronecker

COLUMNS = (
    "model",
    "quantities",
    "wrapper",
    "processes",
    "collectives",
    "bytes",
    "least",
    "ratio",
    "gradient",
    "gathered",
)
WRAPPERS = ("plain", "fsdp")


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def cnn() -> nn.Module:
    layers = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(800, 10))


MODELS = {"mlp": mlp, "cnn": cnn}
QUANTITIES: dict[str, list[Extension]] = {
    "gradient": [],
    "first order": [SumGradSquared(), Variance(), ClippedGrad(1.0)],
    "KFAC": [KFAC()],
    "all": [SumGradSquared(), Variance(), ClippedGrad(1.0), DiagGGNMC(), KFAC()],
}


@dataclass(frozen=True)
class Row:
    """What one call sends: collectives, their bytes, the least there could be, the gradient's bytes, and those of parameters."""

    model: str
    quantities: str
    wrapper: str
    processes: int
    collectives: int
    bytes: int
    least: int
    gradient: int
    gathered: int

    @property
    def ratio(self) -> float:
        """The bytes, relative to the least."""
        return self.bytes / self.least


class Wire(TorchDispatchMode):
    """Notes what collectives are given: the terms of sums, and parameters that are gathered, all ranks' together."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[int] = []
        self.gathered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        ops = torch.ops._c10d_functional
        if func in (ops.all_reduce.default, ops.reduce_scatter_tensor.default):
            self.sums.append(size(args[0]))
        if func is ops.all_gather_into_tensor.default:
            self.gathered += size(args[0]) * args[1]
        return func(*args, **(kwargs or {}))


def size(t: Tensor) -> int:
    """The bytes of a tensor; of a sharded one, of all of it."""
    return t.numel() * t.element_size()


def least(result: fxcurv.Result, asked: list[Extension]) -> int:
    """The bytes of results that no other result gives: a variance is made of two sums, of which the gradient is one."""
    total = size(result.loss)
    fields = ["grad", *(e.savefield for e in asked if not isinstance(e, Variance))]
    seen: list[Tensor] = []
    for value in (v for field in fields for v in getattr(result, field).values()):
        for t in value if isinstance(value, Kronecker) else [value]:  # a `DTensor` has the size of the whole
            if isinstance(value, Kronecker) and any(t.shape == s.shape and torch.equal(t, s) for s in seen):
                continue  # the factor of a layer's outputs is the weight's and the bias'
            seen += [t] if isinstance(value, Kronecker) else []
            triangle = isinstance(value, Kronecker) and t.ndim == 2
            total += size(t) // t.numel() * (len(t) * (len(t) + 1) // 2) if triangle else size(t)
    return total


def count(model: str, quantities: str, wrapper: str) -> Row:
    """What a call sends on this rank."""
    torch.manual_seed(0)
    asked, processes = QUANTITIES[quantities], dist.get_world_size()
    mesh, net = init_device_mesh("cpu", (processes,)), MODELS[model]()
    if wrapper == "fsdp":
        for layer in net.children():
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    compiled = fxcurv.compile(net, nn.CrossEntropyLoss(), asked, mesh=mesh, check=None)
    x, y = torch.randn(16, 1, 28, 28), torch.randint(10, (16,))
    compiled(x, y, seed=0)
    with Wire() as wire:
        result = compiled(x, y, seed=0)
    sent, gradient = sum(wire.sums), sum(map(size, result.grad.values()))
    return Row(
        model, quantities, wrapper, processes, len(wire.sums), sent, least(result, asked), gradient, wire.gathered
    )


def on_rank(rank: int, processes: int, folder: str, args: argparse.Namespace) -> None:
    """Count, and let the first rank write the rows."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store_{processes}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    rows = [count(m, q, w) for m in args.models for q in args.quantities for w in args.wrappers]
    dist.destroy_process_group()
    if rank == 0:
        torch.save(rows, Path(folder) / f"rows_{processes}")


def main() -> None:
    """Count, and print and write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--quantities", nargs="+", choices=QUANTITIES, default=list(QUANTITIES))
    parser.add_argument("--wrappers", nargs="+", choices=WRAPPERS, default=["plain"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1])
    parser.add_argument("--out", type=Path, help="a CSV file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows: list[Row] = []
        for processes in args.processes:
            torch.multiprocessing.spawn(on_rank, (processes, folder, args), processes)
            rows += torch.load(Path(folder) / f"rows_{processes}", weights_only=False)
    table = [[str(getattr(row, c)) if c != "ratio" else f"{row.ratio:.4f}" for c in COLUMNS] for row in rows]
    for line in [list(COLUMNS), *table]:
        print("  ".join(cell.rjust(12) for cell in line))
    if args.out is not None:
        with args.out.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *table])
    sys.exit(any(row.ratio > 1.05 for row in rows))


if __name__ == "__main__":
    main()
