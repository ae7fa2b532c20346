#!/usr/bin/env bash
# torch.export of a model that puts a hook on an activation (h.register_hook): the hook is no part of the exported program.
#
# What one would guess: a forward pass that calls h.register_hook(fn), to scale, clip or reverse the gradient there, is a model with
#   another derivative. torch.export, which exports for training too, keeps the hook or refuses the model; strict mode, which follows
#   the bytecode, at least notices.
# What happens: neither mode keeps it, and neither says so. Outputs are equal; the gradient is that of the model without the hook, here
#   half of the model's.
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
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        h.register_hook(lambda g: 2 * g)
        return h.sum()


def trained(strict):
    """(outputs are equal, the exported program's gradient as a multiple of the model's), or the name of what is raised."""
    torch.manual_seed(0)
    model, x = Model(), torch.rand(4, 3, dtype=torch.float64)
    try:
        exported = torch.export.export(model, (x,), strict=strict).module()
    except Exception as error:
        return type(error).__name__
    out, again = model(x), exported(x)
    (want,) = torch.autograd.grad(out, [model.layer.weight])
    (got,) = torch.autograd.grad(again, [exported.layer.weight])
    return torch.equal(out, again), round((got / want).mean().item(), 9)


for strict in (False, True):
    print(f"strict={strict}: {trained(strict)}")
    assert trained(strict) == (True, 0.5), "no longer as found"
print("as found: the exported program has no hook")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
