"""slice_first: positions of the output that the loss leaves out, as in `logits[:, :-1]`, are left out before the head.

The same numbers from less work, where nobody asks for the output (`compile(outputs=False)`): f is what the loss reads of it.
And its positions then are those of the head's input, so that `chunks` can take some after the others.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import fx

from fxcurv.ir.emit import emit
from fxcurv.ir.graph import is_tensor
from fxcurv.ir.origin import origin_of
from fxcurv.ir.program import Program
from fxcurv.ir.ranks import IN_TURNS
from fxcurv.rules.base import rule_of
from fxcurv.rules.traits import MATRIX_PRODUCTS, pointwise, sliced


def slice_first(program: Program) -> Program:
    """See the module. A result that shows columns has them for every entry of the output."""
    shown = program.options.as_written or any(e.shows_columns for e in program.extensions)
    if program.options.ranks == IN_TURNS and not shown:
        for head in program.heads:
            readers = _readers(head)
            if len(readers) == 1 and sliced(readers[0]):
                _move(program, head, readers[0])
        program.refresh_output()
    return program


def _readers(node: fx.Node) -> list[fx.Node]:
    return [u for u in node.users if u.op != "output"]


def _move(program: Program, head: fx.Node, reader: fx.Node) -> None:
    cut: Any = sliced(reader)
    dim = cut.dim % head.meta["val"].ndim
    chain: list[tuple[fx.Node, int]] = []
    node = head
    while not chain or chain[-1][0].target not in MATRIX_PRODUCTS:
        source = _source(program, node, dim)
        if source is None or len(_readers(node)) > 1:
            return
        chain.append((node, source))
        node = node.args[source]  # type: ignore[assignment]
    origin = origin_of(reader, "forward")
    new = emit(program, reader.target, node, dim, cut.start, cut.end, cut.step, origin=origin, before=reader)
    for old, source in reversed(chain):
        args = (*old.args[:source], new, *old.args[source + 1 :])
        call = functools.partial(old.target, **old.kwargs) if old.kwargs else old.target  # type: ignore[arg-type]
        new = emit(program, call, *args, origin=origin_of(old, "forward"), before=reader)
    program.replace(reader, new)
    program.graph.erase_node(reader)
    program.heads = [new if h is head else h for h in program.heads]


def _source(program: Program, node: fx.Node, dim: int) -> int | None:
    """Which argument an op can be given slices of along an axis, to give those of its output."""
    if node.op != "call_function" or not is_tensor(node):
        return None
    shape = node.meta["val"].shape
    tensors = [k for k, a in enumerate(node.args) if is_tensor(a)]
    if MATRIX_PRODUCTS.get(node.target):
        return 0 if dim < len(shape) - 1 else None
    same = [k for k in tensors if node.args[k].meta["val"].shape == shape]  # type: ignore[union-attr]
    if len(same) != 1:
        return None
    others = [node.args[k].meta["val"].shape for k in tensors if k not in same]  # type: ignore[union-attr]
    beside = all(len(s) + dim < len(shape) or s[dim - len(shape)] == 1 for s in others)
    apart = pointwise(node.target) or rule_of(node.target, program.rules).in_order and len(tensors) == 1
    return same[0] if apart and beside else None
