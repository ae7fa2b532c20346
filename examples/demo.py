"""Training with a diagonal Gauss-Newton step
==========================================

A small CNN on scikit-learn's 8x8 digits. One call of the compiled program gives the loss, the gradient and a Monte-Carlo
estimate of the Gauss-Newton diagonal; a step is p <- p - lr * gradient / (diagonal + damping).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import fxcurv
from fxcurv.extensions import DiagGGNMC

REQUIRED_ACCURACY = 0.9
SMALLEST_SHOWN = 1e-12


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 1, 8, 8] in [0, 1] and labels [N]: those to train on, then those held out."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, held_out = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return images[train], labels[train], images[held_out], labels[held_out]


def small_cnn() -> nn.Sequential:
    """Two convolutions and a linear layer: [N, 1, 8, 8] to [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The fraction of labels y [N] that the model's largest output hits."""
    return (model(x).argmax(dim=1) == y).float().mean().item()


@torch.no_grad()
def gauss_newton_step(model: nn.Module, result: fxcurv.Result, lr: float, damping: float) -> None:
    """Move every parameter against its gradient, divided by its damped curvature."""
    for name, parameter in model.named_parameters():
        parameter.sub_(lr * result.grad[name] / (result.diag_ggn_mc[name] + damping))


def draw(losses: list[float], accuracies: list[float], diagonal: dict[str, Tensor]) -> Figure:
    """Three panels: training loss per step, held-out accuracy per epoch, the diagonal's spread per layer."""
    figure = plt.figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.semilogy(losses, linewidth=0.8)
    left.set(title="Training loss", xlabel="step", ylabel="cross-entropy")
    middle.plot(range(1, len(accuracies) + 1), accuracies, marker="o", markersize=3)
    middle.set(title="Held-out accuracy", xlabel="epoch", ylabel="accuracy")
    for name, values in diagonal.items():
        if name.endswith("weight"):
            # Weights behind dead units or blank pixels have no curvature at all, and zero has no logarithm.
            logarithms = values[values > SMALLEST_SHOWN].log10()
            right.hist(logarithms, bins=40, histtype="step", density=True, label=name)
    right.set(title="Gauss-Newton diagonal", xlabel=f"log10 (above {SMALLEST_SHOWN})", ylabel="density")
    right.legend()
    return figure


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--damping", type=float, default=0.2)
    parser.add_argument("--figure", type=Path, default=Path("demo.png"))
    return parser.parse_args()


def main() -> None:
    """Train, report, draw; leave with an error if the digits were not learned."""
    args = arguments()
    torch.manual_seed(0)
    x, y, x_held_out, y_held_out = digits()
    model = small_cnn()
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagGGNMC(mc_samples=1)])

    losses, accuracies = [], []
    steps_per_epoch = len(x) // args.batch_size
    with tqdm(total=args.epochs * steps_per_epoch, unit="step") as progress:
        for _ in range(args.epochs):
            for batch in torch.randperm(len(x)).split(args.batch_size)[:steps_per_epoch]:
                result = compiled(x[batch], y[batch])
                gauss_newton_step(model, result, args.lr, args.damping)
                losses.append(result.loss.item())
                progress.update()
            accuracies.append(accuracy(model, x_held_out, y_held_out))
            progress.set_postfix(loss=f"{losses[-1]:.3f}", accuracy=f"{accuracies[-1]:.3f}")

    last_epoch = losses[-steps_per_epoch:]
    print(f"training loss {sum(last_epoch) / len(last_epoch):.4f}, held-out accuracy {accuracies[-1]:.3f}")
    first = slice(args.batch_size)
    print(compiled.explain(x[first], y[first]))
    draw(losses, accuracies, compiled(x, y).diag_ggn_mc).savefig(args.figure, dpi=120)
    print(f"figure saved to {args.figure}")
    if accuracies[-1] <= REQUIRED_ACCURACY:
        raise SystemExit(f"held-out accuracy {accuracies[-1]:.3f} is not above {REQUIRED_ACCURACY}")


if __name__ == "__main__":
    main()
