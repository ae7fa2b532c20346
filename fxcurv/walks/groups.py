"""The column groups of a quantity."""

from __future__ import annotations

from fxcurv.ir.program import Program
from fxcurv.quantity import Group, Quantity


def groups_of(program: Program, quantity: Quantity) -> list[Group]:
    """The column groups of a quantity that are known so far, the parts of one group in order."""
    whole = quantity.groups(program.analysis) + (program.walked.residuals if quantity.of_ops else [])
    return [part for group in whole for part in program.walked.parts.get(group, [group])]
