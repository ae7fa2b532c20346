#!/usr/bin/env bash
# torch.export of a stacked nn.LSTM, nn.GRU or nn.RNN in training mode: the decomposed program has no dropout between the layers.
#
# What one would guess: run_decompositions() changes how a program is spelled, not what it computes. A model that is exported in
#   training mode with dropout=0.9 drops nine of ten entries between its layers before and after; if it could not, it would say so.
# What happens: the exported program has one op per network (aten.lstm.input), which drops. PyTorch's own decomposition of that op
#   takes the probability and the training flag, and applies neither: the decomposed program is that of evaluation mode, without a
#   word. A single nn.Dropout in the same model stays.
# Seen in PyTorch 2.13.0 (CPU build) on 2026-11-29.
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
x = torch.randn(5, 2, 3)
for kind in (nn.LSTM, nn.GRU, nn.RNN):
    torch.manual_seed(0)
    layers = kind(3, 4, num_layers=2, dropout=0.9).train()
    exported = torch.export.export(layers, (x,))
    programs = {"model": layers, "exported": exported.module(), "decomposed": exported.run_decompositions().module()}
    outcomes = {}
    for name, program in programs.items():
        outcomes[name] = len({tuple(program(x)[0].flatten().tolist()) for _ in range(6)})
    evaluated = torch.allclose(layers.eval()(x)[0], programs["decomposed"](x)[0], atol=1e-6)
    print(f"{kind.__name__}: different outputs of six calls {outcomes}; decomposed equals the model in evaluation mode: {evaluated}")
    assert outcomes["model"] > 1 and outcomes["exported"] > 1, "the model and the exported program drop"
    assert outcomes["decomposed"] == 1 and evaluated, "the decomposed program drops now: this finding is no longer true"

both = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9)).train()
kept = torch.export.export(both, (x,)).run_decompositions().module()
assert len({tuple(kept(x).flatten().tolist()) for _ in range(6)}) > 1, "nn.Dropout stays"
print("as found: decomposing took the dropout between recurrent layers away, and left nn.Dropout")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
