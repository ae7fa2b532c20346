"""Elastic weight consolidation
============================

A network that has learned one task forgets it over the next. Elastic weight consolidation (Kirkpatrick et al. 2017) holds its
parameters where they were, the harder the more the first task's loss curves there: to the new loss it adds
½ s (θ − θ₁)ᵀ C (θ − θ₁),
with C the curvature at θ₁. C may be a diagonal (`DiagGGNExact`), or the Kronecker factors of every layer (`KFLR`, Ritter et al.
2018), which know what parameters do together.
"""

# %%
# Two tasks: scikit-learn's digits, and the same with their pixels in another order.

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxcurv
from fxcurv.extensions import KFLR, DiagGGNExact
from fxcurv.kronecker import Blocks

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
first, second = x, x[:, torch.randperm(64)]
train, held_out = torch.randperm(len(x)).split([1200, len(x) - 1200])
loss = nn.CrossEntropyLoss()
model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))
named = dict(model.named_parameters())


def nothing() -> Tensor:
    return torch.zeros(())


def fit(inputs: Tensor, penalty: Callable[[], Tensor] = nothing, strength: float = 0.0, steps: int = 200) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        batch = train[torch.randint(len(train), (128,))]
        (loss(model(inputs[batch]), y[batch]) + strength / 2 * penalty()).backward()
        optimizer.step()


def accuracy(inputs: Tensor) -> float:
    with torch.no_grad():
        return (model(inputs[held_out]).argmax(1) == y[held_out]).float().mean().item()


# %%
# The first task, and the curvature there, of all its images: `fxcurv.over` goes over a loader.

fit(first)
print(f"first task {accuracy(first):.2f}, second {accuracy(second):.2f}: before the second is learned")
learned = {name: p.detach().clone() for name, p in named.items()}
compiled = fxcurv.compile(model, loss, [DiagGGNExact(), KFLR(joint=True)])
found = fxcurv.over(compiled, DataLoader(TensorDataset(first[train], y[train]), batch_size=256), progress=False)

# %%
# Three penalties. That of Kronecker factors is `Blocks.quadratic`, which is plain PyTorch and can be differentiated.


def moved() -> dict[str, Tensor]:
    return {name: p - learned[name] for name, p in named.items()}


blocks = Blocks(found.kflr)
PENALTIES: dict[str, Callable[[], Tensor]] = {
    "distance": lambda: torch.stack([d.square().sum() for d in moved().values()]).sum(),
    "diagonal": lambda: torch.stack(
        [(found.diag_ggn_exact[name] * d.square()).sum() for name, d in moved().items()]
    ).sum(),
    "Kronecker factors": lambda: blocks.quadratic(moved()),
}
STRENGTHS: dict[str, list[float]] = {
    "distance": [0.003, 0.01, 0.03, 0.1], "diagonal": [1, 10, 100, 1000], "Kronecker factors": [1, 10, 100, 1000],
}  # fmt: skip

figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for title, penalty in PENALTIES.items():
    points = []
    for strength in STRENGTHS[title]:
        model.load_state_dict(learned)
        torch.manual_seed(1)
        fit(second, penalty, strength)
        points.append((accuracy(second), accuracy(first)))
    axes.plot(*zip(*points, strict=True), "o-", label=title)
    best = max(points, key=min)
    print(f"{title}: first task {best[1]:.2f}, second {best[0]:.2f}")
model.load_state_dict(learned)
torch.manual_seed(1)
fit(second)
axes.plot(accuracy(second), accuracy(first), "kx", label="no penalty")
print(f"no penalty: first task {accuracy(first):.2f}, second {accuracy(second):.2f}")
axes.set(title="Accuracy on two tasks, learned one after the other", xlabel="second task", ylabel="first task")
axes.legend()
plt.show()
