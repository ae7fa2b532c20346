#!/usr/bin/env bash
# torch.export of a model that puts a hook on an activation (h.register_hook): the hook is no part of the exported program.
#
# What one would guess: a forward pass that calls h.register_hook(fn), to scale, clip or reverse the gradient there, is a model with
#   another derivative. A custom autograd function that does the same is refused or kept by torch.export (strict or not), so a hook is.
# What happens: export runs the line on a fake tensor, which keeps the hook for itself, and returns a program without it, in either
#   mode. Outputs are equal; the gradient is that of the model without the hook, here half of the model's, and nothing says so.
# Seen in PyTorch 2.13.0 (CPU build), and (not strict) in 2.14.1 and 2.15.0, on 2026-11-29.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch import nn

print("PyTorch", torch.__version__)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Model(nn.Module):
    def __init__(self, by_hook):
        super().__init__()
        self.layer, self.by_hook = nn.Linear(3, 2).double(), by_hook

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        if self.by_hook:
            h.register_hook(lambda g: 2 * g)
        else:
            h = Doubled.apply(h)
        return h.sum()


def trained(by_hook, strict):
    """(outputs are equal, the exported program's gradient as a multiple of the model's), or the name of what is raised."""
    torch.manual_seed(0)
    model, x = Model(by_hook), torch.rand(4, 3, dtype=torch.float64)
    try:
        exported = torch.export.export(model, (x,), strict=strict).module()
    except Exception as error:
        return type(error).__name__
    out, again = model(x), exported(x)
    (want,) = torch.autograd.grad(out, [model.layer.weight])
    (got,) = torch.autograd.grad(again, [exported.layer.weight])
    return torch.equal(out, again), round((got / want).mean().item(), 9)


found = {}
for by_hook in (True, False):
    for strict in (False, True):
        found[by_hook, strict] = trained(by_hook, strict)
        print(f"{'hook' if by_hook else 'function'}, strict={strict}: {found[by_hook, strict]}")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
