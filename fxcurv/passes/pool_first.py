"""pool_first: max-pooling before an activation instead of after, which is exact and leaves the activation less to do.

pool(f(x)) = f(pool(x)) for a monotone f. Derivatives agree where f is flat wherever it maps different values to
one: the two sides may choose different maxima there, and pass zero on from either.
"""

from __future__ import annotations

import torch
from torch import fx

from fxcurv.ir.emit import emit
from fxcurv.ir.graph import canonical_args
from fxcurv.ir.origin import origin_of
from fxcurv.ir.program import Program
from fxcurv.rules.traits import ACTIVATIONS

aten = torch.ops.aten

POOL = aten.max_pool2d_with_indices.default


def pool_first(program: Program) -> Program:
    """See the module."""
    if program.options.as_written:
        return program
    for node in [n for n in program.graph.nodes if n.target is POOL]:
        values = [user for user in node.users if user.args[1] == 0]
        if len(node.users) == len(values) == 1:
            _swap(program, node, values[0])
    program.graph.eliminate_dead_code()
    program.refresh_output()
    return program


def _swap(program: Program, node: fx.Node, value: fx.Node) -> None:
    given, *window = canonical_args(node)
    padded = _alone(given, aten.constant_pad_nd.default) and given.args[2:] in ((), (0,), (0.0,))
    act = given.args[0] if padded else given
    if not any(_alone(act, f) for f in ACTIVATIONS) or act in program.heads or _bounds_miss_zero(act):
        return
    source = act.args[0]
    joined = _joined(source, given, window) if padded and _rectifies(act) else None
    with_pad = given.args[1] if padded and joined is None else None
    origin = origin_of(node, "forward")
    pooled = emit(program, _pool, source, with_pad, joined or window, origin=origin, before=value)
    rest = act.args[1:]
    program.replace(value, emit(program, act.target, pooled, *rest, origin=origin_of(act, "forward"), before=value))


def _alone(node: fx.Node, target) -> bool:
    """Whether `node` is this op and read once."""
    return isinstance(node, fx.Node) and node.target is target and len(node.users) == 1


def _bounds_miss_zero(act: fx.Node) -> bool:
    """hardtanh between bounds that zero is not between does not map zero to itself."""
    if act.target is not aten.hardtanh.default:
        return False
    _, low, high = canonical_args(act)
    return not low <= 0 <= high


def _rectifies(act: fx.Node) -> bool:
    """Whether everything below zero is mapped to zero."""
    return act.target is not aten.hardtanh.default or canonical_args(act)[1] == 0


def _pool(x, pad, window):
    if pad is not None:
        x = aten.constant_pad_nd.default(x, pad, 0)
    return POOL(x, *window)[0]


def _joined(source: fx.Node, padded: fx.Node, window: list) -> list | None:
    """The window that sees the same without the zeros around it: they never win where zero comes out anyway."""
    kernel, stride, padding, dilation, ceil = window
    stride = stride or kernel
    pads, sizes = padded.args[1], source.meta["val"].shape[-2:]
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
