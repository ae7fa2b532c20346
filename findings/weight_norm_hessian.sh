#!/usr/bin/env bash
# The Hessian of a weight-normalised layer is wrong in PyTorch, and not even symmetric; the gradient is right.
#
# What one would guess: torch.nn.utils.parametrizations.weight_norm says w = g v / |v|, ops that autograd differentiates as often as
#   one likes: Hessian-vector products and Hessians of a model with such layers are right, or an error.
# What happens: for dim=0, the default, and for the last dimension, torch._weight_norm is one fused op. Its backward gives the right
#   gradient, but that backward's own derivative in v is wrong, silently: the Hessian of a smooth function of w is off by as much as
#   it is large, and its two triangles differ. gradgradcheck says so at once. The derivative in g is right, and so is everything
#   for a dimension in the middle, which is said in plain ops. Forward mode raises. The hooks of torch.nn.utils.weight_norm, the
#   older spelling, call the same op.
# Seen in PyTorch 2.13.0 (CPU build), and in 2.11.0, 2.14.1 and 2.15.0, on 2026-11-30.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch import nn
from torch.autograd import gradgradcheck
from torch.autograd.functional import hessian
from torch.nn.utils.parametrizations import weight_norm

print("PyTorch", torch.__version__)
torch.manual_seed(0)
layer = weight_norm(nn.Linear(3, 4, dtype=torch.float64))
x = torch.randn(5, 3, dtype=torch.float64)
g, v = (getattr(layer.parametrizations.weight, f"original{k}").detach() for k in (0, 1))


def by_module(v):
    return torch.func.functional_call(layer, {"parametrizations.weight.original1": v}, (x,)).sin().sum()


def by_hand(v):
    return nn.functional.linear(x, v * (g / v.norm(2, 1, keepdim=True)), layer.bias.detach()).sin().sum()


def gradient(f, v):
    v = v.detach().requires_grad_()
    return torch.autograd.grad(f(v), v)[0]


assert torch.allclose(by_module(v), by_hand(v)) and torch.allclose(gradient(by_module, v), gradient(by_hand, v))
wrong, right = (hessian(f, v).reshape(v.numel(), v.numel()) for f in (by_module, by_hand))
steps = torch.eye(v.numel(), dtype=v.dtype).reshape(-1, *v.shape) * 1e-5
differences = [(gradient(by_module, v + s) - gradient(by_module, v - s)).flatten() / 2e-5 for s in steps]
assert torch.allclose(torch.stack(differences), right, atol=1e-7), "differences of PyTorch's own gradient"
print("largest entry of the Hessian:", right.abs().max().item())
print("largest error:               ", (wrong - right).abs().max().item())
print("largest difference of its two triangles:", (wrong - wrong.T).abs().max().item())
assert (wrong - right).abs().max() > 0.1 and (wrong - wrong.T).abs().max() > 0.1, "no longer as found"

for shape, dim in [((4, 3), 0), ((4, 3), 1), ((4, 3, 2), 1)]:
    v = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.rand([n if k == dim else 1 for k, n in enumerate(shape)], dtype=torch.float64, requires_grad=True)
    found = [
        gradgradcheck(lambda v, g=g.detach(), dim=dim: torch._weight_norm(v, g, dim), v, raise_exception=False),
        gradgradcheck(lambda g, v=v.detach(), dim=dim: torch._weight_norm(v, g, dim), g, raise_exception=False),
    ]
    print(f"gradgradcheck of {shape} along {dim}: in v {found[0]}, in g {found[1]}")
    assert found == [dim == 1 and len(shape) == 3, True], "no longer as found"
print("as found")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
