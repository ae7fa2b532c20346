#!/usr/bin/env bash
# torch.fx: a graph whose placeholders are named like other nodes passes lint, and its code reads another argument than the graph says.
#
# What one would guess: `graph.placeholder("x_2")` makes an argument x_2. If a node has that name already, fx finds a free name for the
#   new node and keeps the target, so `GraphModule.forward` and `fx.Interpreter` return the same.
# What happens: the node's name is counted on ("x_3"), and the code begins with a line `x_3 = x_2` for it. If an argument of the name x_3
#   comes later, that line writes over it before it is read: forward returns the second argument twice, where the interpreter returns the
#   third. `graph.lint()` is silent, nothing is raised. A node that was made and erased (an unused placeholder of a pass) is enough.
# Seen in PyTorch 2.13.0 (CPU build), and in 2.12.1, 2.14.1 and 2.15.0, on 2026-11-30.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "torch==2.13.0" "numpy==2.3.5"
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch import fx, nn

print("PyTorch", torch.__version__)


def module(erased: bool) -> fx.GraphModule:
    """Returns its three arguments."""
    graph = fx.Graph()
    first = graph.placeholder("x_1")
    unused = graph.placeholder("x_1") if erased else None
    second, third = graph.placeholder("x_2"), graph.placeholder("x_3")
    graph.output((first, second, third))
    if unused is not None:
        graph.erase_node(unused)
    graph.lint()
    return fx.GraphModule(nn.Module(), graph)


for erased in (False, True):
    made = module(erased)
    called, interpreted = made(10, 20, 30), fx.Interpreter(made).run(10, 20, 30)
    print(f"after an unused placeholder was erased: {erased}; forward {called}, interpreter {interpreted}")
    print(made.code.strip())
    assert interpreted == (10, 20, 30), "no longer as found"
    assert called == ((10, 20, 20) if erased else (10, 20, 30)), "no longer as found"
print("as found: the third argument is lost in the code, not in the graph")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
