"""Short forms: cheaper ways to compute an op, given its arguments. Values stay the same, up to the sign of a zero.

A short form is a function (make, node) -> the node that replaces `node`, or None where there is nothing to gain.
`make(op, *args, **kwargs)` makes a node in front of `node`; `like=` is a node with its sizes and dtype, if known.
A short form is registered by op; `_elementwise` is tried for all elementwise ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxcurv.ir.graph import is_tensor, layout
from fxcurv.ir.private import schema_of
from fxcurv.rules.traits import (
    KEEP_ONES,
    KEEP_ZERO,
    ONES,
    REARRANGED,
    ZERO_FACTOR,
    makes_zeros,
    pointwise,
    random,
    sliced,
)

aten = torch.ops.aten

Make = Callable[..., fx.Node]
Short = Callable[[Make, fx.Node], "fx.Node | None"]

SHORT: dict[Callable, Short] = {}


def short(*ops: Callable):
    """Decorator: register the function as the short form of these ops."""

    def add(fn: Short) -> Short:
        for op in ops:
            SHORT[op] = fn
        return fn

    return add


def shorter(make: Make, node: fx.Node) -> fx.Node | None:
    """The replacement of `node`, or None."""
    found = SHORT[node.target](make, node) if node.target in SHORT else None
    if found is None and (pointwise(node.target) or node.target is aten._to_copy.default) and not random(node.target):
        return _elementwise(make, node)
    return found


def same_kind(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have the same dtype and sizes."""
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and layout(x)[0] == layout(y)[0]


# ---- ones and zeros ------------------------------


def is_one(node: Any) -> bool:
    """Whether every entry of a value is one, whatever the inputs are."""
    if not isinstance(node, fx.Node):
        return isinstance(node, int | float) and node == 1
    return node.target in ONES or (node.target in KEEP_ONES | REARRANGED and is_one(node.args[0]))


def is_zero(node: Any) -> bool:
    """Whether every entry of a value is zero, whatever the inputs are."""
    if not isinstance(node, fx.Node):
        return isinstance(node, int | float) and node == 0
    if node.target in KEEP_ZERO:
        return is_zero(node.args[0])
    return makes_zeros(node) or (
        node.target in ZERO_FACTOR and any(isinstance(a, fx.Node) and is_zero(a) for a in node.args)
    )


@short(aten.mul.Tensor)
def _times_one(make: Make, node: fx.Node) -> fx.Node | None:
    return _drop_neutral(node, is_one)


@short(aten.add.Tensor)
def _plus_zero(make: Make, node: fx.Node) -> fx.Node | None:
    """Drop zeros; concatenate parts that are each padded with zeros; add rows to a value directly."""
    if node.kwargs:
        return None
    if not node.meta["val"].is_floating_point():
        return _drop_neutral(node, is_zero)
    return _join_parts(make, node) or _add_rows(make, node)


def _add_rows(make: Make, node: fx.Node) -> fx.Node | None:
    """x + index_add(zeros, rows) as index_add(x, rows)."""
    x, rows = node.args
    if not is_tensor(x) or not is_tensor(rows) or not same_kind(x, node) or not same_kind(rows, node):  # type: ignore[arg-type]
        return None
    inner = rows.args[0] if rows.target in BY_SIZES and len(rows.users) == 1 else rows  # type: ignore[union-attr]
    if inner.target is not aten.index_add.default or inner.kwargs or len(inner.users) > 1:  # type: ignore[union-attr]
        return None
    zeros, dim, index, source = inner.args  # type: ignore[union-attr]
    if not makes_zeros(zeros) or zeros.target is not aten.new_zeros.default:  # type: ignore[arg-type, union-attr]
        return None
    into = x if inner is rows else make(aten.reshape.default, x, zeros.args[1], like=zeros)  # type: ignore[union-attr]
    added = make(aten.index_add.default, into, dim, index, source, like=inner)
    return added if inner is rows else make(aten.reshape.default, added, rows.args[1], like=node)  # type: ignore[union-attr]


def _join_parts(make: Make, node: fx.Node) -> fx.Node | None:
    """A sum of parts of an axis, each padded with zeros to the whole, as one `cat`: the transpose of a split."""
    parts = [_part_in_zeros(term) for term in _terms(node)]
    if len(parts) < 2 or None in parts:
        return None
    sizes, dim = parts[0][1:3]  # type: ignore[index]
    parts.sort(key=lambda part: part[3])  # type: ignore[index]
    if any(part[1:3] != (sizes, dim) for part in parts):  # type: ignore[index]
        return None
    ends = [0, *(part[4] for part in parts)]  # type: ignore[index]
    if [part[3] for part in parts] != ends[:-1] or ends[-1] != sizes[dim]:  # type: ignore[index]
        return None
    thick = [g if g.meta["val"].ndim == len(sizes) else make(aten.unsqueeze.default, g, dim) for g, *_ in parts]  # type: ignore[misc]
    return make(aten.cat.default, thick, dim, like=node)


