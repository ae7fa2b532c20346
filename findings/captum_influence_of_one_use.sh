#!/usr/bin/env bash
# captum's influence of training samples is wrong, silently, for a weight that two modules share, for a convolution with padding_mode
# other than "zeros", and for layers other than Linear and Conv2d, where its gradients per sample are asked for in one backward pass.
#
# What one would guess: TracInCP(sample_wise_grads_per_batch=True) gives the scores that False gives, faster, or says that it cannot.
#   Its documentation names linear and convolution layers, and a module that is called twice is summed, as it should be.
# What happens: hooks of modules compute a layer's gradient from its inputs and cotangents. They start every module at zero, so of a
#   weight in two modules (tied weights) one module's part is lost. A convolution's inputs are unfolded with zeros around, whatever
#   `padding_mode` says. Parameters of other layers (LayerNorm here) have no part in the scores. Nothing raises or warns. The scores are
#   inner products of gradients, checked by a loop of plain autograd: they are off by 3 to 16% of the largest, where False is right.
# Seen in captum 0.9.0 with PyTorch 2.13.0 (CPU build) on 2026-11-30.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5" "captum==0.9.0"
cat > "$folder/run.py" <<'PYTHON'
import sys
import warnings

import captum
import torch
import torch.nn.functional as F
from captum.influence import TracInCP
from torch import nn
from torch.utils.data import TensorDataset

warnings.filterwarnings("ignore")
print("PyTorch", torch.__version__, "captum", captum.__version__)
torch.manual_seed(0)
FILE = sys.argv[1]


class Deep(nn.Module):
    """Two layers, the same one twice, or two with one weight."""

    def __init__(self, how):
        super().__init__()
        self.one, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.two = self.one if how == "called twice" else nn.Linear(4, 4, bias=False)
        if how == "tied":
            self.two.weight = self.one.weight

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def images(mode):
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))


def scores(model, x, y, at_once):
    """Of every sample with every other, at one checkpoint with learning rate 1."""

    def load(model, path):
        model.load_state_dict(torch.load(path))
        return 1.0

    torch.save(model.state_dict(), FILE)
    loss = nn.CrossEntropyLoss(reduction="sum" if at_once else "none")
    data = TensorDataset(x, y)
    return TracInCP(model, data, [FILE], load, loss_fn=loss, batch_size=3, sample_wise_grads_per_batch=at_once).influence((x, y))


def wanted(model, x, y):
    """Inner products of the samples' gradients, by a loop."""
    losses = [F.cross_entropy(model(x[k : k + 1]), y[k : k + 1]) for k in range(len(x))]
    each = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    rows = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in each])
    return rows @ rows.T


rows, pictures = torch.randn(6, 4), torch.randn(6, 2, 4, 4)
normed = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
cases = [
    ("two layers", Deep("two"), rows, True), ("one called twice", Deep("called twice"), rows, True),
    ("two with one weight", Deep("tied"), rows, False), ("with LayerNorm", normed, rows, False),
    ("padding of zeros", images("zeros"), pictures, True),
    *((f"padding_mode={mode!r}", images(mode), pictures, False) for mode in ("circular", "reflect", "replicate")),
]
for name, model, x, right in cases:
    y = torch.randint(3, (6,))
    true = wanted(model, x, y)
    off, by_samples = (float((scores(model, x, y, how) - true).abs().max() / true.abs().max()) for how in (True, False))
    print(f"{name}: in one backward pass off by {off:.1e} of the largest score, sample by sample {by_samples:.1e}")
    assert by_samples < 1e-5, "no longer as found"
    assert off < 1e-5 if right else off > 0.01, "no longer as found"
print("as found")
PYTHON
"$folder/env/bin/python" "$folder/run.py" "$folder/checkpoint.pt"
