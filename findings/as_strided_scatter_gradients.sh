#!/usr/bin/env bash
# torch.as_strided_scatter: the gradient of its first input is that of the entries which the op overwrites.
#
# What one would guess: y = as_strided_scatter(x, src, ...) is a copy of x in which some entries are src's. The gradient of
#   <g, y> in x is g with zeros where src was written, and in src it is g at these entries: the op is linear, and
#   finite differences are exact.
# What happens: the gradient in x is g where src was written, and zero everywhere else: the wrong way round, silently. The
#   gradient in src is right where x is contiguous. Of a transposed x (which may have no gradient of its own then) it is wrong
#   too: the forward writes at the strides of x's memory, the backward reads the cotangent as if x were contiguous.
# Seen in PyTorch 2.13.0 (CPU build) on 2026-12-01; the same by 2.11.0 and 2.15.0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import torch

G = torch.arange(1.0, 13.0, dtype=torch.double).reshape(3, 4)


def value(x, src):
    return (torch.as_strided_scatter(x, src, [2], [5], 1) * G).sum()  # two entries are overwritten


def gradients(function, at):
    """(by autograd, by finite differences) of a linear function."""
    at = at.requires_grad_()
    (auto,) = torch.autograd.grad(function(at), at)
    units = torch.eye(at.numel(), dtype=at.dtype).reshape(-1, *at.shape)
    return auto, torch.stack([function(unit.clone()) - function(0 * unit) for unit in units]).detach().reshape(at.shape)


print("PyTorch", torch.__version__)
x, transposed, src = (torch.ones(s, dtype=torch.double) for s in [(3, 4), (4, 3), (2,)])
in_x = gradients(lambda x: value(x, src), x.clone())
in_src = gradients(lambda src: value(x, src), src.clone())
of_transposed = gradients(lambda src: value(transposed.t(), src), src.clone())
for name, (auto, exact) in {"x": in_x, "src": in_src, "src, x transposed": of_transposed}.items():
    print(f"gradient in {name}: autograd {auto.tolist()}, differences {exact.tolist()}")
assert torch.equal(in_x[0] != 0, in_x[1] == 0), "the gradient in x is no longer the wrong way round"
assert torch.equal(*in_src), "the gradient in src was right for a contiguous x"
assert not torch.equal(*of_transposed), "the gradient in src is right for a transposed x now"
print("as found: autograd's gradient of x is that of the overwritten entries")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
