"""Pruning by curvature
====================

Setting a weight θ to zero changes the loss by about ½ θ² h, where h is its curvature (Optimal Brain Damage, LeCun et
al. 1990). So the weights to prune are not the smallest ones but those with the smallest ½ θ² h: `DiagGGNExact` gives h.
"""

# %%
# Networks trained on one part of scikit-learn's digits, judged on the other.

from __future__ import annotations

import copy
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fxcurv
from fxcurv.extensions import DiagGGNExact

digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
train, held_out = train_test_split(range(len(labels)), test_size=0.3, random_state=0, stratify=labels)
x, y = images[train], labels[train]


def trained(seed: int) -> nn.Module:
    """A network that fits the training part."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        batch = torch.randint(len(x), (128,))
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model


# %%
# Three scores, each a function that says what every weight of a model is worth now; the lowest go first.

Score = Callable[[], Tensor]


def vector(model: nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).detach()


def by_curvature(model: nn.Module) -> Score:
    """½ θ² h."""
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagGGNExact()])

    def score() -> Tensor:
        h = compiled(x, y).diag_ggn_exact
        return vector(model).square() * torch.cat([d.flatten() for d in h.values()]) / 2

    return score


SCORES: dict[str, Callable[[nn.Module], Score]] = {
    "random": lambda model: lambda: torch.rand(len(vector(model))),
    "magnitude": lambda model: lambda: vector(model).abs(),
    "curvature": by_curvature,
}

# %%
# The formula holds near the network that h is of. Far from it, h has to be asked for again: the last curve does so at
# every step.

SPARSITIES = [k / 20 for k in range(20)]


@torch.no_grad()
def accuracies(model: nn.Module, name: str, again: bool) -> list[float]:
    """On the held-out part, with more and more weights zero, and no training after."""
    model = copy.deepcopy(model)
    score = SCORES[name](model)
    scores, found = score(), []
    for sparsity in SPARSITIES:
        weights = vector(model)
        weights[scores.argsort()[: round(sparsity * len(scores))]] = 0
        vector_to_parameters(weights, model.parameters())
        found.append((model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item())
        scores = score() if again else scores
    return found


# %%
# The mean over three networks, and their spread.

models = [trained(seed) for seed in range(3)]
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for name, again in [("random", False), ("magnitude", False), ("curvature", False), ("curvature", True)]:
    values = torch.tensor([accuracies(model, name, again) for model in models])
    title = f"{name}, again at every step" if again else name
    print(f"{title:30} accuracy at sparsity 0.8: {values[:, SPARSITIES.index(0.8)].mean():.3f}")
    axes.plot(SPARSITIES, values.mean(0), ".-", label=title)
    axes.fill_between(SPARSITIES, values.min(0).values, values.max(0).values, alpha=0.2)
axes.set(title="Pruning without retraining", xlabel="fraction of weights that are zero", ylabel="held-out accuracy")
axes.legend()
plt.show()
