"""Private training
================

DP-SGD (Abadi et al. 2016): every sample's gradient is clipped to a norm, and noise covers what is left of any one of them. What
does privacy cost? `ClippedGrad` sums the clipped gradients without storing one per sample.
"""

# %%
# A network on scikit-learn's digits: 1400 to train with, and 397 others.

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import ClippedGrad

digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
images, labels = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]
x, y = images[:1400], labels[:1400]
loss = nn.CrossEntropyLoss(reduction="sum")  # of a mean, a sample's gradient would depend on the others' number
MAX_NORM, STEPS, RATE, LR = 1.0, 300, 0.1, 2.0

# %%
# A step samples the batch: every image is in it with probability `RATE` (Poisson sampling, which the accounting below asks for).
# The batch size differs from step to step, and one program serves all. Noise of deviation `multiplier * MAX_NORM` is added to
# the sum.


def trained(multiplier: float) -> tuple[list[float], Tensor]:
    """The accuracy on other images every 10 steps, and the norms of the last batch's gradients."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    clipped = fxcurv.compile(model, loss, [ClippedGrad(max_norm=MAX_NORM)])
    curve = []
    for step in range(STEPS + 1):
        if step % 10 == 0:
            with torch.no_grad():
                curve.append((model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item())
        batch = torch.rand(len(x)) < RATE
        result = clipped(x[batch], y[batch])
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = multiplier * MAX_NORM * torch.randn_like(p)
                p -= LR * (result.grad_clipped[name] + noise) / (RATE * len(x))
    return curve, result.sample_norms


# %%
# The privacy that is spent, by Rényi differential privacy of the sampled Gaussian mechanism at integer orders (Mironov et al.
# 2019, section 3.3), turned into (ε, δ) (Balle et al. 2020). Opacus' accountants do this for any schedule;
# `fxcurv.plugs.opacus` and `fxcurv.backpack.opacus` put fxcurv's gradients into its engine.


def epsilon(multiplier: float, delta: float = 1e-3) -> float:
    found = []
    for order in range(2, 64):
        terms = torch.tensor([
            math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
            + k * math.log(RATE) + (order - k) * math.log1p(-RATE) + (k * k - k) / (2 * multiplier**2)
            for k in range(order + 1)
        ], dtype=torch.float64)  # fmt: skip
        rdp = STEPS * terms.logsumexp(0).item() / (order - 1)
        found.append(rdp + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return min(found)


figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for multiplier in (0.0, 1.0, 4.0):
    curve, norms = trained(multiplier)
    said = f"ε = {epsilon(multiplier):.1f}" if multiplier else "no noise, no privacy"
    print(f"noise {multiplier}: accuracy {curve[-1]:.3f}, {said}")
    axes[0].plot(range(0, STEPS + 1, 10), curve, label=said)
    if not multiplier:
        axes[1].hist(norms.numpy(), bins=30)
axes[0].set(title="On images that were not trained with", xlabel="step", ylabel="accuracy")
axes[0].legend()
axes[1].axvline(MAX_NORM, color="k", linestyle="--")
axes[1].set(title="Gradients of the last batch, without noise", xlabel="norm before clipping", ylabel="samples")
plt.show()
