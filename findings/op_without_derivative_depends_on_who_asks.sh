#!/usr/bin/env bash
# An op that has a Python kernel and no derivative of its own: autograd and export are right, torch.func takes zero, torch.compile None.
#
# What one would guess: whether an op of torch.library that is written in PyTorch ops can be differentiated is one question with one
#   answer, and torch.func.grad, a compiled module and an exported module give the gradient that plain autograd gives, or raise.
# What happens: Library.impl(name, fn, "CPU") registers nothing for autograd, yet plain autograd sees the ops inside of fn: the
#   gradient is right (with a warning that it may not be). Dual numbers and torch.export's module are right too. The transforms of
#   torch.func run fn below their level: grad and jacrev are zero, jvp's tangent is zero without any warning, and with it each
#   per-sample gradient by vmap(grad). torch.compile's module has no gradient at all: None under allow_unused, for every parameter
#   before the op. So a check of one way against another passes or fails with the pair that is compared.
# Seen in PyTorch 2.13.0 (CPU build) on 2026-11-30.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import warnings

import torch
from torch import nn
from torch.autograd import forward_ad

print("PyTorch", torch.__version__)
library = torch.library.Library("found", "FRAGMENT")
library.define("squash(Tensor x) -> Tensor")
library.impl("squash", lambda x: x.tanh(), "CPU")
torch.library.register_fake("found::squash", torch.empty_like, lib=library)
squash = torch.ops.found.squash

x = torch.tensor([[0.5, 1.0]], dtype=torch.float64)
right = 1 - x.tanh() ** 2


def total(x):
    return squash(x).sum()


def of_parameters(call, module):
    return torch.autograd.grad(call(x).sum(), list(module.parameters()), allow_unused=True)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    h = x.clone().requires_grad_()
    print("autograd:       ", torch.autograd.grad(total(h), h)[0].tolist(), "right:", right.tolist())
    assert torch.allclose(torch.autograd.grad(total(h), h)[0], right), "plain autograd is right"
    with forward_ad.dual_level():
        assert torch.allclose(forward_ad.unpack_dual(squash(forward_ad.make_dual(x, torch.ones_like(x)))).tangent, right)

    for name, found in {
        "torch.func.grad:": torch.func.grad(total)(x),
        "jacrev:         ": torch.func.jacrev(total)(x),
        "vmap(grad):     ": torch.vmap(torch.func.grad(total))(x),
    }.items():
        print(name, found.tolist())
        assert not found.any(), "no longer as found"

    module = nn.Linear(2, 2, dtype=torch.float64)
    model = nn.Sequential(module, type("Squash", (nn.Module,), {"forward": lambda self, x: squash(x)})())
    plain = of_parameters(model, model)
    exported = torch.export.export(model, (x,)).module()
    assert all(torch.allclose(a, b) for a, b in zip(plain, of_parameters(exported, exported), strict=True)), "export is right"
    compiled = of_parameters(torch.compile(model, backend="aot_eager"), model)
    print("torch.compile:  ", compiled)
    assert compiled == (None, None), "no longer as found"

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    torch.func.jvp(torch.tanh, (x,), (x,))  # forward mode's own warnings come at its first use
    said.clear()
    tangent = torch.func.jvp(squash, (x,), (torch.ones_like(x),))[1]
print("jvp:            ", tangent.tolist(), "warnings:", len(said))
assert not tangent.any() and not said, "no longer as found"
print("as found")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
