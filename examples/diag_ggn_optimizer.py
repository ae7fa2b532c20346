"""An optimizer that divides by the diagonal Gauss-Newton
======================================================

Train a convolutional network with a diagonal Gauss-Newton step: p <- p - step_size * gradient / (diagonal + damping).

The diagonal is a Monte-Carlo estimate with one sample, which costs about as much as the gradient. The two styles start
from the same parameters, see the same batches and draw the same samples, so that they take the same steps. Damping 1 is
far above most of the diagonal: the step is a gradient step, held back where there is curvature, and how fast it learns
is up to the step size. Of the two that are tried, 0.01 is the careful one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import data
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

import fxcurv
from fxcurv.backpack import backpack, extend
from fxcurv.extensions import DiagGGNMC

PRINT_EVERY = 50
GOAL = 0.9  # accuracy of a batch
SAME_STEPS = 5  # that the styles have in common but for rounding, which training amplifies
TOLERANCE = 1e-3  # relative, of their losses

Batches = Iterator[tuple[Tensor, Tensor]]
Curves = tuple[list[float], list[float]]  # per step: loss, accuracy
Train = Callable[[argparse.Namespace, float, Batches], Curves]


class DiagGGNOptimizer(torch.optim.Optimizer):
    """Reads `grad` and `diag_ggn_mc` from the parameters."""

    def __init__(self, parameters, step_size: float, damping: float):
        super().__init__(parameters, {"step_size": step_size, "damping": damping})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["step_size"] * p.grad / (p.diag_ggn_mc + group["damping"]))


def cnn() -> nn.Sequential:
    """Two convolutions and two linear layers, [N, 1, 28, 28] to [N, 10]; the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 4 * 50, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


class Log:
    """The curves, printed now and then."""

    def __init__(self, steps: int):
        self.steps, self.losses, self.accuracies = steps, list[float](), list[float]()

    def add(self, loss: Tensor, output: Tensor, y: Tensor) -> None:
        """A step's loss, and how many labels y [N] the largest outputs [N, 10] hit; both before the step."""
        step = len(self.losses)
        self.losses.append(loss.item())
        self.accuracies.append((output.argmax(dim=1) == y).float().mean().item())
        if step % PRINT_EVERY == 0 or step == self.steps:
            print(f"  step {step:3}/{self.steps}  loss {self.losses[-1]:.3f}  accuracy {self.accuracies[-1]:.3f}")


def by_compile(args: argparse.Namespace, step_size: float, batches: Batches) -> Curves:
    """The step reads the results of a compiled program."""
    model, log = cnn(), Log(args.steps)
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagGGNMC(mc_samples=1)])
    params = dict(model.named_parameters())
    for _ in range(args.steps + 1):
        x, y = next(batches)
        result = compiled(x, y)
        log.add(result.loss, result.output, y)
        with torch.no_grad():
            for name, p in params.items():
                p.sub_(step_size * result.grad[name] / (result.diag_ggn_mc[name] + args.damping))
    return log.losses, log.accuracies


def by_backpack(args: argparse.Namespace, step_size: float, batches: Batches) -> Curves:
    """The step is an optimizer's, which reads from the parameters."""
    model, lossfunc, log = extend(cnn()), extend(nn.CrossEntropyLoss()), Log(args.steps)
    optimizer = DiagGGNOptimizer(model.parameters(), step_size=step_size, damping=args.damping)
    for _ in range(args.steps + 1):
        x, y = next(batches)
        optimizer.zero_grad()
        output = model(x)
        loss = lossfunc(output, y)
        with backpack(DiagGGNMC(mc_samples=1)):
            loss.backward()
        optimizer.step()
        log.add(loss, output, y)
    return log.losses, log.accuracies


STYLES: dict[str, Train] = {"compile": by_compile, "backpack": by_backpack}


def draw(curves: dict[tuple[str, float], Curves]) -> Figure:
    """Two panels: loss and accuracy of the batches."""
    figure = plt.figure(figsize=(9, 3.8), layout="constrained")
    for k, (axes, title) in enumerate(zip(figure.subplots(1, 2), ("Loss", "Accuracy"), strict=True)):
        for (style, step_size), values in curves.items():
            axes.plot(values[k], "-" if style == "compile" else ":", label=f"{style}, step size {step_size}")
        axes.set(title=title, xlabel="step")
        axes.legend()
    return figure


def summary(curves: Curves) -> str:
    """When the goal was reached."""
    reached = [step for step, accuracy in enumerate(curves[1]) if accuracy >= GOAL]
    return f"accuracy {GOAL} first reached at step {reached[0]}" if reached else f"accuracy {GOAL} not reached"


def compare(ours: Curves, expected: Curves) -> bool:
    """Print whether two styles take the same steps, as far as rounding lets one tell; whether they do."""
    a, b = torch.tensor(ours[0]), torch.tensor(expected[0])
    same = torch.allclose(a[:SAME_STEPS], b[:SAME_STEPS], rtol=TOLERANCE)
    apart = (a - b).abs().max()
    print(f"  losses of both styles: {'agree' if same else 'DISAGREE'}, over the whole run within {apart:.1e}")
    return same


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    data.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--step-size", type=float, nargs="+", default=[0.01, 0.05])
    parser.add_argument("--damping", type=float, default=1.0)
    parser.add_argument("--style", choices=("compile", "backpack", "both"), default="both")
    parser.add_argument("--figure", type=Path, default=Path("diag_ggn_optimizer.png"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, compare, draw; leave with an error if the styles part from the start."""
    args = arguments(argv)
    x, y = data.load(args)
    styles = list(STYLES) if args.style == "both" else [args.style]
    curves, same = {}, True
    for step_size in args.step_size:
        for style in styles:
            print(f"step size {step_size}, {style}")
            curves[style, step_size] = STYLES[style](args, step_size, data.batches(x, y, args.batch_size))
            print(f"  {summary(curves[style, step_size])}")
        if len(styles) > 1:
            same &= compare(curves[styles[1], step_size], curves[styles[0], step_size])
    draw(curves).savefig(args.figure, dpi=120)
    print(f"figure saved to {args.figure}")
    if not same:
        raise SystemExit(f"the losses of the first {SAME_STEPS} steps depend on the style")


if __name__ == "__main__":
    main()
