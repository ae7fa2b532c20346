#!/usr/bin/env bash
# torch.vmap of torch.roll gives each sample another sample's value where a sample's value has no dimension.
#
# What one would guess: torch.roll of a tensor without dimensions gives that tensor (it does), so mapped over samples it gives the
#   samples as they are, and mapped over cotangents (torch.func.jacrev) the rows of the Jacobian in their order.
# What happens: under vmap, without `dims`, the batch itself is rolled: sample n gets the value of sample n - 1, silently. The rows of a
#   Jacobian by jacrev are exchanged; by a loop, and by torch.autograd.grad(is_grads_batched=True), they are right. Values with one
#   dimension or more are right.
# Seen in PyTorch 2.13.0 (CPU build), and in 2.11.0, 2.14.1 and 2.15.0, on 2026-12-01.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import torch

print("PyTorch", torch.__version__)
x = torch.tensor([1.0, 2.0, 3.0])


def rolled(t):
    return torch.roll(t, 1)


assert [rolled(t).item() for t in x] == [1, 2, 3]
found = torch.vmap(rolled)(x).tolist()
print("mapped over", x.tolist(), "it gives", found)
assert found == [3, 1, 2], "no longer as found"

rows = torch.randn(3, 4)
assert torch.equal(torch.vmap(rolled)(rows), torch.stack([rolled(t) for t in rows]))
assert torch.equal(torch.vmap(lambda t: torch.roll(t, 1, 0))(rows), torch.stack([rolled(t) for t in rows]))


def model(w):
    return rolled(w) * x


w = torch.tensor(2.0, requires_grad=True)
by_loop = torch.stack([torch.autograd.grad(y, w, retain_graph=True)[0] for y in model(w)])
by_rows = torch.func.jacrev(model)(w.detach())
(by_batch,) = torch.autograd.grad(model(w), w, torch.eye(3), is_grads_batched=True)
print("Jacobian by a loop:", by_loop.tolist(), "by jacrev:", by_rows.tolist(), "by is_grads_batched:", by_batch.tolist())
assert by_loop.tolist() == by_batch.tolist() == [1, 2, 3]
assert by_rows.tolist() == [2, 3, 1], "no longer as found"
print("as found")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
