"""Optimizers by curvature, against SGD and Adam
=============================================

`fxcurv.optim` divides the gradient by the curvature: by its diagonal (`DiagGGN`), by Kronecker factors (`KFAC`), by second
moments in the factors' eigenbasis (`EKFAC`), or by the batch's Gauss-Newton itself, with conjugate gradients
(`NaturalGradientCG`).
"""

# %%
# A small network on scikit-learn's digits; all optimizers start from the same parameters and see the same batches.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fxcurv.optim import EKFAC, KFAC, DiagGGN, NaturalGradientCG

digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
loss = nn.CrossEntropyLoss()
STEPS = 40


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


def trained(model: nn.Module, step: Callable[[Tensor, Tensor], object]) -> list[float]:
    """The loss of all images before each step and after the last."""
    generator, losses = torch.Generator().manual_seed(1), []
    for k in range(STEPS + 1):
        with torch.no_grad():
            losses.append(loss(model(x), y).item())
        batch = torch.randperm(len(x), generator=generator)[:256]
        if k < STEPS:
            step(x[batch], y[batch])
    return losses


# %%
# PyTorch's own, each at the best of several step sizes.


def plainly(make: Callable[..., torch.optim.Optimizer], rates: list[float], **known) -> list[float]:
    curves = []
    for lr in rates:
        model = network()
        optimizer = make(model.parameters(), lr=lr, **known)

        def step(inputs: Tensor, targets: Tensor, model=model, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            optimizer.step()

        curves.append(trained(model, step))
    return min(curves, key=lambda curve: curve[-1])


curves = {
    "SGD": plainly(torch.optim.SGD, [0.03, 0.1, 0.3, 1.0], momentum=0.9),
    "Adam": plainly(torch.optim.Adam, [0.003, 0.01, 0.03, 0.1]),
}

# %%
# A step by curvature takes the batch, in place of forward, backward and step. Blocks of weight and bias together (`joint=True`)
# say more than two apart. Damping is what is added to the eigenvalues; where it is small, so should the step size be.

CURVED = {
    "DiagGGN": lambda model: DiagGGN(model, loss, lr=0.02, damping=1e-2),
    "KFAC": lambda model: KFAC(model, loss, lr=0.2, damping=1e-2, joint=True),
    "EKFAC": lambda model: EKFAC(model, loss, lr=0.02, damping=1e-3, joint=True, basis_interval=5),
    "NaturalGradientCG": lambda model: NaturalGradientCG(model, loss, lr=0.5, damping=1e-2),
}
for name, make in CURVED.items():
    model = network()
    optimizer = make(model)

    def step(inputs: Tensor, targets: Tensor, optimizer: Any = optimizer) -> None:
        optimizer.step((inputs, targets))

    curves[name] = trained(model, step)

figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for name, curve in curves.items():
    axes.semilogy(curve, "--" if name in ("SGD", "Adam") else "-", label=name)
    print(f"{name}: loss {curve[-1]:.4f} after {STEPS} steps")
axes.set(title="Training loss on digits", xlabel="step", ylabel="cross-entropy of all images")
axes.legend()
plt.show()

# %%
# Steps are not equally dear: one with sampled factors takes a column of the backward walk more than a plain one, and a
# decomposition where the basis turns; one by conjugate gradients takes a product for each iteration.
