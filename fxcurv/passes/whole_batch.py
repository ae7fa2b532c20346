"""whole_batch: the batch as one sample, for quantities that are defined where samples interact.

Every value that is computed from the inputs gets the placement `Whole`. The walk, the rules and the contractions then
compute what they always do, at N = 1: the sum over samples in a definition has one term, the whole batch, whose f is
all of the model's output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.ir.batch import Batch
from fxcurv.ir.graph import ancestors
from fxcurv.ir.mixing import mixing, of_reduced_loss
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Placement, Whole
from fxcurv.ir.program import Program
from fxcurv.ir.specialise import specialise


def whole_batch(program: Program) -> Program:
    """Place all values anew, with the batch as one sample, and make the batch size a number.

    Does so where samples interact and all that is asked for is defined there, or where there is only one sample.
    """
    if not program.options.alone:
        asked = [e for e in program.extensions if e.per_sample]
        reason = mixing(program) if asked and all(e.whole_batch for e in asked) else None
        if reason is None or any(_is_mixed(n) and of_reduced_loss(program, n) for n in ancestors([program.loss])):
            return program
        program.analysis.mixing = reason
    n = program.batch.size
    if program.batch.symbols:
        program = specialise(program, n)
    program.batch = Batch(frozenset(), n, whole=True)
    data = _values_from_inputs(program)
    for head in program.heads:
        if head not in data:  # a temperature, say, that the model returns beside its embeddings
            data.add(_clone_head(program, head))
    inside = set(ancestors(program.heads))
    for node in program.graph.nodes:
        val = node.meta.get("val")
        places = [_place(v, node in data, node in inside) for v in (val if isinstance(val, tuple | list) else [val])]
        node.meta["place"] = places if isinstance(val, tuple | list) else places[0]
    return program


def _is_mixed(node: fx.Node) -> bool:
    return bool(node.meta.get("active")) and node.meta.get("place") == MIXED


def _place(val: Any, from_inputs: bool, inside: bool) -> Placement:
    if not from_inputs or not isinstance(val, Tensor):
        return REPLICATE
    if val.ndim:
        return Whole(0, int(val.shape[0]), 1)
    return Whole(0) if inside else PARTIAL


def _values_from_inputs(program: Program) -> set[fx.Node]:
    """The values that are computed from inputs or targets."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    bound = zip(placeholders, program.inputs, strict=True)
    found = {n for n, what in bound if what.kind in ("input", "target")}
    for node in program.graph.nodes:
        if any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _clone_head(program: Program, head: fx.Node) -> fx.Node:
    """Put a copy in the place of the output `head`: the sample-free part of the model ends before it."""
    inside = ancestors(program.heads)
    with program.graph.inserting_after(head):
        copy = program.graph.call_function(torch.ops.aten.clone.default, (head,))
    copy.meta = dict(head.meta)
    head.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy and user not in inside)
    program.heads = [copy if h is head else h for h in program.heads]
    return copy
