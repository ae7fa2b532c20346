#!/usr/bin/env bash
# torch.export of a model with a torch.inference_mode() region in its forward pass: the exported program trains what the region holds.
#
# What one would guess: torch.inference_mode() is the stricter torch.no_grad(). torch.export keeps a no_grad region, so that a program
#   that is exported for training gives the gradients of the model; it keeps an inference_mode region too, or refuses it.
# What happens: the region is gone, and nothing says so. Outputs are equal, and gradients flow through what the model held constant: of
#   h + 2 h, the second term in the region, the gradient is three times the model's. With no_grad in its place all is right.
# Seen in PyTorch 2.13.0 (CPU build), and in 2.14.1 and 2.15.0, on 2026-11-29.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch import nn

print("PyTorch", torch.__version__)


class Model(nn.Module):
    def __init__(self, region):
        super().__init__()
        self.layer, self.region = nn.Linear(3, 2).double(), region

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        with self.region():
            held = 2 * h
        return (h + held).sum()


def trained(region):
    """(outputs are equal, the exported program's gradient as a multiple of the model's)."""
    torch.manual_seed(0)
    model, x = Model(region), torch.rand(4, 3, dtype=torch.float64)
    exported = torch.export.export(model, (x,)).module()
    out, again = model(x), exported(x)
    (want,) = torch.autograd.grad(out, [model.layer.weight])
    (got,) = torch.autograd.grad(again, [exported.layer.weight])
    return torch.equal(out, again), (got / want).mean().item(), (got / want).std().item()


for region in (torch.no_grad, torch.inference_mode):
    equal, times, spread = trained(region)
    print(f"{region.__name__}: outputs equal {equal}, gradient x {times:.6f} (+- {spread:.1e})")
    expected = 1.0 if region is torch.no_grad else 3.0
    assert equal and abs(times - expected) < 1e-9 and spread < 1e-9, "no longer as found"
print("as found: the exported program differentiates what inference_mode held")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
