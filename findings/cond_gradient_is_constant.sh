#!/usr/bin/env bash
# torch.cond in a model: the gradient that is made with create_graph=True cannot be differentiated again, and nothing says so.
#
# What one would guess: torch.cond(c, f, g, x) is the `if` that compilers can see. What autograd gives of the branch that is taken is
#   what it gives of the same branch under a plain `if`: with create_graph=True a gradient that can be differentiated again, so a
#   gradient penalty or a Hessian-vector product is that of the model; if it could not, it would raise.
# What happens: the values are right, but the gradient has requires_grad=False, as if it did not depend on the parameters. A penalty
#   that is added to a loss keeps its value and loses its derivative: training runs, unpenalised, without a word.
# Seen in PyTorch 2.13.0 (CPU build), and in 2.14.1 and 2.15.0, on 2026-11-29.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch import nn

print("PyTorch", torch.__version__)
torch.manual_seed(0)
layer = nn.Linear(2, 3).double()
x, y = torch.rand(4, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)


def by_cond():
    return torch.cond(x.sum() > 0, lambda x: torch.tanh(layer(x)), lambda x: torch.sin(layer(x)), (x,))


def by_if():
    return torch.tanh(layer(x)) if x.sum() > 0 else torch.sin(layer(x))


def trained(forward):
    """(the penalty, whether it can be differentiated, the gradient of loss + 10 penalty) of one step."""
    loss = (forward() - y).square().mean()
    (g,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
    penalty = g.square().sum()
    (total,) = torch.autograd.grad(loss + 10 * penalty, layer.weight)
    (alone,) = torch.autograd.grad((forward() - y).square().mean(), layer.weight)
    return penalty.item(), g.requires_grad, total, alone


penalty, follows, total, alone = trained(by_if)
penalty_of_cond, follows_of_cond, total_of_cond, alone_of_cond = trained(by_cond)
print(f"if:   penalty {penalty:.6f}, its gradient can be differentiated: {follows}, moves the step: {not torch.allclose(total, alone)}")
print(
    f"cond: penalty {penalty_of_cond:.6f}, its gradient can be differentiated: {follows_of_cond}, "
    f"moves the step: {not torch.allclose(total_of_cond, alone_of_cond)}"
)
assert abs(penalty - penalty_of_cond) < 1e-12 and torch.allclose(alone, alone_of_cond), "first derivatives are equal"
assert follows and not torch.allclose(total, alone), "under a plain `if` the penalty counts"
assert not follows_of_cond and torch.allclose(total_of_cond, alone_of_cond), "it counts under torch.cond now: no longer true"
print("as found: torch.cond's gradient is a constant to autograd, and the penalty has no effect")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
