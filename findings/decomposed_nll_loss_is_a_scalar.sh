#!/usr/bin/env bash
# torch.export with a dynamic batch: after run_decompositions({}), per-sample cross-entropy is noted as a scalar.
#
# What one would guess: run_decompositions({}) leaves the operators of an exported program as they are and makes them functional. The
#   loss of each sample, cross_entropy(f, y, reduction="none"), is a vector in the model and in the exported program, and stays one;
#   a dynamic batch changes nothing of that.
# What happens: with a static batch that is so. With a dynamic one the decomposed program says that the loss has no dimension
#   (meta["val"] has shape []), though it returns a vector when it runs. So whatever reads shapes from the program is misled, and a
#   model that goes on with the vector (takes its first entries, say) cannot be decomposed at all: slice() refuses a 0-dim tensor.
#   reduction="none" arrives as the number 0 at an argument that older callers used as a flag, and is read as "sum".
# Seen in PyTorch 2.13.0 (CPU build), and in 2.15.0, on 2026-11-29.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import warnings

import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

warnings.simplefilter("ignore")
print("PyTorch", torch.__version__)
f, y = torch.randn(4, 3), torch.randint(3, (4,))
dynamic = ({0: Dim.AUTO}, {0: Dim.AUTO})


class Losses(nn.Module):
    def forward(self, f, y):
        return F.cross_entropy(f, y, reduction="none")


class First(nn.Module):
    def forward(self, f, y):
        return F.cross_entropy(f, y, reduction="none")[:2]


def noted(model, shapes):
    """The shape that the decomposed program notes for its result, and the one that the result has."""
    program = torch.export.export(model, (f, y), dynamic_shapes=shapes).run_decompositions({})
    (result,) = program.graph.output_node().args[0]
    return tuple(result.meta["val"].shape), tuple(program.module()(f, y).shape)


static, moving = noted(Losses(), None), noted(Losses(), dynamic)
print("static batch:  noted", static[0], "returned", static[1])
print("dynamic batch: noted", moving[0], "returned", moving[1])
assert static == ((4,), (4,)) and moving[1] == (4,), "the numbers themselves are right"
assert moving[0] == (), "the vector is noted as a vector now: this finding is no longer true"
assert noted(First(), None) == ((2,), (2,)), "with a static batch the first entries are two numbers"
try:
    noted(First(), dynamic)
except Exception as error:
    print("dynamic batch, first entries:", type(error).__name__, str(error).splitlines()[0])
else:
    raise AssertionError("it decomposes now: this finding is no longer true")
print("as found: with a dynamic batch, a loss per sample passes for a scalar")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
