"""Quantities: which columns enter the backward walk, and where.

Columns come in groups. A group is born at one node (the loss value, a loss term's prediction, a leaf of the model's
output) and keeps its identity through the walk, so that equal quantities share nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quantity:
    """Base: what a set of extensions needs to be carried backward."""


@dataclass(frozen=True)
class Gradient(Quantity):
    """One column: dL/df. Always carried when there is a loss.

    Where every position of f is a sample of its own, a column per position: dL/df there, and zero elsewhere.
    """


@dataclass(frozen=True)
class SqrtGGN(Quantity):
    """Columns s with sum_v s s^T = H_n, the loss Hessian per sample (times real weights, if `signed` columns do).

    Attributes:
        mc: number of sampled columns, None for the exact ones.
        signed: real column weights are welcome, no root is needed (diagonals).
        empirical: the sampled column with the target itself for the sample: the gradient over sqrt(c).
    """

    mc: int | None = None
    signed: bool = False
    empirical: bool = False


@dataclass(frozen=True)
class Nothing(Quantity):
    """No columns: what needs it does not read the walk."""


@dataclass(frozen=True)
class Product(Nothing):
    """No columns: products with the "ggn", the "hessian" or the "pch" (`modify`: "clip" or "abs"), from `passes.products`."""

    kind: str = ""
    modify: str = ""


@dataclass(frozen=True)
class Averaged(SqrtGGN):
    """No columns: the loss Hessian's sum over samples, carried down as a matrix (`passes.average`)."""


@dataclass(frozen=True)
class HessianFactors(SqrtGGN):
    """The loss Hessian's columns, and weighted columns of every op's residual (`passes.curvature`)."""

    signed: bool = True


@dataclass(frozen=True)
class Identity(Quantity):
    """One column per entry of the model's output: the Jacobian."""


@dataclass(frozen=True)
class Group:
    """Columns of one birth: `kind` of columns at loss term or head `term`.

    kind: "gradient", "exact", "mc", "empirical", "signed", "root", "signs" (root times random signs), "identity" or
        "token" (the gradient, a column per position), "residual" (of an op; `term` counts them) or "none" (columns of a
        loss that is linear in f: zeros, which nothing carries).
    part: a group that is too large for the memory budget goes down the walk in parts.
    paired: columns u_1 ... u_D, v_1 ... v_D, of which the products u_i v_i count, not their squares.
    """

    kind: str
    term: int = 0
    draws: int = 0
    part: int = 0
    paired: bool = False


GRADIENT = Group("gradient")

TOKEN = Group("token")


@dataclass(frozen=True)
class Term:
    """A source of curvature: a loss op and its prediction, or (node None) the whole loss as a function of f."""

    node: Any = None
    prediction: Any = None
