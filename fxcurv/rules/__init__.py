"""Rules: how a cotangent passes an op. One file per family of ops; importing a file registers its rules."""

from fxcurv.rules import (  # noqa: F401
    attention,
    contraction,
    convolution,
    embedding,
    inplace,
    loss,
    normalization,
    pointwise,
    pooling,
    quantise,
    recurrent,
    resampling,
    shape,
)
from fxcurv.rules.base import FALLBACK, REWRITES, RULES, Rule, register, rewrite, rule_of
from fxcurv.rules.call import Call
from fxcurv.rules.contraction import Contraction
from fxcurv.rules.loss import LossRule
from fxcurv.rules.pointwise import Pointwise

__all__ = [
    "FALLBACK", "REWRITES", "RULES", "Call", "Contraction", "LossRule", "Pointwise", "Rule", "register", "rewrite",
    "rule_of",
]  # fmt: skip
