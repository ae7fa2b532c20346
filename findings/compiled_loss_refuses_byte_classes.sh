#!/usr/bin/env bash
# F.cross_entropy takes classes in bytes; torch.compile, torch.export and torch.vmap of the same line do not.
#
# What one would guess: class indices are int64, and other dtypes are refused; or, since the line runs with uint8 (as labels of
#   images are stored), it runs by torch.compile, torch.export and torch.vmap too, which run the same ops.
# What happens: on a CPU cross_entropy and nll_loss have kernels for uint8, give the loss that int64 gives, and have a gradient.
#   torch.compile and torch.export take the loss's shape from a decomposition, and torch.vmap the loss itself: they gather by
#   the classes, which refuses uint8. The messages speak of gather(), which the user has not called.
# Seen in PyTorch 2.13.0 (CPU build) on 2026-12-01; the same by 2.15.0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5" "setuptools<81"
cat > "$folder/run.py" <<'PYTHON'
import logging

import torch
import torch.nn.functional as F
from torch import nn

logging.disable(logging.ERROR)
torch.manual_seed(0)
x, classes = torch.randn(6, 3), torch.tensor([0, 1, 2, 1, 0, 2], dtype=torch.uint8)


class Loss(nn.Module):
    def forward(self, x, classes):
        return F.cross_entropy(x, classes)


def tried(fn):
    try:
        return f"{float(fn()):.6f}"
    except Exception as error:
        lines = [line for line in str(error).splitlines() if "gather" in line]
        return f"{type(error).__name__}: {lines[0].strip() if lines else error}"


print("PyTorch", torch.__version__)
ways = {
    "plain": lambda y: F.cross_entropy(x, y),
    "torch.compile": lambda y: torch.compile(F.cross_entropy, backend="aot_eager")(x, y),
    "torch.export": lambda y: torch.export.export(Loss(), (x, y)).module()(x, y),
    "torch.vmap": lambda y: torch.vmap(lambda a, b: F.cross_entropy(a[None], b[None]))(x, y).mean(),
}
seen = {name: (tried(lambda: way(classes)), tried(lambda: way(classes.long()))) for name, way in ways.items()}
for name, (by_bytes, by_long) in seen.items():
    print(f"{name}: uint8 {by_bytes}; int64 {by_long}")
slope = torch.func.grad(F.cross_entropy)(x, classes.long())
leaf = x.clone().requires_grad_()
F.cross_entropy(leaf, classes).backward()
assert torch.equal(leaf.grad, slope) and seen["plain"][0] == seen["plain"][1]
assert all("gather" in by_bytes for name, (by_bytes, _) in seen.items() if name != "plain")
assert len({by_long for _, by_long in seen.values()}) == 1
print("as found: what runs as it is does not run by compile, export or vmap")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
