"""Laplace uncertainty of a regression
===================================

The linearised Laplace approximation puts a Gaussian on the weights of a trained network. Its precision is the
Gauss-Newton plus the prior's, Σ its inverse; at a new input the network's output has the variance J Σ Jᵀ, with J the
Jacobian there. `Jacobian` gives both.
"""

# %%
# Noisy points of a curve, with a gap in the middle and none outside.

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import Jacobian

NOISE, PRIOR = 0.15, 1.0  # standard deviation of the targets, precision of the weights
torch.manual_seed(0)
x = torch.cat([torch.rand(30, 1) * 2 - 3.5, torch.rand(30, 1) * 2 + 1]).double()
y = torch.sin(2 * x) + NOISE * torch.randn_like(x)

model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(1500):
    optimizer.zero_grad()
    prior = sum(p.square().sum() for p in model.parameters())
    energy = (model(x) - y).square().sum() / (2 * NOISE**2) + PRIOR * prior / 2
    energy.backward()
    optimizer.step()

# %%
# The Jacobians of all points, as rows [N, parameters]. A Jacobian needs no loss.

compiled = fxcurv.compile(model, None, [Jacobian()])


def jacobian(inputs: Tensor) -> Tensor:
    return torch.cat([j.flatten(1) for j in compiled(inputs).jacobian.values()], dim=1)


# %%
# The Hessian of the squares is 1/noise², so the Gauss-Newton is JᵀJ/noise². With the prior it is the precision of the weights.

j = jacobian(x)
precision = j.T @ j / NOISE**2 + PRIOR * torch.eye(j.shape[1]).double()

grid = torch.linspace(-6, 6, 300).double().unsqueeze(1)
at_grid = jacobian(grid)
variance = (at_grid @ torch.linalg.inv(precision) * at_grid).sum(1)
deviation, noisy = variance.sqrt(), (variance + NOISE**2).sqrt()
with torch.no_grad():
    mean = model(grid).squeeze(1)

seen = torch.tensor([((point - x).abs().min() < 0.3).item() for point in grid])
print(f"mean standard deviation near the data {deviation[seen].mean():.3f}, elsewhere {deviation[~seen].mean():.3f}")

figure, axes = plt.subplots(figsize=(7, 4.3), layout="constrained")
line = grid.squeeze(1)
axes.fill_between(line, mean - 2 * noisy, mean + 2 * noisy, color="C0", alpha=0.15, label="± 2 σ, with the noise")
axes.fill_between(
    line, mean - 2 * deviation, mean + 2 * deviation, color="C0", alpha=0.3, label="± 2 σ, of the network"
)
axes.plot(line, mean, color="C0", label="the network")
axes.plot(line, torch.sin(2 * line), "--", color="black", linewidth=0.8, label="the curve")
axes.plot(x.squeeze(1), y.squeeze(1), ".", color="C3", label="data")
axes.set(title="Linearised Laplace", xlabel="x", ylabel="y", ylim=(-4, 4))
figure.legend(loc="outside lower center", ncols=5, fontsize=8)
plt.show()