def _terms(node: fx.Node) -> list[fx.Node]:
    """The terms of a tree of sums whose inner nodes have no other users."""
    if node.target is not aten.add.Tensor or node.kwargs or not all(map(is_tensor, node.args)):
        return [node]
    return [t for a in node.args for t in (_terms(a) if len(a.users) == 1 else [a])]  # type: ignore[arg-type, union-attr]


def _part_in_zeros(node: fx.Node) -> tuple[fx.Node, list, int, int, int] | None:
    """(part, sizes of the whole, dimension, start, end) if `node` pads a part of an axis with zeros to the whole."""
    if node.target is aten.slice_backward.default:
        g, sizes, dim, start, end, step = node.args
        size = sizes[dim]  # type: ignore[index, call-overload]
        if step != 1 or not all(isinstance(n, int) for n in (start, end, size)):
            return None
        start, end, _ = slice(start, end).indices(size)
    elif node.target is aten.select_backward.default:
        g, sizes, dim, start = node.args
        if not isinstance(start, int) or not isinstance(sizes[dim], int):  # type: ignore[index, call-overload]
            return None
        start %= sizes[dim]  # type: ignore[index, call-overload]
        end = start + 1
    else:
        return None
    return g, list(sizes), dim % len(sizes), start, end  # type: ignore[arg-type, operator, return-value]


def _drop_neutral(node: fx.Node, neutral: Callable[[Any], bool]) -> fx.Node | None:
    """The one of two arguments that equals the result because the other is `neutral`."""
    x, z = node.args
    for a, b in ((x, z), (z, x)):
        if is_tensor(a) and same_kind(a, node) and neutral(b):  # type: ignore[arg-type]
            return a  # type: ignore[return-value]
    return None


# ---- columns ------------------------------


@short(aten.select.int)
def _only_entry(make: Make, node: fx.Node) -> fx.Node | None:
    """Selecting from an axis of size one is a squeeze."""
    x, d, _ = node.args
    return make(aten.squeeze.dim, x, d, like=node) if _has_size_one(x, d) else None


def _has_size_one(x: Any, d: int) -> bool:
    """Whether an axis has size one in every batch."""
    size = x.meta["val"].shape[d]
    return isinstance(size, int) and size == 1


@short(aten.slice.Tensor)
def _slice_of_cat(make: Make, node: fx.Node) -> fx.Node | None:
    """The argument of a `cat` that a slice of it equals, if only slices along its axis read the `cat`."""
    cut = sliced(node)
    joined = cut.x if cut else None
    if joined is None or joined.target is not aten.cat.default or cut is None or cut.step != 1:
        return None
    parts, dim = joined.args[0], joined.args[1] if len(joined.args) > 1 else 0
    if any(not (s := sliced(user)) or s.x is not joined or s.dim != dim for user in joined.users):
        return None
    start = 0
    for part in parts:
        size = part.meta["val"].shape[dim] if part.meta["val"].ndim == joined.meta["val"].ndim else None
        if not isinstance(size, int):
            return None
        if (start, start + size) == (cut.start, cut.end) and part.meta["val"].dtype == node.meta["val"].dtype:
            return part
        start += size
    return None


def _elementwise(make: Make, node: fx.Node) -> fx.Node | None:
    """Apply the op without a first axis of size one that all arguments have; drop `expand` where the op broadcasts."""
    schema = schema_of(node.target)
    if schema is None or schema.is_mutable or not is_tensor(node):
        return None
    if any(isinstance(a, list | tuple) for a in node.args) or any(isinstance(a, fx.Node) for a in node.kwargs.values()):
        return None
    if node.kwargs.get("memory_format") in (torch.channels_last, torch.channels_last_3d):
        return None  # which tensors of fewer axes do not have
    sizes, ndim = layout(node.meta["val"])[0], node.meta["val"].ndim
    beside = [a for a in node.args if is_tensor(a) and ndim == a.meta["val"].ndim]  # type: ignore[union-attr]
    if beside and all(a.target is aten.unsqueeze.default and a.args[1] in (0, -ndim) for a in beside):  # type: ignore[union-attr]
        plain = [a.args[0] if a in beside else a for a in node.args]  # type: ignore[union-attr]
        return make(aten.unsqueeze.default, make(node.target, *plain, **node.kwargs), 0, like=node)
    wide = [a for a in beside if a.target is aten.expand.default]  # type: ignore[union-attr]
    if wide and any(layout(a.meta["val"])[0] == sizes for a in beside if a not in wide):  # type: ignore[union-attr]
        plain = [a.args[0] if a in wide else a for a in node.args]  # type: ignore[union-attr]
        return make(node.target, *plain, like=node, **node.kwargs)
    return None


