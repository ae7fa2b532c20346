"""Further implementations of ops: on CUDA, and into memory of the caller's.

The one for CUDA is in a module beside the op, `<op>_triton.py`, which is imported at the first call: Triton comes only
with PyTorch's CUDA builds, so importing fxcurv must not import it. Kernels cannot be defined inside a function instead,
because Triton's interpreter, which tests use, resolves a kernel's names in its module alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

# Op -> the same op on a CPU with `out=`, memory for its result. Ops of PyTorch have such variants.
INTO: dict[Any, Callable] = {aten.bmm.default: aten.bmm.out, aten.mul.Tensor: aten.mul.out}


def on_cuda(op: Any, name: str, file: str | None = None) -> None:
    """Register function `name` of `<file>_triton` (default: `<name>_triton`) as the CUDA implementation of the op."""
    module = f"fxcurv.kernels.{file or name}_triton"

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    op.register_kernel("cuda")(run)
