#!/usr/bin/env bash
# torch.export, then run_decompositions(): the gradient of index_fill's value counts a place twice that the index names twice.
#
# What one would guess: index_fill(x, 0, index, value) puts one value at some places, and a place that index names twice holds it
#   once. The gradient of the value is the sum of the cotangent over the places that hold it: of the model, of the exported program,
#   and of the program after run_decompositions(), which computes the same outputs.
# What happens: outputs are equal. The model and the exported program give the right gradient; the decomposed one adds the
#   cotangent of a place once for every time that index names it, and says nothing. With each place named once, all are equal.
# Seen in PyTorch 2.13.0 (CPU build), and in 2.14.1 and 2.15.0, on 2026-11-30.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
print("PyTorch", torch.__version__)


class Masked(nn.Module):
    """A learned value at the masked places, as a mask token is."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x, index):
        return (torch.index_fill(x, 0, index, self.value) * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)).sum()


def compare(index):
    """{program: (output, gradient)}, and the slope by differences, which is exact since the output is linear in the value."""
    model, x = Masked(), torch.zeros(4, dtype=torch.float64)
    exported = torch.export.export(model, (x, index))
    programs = {"model": model, "exported": exported.module(), "decomposed": exported.run_decompositions().module()}
    found = {}
    for name, program in programs.items():
        output = program(x, index)
        found[name] = output.item(), torch.autograd.grad(output, program.value)[0].item()
    with torch.no_grad():
        before = model(x, index).item()
        model.value += 1
        return found, model(x, index).item() - before


for places in ([0, 2], [0, 2, 2]):
    found, slope = compare(torch.tensor(places))
    print(f"index {places}: slope {slope}, (output, gradient) {found}")
    assert found["model"] == found["exported"] == (8.0, 4.0) and slope == 4.0, "model and exported program are right"
    expected = 4.0 if places == [0, 2] else 7.0
    assert found["decomposed"] == (8.0, expected), "no longer as found"
print("as found: 1 + 3 has become 1 + 3 + 3")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
