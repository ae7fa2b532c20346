"""pool_first: max-pooling before an activation instead of after, which is exact and leaves the activation less to do.

pool(f(x)) = f(pool(x)) for a monotone f. Derivatives agree if f is flat wherever it maps different values to one:
there the two sides may choose different maxima, but both pass on zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcurv.ir.emit import emit
from fxcurv.ir.origin import origin_of
from fxcurv.ir.program import Program
from fxcurv.rules.traits import MAX_POOL, bounds, window, zero_padding

aten = torch.ops.aten


def pool_first(program: Program) -> Program:
    """See the module."""
    if program.options.as_written:
        return program
    for node in [n for n in program.graph.nodes if n.target is MAX_POOL]:
        values = [user for user in node.users if user.args[1] == 0]
        if len(node.users) == len(values) == 1:
            _swap(program, node, values[0])
    program.graph.eliminate_dead_code()
    program.refresh_output()
    return program


def _swap(program: Program, node: fx.Node, value: fx.Node) -> None:
    given: Any = node.args[0]
    own = window(node) or []
    padding = zero_padding(given) if _read_once(given) else None
    act = given.args[0] if padding else given
    between = bounds(act) if _read_once(act) else None
    if between is None or act in program.heads or not between[0] <= 0 <= between[1]:  # zero has to stay zero
        return
    source = act.args[0]
    joined = _window_without_zeros(source, given, padding, own) if padding and between[0] == 0 else None
    with_pad = padding if joined is None else None
    origin = origin_of(node, "forward")
    pooled = emit(program, _pool, source, with_pad, joined or own, origin=origin, before=value)
    rest = act.args[1:]
    program.replace(value, emit(program, act.target, pooled, *rest, origin=origin_of(act, "forward"), before=value))


def _read_once(node: fx.Node) -> bool:
    return node.op == "call_function" and len(node.users) == 1


def _pool(x, pad, window):
    if pad is not None:
        x = aten.constant_pad_nd.default(x, pad, 0)
    return MAX_POOL(x, *window)[0]


def _window_without_zeros(source: fx.Node, padded: fx.Node, pads: list[int], window: list[Any]) -> list[Any] | None:
    """The window with padding of its own in place of the zeros `pads`; None if there is none.

    The zeros need not be seen: an activation whose smallest value is zero gives zero where they would win.
    """
    kernel, stride, padding, dilation, ceil = window
    stride = stride or kernel
    sizes = source.meta["val"].shape[-2:]
    if len(pads) != 4 or any(padding) or ceil or not all(isinstance(s, int) for s in sizes):
        return None
    if any(d != 1 for d in dilation):  # a window may see padding alone, where the pool has no maximum
        return None
    (left, right, top, bottom) = pads
    if left == right and top == bottom and 0 <= left <= kernel[1] // 2 and 0 <= top <= kernel[0] // 2:
        return [kernel, stride, [top, left], dilation, False]
    if left or top or right < 0 or bottom < 0:
        return None
    outs = padded.meta["val"].shape[-2:]
    for size, out, k, s in zip(sizes, outs, kernel, stride, strict=True):
        count = -(-(size - k) // s) + 1
        count -= (count - 1) * s >= size  # the last window starts inside
        if count != (out - k) // s + 1:
            return None
    return [kernel, stride, padding, dilation, True]
