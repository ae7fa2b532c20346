#!/usr/bin/env bash
# LeViT of transformers in eval mode: parameters that have changed are not seen, and per-sample gradients become zero, silently.
#
# What one would guess: eval() fixes dropout and batch norm's statistics, and nothing else. A model in eval mode is a function of its
#   parameters: it can be differentiated again and again, be fine-tuned with its statistics frozen, and be given other parameters by
#   torch.func.functional_call, as individual gradients, influence functions and Laplace approximations do.
# What happens: each attention keeps its biases, gathered from the parameter `attention_biases`, in a dictionary at its first forward
#   pass in eval mode, and uses what is kept until train() is called.
#   1. A second gradient in eval mode raises "Trying to backward through the graph a second time", though the pass is a new one.
#   2. Changing the parameter, as an optimizer step does, does not change the output.
#   3. torch.func.grad of functional_call has the gradient of these parameters at its first call, and zero at every later one; other
#      values of them are ignored. Nothing is raised.
#   Calling train() and then eval() before each pass empties the dictionary, and all three are as one would guess.
# Seen in transformers 5.24.0 with PyTorch 2.13.0 (CPU build), on 2026-11-30.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5" "transformers==5.24.0"
cat > "$folder/run.py" <<'PYTHON'
import torch
import transformers
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

print("transformers", transformers.__version__, "PyTorch", torch.__version__)
settings = transformers.LevitConfig(
    image_size=32, hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[4, 4, 4],
    down_ops=[["Subsample", 4, 2, 4, 2, 2], ["Subsample", 4, 2, 4, 2, 2]], num_labels=3,
)


def fresh():
    torch.manual_seed(0)
    model = transformers.LevitForImageClassification(settings).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


x, y = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1])
name = next(n for n, _ in fresh().named_parameters() if n.endswith("attention_biases"))

model = fresh()
cross_entropy(model(x).logits, y).backward()
try:
    cross_entropy(model(x).logits, y).backward()
    print("1. a second gradient: works")
    again = True
except RuntimeError as error:
    print("1. a second gradient:", str(error).split("(")[0])
    again = False

model = fresh()
with torch.no_grad():
    before = model(x).logits
    model.get_parameter(name).add_(3.0 * torch.randn_like(model.get_parameter(name)))
    same = torch.equal(before, model(x).logits)
    model.train().eval()
    moved = (model(x).logits - before).abs().max().item()
print("2. the output after the parameter changed is the same:", same, "; after train() and eval() it has moved by", moved)

model = fresh()
parameters = {n: p.detach() for n, p in model.named_parameters()}
of_one = grad(lambda p: cross_entropy(functional_call(model, p, (x[:1],)).logits, y[:1]))
first, second = of_one(parameters)[name].abs().max().item(), of_one(parameters)[name].abs().max().item()
model.train().eval()
third = of_one(parameters)[name].abs().max().item()
print("3. largest entry of the gradient by torch.func.grad:", first, ", then", second, ", after train() and eval()", third)

assert not again and same and moved > 1e-4, "no longer as found"
assert first > 1e-4 and second == 0.0 and third == first, "no longer as found"
print("as found")
PYTHON
"$folder/env/bin/python" -W ignore "$folder/run.py"
