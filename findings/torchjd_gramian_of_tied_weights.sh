#!/usr/bin/env bash
# torchjd's engine for the Gramian of the losses' gradients leaves out the cross terms of a weight that two modules share.
#
# What one would guess: Engine(model, batch_dim=0).compute_gramian(losses) is J J^T, J the losses' derivatives in the model's parameters.
#   Its class that adds up says that the derivatives of several paths to one parameter are summed before their Gramian is taken, and
#   for a module that is called twice they are.
# What happens: they are summed for each module, not for each parameter. Where a language model's head has its embedding's weight, the two
#   Gramians are added without <g_n of the embedding, g_m of the head>. Nothing raises; here the matrix is off by more than a tenth of its
#   largest entry. torchjd.autojac, which forms J, and this engine then weigh the losses differently.
# Seen in torchjd 0.18.0 with PyTorch 2.13.0 (CPU build) on 2026-11-30.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5" "torchjd==0.18.0"
cat > "$folder/run.py" <<'PYTHON'
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import nn
from torchjd.autogram import Engine

print("PyTorch", torch.__version__, "torchjd", version("torchjd"))
torch.manual_seed(0)


class Words(nn.Module):
    """Predicts a word for every word: with two tables, with one in two modules, or with two and a layer that is called twice."""

    def __init__(self, how):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.layer = nn.Linear(4, 4) if how == "called twice" else nn.Identity()
        if how == "tied":
            self.head.weight = self.embed.weight

    def forward(self, words):
        return self.head(self.layer(torch.tanh(self.layer(self.embed(words)))))


words, following = torch.randint(7, (5, 3)), torch.randint(7, (5, 3))


def losses(model):
    """One for each sentence."""
    return F.cross_entropy(model(words).transpose(1, 2), following, reduction="none").sum(1)


for how in ("apart", "called twice", "tied"):
    model = Words(how).double()
    each = [torch.autograd.grad(loss, list(model.parameters())) for loss in map(lambda n: losses(model)[n], range(5))]
    rows = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in each])
    true = rows @ rows.T
    found = Engine(model, batch_dim=0).compute_gramian(losses(model))
    off = float((found - true).abs().max() / true.abs().max())
    print(f"{how}: off by {off:.1e} of the largest entry")
    assert off > 0.1 if how == "tied" else off < 1e-10, "no longer as found"
print("as found")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
