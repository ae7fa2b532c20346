"""A training step under torch.compile
===================================

One training, three ways to run it: in eager, with the whole step under `torch.compile`, and with `backend="inductor"`.

All three start from the same parameters, see the same batches and draw the same samples; the last batch of an epoch is
smaller. Printed are the time of the first step (which compiles), the median of the later ones, and the first step whose
loss differs from eager's by more than rounding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import data
import torch
from diag_ggn_optimizer import cnn
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import DiagGGNMC

STEP_SIZE, DAMPING = 0.05, 1.0
TOLERANCE = 1e-4  # relative, of a step's loss
Step = Callable[[Tensor, Tensor, Tensor], Tensor]
Run = tuple[list[float], list[float]]  # per step: loss, seconds


def training_step(backend: str = "eager") -> Step:
    """A step, (images, labels, seed) -> loss, of a model that is the same at every call."""
    model = cnn()
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagGGNMC(mc_samples=1)], backend=backend)

    def step(x: Tensor, y: Tensor, seed: Tensor) -> Tensor:
        result = compiled(x, y, seed=seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= STEP_SIZE * result.grad[name] / (result.diag_ggn_mc[name] + DAMPING)
        return result.loss

    return step


WAYS: dict[str, Callable[[str], Step]] = {
    "eager": lambda backend: training_step(),
    "compiled step": lambda backend: torch.compile(training_step(), fullgraph=True, backend=backend),
    "backend=": lambda backend: training_step(backend),
}


def train(step: Step, x: Tensor, y: Tensor, steps: int, size: int) -> Run:
    """Losses and seconds of `steps` steps, over the images again and again, the last batch of an epoch smaller."""
    losses, seconds = [], []
    starts = [start for start in range(0, len(x), size)]
    for k in range(steps):
        start = starts[k % len(starts)]
        batch = x[start : start + size], y[start : start + size]
        for t in batch:
            torch._dynamo.maybe_mark_dynamic(t, 0)  # one program for all batch sizes
        began = time.perf_counter()
        losses.append(float(step(*batch, torch.tensor(k))))
        seconds.append(time.perf_counter() - began)
    return losses, seconds


def divergence(ours: Sequence[float], expected: Sequence[float]) -> int | None:
    """The first step whose loss is not eager's."""
    pairs = enumerate(zip(ours, expected, strict=True))
    return next((k for k, (a, b) in pairs if abs(a - b) > TOLERANCE * abs(b)), None)


def draw(runs: dict[str, Run]) -> Figure:
    """The time of every step."""
    figure = plt.figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, (_, seconds) in runs.items():
        axes.semilogy([1000 * s for s in seconds], ".-", label=name)
    axes.set(title="Time per step", xlabel="step", ylabel="ms")
    axes.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Train in each way; leave with an error if one of them takes other steps than eager."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    data.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--backend", default="inductor", help="of torch.compile, in both ways that use it")
    parser.add_argument("--figure", type=Path, default=Path("train_compiled.png"))
    args = parser.parse_args(argv)
    x, y = data.load(args)
    runs: dict[str, Run] = {}
    failed = False
    for name, make in WAYS.items():
        torch.compiler.reset()
        losses, seconds = runs[name] = train(make(args.backend), x, y, args.steps, args.batch_size)
        later = 1000 * statistics.median(seconds[1:])
        first = divergence(losses, runs["eager"][0])
        failed |= first is not None
        apart = "the same losses" if first is None else f"FIRST APART AT STEP {first}"
        print(f"{name:14} first step {seconds[0]:5.1f} s, later ones {later:6.1f} ms, loss {losses[-1]:.3f}, {apart}")
    draw(runs).savefig(args.figure)
    print(f"{args.figure}: the time of every step")
    if failed:
        raise SystemExit("the losses depend on the way")


if __name__ == "__main__":
    main()
