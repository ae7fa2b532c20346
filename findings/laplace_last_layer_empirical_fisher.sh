#!/usr/bin/env bash
# laplace-torch: the diagonal empirical Fisher of a last layer is zero, so its posterior is the prior; the full one is right.
#
# What one would guess: Laplace(subset_of_weights="last_layer", backend=CurvlinopsEF) fits the same matrix whatever structure it is
#   kept in: hessian_structure="diag" is the diagonal of hessian_structure="full", up to rounding.
# What happens: the diagonal is exactly zero after fit(), for every weight, and nothing is said. The full matrix of the same data has
#   the right diagonal, and so has the diagonal of all weights. The last layer's parameters are looked up under names of their own
#   ("weight", "bias"), which the whole model does not have.
# Seen in laplace-torch 0.3 with curvlinops-for-pytorch 3.0.1 and PyTorch 2.13.0 (CPU build) on 2026-11-29.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5" "laplace-torch==0.3" "curvlinops-for-pytorch==3.0.1"
"$folder/env/bin/pip" uninstall --quiet --yes torchvision  # of another build of PyTorch than this one, and nothing here needs it
cat > "$folder/run.py" <<'PYTHON'
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")

import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsEF
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

print("laplace-torch", version("laplace-torch"), "PyTorch", torch.__version__)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
x, y = torch.randn(20, 3), torch.randint(2, (20,))
loader = DataLoader(TensorDataset(x, y), batch_size=5)


def fitted(weights, structure):
    posterior = Laplace(model, "classification", subset_of_weights=weights, hessian_structure=structure, backend=CurvlinopsEF)
    posterior.fit(loader)
    return posterior.H


last = list(model[2].parameters())
by_hand = torch.zeros(12)
for n in range(len(x)):
    loss = nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
    by_hand += torch.cat([g.flatten() for g in torch.autograd.grad(loss, last)]).square()
diagonal, full = fitted("last_layer", "diag"), fitted("last_layer", "full").diagonal()
of_all = fitted("all", "diag")[-12:]
print("last layer, diag:             ", [round(v, 3) for v in diagonal.tolist()])
print("last layer, diagonal of full: ", [round(v, 3) for v in full.tolist()])
print("all weights, diag, last layer:", [round(v, 3) for v in of_all.tolist()])
print("sum of squared gradients:     ", [round(v, 3) for v in by_hand.tolist()])
assert torch.allclose(full, by_hand, rtol=1e-4) and torch.allclose(of_all, by_hand, rtol=1e-4), "two of three are right"
assert not diagonal.any(), "the diagonal of the last layer is not zero any more: this finding is no longer true"
print("as found: the diagonal of the last layer is zero, and no other way of asking gives that")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
