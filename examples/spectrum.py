"""The spectrum of a small network
===============================

`GGNMP` and `HMP` multiply with the Gauss-Newton and the Hessian without making them; of a network this small, products with all
unit vectors make them whole, and their eigenvalues show how they differ. So do their diagonals, by `DiagHessian` and
`DiagGGNExact`, which need no matrix.
"""

# %%
# A network with 498 parameters on 600 of scikit-learn's digits, their images averaged down to 4x4.

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import GGNMP, HMP, DiagGGNExact, DiagHessian

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.images[:600]) / 16, torch.tensor(digits.target[:600])
x = nn.functional.avg_pool2d(x.unsqueeze(1), 2).flatten(1)
model = nn.Sequential(nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, 10), nn.Tanh(), nn.Linear(10, 10)).double()
loss = nn.CrossEntropyLoss()
compiled = fxcurv.compile(model, loss, [GGNMP(), HMP()])
diagonals = fxcurv.compile(model, loss, [DiagHessian(), DiagGGNExact()])(x, y)  # before training


def spectra() -> dict[str, Tensor]:
    """The eigenvalues of both matrices over all parameters, the largest first."""
    result = compiled(x, y)
    eye = torch.eye(result.ggn.shape[0]).double()
    matrices = {"Hessian": result.hessian @ eye, "Gauss-Newton": result.ggn @ eye}
    return {name: torch.linalg.eigvalsh(matrix).flip(0) for name, matrix in matrices.items()}


# %%
# Before training, the Hessian has negative eigenvalues, which the Gauss-Newton cannot have. After training most residuals
# are small, and so is the difference; most of the curvature is in as many directions as there are classes, but one.

found = {"before training": spectra()}
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(500):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()
found["after 500 steps"] = spectra()

figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
panels[1].sharey(panels[0])
for axes, (title, values) in zip(panels, found.items(), strict=False):
    for name, style in {"Hessian": ".", "Gauss-Newton": "-"}.items():
        axes.plot(values[name], style, markersize=4, label=name)
        share = values[name][:9].sum() / values[name].sum()
        print(
            f"{title}, {name:12} negative {int((values[name] < -1e-9).sum()):3}, the nine largest are {share:.0%} of the trace"
        )
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_yscale("symlog", linthresh=1e-5)
    axes.set(title=title, xlabel="index")
panels[0].set(ylabel="eigenvalue")
panels[0].legend()

# %%
# Entry by entry: the Hessian's diagonal is the Gauss-Newton's where the parameter is behind all activations (the last layer), and
# may be negative elsewhere.

for name, layer in {"0.weight": "first layer", "4.weight": "last layer"}.items():
    hessian, ggn = diagonals.diag_h[name].flatten(), diagonals.diag_ggn_exact[name].flatten()
    panels[2].plot(ggn, hessian, ".", markersize=4, label=layer)
    print(f"{layer}: {int((hessian < -1e-12).sum())} of {len(hessian)} entries of the Hessian's diagonal are negative")
panels[2].axhline(0, color="black", linewidth=0.5)
panels[2].set(title="diagonals, before training", xlabel="Gauss-Newton", ylabel="Hessian")
panels[2].legend()
plt.show()
