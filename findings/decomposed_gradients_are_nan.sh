#!/usr/bin/env bash
# torch.export, then run_decompositions(): sinc, log_ndtr, std and binary cross-entropy get NaN for a gradient that was a number.
#
# What one would guess: these ops have gradients of their own that are careful, and run_decompositions() keeps what they compute:
#   the gradient of torch.sinc at 0 is 0, that of torch.special.log_ndtr (the logarithm of the normal distribution function) at -10 is
#   10.098, a standard deviation of equal numbers has 0, and so has a cross-entropy whose prediction is exactly right.
# What happens: the model and the exported program say so. The decomposed program has the same outputs, and NaN for a gradient: its
#   spelling chooses between two formulas, and the infinite slope of the one that is not taken, or of a root at 0, is multiplied by
#   zero. For log_ndtr no edge is needed: in float64 each number below -8.3 does it, where the formula that is not taken is log1p(-1).
# Seen in PyTorch 2.13.0 (CPU build), and in 2.14.1 and 2.15.0, on 2026-11-30.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import math
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
print("PyTorch", torch.__version__)


class Scaled(nn.Module):
    """f(w x), summed; w is one everywhere."""

    def __init__(self, f, n):
        super().__init__()
        self.f, self.w = f, nn.Parameter(torch.ones(n, dtype=torch.float64))

    def forward(self, x):
        return self.f(self.w * x).sum()


def gradients(f, numbers):
    """{program: (output, gradient)} at w = 1."""
    x = torch.tensor(numbers, dtype=torch.float64)
    model = Scaled(f, len(x))
    exported = torch.export.export(model, (x,))
    programs = {"model": model, "exported": exported.module(), "decomposed": exported.run_decompositions().module()}
    found = {}
    for name, program in programs.items():
        output = program(x)
        found[name] = output.item(), torch.autograd.grad(output, program.w)[0].tolist()
    return found


label = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
cases = {
    "sinc": (torch.sinc, [-1.0, 0.0, 0.5], [1]),
    "log_ndtr": (torch.special.log_ndtr, [-30.0, -10.0, -8.4, -8.0, 1.0], [0, 1, 2]),
    "std": (torch.std, [2.0, 2.0, 2.0], [0, 1, 2]),
    "binary_cross_entropy": (lambda p: nn.functional.binary_cross_entropy(p, label), [1.0, 0.0, 0.5], [0, 1]),
}
for name, (f, numbers, broken) in cases.items():
    found = gradients(f, numbers)
    shown = {where: [round(v, 3) + 0.0 for v in g] for where, (_, g) in found.items()}
    print(f"{name} at {numbers}: model {shown['model']}, decomposed {shown['decomposed']}")
    (value, want), (again, got) = found["model"], found["decomposed"]
    assert math.isclose(value, again, rel_tol=1e-12) and found["exported"] == (value, want), "outputs are equal"
    assert all(math.isfinite(v) for v in want), "the model's gradient is finite"
    if name in ("sinc", "log_ndtr"):  # the two others are at an edge, where differences say nothing
        x = torch.tensor(numbers, dtype=torch.float64)
        slopes = ((f((1 + 1e-6) * x) - f((1 - 1e-6) * x)) / 2e-6).tolist()
        assert all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6) for a, b in zip(want, slopes)), "and right"
    assert [i for i, v in enumerate(got) if math.isnan(v)] == broken, "no longer as found"
    assert all(math.isclose(a, b, rel_tol=1e-9) for i, (a, b) in enumerate(zip(want, got)) if i not in broken)
print("as found: equal outputs, and gradients that are not a number")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
