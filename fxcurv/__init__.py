"""fxcurv: a compiler for individual gradients and curvature of PyTorch models."""

import os

from fxcurv import errors, extensions, linear, optim
from fxcurv.api import Compiled, compile  # noqa: A004
from fxcurv.front.arguments import Rows
from fxcurv.ir.program import Program
from fxcurv.over import Totals, accumulate, over
from fxcurv.result import Result
from fxcurv.rules import Contraction, Pointwise, Rule, register, rewrite

__version__ = "0.1.0"

# The folder that keeps programs between processes (docs/keeping_programs.md); `compile` reads it.
cache_dir: str | os.PathLike[str] | None = os.environ.get("FXCURV_CACHE_DIR") or None

__all__ = [
    "Compiled", "Contraction", "Pointwise", "Program", "Result", "Rows", "Rule", "Totals", "accumulate", "cache_dir", "compile",
    "errors", "extensions", "linear", "optim", "over", "register", "rewrite",
]  # fmt: skip
