"""placements: where the samples are on every value of the emitted graph, so that a batch can be split.

Sets `meta["across"]`, a value's placement where copies of the program run on the parts of a batch, and
`meta["complete"]`, the arguments that an op reads as sums over all parts (`rules.split`). A contraction's placement
follows from its spec.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from fxcurv.ir.placement import MIXED, REPLICATE, Placement, Shard
from fxcurv.ir.program import Input, Program
from fxcurv.rules.split import Split


def placements(program: Program) -> Program:
    """See the module. A batch whose size is a number is not split: what depends on its samples is `Mixed`."""
    split, fixed = Split(program), program.fixed
    bound = dict(zip(program.graph.find_nodes(op="placeholder"), program.inputs, strict=True))
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        place: Any
        complete: tuple[fx.Node, ...] = ()
        if node.op == "placeholder":
            place = _place_of_input(program, node, bound[node])
        elif node.op == "get_attr":
            place = REPLICATE
        elif fixed:
            place = MIXED if any(split.across[i] != REPLICATE for i in node.all_input_nodes) else REPLICATE
        elif node.target is operator.getitem:
            source: Any = split.across[node.args[0]]
            place = source[node.args[1]] if isinstance(source, list) else source
        else:
            found = split.visit(node)
            place, complete = found.place, found.complete
        split.across[node] = node.meta["across"] = place
        node.meta["complete"] = complete
    return program


def _place_of_input(program: Program, node: fx.Node, what: Input) -> Placement:
    val = node.meta.get("val")
    if what.kind not in ("input", "target") or not isinstance(val, Tensor):
        return REPLICATE
    if program.fixed:
        return MIXED
    place = node.meta["place"]
    return place if isinstance(place, Shard) else REPLICATE
