"""propagate: one reverse walk that carries the columns of every quantity.

A value's cotangent is a list of stacks, each one tensor [V, *value] for an ordered tuple of column groups. Where a
sample-free value (a parameter, or something computed from parameters only) enters a per-sample op, the walk leaves
a `Use`: the factors of P there. A use moves up to its parameter through ops that only move elements; through any
other op P is materialised and pulled back with a column per sample.

Columns beyond the memory budget wait, and go down in parts in sweeps of their own; a contraction over columns adds
up the parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fxcurv.ir.emit import emit
from fxcurv.ir.graph import ancestors, descendants
from fxcurv.ir.program import Program, is_active
from fxcurv.quantity import GRADIENT, Group
from fxcurv.walks.columns import births
from fxcurv.walks.columns.budget import capacity, convenient, largest_batch, sizes
from fxcurv.walks.columns.stack import Stack, Walk, width
from fxcurv.walks.columns.steps import visit
from fxcurv.walks.groups import groups_of


def propagate(program: Program) -> Program:
    """Fill `walked.uses` (parameter name -> uses), `walked.direct` and the weights of columns.

    `walked.direct` has the gradients that do not come from samples (weight decay's).
    """
    walk = Walk(program, [GRADIENT] if program.loss is not None else [])
    for e in program.extensions:
        curved = e.requires.of_ops
        for group in [*groups_of(program, e.requires), *([GRADIENT] if curved or e.reads_gradients else [])]:
            walk.wanted[group] = walk.wanted.get(group, frozenset()) | {*program.names_of(e)}
        if curved:
            walk.of_curvature |= {*program.names_of(e)}
    walk.groups = list(dict.fromkeys([*walk.groups, *walk.wanted]))
    walk.curved = set(ancestors(program.heads)) & descendants([program.params[n] for n in walk.of_curvature])
    # a result that shows its columns holds them all anyway
    if not any(e.shows_columns for e in program.extensions):
        walk.capacity = capacity(program)
        if not any(e.holds_samples for e in program.extensions):
            walk.convenient = convenient(program)
    forward = list(program.graph.nodes)
    targets = [program.loss] if program.loss is not None else program.heads
    reached = set(ancestors(targets))
    _seed(walk)
    planned = births.plan(walk)
    for node in reversed(forward):
        if node in reached:
            births.at(walk, node, planned)
            if is_active(node) or node in walk.outputs:
                visit(walk, node)
    widest = walk.carried
    sweeps = _sweeps(walk, len(reached))
    for sweep in sweeps:
        for group, start, stop, send in sweep:
            send(_next_part(walk, group), start, stop)
        widest = max(widest, sum((stop - start) * width(group) for group, start, stop, _ in sweep))
        for node in reversed(forward):
            if node in reached and (is_active(node) or node in walk.outputs):
                visit(walk, node)
    if not any(e.shows_columns for e in program.extensions):
        program.largest = largest_batch(program, widest)
    program.walked.uses = {name: walk.uses.get(node, []) for name, node in program.params.items()}
    program.walked.direct = {n: walk.direct[p] for n, p in program.params.items() if p in walk.direct}
    program.walked.weights = walk.weights
    program.walked.columns, program.walked.wanted = walk.columns, walk.wanted
    program.walked.residuals = walk.residuals
    program.walked.parts, program.walked.sweeps = walk.parts, 1 + len(sweeps)
    return program


def _sweeps(walk: Walk, forward: int) -> list[list[tuple[Group, int, int, Callable[[Group, int, int], None]]]]:
    """The waiting columns or pairs, as (group, start, stop, send), packed into sweeps of as many as can be carried."""
    sweeps: list[list] = []
    total = sum(count * width(group) for group, count, _ in walk.waiting)
    size = sizes(total, walk.capacity, walk.convenient, forward) if total else 0
    room = 0
    for group, count, send in walk.waiting:
        start = 0
        while start < count:
            if room < width(group):
                sweeps.append([])
                room = max(size, width(group))
            stop = min(count, start + room // width(group))
            sweeps[-1].append((group, start, stop, send))
            room -= (stop - start) * width(group)
            start = stop
    return sweeps


def _next_part(walk: Walk, group: Group) -> Group:
    """Add the next part of a group to the walk."""
    parts = walk.parts.setdefault(group, [])
    part = replace(group, part=len(parts) + 1)
    parts.append(part)
    walk.groups.append(part)
    return part


def _seed(walk: Walk) -> None:
    program = walk.program
    if program.loss is None:
        return
    one = emit(program, _ones, program.loss, origin={"stage": "propagate", "op": "gradient of the loss"})
    walk.add(program.loss, Stack((GRADIENT,), (1,), one))


def _ones(loss: Tensor) -> Tensor:
    """A one that does not read the loss's value, so that nothing waits for it."""
    return torch.ones(1, dtype=loss.dtype, device=loss.device)
