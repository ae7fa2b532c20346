#!/usr/bin/env bash
# torch.autograd.functional.jvp and hvp of torch.logcumsumexp are NaN, where forward mode, hessian() and vhp() are right.
#
# What one would guess: PyTorch's ways to a product with a Jacobian or a Hessian agree. The backward pass of an op is linear in the
#   gradient that arrives, so differentiating it by that gradient, at whatever value, gives the Jacobian ("double backward trick"):
#   autograd.functional.jvp and hvp do so, at a gradient of zero, and many packages have a function of their own that does the same.
# What happens: logcumsumexp's backward takes the logarithms of the positive and of the negative part of the gradient, and sums their
#   exponentials. That is linear in exact numbers, but its derivative at zero is 0 * log(0): jvp and hvp are NaN everywhere, for
#   ordinary finite inputs and without a warning. logsumexp, and cumsum, which are written otherwise, are right.
# Seen in PyTorch 2.13.0 (CPU build), and in 2.11.0, 2.14.1 and 2.15.0, on 2026-11-30.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import warnings

import torch
from torch.autograd import functional

warnings.simplefilter("ignore")
print("PyTorch", torch.__version__)
x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
v = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)


def by_sums(x):
    """The same function by logsumexp of the first k numbers."""
    return torch.stack([x[: k + 1].logsumexp(0) for k in range(len(x))])


def scan(x):
    return x.logcumsumexp(0)


def squares(f):
    return lambda x: f(x).square().sum()


assert torch.allclose(scan(x), by_sums(x)), "one function"
right = functional.jvp(by_sums, x, v)[1]
print("jvp of logcumsumexp:", functional.jvp(scan, x, v)[1].tolist(), "right:", right.tolist())
assert functional.jvp(scan, x, v)[1].isnan().all(), "no longer as found"
assert torch.allclose(torch.func.jvp(scan, (x,), (v,))[1], right), "forward mode is right"

hessian = functional.hessian(squares(by_sums), x)
print("hvp of its squares:", functional.hvp(squares(scan), x, v)[1].tolist(), "right:", (hessian @ v).tolist())
assert functional.hvp(squares(scan), x, v)[1].isnan().all(), "no longer as found"
assert torch.allclose(functional.hessian(squares(scan), x), hessian), "the whole Hessian is right"
assert torch.allclose(functional.vhp(squares(scan), x, v)[1], hessian @ v), "and so is vhp"

for op in (torch.cumsum, torch.logsumexp, torch.cumprod):
    f = lambda x: op(x, 0)  # noqa: B023, E731
    assert torch.allclose(functional.jvp(f, x, v)[1], torch.func.jvp(f, (x,), (v,))[1]), op
print("as found")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
