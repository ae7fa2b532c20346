"""The column groups of a quantity."""

from __future__ import annotations

from fxcurv.ir.program import Program
from fxcurv.quantity import GRADIENT, TOKEN, Averaged, Group, HessianFactors, Identity, Nothing, Quantity, SqrtGGN


def groups_of(program: Program, quantity: Quantity) -> list[Group]:
    """The column groups of a quantity, the parts of one group in order."""
    parts = program.walked.parts
    return [part for group in _whole_groups(program, quantity) for part in parts.get(group, [group])]


def _whole_groups(program: Program, quantity: Quantity) -> list[Group]:
    if isinstance(quantity, Identity):
        return [Group("identity")]
    if isinstance(quantity, Nothing | Averaged):
        return []
    if not isinstance(quantity, SqrtGGN):
        return [TOKEN if program.analysis.positions is not None else GRADIENT]
    out = [] if program.analysis.terms else [Group("none", draws=quantity.mc or 0)]
    for index, term in enumerate(program.analysis.terms):
        if quantity.empirical:
            out.append(Group("empirical", index))
        elif term.node is not None:
            out.append(Group("mc", index, quantity.mc) if quantity.mc else Group("exact", index))
        elif quantity.mc:
            out.append(Group("signs", index, quantity.mc))
        else:
            out.append(Group("signed", index, paired=True) if quantity.signed else Group("root", index))
    if isinstance(quantity, HessianFactors):
        out += program.walked.residuals
    return out
