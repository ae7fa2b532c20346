"""Kronecker factors and the block that they stand for
===================================================

The block of the Gauss-Newton of a weight [O, I] has (O I)² entries. `KFLR` and `KFAC` approximate it by B ⊗ A, with B [O, O] of
what comes back to the layer and A [I, I] of what goes into it: here all four are small enough to be seen.
"""

# %%
# A small network, trained a little on scikit-learn's digits.

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxcurv
from fxcurv import kronecker
from fxcurv.extensions import EKFAC, GGNMP, KFAC, KFLR, DiagGGNExact

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data[:500]) / 16, torch.tensor(digits.target[:500])
model = nn.Sequential(nn.Linear(64, 16), nn.Sigmoid(), nn.Linear(16, 10)).double()
loss = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(200):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()

# %%
# The factors of the last layer's weight [10, 16], and its exact block [160, 160]: products with all unit vectors.

extensions = [KFLR(), KFAC(mc_samples=10), EKFAC(mc_samples=10), DiagGGNExact(), GGNMP()]
result = fxcurv.compile(model, loss, extensions)(x, y, seed=0)
b, a = result.kflr["2.weight"]
eye = torch.eye(160).double()
exact = result.ggnmp["2.weight"](eye.reshape(160, 10, 16)).reshape(160, 160)

# %%
# How far each approximation is off.

approximations = {
    "KFLR": kronecker.dense(result.kflr["2.weight"]),
    "KFAC, ten samples": kronecker.dense(result.kfac["2.weight"]),
    "EKFAC, ten samples": kronecker.dense(result.ekfac["2.weight"]),
    "diagonal": result.diag_ggn_exact["2.weight"].flatten().diag(),
}
for name, block in approximations.items():
    print(f"{name:18} relative error {(block - exact).norm() / exact.norm():.3f}")


# %%
# Blue is negative, red positive; each has its own scale.


def show(axes: plt.Axes, matrix: Tensor, title: str) -> None:
    limit = matrix.abs().max().item()
    axes.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.set(title=title, xticks=[], yticks=[])


figure, panels = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
show(panels[0], b, "B, [10, 10]")
show(panels[1], a, "A, [16, 16]")
show(panels[2], approximations["KFLR"], "B ⊗ A, [160, 160]")
show(panels[3], exact, "exact block")
plt.show()
