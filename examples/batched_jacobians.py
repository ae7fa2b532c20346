"""A batch of Jacobians
====================

The Jacobian of a batch of outputs with respect to every parameter, `[N, C, *param]`, in four ways that agree.

The model maps x [N, 10] to f [N, C]. By autograd, entry by entry, its Jacobian takes N C backward passes. The gradient
of sum_n f[n, c] is a sum over samples whose terms are the rows of the Jacobian, so `BatchGrad` gives a column c of all
samples at once: C passes. The root of the Gauss-Newton of sum (f - y)^2, whose Hessian is 2 I, is the Jacobian times
sqrt(2), with columns before samples, whatever y is: one pass of `SqrtGGNExact`. And `Jacobian` asks for it by name.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

import fxcurv
from fxcurv.backpack import backpack, extend
from fxcurv.extensions import BatchGrad, Jacobian, SqrtGGNExact

SAMPLES, INPUTS, HIDDEN, OUTPUTS = 15, 10, 7, 5

Jacobians = dict[str, Tensor]  # parameter name -> [N, C, *param]


def setup() -> tuple[nn.Sequential, Tensor]:
    """The same model and inputs [N, 10] at every call."""
    torch.manual_seed(0)
    x = torch.rand(SAMPLES, INPUTS)
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS)), x


def by_autograd() -> Jacobians:
    """An entry of the output at a time."""
    model, x = setup()
    f, params = model(x), dict(model.named_parameters())
    jacobians = {name: torch.zeros(*f.shape, *p.shape) for name, p in params.items()}
    for n in range(SAMPLES):
        for c in range(OUTPUTS):
            gradients = torch.autograd.grad(f[n, c], list(params.values()), retain_graph=True)
            for name, gradient in zip(params, gradients, strict=True):
                jacobians[name][n, c] = gradient
    return jacobians


def by_batch_grad() -> Jacobians:
    """A column of the output at a time; the column is an argument of the loss, so that all share one program."""
    model, x = setup()
    compiled = fxcurv.compile(model, lambda f, picked: (f * picked).sum(), [BatchGrad()])
    picks = torch.eye(OUTPUTS).unsqueeze(1).expand(-1, SAMPLES, -1)
    columns = [compiled(x, picked).grad_batch for picked in picks]
    return {name: torch.stack([c[name] for c in columns], dim=1) for name in columns[0]}


def by_sqrt_ggn() -> Jacobians:
    """All at once, as the root of a Gauss-Newton."""
    model, x = setup()
    compiled = fxcurv.compile(model, nn.MSELoss(reduction="sum"), [SqrtGGNExact()])
    result = compiled(x, torch.zeros(SAMPLES, OUTPUTS))
    return {name: root.transpose(0, 1) / sqrt(2) for name, root in result.sqrt_ggn_exact.items()}


def by_jacobian() -> Jacobians:
    """All at once, by name: there is no loss."""
    model, x = setup()
    return fxcurv.compile(model, None, [Jacobian()])(x).jacobian


def by_batch_grad_in_backpack() -> Jacobians:
    """`by_batch_grad`, on the parameters: one forward pass, and a backward pass per column."""
    model, x = setup()
    model = extend(model)
    f = model(x)
    jacobians = {name: torch.zeros(*f.shape, *p.shape) for name, p in model.named_parameters()}
    for c in range(OUTPUTS):
        with backpack(BatchGrad(), retain_graph=True):
            f[:, c].sum().backward(retain_graph=True)
        for name, p in model.named_parameters():
            jacobians[name][:, c] = p.grad_batch
    return jacobians


def by_sqrt_ggn_in_backpack() -> Jacobians:
    """`by_sqrt_ggn`, on the parameters."""
    model, x = setup()
    model, lossfunc = extend(model), extend(nn.MSELoss(reduction="sum"))
    f = model(x)
    loss = lossfunc(f, torch.zeros_like(f))
    with backpack(SqrtGGNExact()):
        loss.backward()
    return {name: p.sqrt_ggn_exact.transpose(0, 1) / sqrt(2) for name, p in model.named_parameters()}


WAYS: dict[str, dict[str, Callable[[], Jacobians]]] = {
    "compile": {
        "BatchGrad": by_batch_grad,
        "SqrtGGNExact": by_sqrt_ggn,
        "Jacobian": by_jacobian,
    },
    "backpack": {
        "BatchGrad": by_batch_grad_in_backpack,
        "SqrtGGNExact": by_sqrt_ggn_in_backpack,
    },
}


def agree(ours: Jacobians, expected: Jacobians) -> bool:
    """Whether all parameters have the same Jacobian, but for rounding."""
    return list(ours) == list(expected) and all(
        ours[name].shape == value.shape and torch.allclose(ours[name], value, rtol=1e-5, atol=1e-7)
        for name, value in expected.items()
    )


def draw(jacobians: Jacobians) -> Figure:
    """A heat map: a row per entry of the output, a column per entry of the parameters."""
    figure = plt.figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(torch.cat([j.flatten(2).flatten(0, 1) for j in jacobians.values()], dim=1).numpy())
    axes.set(title="Batched Jacobian", xlabel="parameter", ylabel="sample and output")
    figure.colorbar(image, shrink=0.7)
    return figure


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--style", choices=("compile", "backpack", "both"), default="both")
    parser.add_argument("--figure", type=Path, default=Path("batched_jacobians.png"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute, compare, draw; leave with an error if two ways disagree."""
    args = arguments(argv)
    expected = by_autograd()
    for name, jacobian in expected.items():
        print(f"{name:8} Jacobian {list(jacobian.shape)}")
    draw(expected).savefig(args.figure, dpi=120)
    print(f"figure saved to {args.figure}")

    differ = []
    for style in WAYS if args.style == "both" else (args.style,):
        for name, way in WAYS[style].items():
            same = agree(way(), expected)
            print(f"autograd and {name} ({style}): {'agree' if same else 'DISAGREE'}")
            differ += [] if same else [f"{name} ({style})"]
    if differ:
        raise SystemExit(f"not autograd's Jacobian: {', '.join(differ)}")


if __name__ == "__main__":
    main()
