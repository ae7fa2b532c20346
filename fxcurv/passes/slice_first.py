"""slice_first: leave out positions of the output that the loss does not read, as in `logits[:, :-1]`, before the head.

The numbers stay the same, for less work, where nobody asks for the output (`compile(outputs=False)`): f is the part
that the loss reads. Its positions are then those of the head's input, so that `chunks` can run the head chunk by chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcurv.ir.graph import is_tensor
from fxcurv.ir.private import enable_python_dispatcher
from fxcurv.ir.program import Program
from fxcurv.ir.ranks import IN_TURNS
from fxcurv.rules.base import rule_of
from fxcurv.rules.traits import MATRIX_PRODUCTS, pointwise, sliced


def slice_first(program: Program) -> Program:
    """See the module. Does nothing if a result shows columns, which it has for every entry of the output."""
    shown = program.options.as_written or any(e.shows_columns for e in program.extensions)
    if program.options.ranks == IN_TURNS and not shown:
        for head in program.heads:
            reader = _slice_of(program, head)
            if reader is not None:
                _move(program, head, reader)
        program.refresh_output()
    return program


def _readers(node: fx.Node) -> list[fx.Node]:
    return [u for u in node.users if u.op != "output"]


def _slice_of(program: Program, node: fx.Node) -> fx.Node | None:
    """The one slice that is read of a value, perhaps behind ops that keep its entries apart; None if there is none."""
    readers = _readers(node)
    if len(readers) != 1 or not is_tensor(readers[0]):
        return None
    (reader,) = readers
    cut = sliced(reader)
    if cut is not None and not cut.everything:
        return reader if cut.x is node else None
    source = _sliceable_argument(program, reader, 0)
    return _slice_of(program, reader) if source is not None and reader.args[source] is node else None


def _move(program: Program, head: fx.Node, reader: fx.Node) -> None:
    cut: Any = sliced(reader)
    dim = cut.dim % head.meta["val"].ndim
    chain: list[tuple[fx.Node, int]] = []
    node = cut.x
    while not chain or chain[-1][0].target not in MATRIX_PRODUCTS:
        source = _sliceable_argument(program, node, dim)
        if source is None or len(_readers(node)) > 1:
            return
        chain.append((node, source))
        node = node.args[source]
    if head not in [old for old, _ in chain]:
        return
    new = _copy_with(program, reader, 0, node, reader)
    for old, source in reversed(chain):
        new = _copy_with(program, old, source, new, reader)
        program.heads = [new if h is old else h for h in program.heads]
    program.replace(reader, new)
    program.graph.erase_node(reader)


def _copy_with(program: Program, node: fx.Node, position: int, value: fx.Node, before: fx.Node) -> fx.Node:
    """The op of `node` with `value` as the argument at `position`."""
    with program.graph.inserting_before(before):
        new = program.graph.node_copy(node)
    new.args = (*node.args[:position], value, *node.args[position + 1 :])
    args, kwargs = fx.node.map_arg((new.args, new.kwargs), lambda a: a.meta["val"])
    with program.fake_mode, torch.no_grad(), enable_python_dispatcher():
        new.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    return new


def _sliceable_argument(program: Program, node: fx.Node, dim: int) -> int | None:
    """Which argument an op can read sliced along axis `dim`, to give slices of its output; None if there is none."""
    if node.op != "call_function" or not is_tensor(node):
        return None
    shape = node.meta["val"].shape
    tensors = [k for k, a in enumerate(node.args) if is_tensor(a)]
    cut = sliced(node)
    if cut is not None:
        return 0 if cut.everything else None
    if MATRIX_PRODUCTS.get(node.target):
        return 0 if dim < len(shape) - 1 else None
    same = [k for k in tensors if node.args[k].meta["val"].shape == shape]  # type: ignore[union-attr]
    if len(same) != 1:
        return None
    others = [node.args[k].meta["val"].shape for k in tensors if k not in same]  # type: ignore[union-attr]
    beside = all(len(s) + dim < len(shape) or s[dim - len(shape)] == 1 for s in others)
    apart = pointwise(node.target) or rule_of(node.target, program.rules).in_order and len(tensors) == 1
    return same[0] if apart and beside else None
