#!/usr/bin/env bash
# torch.optim.Optimizer.load_state_dict: a string in a parameter's state comes back as the text of a generator, and Kronecker factors
# in a list come back in the parameter's dtype.
#
# What one would guess: an optimizer of second order keeps, for each parameter, its factors (a list of matrices, in float32 or float64
#   though the model is in bfloat16, since they are inverted) and a word that says which block it is. state_dict() has both, torch.save
#   and torch.load keep both, so load_state_dict() gives both back; what is no tensor is left alone.
# What happens: load_state_dict() casts every value of a parameter's state, and what is iterable it makes anew from a generator, whose
#   type it calls with it. A string is iterable: str(generator) is "<generator object ...>", for every word, without a warning. A
#   list is too: the matrices in it are cast to the parameter's dtype, so factors in float64 come back in bfloat16, with 8 bits of
#   mantissa, while a matrix that lies in the state by itself under the name "step" keeps its dtype.
# Seen in PyTorch 2.13.0 (CPU build), on 2026-11-29.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch import nn


class Curvature(torch.optim.Optimizer):
    """Keeps factors and the kind of its block for each parameter."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self):
        for p in self.param_groups[0]["params"]:
            factor = torch.full((2, 2), 1 / 3, dtype=torch.float64)
            self.state[p] = {"kind": "kronecker", "factors": [factor], "step": factor.clone()}


print("PyTorch", torch.__version__)
weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
first, second = Curvature([weight]), Curvature([weight])
first.step()
saved = first.state_dict()
assert saved["state"][0]["kind"] == "kronecker" and saved["state"][0]["factors"][0].dtype == torch.float64
second.load_state_dict(saved)
found = second.state[weight]
print("kind:   ", found["kind"])
print("factors:", found["factors"][0].dtype, found["factors"][0].double()[0, 0].item(), "and step:", found["step"].dtype)
assert found["kind"].startswith("<generator object"), "strings survive now: this finding is no longer true"
assert found["factors"][0].dtype == torch.bfloat16, "factors in a list keep their dtype now: this finding is no longer true"
assert found["step"].dtype == torch.float64
print("load_state_dict has changed both, silently")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
