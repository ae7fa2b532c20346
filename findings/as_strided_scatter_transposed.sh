#!/usr/bin/env bash
# torch.as_strided_scatter of a transposed matrix: its gradient is read at other places than its forward writes to.
#
# What one would guess: the gradient of <g, as_strided_scatter(x, src, ...)> is what finite differences say, as autograd's
#   gradient of every linear op is, whatever the strides of x.
# What happens: where x is not contiguous, the forward writes src at the strides of x's own memory, and the backward reads the
#   cotangent as if x were contiguous. Both gradients, of x and of src, are silently wrong; of a contiguous x they are right.
# Seen in PyTorch 2.13.0 (CPU build) on 2026-11-29.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import torch


def gradients(x):
    """(by autograd, by finite differences) of src."""
    src = torch.zeros(2, dtype=torch.double, requires_grad=True)
    g = torch.arange(12.0, dtype=torch.double).reshape(3, 4)
    value = lambda s: (torch.as_strided_scatter(x, s, [2], [5], 1) * g).sum()
    (auto,) = torch.autograd.grad(value(src), src)
    one = torch.eye(2, dtype=torch.double)
    return auto, torch.stack([value(one[i]) - value(0 * one[i]) for i in range(2)])  # exact: the op is linear


print("PyTorch", torch.__version__)
contiguous = gradients(torch.ones(3, 4, dtype=torch.double))
transposed = gradients(torch.ones(4, 3, dtype=torch.double).t())
print("contiguous x: autograd", contiguous[0].tolist(), "differences", contiguous[1].tolist())
print("transposed x: autograd", transposed[0].tolist(), "differences", transposed[1].tolist())
assert torch.equal(*contiguous), "it was right for a contiguous x"
assert not torch.allclose(*transposed), "it is right for a transposed x now: this finding is no longer true"
print("as found: autograd's gradient of src is that of other entries")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
