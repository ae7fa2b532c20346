#!/usr/bin/env bash
# curvlinops: KFAC and EKFAC count the targets that CrossEntropyLoss ignores; the GGN of the same library, model and data does not.
#
# What one would guess: a target of -100 (ignore_index, how padding is marked) adds nothing to the loss, so nothing to its curvature.
#   GGNLinearOperator and EKFACLinearOperator with the exact loss Hessian (fisher_type="type-2") take the same loss object; EKFAC
#   corrects its eigenvalues, so its trace is the GGN's whatever the Kronecker factors are, and with four of ten targets ignored
#   both are what they are for the six others alone.
# What happens: so it is for the GGN. EKFAC's trace is that of all ten samples, as if the four had labels: of a sum, 10/6 of it for
#   equal samples; of a mean it is the mean of ten and not of six. KFAC's factors contain them too. Nothing is said.
# Seen in curvlinops-for-pytorch 3.0.1 with PyTorch 2.13.0 (CPU build) on 2026-11-30.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5" "curvlinops-for-pytorch==3.0.1"
"$folder/env/bin/pip" uninstall --quiet --yes torchvision  # of another build of PyTorch than this one, and nothing here needs it
cat > "$folder/run.py" <<'PYTHON'
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")

import torch
from curvlinops import EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator
from torch import nn

print("curvlinops-for-pytorch", version("curvlinops-for-pytorch"), "PyTorch", torch.__version__)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 4, bias=False)).double()
x, labels = torch.randn(10, 3, dtype=torch.float64), torch.randint(4, (10,))
padded = labels.clone()
padded[[0, 1, 2, 7]] = -100
kept = padded >= 0


def trace(operator, loss, x, y, **options):
    made = operator(model, loss, list(model.parameters()), [(x, y)], check_deterministic=False, **options)
    return (made @ torch.eye(12, dtype=torch.float64)).diagonal().sum().item()


def by_hand(reduction):
    """The trace of the Gauss-Newton: a loop over the samples that count."""
    total = 0.0
    for row in x[kept]:
        p = model(row).softmax(0)
        total += ((p - p * p).sum() * row.square().sum()).item()
    return total / int(kept.sum()) if reduction == "mean" else total


for reduction in ("sum", "mean"):
    loss = nn.CrossEntropyLoss(reduction=reduction)
    exact = by_hand(reduction)
    ggn = trace(GGNLinearOperator, loss, x, padded)
    print(f"{reduction}: by hand {exact:.5f}, GGN {ggn:.5f}")
    assert abs(ggn - exact) < 1e-9, "the GGN leaves them out"
    for operator in (EKFACLinearOperator, KFACLinearOperator):
        alone, all_ten = (trace(operator, loss, *data, fisher_type="type-2") for data in ((x[kept], labels[kept]), (x, labels)))
        found = trace(operator, loss, x, padded, fisher_type="type-2")
        print(f"  {operator.__name__}: six samples {alone:.5f}, ten of which four are ignored {found:.5f}, ten {all_ten:.5f}")
        if operator is EKFACLinearOperator:
            assert abs(alone - exact) < 1e-9, "without ignored targets EKFAC's trace is exact"
        assert abs(found / alone - 1) > 0.1, "ignored targets are left out now: this finding is no longer true"
        assert abs(found - all_ten) < 1e-9, "it is that of ten samples"
print("as found: a target that the loss ignores is counted by the Kronecker factors")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
