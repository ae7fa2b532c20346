#!/usr/bin/env bash
# torch.matrix_exp: its gradient is not linear in the cotangent; of a large one all digits are wrong, also in double precision.
#
# What one would guess: a gradient scales with its loss. Multiplying a loss by a power of two, as loss scaling does, changes
#   exponents and no digits, while nothing overflows.
# What happens: the backward pass takes the exponential of [[A^H, g], [0, A^H]] by scaling and squaring, and chooses the scaling
#   by the norm of all of it. So a large cotangent g means that A is divided by a large power of two and added to the identity,
#   where its digits go. Of a random 6 x 6 matrix in single precision, the gradient of a loss times 2^16 (the scale that
#   torch.amp.GradScaler begins with) is wrong by 2%, and that of one times 2^32 by 65%; in double precision one times 2^48 by 37%.
#   Nothing overflows, and nothing is said.
# Seen in PyTorch 2.13.0 (CPU build) on 2026-12-01; the same by 2.11.0 and 2.15.0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import torch

torch.manual_seed(0)
A = torch.randn(6, 6, dtype=torch.double)
G = torch.randn(6, 6, dtype=torch.double)


def gradient(dtype, power):
    """Of 2**power <G, exp(A)>, divided by 2**power: exact but for rounding."""
    a = A.to(dtype).requires_grad_()
    (found,) = torch.autograd.grad(((2.0**power * G).to(dtype) * torch.matrix_exp(a)).sum(), a)
    return found.double() / 2.0**power


def by_differences():
    h = 1e-6
    units = torch.eye(36, dtype=torch.double).reshape(36, 6, 6)
    sides = [[(G * torch.matrix_exp(A + sign * h * unit)).sum() for sign in (1, -1)] for unit in units]
    return torch.stack([(a - b) / (2 * h) for a, b in sides]).reshape(6, 6)


exact = by_differences()
error = lambda found: ((found - exact).abs().max() / exact.abs().max()).item()
print("PyTorch", torch.__version__)
seen = {(dtype, power): error(gradient(dtype, power)) for dtype in (torch.float32, torch.double) for power in (0, 16, 32, 48)}
for (dtype, power), found in seen.items():
    print(f"{dtype}, loss times 2^{power}: gradient off by {found:.1e} of its largest entry")
assert seen[torch.float32, 0] < 1e-5 and seen[torch.double, 0] < 1e-7
assert seen[torch.float32, 16] > 1e-4, "a scaled loss has the same digits now"
assert seen[torch.float32, 48] > 0.1, "a large loss has a right gradient now"
print("as found: digits go with the size of the cotangent")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
