"""The carrier of KFRA: one matrix M per op's output, from the loss down the chain of activations (`mathematics`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

LAST = "Way out: KFLR() or KFAC(), which are defined for every graph."

# The largest matrix that is made, in bytes.
LARGEST = 2**34


@dataclass(frozen=True)
class Matrix:
    """M at the output of an op, over a sample's slice of `shape` there; `summed`: over pairs of positions, [C, C]."""

    node: fx.Node
    shape: tuple[int, ...]
    summed: bool = False


@dataclass(frozen=True)
class Tail:
    """Ops above a first convolution, the nearest first, that are passed without their M (see `mathematics.summed`)."""

    ops: list[fx.Node]
    by_offsets: bool
