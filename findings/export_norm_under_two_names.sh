#!/usr/bin/env bash
# torch.export: a batch norm that a Sequential holds twice is exported, and cannot be decomposed; called twice by one name it can.
#
# What one would guess: nn.Sequential(linear, norm, tanh, norm) and a forward that calls self.norm twice are the same computation,
#   so what can be exported and decomposed of one can of the other. If torch.export cannot, it says so itself, as it does of
#   other models, and names the module.
# What happens: torch.export.export takes both. Its graph lists the norm's buffers under both names, and the program that it
#   gives updates them as the model does. But run_decompositions(), which most users of exported programs call next, raises a
#   bare AssertionError ("expected compiled_fn to be GraphModule, got <class 'function'>"), which names neither module nor
#   buffer. In eval mode, where no buffer is written, and with one name it goes through.
# Seen in PyTorch 2.13.0 (CPU build) on 2026-12-01; the same by 2.15.0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import copy

import torch
from torch import nn

torch.manual_seed(0)
x = torch.randn(6, 4)


class Called(nn.Module):
    def __init__(self, linear, norm):
        super().__init__()
        self.linear, self.norm = linear, norm

    def forward(self, x):
        return self.norm(self.norm(self.linear(x)).tanh())


def decomposed(exported):
    """Whether it can be, in words."""
    try:
        exported.run_decompositions({})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "decomposed"


linear, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
held = nn.Sequential(linear, norm, nn.Tanh(), norm)
called = Called(*copy.deepcopy((linear, norm)))
plain = copy.deepcopy(held)
assert torch.equal(plain(x), called(x)), "they are the same model"

print("PyTorch", torch.__version__)
exported = torch.export.export(held, (x,))
named = [spec.target for spec in exported.graph_signature.input_specs if "running_mean" in str(spec.target)]
print("held under two names: exported; buffers:", named)
program = exported.module()
program(x)
after = {name: t for name, t in program.named_buffers() if "running_mean" in name}
print("its program updates them as the model does:", all(torch.allclose(t, plain[1].running_mean) for t in after.values()))
seen = {
    "held under two names": decomposed(exported),
    "called twice": decomposed(torch.export.export(called, (x,))),
    "held under two names, eval": decomposed(torch.export.export(held.eval(), (x,))),
}
for what, found in seen.items():
    print(f"{what}: {found}")
assert seen["held under two names"].startswith("AssertionError") and "norm" not in seen["held under two names"]
assert seen["called twice"] == seen["held under two names, eval"] == "decomposed"
print("as found: it is exported, and fails where it is decomposed")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