# ---- views ------------------------------

BY_SIZES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
BY_ONES = (aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)


@short(*REARRANGED, aten._unsafe_view.default)
def _merge_views(make: Make, node: fx.Node) -> fx.Node | None:
    """Replace a chain of views by its source, by that with axes of size one added or dropped, or by a single view.

    A slice of one entry whose axis is then dropped becomes a selection.
    """
    cut = sliced(node.args[0]) if node.target is aten.squeeze.dim else None  # type: ignore[arg-type]
    if (
        cut
        and cut.dim == node.args[1]
        and isinstance(cut.start, int)
        and cut.start >= 0
        and _has_size_one(node.args[0], cut.dim)
    ):
        return make(aten.select.int, cut.x, cut.dim, cut.start, like=node)
    sizes, ones = node.meta["val"].shape, node.args[0]
    if ones.target is aten.ones.default and all(isinstance(s, int) for s in sizes):  # type: ignore[union-attr]
        return make(aten.ones.default, list(sizes), like=node, **ones.kwargs)  # type: ignore[union-attr]
    chain, source = [node], node.args[0]
    found, count = None, 0
    while is_tensor(source) and _is_view(chain[-1]):
        edits = _edits(source, node)  # type: ignore[arg-type]
        if edits is not None:
            found, count = (source, *edits), len(chain)
        if source.target not in SHORT or SHORT[source.target] is not _merge_views:  # type: ignore[union-attr]
            break
        chain.append(source)  # type: ignore[arg-type]
        source = source.args[0]  # type: ignore[union-attr]
    if found is not None and _is_shorter(found, count, node):
        value, dropped, added = found
        column = 0 in added  # added last, so that readers of the view can skip it
        steps: list[tuple] = [(aten.unsqueeze.default, d) for d in [d - column for d in added if d] + [0] * column]
        if dropped:
            steps.insert(0, (aten.squeeze.dim, dropped[0]) if len(dropped) == 1 else (aten.squeeze.dims, dropped))
        for k, (op, where) in enumerate(steps, 1):
            value = make(op, value, where, like=node if k == len(steps) else None)
        return value
    first = _source_in_order(node)
    return make(aten.reshape.default, first, *node.args[1:], like=node) if first is not node.args[0] else None


def _is_view(node: fx.Node) -> bool:
    """Whether a node shares its argument's memory: a reshape may copy, unless it only adds or drops axes of size 1."""
    return node.target is not aten.reshape.default or _edits(node.args[0], node) is not None  # type: ignore[arg-type]


def _edits(source: fx.Node, node: fx.Node) -> tuple[list[int], list[int]] | None:
    """(axes of size one to drop from `source`, then those to add, in order) to get `node`; None if more is needed."""
    if source.meta["val"].dtype != node.meta["val"].dtype:
        return None
    (before, strides), (after, wanted) = layout(source.meta["val"]), layout(node.meta["val"])
    dropped, added, i, k = [], [], 0, 0
    while i < len(before) or k < len(after):
        old, new = before[i] if i < len(before) else None, after[k] if k < len(after) else None
        if old == new and (old == 1 or strides[i] == wanted[k]):
            i, k = i + 1, k + 1
        elif old == 1:
            dropped.append(i)
            i += 1
        elif new == 1:
            added.append(k)
            k += 1
        else:
            return None
    return dropped, added


def _is_shorter(found: tuple, count: int, node: fx.Node) -> bool:
    """Whether dropping and adding axes takes fewer ops than the chain, or one that needs no sizes in place of one."""
    _, dropped, added = found
    ops = bool(dropped) + len(added)
    return ops < count or (ops == count == 1 and node.target not in BY_ONES)


def _source_in_order(node: fx.Node) -> Any:
    """The value at the start of the chain of row-major views that ends in the view by sizes `node`."""
    source: Any = node.args[0]
    while node.target in BY_SIZES and source.target in (*BY_SIZES, *BY_ONES):
        source = source.args[0]
    return source
