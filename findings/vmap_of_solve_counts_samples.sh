#!/usr/bin/env bash
# Individual gradients by torch.func.vmap(grad(...)) are N times too large where the model calls torch.linalg.solve(A, x).
#
# What one would guess: PyTorch's recipe for individual gradients (its tutorial: give the model a batch of one, sample.unsqueeze(0),
#   map that over the samples) gives what a loop over the samples gives, or an error. A is a parameter, x the samples' right-hand sides.
# What happens: under vmap, solve of a matrix without batch axes and of mapped right-hand sides with a batch axis of its own lines the
#   mapped axis of the one up with the batch axis of the other. Where that is one, as in the recipe, the two broadcast: a mapped call gives
#   [3, 3, 2, 4] instead of [3, 1, 2, 4], silently, and each of three individual gradients is three times too large. For other sizes it
#   raises, and torch.func.jacrev of the plain batch as well. inv(A) @ x, solve_triangular and A.expand are right.
# Seen in PyTorch 2.13.0 (CPU build), and in 2.11.0, 2.14.1 and 2.15.0, on 2026-11-30.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch.func import grad, jacrev, vmap

print("PyTorch", torch.__version__)
torch.manual_seed(0)
a = 3 * torch.eye(2, dtype=torch.float64) + 0.1 * torch.randn(2, 2, dtype=torch.float64)
x = torch.randn(3, 2, 4, dtype=torch.float64)  # three samples


def by_solve(a, x):
    return torch.linalg.solve(a, x)


def by_inverse(a, x):
    return torch.linalg.inv(a) @ x


def by_triangle(a, x):
    return torch.linalg.solve_triangular(a.triu(), x, upper=True)


def expanded(a, x):
    return torch.linalg.solve(a.expand(*x.shape[:-2], 2, 2), x)


def individual(model):
    """The recipe, and a loop."""
    loss = lambda a, sample: model(a, sample.unsqueeze(0)).square().sum()  # noqa: E731
    return vmap(grad(loss), (None, 0))(a, x), torch.stack([grad(loss)(a, sample) for sample in x])


for model in (by_inverse, by_triangle, expanded):
    found, right = individual(model)
    assert torch.allclose(found, right), model
found, right = individual(by_solve)
print("individual gradients over those of a loop:", (found / right).flatten().tolist())
assert torch.allclose(found, 3 * right), "no longer as found"

shape = vmap(lambda sample: by_solve(a, sample.unsqueeze(0)))(x).shape
print("a mapped batch of one:", tuple(shape))
assert shape == (3, 3, 2, 4), "no longer as found"

right = torch.autograd.functional.jacobian(lambda a: by_solve(a, x), a)
assert torch.allclose(jacrev(lambda a: by_inverse(a, x))(a), right)
try:
    jacrev(lambda a: by_solve(a, x))(a)
except RuntimeError as error:
    print("jacrev of the plain batch:", error)
else:
    raise AssertionError("no longer as found")
print("as found")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
