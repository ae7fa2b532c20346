"""Where an op's CUDA implementation is: in a module beside it, `<op>_triton.py`, imported at the first call.

Triton comes with PyTorch's CUDA builds only, so importing fxcurv must not import it. Its kernels cannot be defined inside a
function either: the interpreter that tests run them in resolves a kernel's names in its module alone.
"""

from __future__ import annotations

import importlib
from typing import Any


def on_cuda(op: Any, name: str, file: str | None = None) -> None:
    """Make the function `name` of `<file>_triton` (of `<name>_triton`) the implementation of the custom op `op` on CUDA."""
    module = f"fxcurv.kernels.{file or name}_triton"

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    op.register_kernel("cuda")(run)
