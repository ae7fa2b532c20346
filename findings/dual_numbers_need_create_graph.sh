#!/usr/bin/env bash
# Forward mode over reverse mode: whether the gradient is asked for with create_graph=True decides what its tangent is.
#
# What one would guess: a Hessian-vector product by dual numbers is one backward pass over a forward pass whose parameters carry
#   tangents (torch.autograd.forward_ad); the tangent of the gradient is the product. Nothing is differentiated by reverse mode
#   twice, so create_graph=True, whose one purpose is a second backward pass, costs memory and changes no number.
# What happens: for most ops (inv and cholesky here) that is so. For det, logdet, slogdet, cumprod and prod the backward pass
#   chooses its formula by create_graph, and the one for False loses the tangents of what it reads: logdet's gradient has no tangent
#   at all (None, which stands for zero), det's is another matrix, both where the argument is invertible; cumprod's is wrong at a
#   zero in its input, prod's is None at two. Values and gradients are right.
# Seen in PyTorch 2.13.0 (CPU build), and in 2.14.1 and 2.15.0, on 2026-11-30.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch.autograd import forward_ad

print("PyTorch", torch.__version__)
matrix = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 4.0]], dtype=torch.float64)
direction = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 10.0]], dtype=torch.float64)
vector = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
one_zero, two_zeros = torch.tensor([2.0, 0.0, 3.0], dtype=torch.float64), torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)


def gradient(f, at):
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(f(leaf), leaf)[0]


def by_differences(f, at, v):
    """The Hessian-vector product, from first derivatives alone."""
    return (gradient(f, at + 1e-5 * v) - gradient(f, at - 1e-5 * v)) / 2e-5


def by_dual_numbers(f, at, v, create_graph):
    with forward_ad.dual_level():
        leaf = at.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(forward_ad.make_dual(leaf, v)), leaf, create_graph=create_graph)
        tangent = forward_ad.unpack_dual(g).tangent
    return None if tangent is None else tangent.detach()


def shown(t):
    return None if t is None else [round(v, 4) + 0.0 for v in t.flatten()[:3].tolist()]


functions = {
    "inv": (lambda a: torch.linalg.inv(a).sum(), matrix, direction),
    "cholesky": (lambda a: torch.linalg.cholesky(a @ a.T).sum(), matrix, direction),
    "det": (torch.linalg.det, matrix, direction),
    "logdet": (torch.logdet, matrix, direction),
    "slogdet": (lambda a: torch.linalg.slogdet(a)[1], matrix, direction),
    "cumprod": (lambda t: t.cumprod(0).sum(), one_zero, vector),
    "prod": (torch.prod, two_zeros, vector),
}
for name, (f, at, v) in functions.items():
    want, without, with_graph = by_differences(f, at, v), by_dual_numbers(f, at, v, False), by_dual_numbers(f, at, v, True)
    print(f"{name:8} differences {shown(want)}, create_graph=True {shown(with_graph)}, create_graph=False {shown(without)}")
    close = {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(with_graph, want, **close), "with the graph it is right"
    right = without is not None and torch.allclose(without, want, **close)
    assert right == (name in ("inv", "cholesky")), "no longer as found"
    assert (without is None) == (name in ("logdet", "slogdet", "prod")), "no longer as found"
print("as found: create_graph=False gives five of the seven functions another second derivative")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
