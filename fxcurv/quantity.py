"""Quantities: which columns enter the backward walk, and where.

Columns come in groups. A group is born at one node (the loss value, a loss term's prediction, a leaf of the model's
output) and keeps its identity through the walk, so that equal quantities share nodes. A quantity names its groups, and
what else passes need to know of it; how the columns of a kind are made is registered in `walks.columns.births`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fxcurv.ir.state import Analysis


@dataclass(frozen=True)
class Kind:
    """A kind of columns.

    Attributes:
        title: what the report calls it.
        of_term: whether each term of the loss has a group of its own.
        by_class: whether a loss in closed form has a column for each class and position.
        carried: whether the walk carries columns of this kind.
    """

    title: str
    of_term: bool = True
    by_class: bool = False
    carried: bool = True


KINDS: dict[str, Kind] = {}


def kind(name: str, title: str, **more: bool) -> str:
    """Register a kind of columns, and return its name.

    Raises:
        ValueError: if the name is taken.
    """
    if name in KINDS:
        raise ValueError(f"there are columns of the kind '{name}' already")
    KINDS[name] = Kind(title, **more)
    return name


@dataclass(frozen=True)
class Group:
    """Columns born together: of a registered `kind`, at loss term or head `term`; `draws` of them if they are sampled.

    part: which part this is, where a group too large for the memory budget goes down the walk in parts.
    paired: the columns are u_1 ... u_D, v_1 ... v_D, and count by their products u_i v_i, not by squares.
    """

    kind: str
    term: int = 0
    draws: int = 0
    part: int = 0
    paired: bool = False


GRADIENT = Group(kind("gradient", "gradient", of_term=False))

# a column per position
TOKEN = Group(kind("token", "gradient per position"))

IDENTITY = Group(kind("identity", "identity"))

# born at ops; `term` counts these groups
RESIDUAL = kind("residual", "weighted (of the ops' residuals)", of_term=False)

# for a loss that is linear in f: the quantity is zero
NONE = kind("none", "none", carried=False)


@dataclass(frozen=True)
class Quantity:
    """Base: what a set of extensions needs to be carried backward.

    Attributes:
        needs_loss: whether it is a quantity of the loss.
        first_order: whether it needs no second derivatives.
        of_gradients: whether it is made of individual gradients, which exist by token as well.
        of_loss: whether it includes the curvature of the loss in f.
        of_ops: whether it includes the curvature of the ops.
        of_vectors: whether it is a product, a function of vectors.
        inside: what it needs of the ops besides their transposes, in words; "" for nothing.
        mc: number of sampled columns, None for none.
        empirical: whether the target takes the place of a sample.
    """

    needs_loss: ClassVar[bool] = True
    first_order: ClassVar[bool] = False
    of_gradients: ClassVar[bool] = False
    of_loss: ClassVar[bool] = False
    of_ops: ClassVar[bool] = False
    of_vectors: ClassVar[bool] = False
    inside: ClassVar[str] = ""

    def groups(self, analysis: Analysis) -> list[Group]:
        """The groups of columns that are known before the walk, not yet cut into parts."""
        return []

    @property
    def sampled(self) -> bool:
        """Whether columns are drawn from the likelihood of the loss."""
        return bool(getattr(self, "mc", None))

    @property
    def of_targets(self) -> bool:
        """Whether columns are made with the targets in place of samples."""
        return bool(getattr(self, "empirical", False))


@dataclass(frozen=True)
class Gradient(Quantity):
    """One column: dL/df. Always carried when there is a loss.

    Where every position of f is a sample, there is a column per position: dL/df there, and zero elsewhere.
    """

    first_order = True
    of_gradients = True

    def groups(self, analysis: Analysis) -> list[Group]:
        return [TOKEN if analysis.positions is not None else GRADIENT]


@dataclass(frozen=True)
class SqrtGGN(Quantity):
    """Columns s with sum_v s s^T = H_n, the loss Hessian per sample (with real weights, if `signed`).

    Attributes:
        mc: number of sampled columns, None for the exact ones.
        signed: columns may have real weights, because no root is needed (diagonals).
        empirical: one column, sampled with the target as the sample: the gradient over sqrt(c), c the factor of the
            log-likelihood in the loss.
    """

    mc: int | None = None
    signed: bool = False
    empirical: bool = False
    of_loss = True

    def groups(self, analysis: Analysis) -> list[Group]:
        if not analysis.terms:
            return [Group(NONE, draws=self.mc or 0)]
        return [self._group_of_term(index, term.node is not None) for index, term in enumerate(analysis.terms)]

    def _group_of_term(self, index: int, closed_form: bool) -> Group:
        if self.empirical:
            return Group("empirical", index)
        if self.mc:
            return Group("mc" if closed_form else "signs", index, self.mc)
        if closed_form:
            return Group("exact", index)
        return Group("signed", index, paired=True) if self.signed else Group("root", index)


@dataclass(frozen=True)
class Product(Quantity):
    """No columns: products with the "ggn", the "hessian" or the "pch" (`modify`: "clip" or "abs"), from `passes.products`."""

    kind: str = ""
    modify: str = ""
    of_vectors = True
    inside = "its tangent"


@dataclass(frozen=True)
class Averaged(Quantity):
    """No columns: the loss Hessian's sum over samples, carried down as a matrix (`passes.average`)."""

    of_loss = True
    inside = "its transpose without columns"


@dataclass(frozen=True)
class HessianFactors(SqrtGGN):
    """The loss Hessian's columns, and weighted columns of every op's residual (`walks.columns.residuals`)."""

    signed: bool = True
    of_ops = True
    inside = "its second derivative"


@dataclass(frozen=True)
class Identity(Quantity):
    """One column per entry of the model's output: the Jacobian."""

    needs_loss = False
    first_order = True

    def groups(self, analysis: Analysis) -> list[Group]:
        return [IDENTITY]


@dataclass(frozen=True)
class Term:
    """A source of curvature: a loss op and its prediction, or (node None) the whole loss as a function of f."""

    node: Any = None
    prediction: Any = None
