"""finish: make the final GraphModule, of functional ATen and custom ops only, and a module of the checks."""

from __future__ import annotations

from fxcurv.ir.graph import to_reshape
from fxcurv.ir.program import Program


def finish(program: Program) -> Program:
    """Set what a call returns and compile the graph's code.

    A traced view relies on the strides of fake values, and fused kernels (attention's) return others: views become
    reshapes, which copy where they must.
    """
    for node in program.graph.nodes:
        to_reshape(node)
    program.finish()
    return program
