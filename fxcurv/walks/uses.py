"""Uses of a parameter: where its per-sample cotangents P arise, and how results move from there to the parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.contractions.factors import Factor
from fxcurv.ir.emit import emit
from fxcurv.ir.graph import canonical_args
from fxcurv.ir.origin import origin_of
from fxcurv.ir.precision import widened
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program, is_active
from fxcurv.quantity import Group
from fxcurv.rules.base import rule_of
from fxcurv.rules.call import Call, call_of


@dataclass(frozen=True)
class Use:
    """One per-sample use of a sample-free value: `factor` of P there, and the ops on the way up to the parameter.

    `path`: these ops, the nearest to the parameter last. `op` reads `value`, and `cotangent` [V, *y] are the columns at
    its output (None after a pull-back).
    """

    factor: Factor
    groups: tuple[Group, ...]
    columns: tuple[int, ...]
    rule: str
    path: tuple[fx.Node, ...] = ()
    op: Any = None
    value: Any = None
    cotangent: Any = None


def select_group(program: Program, use: Use, group: Group, origin: dict[str, Any]) -> Factor:
    """`use.factor` with the columns of `group` only."""
    g = columns_of(program, use, group, use.factor.g, origin)
    return use.factor if g is use.factor.g else use.factor.with_g(g)


def columns_of(program: Program, use: Use, group: Group, stacked: fx.Node, origin: dict[str, Any]) -> fx.Node:
    """The rows of `group` in `stacked`, [V, ...] for all groups of `use`."""
    if use.groups == (group,):
        return stacked
    start = sum(use.columns[: use.groups.index(group)])
    stop = start + use.columns[use.groups.index(group)]
    return emit(program, _columns, stacked, start, stop, origin=origin)


def _columns(g: Tensor, start: int, stop: int) -> Tensor:
    return g[start:stop]


def pull_back(program: Program, use: Use, value: fx.Node, reduce: str) -> fx.Node:
    """Move a contraction's result, [*lead, *value], from the value a use is at to its parameter, [*lead, *param]."""
    lead = len([axis for axis in "vn" if axis not in reduce])
    for node in use.path:
        rule, call = rule_of(node.target, program.rules), call_of(program, node)
        (wrt,) = [i for i, leaf in enumerate(pytree.tree_leaves(canonical_args(node))) if is_active(leaf)]
        value = emit(
            program, _apply_transpose, rule.transpose, call, wrt, value, lead, origin=origin_of(node, "extract")
        )
    return value


def _apply_transpose(transpose, call: Call, wrt: int, value: Tensor, lead: int) -> Tensor:
    flat = value.flatten(0, lead - 1) if lead > 1 else value if lead else value.unsqueeze(0)
    if flat.dtype == torch.float32:
        call = widened(call)  # squares of half precision stay precise on their way
    (out,) = transpose(call, (wrt,), flat)
    return out.reshape((*value.shape[:lead], *out.shape[1:]))
