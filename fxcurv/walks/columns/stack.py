"""Cotangents of several groups in one tensor, and the state of the walk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.ir.emit import emit
from fxcurv.ir.graph import descendants
from fxcurv.ir.origin import origin_of
from fxcurv.ir.program import Program
from fxcurv.ir.traced import sum_of
from fxcurv.quantity import GRADIENT, Group
from fxcurv.walks.uses import Use


@dataclass(frozen=True)
class Stack:
    """Cotangents of several groups in one tensor: `groups[k]` takes `columns[k]` rows of `node` [V, *value]."""

    groups: tuple[Group, ...]
    columns: tuple[int, ...]
    node: Any
    per_sample: bool = False
    """Whether the leading axis holds V * N rows: the walk is in the sample-free part before a materialised P."""


@dataclass
class Walk:
    """The state of the reverse walk."""

    program: Program
    groups: list[Group]
    cotangents: dict[fx.Node, list[Stack]] = field(default_factory=dict)
    outputs: dict[fx.Node, dict[int, list[Stack]]] = field(default_factory=dict)
    uses: dict[fx.Node, list[Use]] = field(default_factory=dict)
    direct: dict[fx.Node, fx.Node] = field(default_factory=dict)
    wanted: dict[Group, frozenset[str]] = field(default_factory=dict)
    below: dict[frozenset[str], set[fx.Node]] = field(default_factory=dict)
    weights: dict[Group, fx.Node] = field(default_factory=dict)
    columns: dict[Group, int] = field(default_factory=dict)
    of_curvature: frozenset[str] = frozenset()
    curved: set[fx.Node] = field(default_factory=set)
    residuals: list[Group] = field(default_factory=list)
    capacity: int = 1 << 62
    convenient: int = 1 << 62
    carried: int = 0
    hessian: fx.Node | None = None
    waiting: list[tuple[Group, int, Callable[[Group, int, int], None]]] = field(default_factory=list)
    parts: dict[Group, list[Group]] = field(default_factory=dict)

    def born(self, group: Group, count: int, send: Callable[[Group, int, int], None], divisible: bool = True) -> None:
        """Send `count` columns, or pairs, of `group` down: now, or in parts in later sweeps if they are too many.

        send: puts those from `start` to `stop` on the walk, called as `send(part of the group, start, stop)`.
        """
        columns = count * width(group)
        if divisible and self.carried + columns > min(self.capacity, self.convenient):
            self.waiting.append((group, count, send))
            return
        self.carried += columns
        send(group, 0, count)

    def wants(self, group: Group, node: fx.Node) -> bool:
        """Whether an extension needs the columns of `group` at `node`: one of the extension's parameters reaches it."""
        names = self.wanted.get(replace(group, part=0), frozenset())
        if names not in self.below:
            self.below[names] = descendants([self.program.params[n] for n in names])
        return node in self.below[names]

    def carries(self, group: Group, node: fx.Node) -> bool:
        """Whether the columns of `group` go to `node`; the gradient goes wherever a parameter is."""
        return group == GRADIENT or self.wants(group, node)

    def add(self, node: fx.Node, stack: Stack) -> None:
        self.cotangents.setdefault(node, []).append(stack)
        self.columns.update(zip(stack.groups, stack.columns, strict=True))


def width(group: Group) -> int:
    """How many columns of a group belong together."""
    return 2 if group.paired else 1


def some(t: Tensor, start: int, stop: int, paired: bool) -> Tensor:
    """The columns, or pairs of columns, from `start` to `stop`."""
    if (start, stop * (2 if paired else 1)) == (0, t.shape[0]):
        return t
    return t.unflatten(0, (2, -1))[:, start:stop].flatten(0, 1) if paired else t[start:stop]


def merged(walk: Walk, node: fx.Node, stacks: list[Stack]) -> Stack:
    """The sum of `stacks`, group by group, as one stack."""
    first = stacks[0]
    origin = origin_of(node, "propagate")
    if len(stacks) == 1:
        return first
    if all(s.groups == first.groups for s in stacks):
        return Stack(
            first.groups,
            first.columns,
            emit(walk.program, sum_of, [s.node for s in stacks], origin=origin),
            first.per_sample,
        )
    groups = [g for g in walk.groups if any(g in s.groups for s in stacks)]
    columns = tuple(next(s.columns[s.groups.index(g)] for s in stacks if g in s.groups) for g in groups)
    parts = [[_slot(s, g) for s in stacks if g in s.groups] for g in groups]
    total = emit(walk.program, _unite, parts, origin=origin)
    return Stack(tuple(groups), columns, total, first.per_sample)


def _slot(stack: Stack, group: Group) -> tuple[fx.Node, int, int, int]:
    """(tensor, first, last, of): the rows of a group, counted in columns."""
    start = sum(stack.columns[: stack.groups.index(group)])
    width = stack.columns[stack.groups.index(group)]
    return stack.node, start, start + width, sum(stack.columns)


def _rows(t: Tensor, start: int, stop: int, of: int) -> Tensor:
    if (start, stop) == (0, of):
        return t
    return t.unflatten(0, (of, -1))[start:stop].flatten(0, 1)


def _unite(parts) -> Tensor:
    return torch.cat([sum_of([_rows(*slot) for slot in slots]) for slots in parts])


def narrowed(walk: Walk, stack: Stack, groups: tuple[Group, ...], node: fx.Node) -> Stack:
    """`stack` with the columns of `groups` only."""
    if groups == stack.groups:
        return stack
    columns = tuple(stack.columns[stack.groups.index(g)] for g in groups)

    def of(tensor: fx.Node) -> fx.Node:
        slots = [[(tensor, *_slot(stack, g)[1:])] for g in groups]
        return emit(walk.program, _unite, slots, origin=origin_of(node, "propagate"))

    rows = tuple(n if n is None else of(n) for n in stack.node) if isinstance(stack.node, tuple) else of(stack.node)
    return Stack(groups, columns, rows, stack.per_sample)
