"""Count what travels between the ranks of a mesh: ``python bench/distributed.py``; nothing is timed.

For each model and set of quantities: collectives of a call, their bytes, the least that sums need (each [*P] result once, of a
symmetric factor a triangle), and the bytes of the gradient alone. A ring sends 2 (R - 1) / R times these bytes from each of R
ranks. Two gathers of a few integers, by which ranks agree, come on top.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fxcurv
from fxcurv.extensions import KFAC, ClippedGrad, DiagGGNMC, Extension, SumGradSquared, Variance
from fxcurv.kronecker import Kronecker
from fxcurv.passes.distribute import collectives

COLUMNS = ("model", "quantities", "collectives", "bytes", "least", "ratio", "gradient")


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
    """What one program sends: collectives, their bytes, the least there could be, and the gradient's bytes."""

    model: str
    quantities: str
    collectives: int
    bytes: int
    least: int
    gradient: int

    @property
    def ratio(self) -> float:
        """The bytes, relative to the least."""
        return self.bytes / self.least


def size(t: Tensor) -> int:
    return t.numel() * t.element_size()


def least(result: fxcurv.Result, asked: list[Extension]) -> int:
    """The bytes of results that no other result gives: a variance is made of two sums, of which the gradient is one."""
    total = size(result.loss)
    fields = ["grad", *(e.savefield for e in asked if not isinstance(e, Variance))]
    seen: list[Tensor] = []
    for value in (v for field in fields for v in getattr(result, field).values()):
        for t in value if isinstance(value, Kronecker) else [value]:
            if isinstance(value, Kronecker) and any(t.shape == s.shape and torch.equal(t, s) for s in seen):
                continue  # the factor of a layer's outputs is the weight's and the bias'
            seen += [t] if isinstance(value, Kronecker) else []
            triangle = isinstance(value, Kronecker) and t.ndim == 2
            total += size(t) // t.numel() * (len(t) * (len(t) + 1) // 2) if triangle else size(t)
    return total


def count(model: str, quantities: str) -> Row:
    """What a call sends: the same whatever the number of ranks, so that one is enough to count."""
    torch.manual_seed(0)
    asked = QUANTITIES[quantities]
    compiled = fxcurv.compile(
        MODELS[model](), nn.CrossEntropyLoss(), asked, mesh=init_device_mesh("cpu", (1,)), check=None
    )
    x, y = torch.randn(16, 1, 28, 28), torch.randint(10, (16,))
    result = compiled(x, y, seed=0)
    sums = collectives(compiled.lower(x, y).graph_module)
    sent = sum(t.numel() * t.element_size() for t in sums)
    return Row(model, quantities, len(sums), sent, least(result, asked), sum(map(size, result.grad.values())))


def main() -> None:
    """Count, and print and write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--quantities", nargs="+", choices=QUANTITIES, default=list(QUANTITIES))
    parser.add_argument("--out", type=Path, help="a CSV file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        rows = [count(model, quantities) for model in args.models for quantities in args.quantities]
        dist.destroy_process_group()
    table = [[str(getattr(row, c)) if c != "ratio" else f"{row.ratio:.4f}" for c in COLUMNS] for row in rows]
    for line in [list(COLUMNS), *table]:
        print("  ".join(cell.rjust(12) for cell in line))
    if args.out is not None:
        with args.out.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *table])
    sys.exit(any(row.ratio > 1.05 for row in rows))


if __name__ == "__main__":
    main()
