"""The tangent kernel of a network
===============================

To first order in its parameters a network is a linear model, whose features are the derivatives of its outputs. Their inner
products are the neural tangent kernel (Jacot et al. 2018): it says how training on one sample moves the output at another.
"""

# %%
# A small network on 500 of scikit-learn's digits, before and after training.

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import NTK

torch.manual_seed(0)
digits = load_digits()
x, labels = torch.tensor(digits.data, dtype=torch.float64) / 16, torch.tensor(digits.target)
y = torch.where(labels % 2 == 0, 1.0, -1.0).double().unsqueeze(1)  # even or odd
train, test = slice(0, 500), slice(500, 900)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 1)).double()
compiled = fxcurv.compile(model, None, [NTK()])  # needs no loss


def kernel() -> Tensor:
    """Of the images for training and testing, [900, 900]: from what each layer reads and gets back, no gradient per sample."""
    parts = compiled(x[:900]).ntk.values()  # of each parameter, [900, 1, 900, 1]
    return torch.stack(list(parts)).sum(0).reshape(900, 900)


def regression(k: Tensor) -> tuple[float, float]:
    """Accuracy of ridge regression with a kernel, and how well the kernel is aligned with the labels."""
    weights = torch.linalg.solve(k[train, train] + 1e-2 * k.diagonal().mean() * torch.eye(500).double(), y[train])
    accuracy = ((k[test, train] @ weights).sign() == y[test]).double().mean()
    target = y[train] @ y[train].T
    return accuracy.item(), ((k[train, train] * target).sum() / k[train, train].norm() / target.norm()).item()


# %%
# The kernel of the network as it is drawn already separates even digits from odd ones. Training turns it towards the labels.

before = kernel()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(150):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x[train]), y[train]).backward()
    optimizer.step()
after = kernel()
trained = (model(x[test]).sign() == y[test]).double().mean().item()
for name, k in (("before", before), ("after", after)):
    accuracy, alignment = regression(k)
    print(f"kernel {name} training: accuracy {accuracy:.3f}, alignment with the labels {alignment:.3f}")
print(f"the network itself: accuracy {trained:.3f}")

# %%
# The images in the order of their digits: blocks are digits that move together. A kernel that is too large to be formed is
# `fxcurv.linear.NTK`, which multiplies.

figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
order = labels[train].argsort()
for axis, k, name in zip(axes, (before, after), ("before training", "after training"), strict=True):
    own = k[train, train][order][:, order]
    scale = own.diagonal().sqrt()
    axis.imshow((own / scale / scale[:, None]).numpy(), vmin=-1, vmax=1, cmap="RdBu")
    axis.set(title=name, xticks=[], yticks=[])
plt.show()
