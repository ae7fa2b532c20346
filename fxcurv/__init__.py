"""fxcurv: a compiler for individual gradients and curvature of PyTorch models."""

from fxcurv import errors, extensions, linear, optim
from fxcurv.api import Compiled, compile  # noqa: A004
from fxcurv.front.arguments import Rows
from fxcurv.ir.program import Program
from fxcurv.over import Totals, accumulate, over
from fxcurv.result import Result
from fxcurv.rules import Contraction, Pointwise, Rule, register, rewrite

__version__ = "0.1.0"

__all__ = [
    "Compiled", "Contraction", "Pointwise", "Program", "Result", "Rows", "Rule", "Totals", "accumulate", "compile", "errors",
    "extensions", "linear", "optim", "over", "register", "rewrite",
]  # fmt: skip
