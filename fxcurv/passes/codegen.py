"""codegen: the final GraphModule, functional ATen and custom ops only, and the checks apart."""

from __future__ import annotations

from fxcurv.program import Program


def codegen(program: Program) -> Program:
    """Set what a call returns and compile the graph's code."""
    program.finish()
    return program
