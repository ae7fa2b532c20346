#!/usr/bin/env bash
# torch.export, then run_decompositions(): where a logit or a residual is zero, the loss has a Hessian of zero.
#
# What one would guess: run_decompositions() writes a loss in simpler ops, and it stays the function it was. Binary cross-entropy of
#   logits, the Huber loss and the smooth L1 loss are smooth at zero, and a head that starts at zero puts every logit there; what the
#   program says of the Hessian (p (1 - p) = 1/4 of a logit) is what the model says of it.
# What happens: value and gradient are equal to rounding, nothing is said, and the program's second derivative is exactly zero. Near
#   zero (at 1e-9) it is right again. The simpler spelling has a branch or an absolute value at zero, whose parts are not smooth
#   there; one choice for all of the edge gives the right slope and takes the curvature away. The exported program before it is right,
#   and so is run_decompositions({}), which leaves the losses whole.
# Seen in PyTorch 2.13.0 (CPU build), and in 2.14.1 and 2.15.0, on 2026-11-30.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import warnings

import torch
from torch import nn
from torch.nn import functional as F

warnings.simplefilter("ignore")
print("PyTorch", torch.__version__)
target = torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64)


class Zero(nn.Module):
    """A loss of parameters that are all `start`."""

    def __init__(self, loss, start):
        super().__init__()
        self.loss, self.w = loss, nn.Parameter(torch.full((3,), start, dtype=torch.float64))

    def forward(self, y):
        return self.loss(self.w, y)


losses = {
    "binary_cross_entropy_with_logits": (lambda w, y: F.binary_cross_entropy_with_logits(w, y, reduction="sum"), 0.25),
    "multilabel_soft_margin_loss": (lambda w, y: 3 * F.multilabel_soft_margin_loss(w, y), 0.25),
    "logsigmoid": (lambda w, y: -F.logsigmoid(w).sum(), 0.25),
    "huber_loss": (lambda w, y: F.huber_loss(w + y, y, reduction="sum"), 1.0),
    "smooth_l1_loss": (lambda w, y: F.smooth_l1_loss(w + y, y, reduction="sum"), 1.0),
}


def derivatives(program):
    """(value, gradient, diagonal of the Hessian)."""
    (w,) = program.parameters()
    value = program(target)
    (g,) = torch.autograd.grad(value, w, create_graph=True)
    rows = [torch.autograd.grad(g[i], w, retain_graph=True)[0] for i in range(3)]
    return value.item(), g.detach(), torch.stack(rows).diagonal()


def all_three(loss, start):
    exported = torch.export.export(Zero(loss, start), (target,))
    programs = {"model": Zero(loss, start), "exported": exported.module(), "{}": exported.run_decompositions({}).module()}
    return {name: derivatives(p) for name, p in (programs | {"decomposed": exported.run_decompositions().module()}).items()}


for name, (loss, curvature) in losses.items():
    found, near = all_three(loss, 0.0), all_three(loss, 1e-9)
    value, gradient, _ = found["model"]
    h = {where: [round(v, 6) + 0.0 for v in hessian.tolist()] for where, (_, _, hessian) in found.items()}
    print(f"{name}: at zero, model {h['model']}, decomposed {h['decomposed']}")
    for where, (again, g, hessian) in found.items():
        assert abs(again - value) < 1e-12 and torch.allclose(g, gradient, atol=1e-12), "value and gradient are right"
        assert where == "decomposed" or torch.allclose(hessian, torch.full_like(hessian, curvature)), "three of four are right"
    assert not found["decomposed"][2].any(), "the decomposed program curves now: this finding is no longer true"
    assert torch.allclose(near["decomposed"][2], torch.full_like(gradient, curvature)), "beside zero it is right"
print("as found: at zero, and there alone, the decomposed losses have no second derivative")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
