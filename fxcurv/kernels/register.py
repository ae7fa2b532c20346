"""Where an op's other implementations are: for CUDA, and into memory that the caller has.

For CUDA it is in a module beside the op, `<op>_triton.py`, imported at the first call.

Triton comes with PyTorch's CUDA builds only, so importing fxcurv must not import it. Its kernels cannot be defined inside a
function either: the interpreter that tests run them in resolves a kernel's names in its module alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

# Op -> the same op with `out=`, memory for its result, on a CPU. Products of a linear layer are PyTorch's.
INTO: dict[Any, Callable] = {aten.bmm.default: aten.bmm.out, aten.mul.Tensor: aten.mul.out}


def on_cuda(op: Any, name: str, file: str | None = None) -> None:
    """Make the function `name` of `<file>_triton` (of `<name>_triton`) the implementation of the custom op `op` on CUDA."""
    module = f"fxcurv.kernels.{file or name}_triton"

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    op.register_kernel("cuda")(run)
