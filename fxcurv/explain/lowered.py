"""What `compiled.lower` gives: a program to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fxcurv.explain.drawing import draw
from fxcurv.ir.program import Program


@dataclass(frozen=True, eq=False)
class Lowered:
    """A program to look at; every other attribute is that of `program`.

    Attributes:
        program: the program itself, as the passes left it.
    """

    program: Program

    def __getattr__(self, name: str) -> Any:
        if name == "program":  # asked for while this is being unpickled or copied
            raise AttributeError(name)
        return getattr(self.program, name)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The emitted GraphModule; its arguments are `inputs`, in order."""
        return self.program.gm

    def print_readable(self, print_output: bool = True) -> str:
        """The graph as Python with shapes."""
        return self.program.gm.print_readable(print_output=print_output)

    def draw(self, path: str) -> None:
        """Draw the graph to `path` (.svg), coloured by the pass that made each node."""
        draw(self.program, path)
