"""A Laplace posterior in five lines
=================================

A trained network is a point. The curvature of the loss around it says how well the data determine it: the posterior is about
N(θ, (H + δI)⁻¹), with H the Gauss-Newton over the data set. Its Kronecker factors are one pass over the loader.
"""

# %%
# A network that has seen the digits 0 to 6 alone.

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxcurv
from fxcurv.extensions import KFLR, Jacobian
from fxcurv.kronecker import Blocks

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
known, other = (y < 7).nonzero().squeeze(1), (y >= 7).nonzero().squeeze(1)
train, test = known[:900], known[900:]
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 7))
loss = nn.CrossEntropyLoss(reduction="sum")
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(200):
    batch = train[torch.randint(len(train), (128,))]
    optimizer.zero_grad()
    (loss(model(x[batch]), y[batch]) / 128).backward()
    optimizer.step()

# %%
# The five lines. `damping` is the precision of the prior, N(0, 1); the evidence of others is `blocks.logdet(damping)` away.

loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=300)
compiled = fxcurv.compile(model, loss, [KFLR(joint=True)])
blocks = Blocks(fxcurv.over(compiled, loader, progress=False).kflr)
posterior = blocks.inverse(damping=1.0)
jacobians = fxcurv.compile(model, None, [Jacobian()])

# %%
# To first order in the parameters the outputs are normal, with the variances J Σ Jᵀ; dividing by √(1 + π/8 v) averages the
# softmax over them (MacKay 1992, probit).


def confidence(images: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability of each image, of the point and of the posterior."""
    result = jacobians(images)
    variance = posterior.quadratic(result.jacobian)  # [N, 7]
    logits = result.output.detach()
    averaged = logits / (1 + torch.pi / 8 * variance).sqrt()
    return logits.softmax(1).amax(1), averaged.softmax(1).amax(1)


figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
for axis, way, name in zip(axes, range(2), ("point", "posterior"), strict=True):
    for digit, images in (("0 to 6", x[test]), ("7 to 9, never seen", x[other])):
        sure = confidence(images)[way]
        print(f"{name}, digits {digit}: {(sure > 0.9).float().mean():.2f} of the images with a probability above 0.9")
        axis.hist(sure.numpy(), bins=20, range=(0, 1), alpha=0.6, label=digit, density=True)
    axis.set(title=name, xlabel="largest probability")
axes[0].legend()
plt.show()
