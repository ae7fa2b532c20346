"""The gradient of a quantity
==========================

The gradient of a backpropagated quantity: of the total variance of the individual gradients.

The total variance is the sum, over all entries of all parameters, of the variance that the individual gradients have
there. With `create_graph=True` it is a differentiable function of the parameters like any other value. Plain PyTorch
computes the same from one graph per sample. Three models: a linear one with two parameters, a linear classifier of
images, and a small convolutional network.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence

import data
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.backpack import backpack, extend
from fxcurv.extensions import Variance

Problem = tuple[nn.Module, nn.Module, Tensor, Tensor]  # model, loss, x [N, ...], y [N, ...]
Answer = tuple[Tensor, tuple[Tensor, ...]]  # the total variance, and its gradient for every parameter


def by_pytorch(model: nn.Module, lossfunc: nn.Module, x: Tensor, y: Tensor) -> Answer:
    """A forward and a backward pass per sample, all of them differentiated again."""
    params = list(model.parameters())
    individual = []
    for n in range(len(x)):
        loss = lossfunc(model(x[n : n + 1]), y[n : n + 1])
        gradients = torch.autograd.grad(loss, params, create_graph=True)
        individual.append(torch.cat([g.flatten() for g in gradients]))
    total = torch.stack(individual).var(dim=0, unbiased=False).sum()
    return total.detach(), torch.autograd.grad(total, params)


def by_compile(model: nn.Module, lossfunc: nn.Module, x: Tensor, y: Tensor) -> Answer:
    """One call, whose results carry a graph."""
    result = fxcurv.compile(model, lossfunc, [Variance()])(x, y, create_graph=True)
    total = torch.stack([v.sum() for v in result.variance.values()]).sum()
    return total.detach(), torch.autograd.grad(total, list(model.parameters()))


def by_backpack(model: nn.Module, lossfunc: nn.Module, x: Tensor, y: Tensor) -> Answer:
    """One backward pass, whose quantities on the parameters carry a graph."""
    model, lossfunc = extend(model), extend(lossfunc)
    loss = lossfunc(model(x), y)
    with warnings.catch_warnings(), backpack(Variance()):
        warnings.filterwarnings("ignore", message="Using backward.*create_graph=True")  # of the cycle broken below
        loss.backward(retain_graph=True, create_graph=True)
    total = torch.stack([p.variance.sum() for p in model.parameters()]).sum()
    gradients = torch.autograd.grad(total, list(model.parameters()))
    model.zero_grad()  # a parameter, its gradient and the graph hold each other
    return total.detach(), gradients


STYLES: dict[str, Callable[[nn.Module, nn.Module, Tensor, Tensor], Answer]] = {
    "compile": by_compile,
    "backpack": by_backpack,
}


def problems(args: argparse.Namespace) -> dict[str, Problem]:
    """The three models with their losses and data, in double precision, so that rounding hides nothing."""
    torch.manual_seed(0)
    images, labels = (t[: args.samples] for t in data.load(args))
    images = images.double()
    linear = nn.Sequential(nn.Linear(2, 1, bias=False))
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    layers = [nn.Conv2d(1, 5, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(720, 10)]
    x, y = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    cross_entropy = nn.CrossEntropyLoss(reduction="sum")
    return {
        "linear model": (linear.double(), nn.MSELoss(reduction="sum"), x, y),
        "linear classifier": (classifier.double(), cross_entropy, images, labels),
        "convolutional network": (nn.Sequential(*layers).double(), cross_entropy, images, labels),
    }


def compare(names: Sequence[str], ours: Answer, expected: Answer) -> bool:
    """Print what agrees; whether everything does."""
    same = {"total variance": torch.allclose(ours[0], expected[0])}
    for name, a, b in zip(names, ours[1], expected[1], strict=True):
        same[f"its gradient, {name}"] = torch.allclose(a, b)
    for what, agrees in same.items():
        print(f"  {what:25} {'agree' if agrees else 'DISAGREE'}")
    return all(same.values())


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    data.add_arguments(parser)
    parser.add_argument("--samples", type=int, default=32, help="images in the batch")
    parser.add_argument("--style", choices=("compile", "backpack", "both"), default="both")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute and compare; leave with an error if anything is not as plain PyTorch has it."""
    args = arguments(argv)
    differ = []
    for title, (model, lossfunc, x, y) in problems(args).items():
        expected = by_pytorch(model, lossfunc, x, y)
        names = [name for name, _ in model.named_parameters()]
        norm = torch.cat([g.flatten() for g in expected[1]]).norm()
        print(f"{title}: total variance {expected[0]:.6g}, norm of its gradient {norm:.6g}")
        for style in STYLES if args.style == "both" else (args.style,):
            print(f"  against plain PyTorch ({style})")
            answer = STYLES[style](copy.deepcopy(model), copy.deepcopy(lossfunc), x, y)
            differ += [] if compare(names, answer, expected) else [f"{title} ({style})"]
    if differ:
        raise SystemExit(f"not as plain PyTorch has it: {', '.join(differ)}")


if __name__ == "__main__":
    main()
