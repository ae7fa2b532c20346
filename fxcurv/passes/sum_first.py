"""sum_first: sum cotangents over positions before the transpose of max-pooling instead of after.

The transpose puts every value at one position, so the sum stays the same. A bias, and a Kronecker factor of a
convolution, ask for that sum alone: they read the smaller tensor, and the larger one may not be needed at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from fxcurv.contractions.factors import is_one
from fxcurv.ir.emit import emit
from fxcurv.ir.graph import layout
from fxcurv.ir.program import Program
from fxcurv.rules.traits import REARRANGED, SCATTERS, SUMS


def sum_first(program: Program) -> Program:
    """See the module."""
    replaced = {}
    for node in [n for n in program.graph.nodes if n.target in SUMS]:
        source: Any = node.args[0]
        while source.target in REARRANGED:
            source = source.args[0]
        if source.target in SCATTERS and _sums_over_positions(node, source):
            ones = tuple(d for d, s in enumerate(node.meta["val"].shape) if is_one(s))
            new = emit(program, _sum_sent, source.args[0], ones, origin=node.meta["origin"], before=node)
            program.stand_in(node, new)
            replaced[node] = new
            program.graph.erase_node(node)
    program.rename(replaced)
    program.refresh_output()
    program.graph.eliminate_dead_code()
    return program


def _sums_over_positions(node: fx.Node, source: fx.Node) -> bool:
    """Whether `node` sums a view of `source` [..., C, H, W] over all of H and W, and keeps the order of the rest."""
    val, (*_, dims) = node.args[0].meta["val"], node.args[:2]
    summed = {d % val.ndim for d in dims}
    sizes, strides = layout(val)
    (*_, h, w), (*_, row, column) = layout(source.meta["val"])
    kept = [t for d, (s, t) in enumerate(zip(sizes, strides, strict=True)) if d not in summed and not is_one(s)]
    lead = [t for s, t in zip(*(part[:-2] for part in layout(source.meta["val"])), strict=True) if not is_one(s)]
    positions = [(s, t) for d, (s, t) in enumerate(zip(sizes, strides, strict=True)) if d in summed and not is_one(s)]
    count = 1
    for s, _ in positions:
        count = count * s
    return kept == lead and count == h * w and all(t in (row, column) for _, t in positions)


def _sum_sent(g: Tensor, ones: Sequence[int]) -> Tensor:
    """[..., C, h, w] -> [..., C], with axes of size one at `ones` alone."""
    t = g.sum((-2, -1))
    t = t.squeeze([d for d, s in enumerate(t.shape) if is_one(s)])
    for d in ones:
        t = t.unsqueeze(d)
    return t
