"""One training on several processes
=================================

`torchrun --nproc-per-node=4 examples/train_distributed.py`: every process has a part of each batch, and every step is that of one
process on the whole batch: the same losses for 1, 2 and 4 processes, to rounding.

The step divides the gradient by a sampled diagonal of the Gauss-Newton and by the noise of the gradient, from its variance,
which is no mean of the processes' variances. Parts are of unequal sizes on purpose.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import data
import torch
import torch.distributed as dist
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fxcurv
from fxcurv.extensions import DiagGGNMC, Variance

STEP_SIZE, DAMPING = 0.1, 1.0


def part(t: Tensor, rank: int, count: int) -> Tensor:
    """This process' samples: the last one has more than the others."""
    size = len(t) // (count + 1) if count > 1 else len(t)
    return t[rank * size :] if rank == count - 1 else t[rank * size : (rank + 1) * size]


def train(x: Tensor, y: Tensor, steps: int, size: int) -> list[float]:
    """The loss of every batch before its step."""
    count, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    mesh = init_device_mesh("cpu", (count,), mesh_dim_names=("dp",))
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagGGNMC(mc_samples=1), Variance()], mesh=mesh)
    losses = []
    for step, (images, labels) in zip(range(steps), data.batches(x, y, size), strict=False):
        result = compiled(part(images, rank, count), part(labels, rank, count), seed=step)
        losses.append(float(result.loss))
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = size * result.variance[name].sqrt()
                p -= STEP_SIZE * result.grad[name] / (result.diag_ggn_mc[name] + noise + DAMPING)
    return losses


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the losses; without torchrun, on one process."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    data.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--figure", type=Path, default=Path("train_distributed.png"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        alone = {} if "RANK" in os.environ else {"init_method": f"file://{folder}/store", "rank": 0, "world_size": 1}
        dist.init_process_group("gloo", **alone)
        x, y = data.load(args)
        losses = train(x.double(), y, args.steps, args.batch_size)
        count, rank = dist.get_world_size(), dist.get_rank()
        dist.destroy_process_group()
    if rank == 0:
        print(f"{count} processes, a loss every {max(1, args.steps // 8)} steps")
        print(" ".join(f"{loss:.10f}" for loss in losses[:: max(1, args.steps // 8)]))
        figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
        axes.plot(losses)
        axes.set(title=f"{count} processes", xlabel="step", ylabel="loss of the batch")
        figure.savefig(args.figure)


if __name__ == "__main__":
    main()
