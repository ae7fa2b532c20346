"""Which bias belongs to which weight: both share one block, with the weight's inputs as [a, 1] and its columns b.

P[v,n] = sum_s b [a, 1]^T holds if the bias is added to the output of every use of the weight: by the same op (a linear
layer, a convolution), or by a sum right behind it (x @ W + c).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from fxcurv.contractions.factors import Gather
from fxcurv.extensions.layers import Layer, LayerUse
from fxcurv.ir.graph import canonical_args, layout
from fxcurv.ir.program import Program, is_active
from fxcurv.rules.base import rule_of
from fxcurv.rules.traits import WEIGHTS, plain_sum


def partners(program: Program, layers: Mapping[str, Layer]) -> dict[str, str]:
    """Weight -> the bias that is added once at each of its uses, in the same rows.

    A weight that is looked up has none: the factor A of both together would not be diagonal.
    """
    weights = {name: w for name, w in layers.items() if not w.bias and not isinstance(w.uses[0].use.factor, Gather)}
    found: dict[str, str] = {}
    for name, bias in layers.items():
        if bias.bias:
            mine = [w for w in weights if w not in found and _alike(program, weights[w], bias)]
            found |= {mine[0]: name} if len(mine) == 1 else {}
    return found


def _alike(program: Program, weight: Layer, bias: Layer) -> bool:
    rows = {u.use.op: u.rows for u in weight.uses}
    ops = [_op_with_bias(program, u, rows) for u in bias.uses]
    once = len(rows) == len(weight.uses) == len(ops) == len(set(ops)) and None not in ops
    same = once and all(rows[op] == u.rows for op, u in zip(ops, bias.uses, strict=True))
    return same and weight.arrangement.rows == bias.arrangement.rows


def _op_with_bias(program: Program, bias: LayerUse, ops: Mapping[Any, Any]) -> fx.Node | None:
    """The one of `ops` to whose output the bias is added; else None."""
    op = bias.use.op
    if op in ops:
        return op
    if op is None or not plain_sum(op):
        return None
    x, z = canonical_args(op)[:2]
    node = z if x is bias.use.value else x
    while isinstance(node, fx.Node) and sum(map(is_active, node.users)) == 1:
        if node in ops:
            return node if node.target in WEIGHTS and _along(op, bias, node, WEIGHTS[node.target][1]) else None
        rule = rule_of(node.target, program.rules)
        if not (rule.in_order and rule.index_map) or _sizes(node)[-1:] != _sizes(op)[-1:]:
            return None
        node = canonical_args(node)[0]
    return None


def _along(op: fx.Node, bias: LayerUse, node: fx.Node, axis: int) -> bool:
    """Whether a bias of the sum `op` lies along `axis` of `node`, which reaches the sum in order through views."""
    sizes, summed = _sizes(node), _sizes(op)
    axis, channel = axis % len(sizes), bias.at[1] if bias.at is not None else None
    if channel is None:  # one number
        return sizes[axis] == 1
    channel %= len(summed)
    last = (axis, channel) == (len(sizes) - 1, len(summed) - 1) and sizes[-1] == summed[-1]
    return last or (sizes == summed and axis == channel)


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    return layout(node.meta["val"])[0]
