"""Gradient noise: the variance of a batch's gradient against the batch size
=========================================================================

The gradient of a batch is a mean over samples, so its variance falls as one over the batch size; how large it is, the
individual gradients of a single batch say. `Variance` gives that in one backward pass, without storing them.
"""

# %%
# A small network on scikit-learn's digits.

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import Variance

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
loss = nn.CrossEntropyLoss()
params = list(model.parameters())


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Samples drawn with replacement."""
    picked = torch.randint(len(x), (size,))
    return x[picked], y[picked]


# %%
# The loss is a mean, so an individual gradient has 1/N in it, and N² times `Variance` is the variance of the gradients of
# the samples' own losses. Its sum over all parameters, divided by B, is the expected squared distance between the
# gradient of a batch of B samples and the one of all data.

PREDICT_FROM = 512
compiled = fxcurv.compile(model, loss, [Variance()])


def predicted() -> float:
    """The total variance of the gradients of single samples, from one batch."""
    result = compiled(*batch(PREDICT_FROM))
    return PREDICT_FROM**2 * sum(v.sum().item() for v in result.variance.values())


def measured(size: int, draws: int = 100) -> float:
    """The total variance of the gradient over many batches of `size`, by plain backward passes."""
    gradients = []
    for _ in range(draws):
        inputs, targets = batch(size)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(inputs), targets), params)]))
    return torch.stack(gradients).var(0).sum().item()


# %%
# Before training and after, where most samples are learned and a few have large gradients.

SIZES = [8, 16, 32, 64, 128, 256]
curves = {}
for title, steps in {"before training": 0, "after 300 steps": 300}.items():
    optimizer = torch.optim.Adam(params, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        inputs, targets = batch(64)
        loss(model(inputs), targets).backward()
        optimizer.step()
    curves[title] = predicted(), [measured(size) for size in SIZES]

figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for colour, (title, (total, points)) in zip(("C0", "C1"), curves.items(), strict=True):
    axes.loglog(SIZES, [total / size for size in SIZES], color=colour, label=f"predicted, {title}")
    axes.loglog(SIZES, points, "o", color=colour, label=f"measured, {title}")
    for size, point in zip(SIZES, points, strict=True):
        print(f"{title}, batches of {size:3}: measured {point:.2e}, predicted {total / size:.2e}")
axes.set(title="Variance of a batch's gradient", xlabel="batch size", ylabel="summed over all parameters")
axes.set_xticks(SIZES, [str(size) for size in SIZES])
axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
axes.legend()
plt.show()
