#!/usr/bin/env bash
# torch.export with a dynamic batch, and opt_einsum in the environment: a product of three operands fixes the batch size.
#
# What one would guess: PyTorch uses opt_einsum, where it is installed, to choose the order in which torch.einsum multiplies several
#   operands. That changes how fast a product is, and perhaps its last digits; which models can be exported does not depend on it,
#   nor for which batches an exported program serves.
# What happens: opt_einsum asks every size for a number, which torch.export takes for a wish to have that number. So the same model,
#   exported with Dim.AUTO for the batch, serves any batch without opt_einsum, and only batches of the size at export with it.
#   Nothing is said at export. opt_einsum comes with other packages (curvlinops, say), so nobody may have asked for it.
# Seen in PyTorch 2.13.0 (CPU build) with opt_einsum 3.4.0 on 2026-11-30.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import importlib.util

import torch
from torch import nn
from torch.export import Dim


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return torch.einsum("ni,ij,jk->nk", x, self.a, self.b)


model = Three()
program = torch.export.export(model, (torch.randn(5, 3),), dynamic_shapes=({0: Dim.AUTO},))
x = torch.randn(4, 3)
try:
    serves = torch.allclose(program.module()(x), model(x), atol=1e-6)
except (AssertionError, RuntimeError) as error:
    serves = False
    print(str(error).splitlines()[0])
has = importlib.util.find_spec("opt_einsum") is not None
print("PyTorch", torch.__version__, "opt_einsum is", "there:" if has else "not there:", "serves another batch:", serves)
assert serves != has, "it is no longer so"
PYTHON
"$folder/env/bin/python" "$folder/run.py"
"$folder/env/bin/pip" install --quiet "opt_einsum==3.4.0"
"$folder/env/bin/python" "$folder/run.py"
echo "as found: the batch is fixed where opt_einsum is installed"
