"""Curvature of the ops: the columns that the Hessian has beyond the Gauss-Newton.

At an op y = op(inputs) that the gradient reaches with cotangent g, the Hessian of the loss gains the residual
R = sum_k g_k d^2 y_k over the op's inputs jointly, pulled back to the parameters. Its diagonal needs no root: columns u
with real weights w, sum w (J^T u)^2, or pairs of columns, sum (J^T u)(J^T v), suffice (Dangel et al. 2020, eq. 25,
without its eigendecompositions).

* elementwise op: one column e_i per entry, of weight g_i f''(x_i); none where f is piecewise linear;
* a product of a value and a parameter (any op that is linear in each): per entry i of the value the pair u and 2 q,
  u = e_i on the value and q the cotangent that e_i causes on the parameter; only where the parameter also
  reaches the value, since otherwise no entry of the diagonal sees it;
* any other op: the pairs e_i and R_i over all inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.contractions.factors import Explicit
from fxcurv.errors import FxcurvError
from fxcurv.ir.emit import declare, emit
from fxcurv.ir.graph import ancestors, canonical_args
from fxcurv.ir.lengths import said
from fxcurv.ir.origin import origin_of
from fxcurv.ir.placement import Shard, samples_back, samples_first, shifted
from fxcurv.ir.precision import widened
from fxcurv.ir.private import pytree
from fxcurv.ir.program import is_active, is_sharded
from fxcurv.ir.traced import zeros_behind
from fxcurv.quantity import GRADIENT, RESIDUAL, Group
from fxcurv.rules.base import FAILURES, Rule, floats, is_op, rule_of, serves_alone
from fxcurv.rules.call import Call, call_of, outputs_of, place_of_outputs
from fxcurv.rules.loss import separate
from fxcurv.walks.columns.stack import Stack, Walk, some
from fxcurv.walks.loss import pairs_of
from fxcurv.walks.products.derivatives import no_second_derivative
from fxcurv.walks.uses import Use


def at(walk: Walk, node: fx.Node, stack: Stack) -> None:
    """Add the residual columns of the op at `node` to its inputs' cotangents."""
    if GRADIENT not in stack.groups or not is_op(node.target):
        return
    try:
        _add(walk, node, stack)
    except FxcurvError:
        raise  # some are ValueErrors, which the next clause would catch
    except (*FAILURES, TypeError) as error:
        raise no_second_derivative(node, error) from error


def _add(walk: Walk, node: fx.Node, stack: Stack) -> None:
    leaves = pytree.tree_leaves(canonical_args(node))
    active = [i for i, leaf in enumerate(leaves) if is_active(leaf) and leaf in walk.curved]
    rule = rule_of(node.target, walk.program.rules)
    if rule.linear(active) or rule.piecewise_linear:
        return
    where = place_of_outputs(node)
    if stack.per_sample:
        _send_joint(walk, node, stack, rule, active, leaves, None)
    elif isinstance(where, Shard):
        data = [i for i in active if is_sharded(leaves[i])]
        free = [i for i in active if i not in data]
        if free and rule.linear(data) and all(rule.linear([i]) for i in free):
            _send_bilinear(walk, node, stack, rule, data, free, leaves)
        elif rule.d2 is not None and active == [0]:
            _send_elementwise(walk, node, stack, rule, leaves)
        else:
            _send_joint(walk, node, stack, rule, active, leaves, where)


def _share_parameter(walk: Walk, a: fx.Node, b: fx.Node) -> bool:
    """Whether a parameter whose curvature is asked for reaches both values."""
    params = {walk.program.params[n] for n in walk.of_curvature}
    return bool(params & set(ancestors([a])) & set(ancestors([b])))


def _gradient(walk: Walk, node: fx.Node, stack: Stack) -> Any:
    """The gradient's rows of a stack (a tuple for several outputs)."""
    start = sum(stack.columns[: stack.groups.index(GRADIENT)])
    of = sum(stack.columns)
    take = lambda n: emit(walk.program, _rows, n, start, of, origin=origin_of(node, "propagate"))  # noqa: E731
    if not isinstance(stack.node, tuple):
        return take(stack.node)
    rows = [n if n is None else take(n) for n in stack.node]
    one = next(n for n in rows if n is not None)
    of_floats = [y for y, val in zip(outputs_of(walk.program, node), node.meta["val"], strict=True) if floats(val)]
    return tuple([emit(walk.program, zeros_behind, one, of_floats[k]) if n is None else n for k, n in enumerate(rows)])


def _rows(t: Tensor, start: int, of: int) -> Tensor:
    return t.unflatten(0, (of, -1))[start]


def _start_group(
    walk: Walk, count: int, send: Callable[[Group, int, int], None], paired: bool, divisible: bool = True
) -> None:
    group = Group(RESIDUAL, len(walk.residuals), paired=paired)
    walk.residuals.append(group)
    walk.groups.append(group)
    walk.wanted[group] = walk.of_curvature
    walk.born(group, count, send, divisible)


def _send(walk: Walk, target: fx.Node, group: Group, columns: fx.Node, v: int, per_sample: bool) -> None:
    walk.add(target, Stack((group,), (v,), columns, per_sample))


def _send_elementwise(walk: Walk, node: fx.Node, stack: Stack, rule: Rule, leaves: list) -> None:
    program = walk.program
    call, origin = call_of(program, node), origin_of(node, "curvature")
    g = _gradient(walk, node, stack)
    entries = program.batch.columns(leaves[0].meta["val"])

    def send(part: Group, start: int, stop: int) -> None:
        columns, walk.weights[part] = emit(program, _unit_columns, rule.d2, call, g, start, stop, origin=origin)
        _send(walk, leaves[0], part, columns, stop - start, False)

    _start_group(walk, entries, send, paired=False)


def _unit_columns(d2, call: Call, g: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(e_i [V, *x], g f'' as weights [V, N]) for the entries i from `start` to `stop` of a sample's slice."""
    x, *rest = call.args
    place = call.places[0]
    curvature = (g.squeeze(0) * d2(x, call.y, *rest)).to(x.dtype)
    rows = samples_first(curvature, place)
    weights = rows.reshape(rows.shape[0], -1)[:, start:stop].t()
    return separate(torch.ones_like(x).unsqueeze(0), place, None, (start, stop)), weights


def _send_bilinear(walk: Walk, node: fx.Node, stack: Stack, rule: Rule, data: list, free: list, leaves: list) -> None:
    call, origin = call_of(walk.program, node), origin_of(node, "curvature")
    g = _gradient(walk, node, stack)
    for position in data:
        partners = [
            i
            for i in free
            if not rule.linear(sorted((position, i))) and _share_parameter(walk, leaves[i], leaves[position])
        ]
        if not partners:
            continue
        columns, direct = emit(walk.program, _cross_pairs, rule, call, position, tuple(partners), g, origin=origin)
        parts = {position: columns, **dict(zip(partners, direct, strict=True))}
        _send_parts(walk, leaves, parts, set(partners), rule, False, origin, (node, call, g))


def _cross_pairs(rule: Rule, call: Call, position: int, free: tuple, g: Tensor):
    """Pairs of columns for the value, [2D, *x], and for every parameter, [2D, N, *h].

    The first column of a pair is zero at the parameters, the second at the value.
    """
    leaves, spec = pytree.tree_flatten(call.args)
    x, place = leaves[position], call.places[position]
    units = separate(torch.ones_like(x).unsqueeze(0), place, None)

    def caused(unit: Tensor) -> list[Tensor]:
        args = pytree.tree_unflatten([unit if i == position else a for i, a in enumerate(leaves)], spec)
        there = Call(call.op, args, call.y, call.place, call.places, call.sizes, call.outs, call.alone)
        return [rule.factors(there, i, g).materialise().squeeze(0) for i in free]

    per_unit = [caused(unit) for unit in units.unbind(0)]
    direct = [torch.stack([q[k] for q in per_unit]) for k in range(len(free))]
    return torch.cat([units, torch.zeros_like(units)]), [torch.cat([torch.zeros_like(q), 2 * q]) for q in direct]


def _send_joint(
    walk: Walk, node: fx.Node, stack: Stack, rule: Rule, active: list, leaves: list, place: Shard | None
) -> None:
    call, origin = call_of(walk.program, node), origin_of(node, "curvature")
    g = _gradient(walk, node, stack)
    parts = emit(walk.program, _residual_pairs, rule, call, tuple(active), g, place, origin=origin)
    free = {i for i in active if place is not None and not is_sharded(leaves[i])}
    _send_parts(walk, leaves, dict(zip(active, parts, strict=True)), free, rule, place is None, origin, (node, call, g))


def _send_parts(walk: Walk, leaves: list, parts: dict, free: set, rule: Rule, per_sample: bool, origin, sources):
    """Send pairs of columns, by argument position: as cotangents, or as P itself to the arguments in `free`."""
    if per_sample:  # [2D * N, *h]
        pairs = sum(leaves[i].meta["val"].numel() for i in parts)
    else:
        pairs = next(iter(parts.values())).meta["val"].shape[0] // 2
    for i, whole in parts.items():
        if i in free or per_sample:
            declare(whole, Shard(1) if i in free else Shard(0, 2 * pairs), sources)
        else:
            declare(whole, shifted(leaves[i].meta["place"]), sources)

    def send(part: Group, start: int, stop: int) -> None:
        v = 2 * (stop - start)
        for i, whole in parts.items():
            columns = whole if per_sample else emit(walk.program, some, whole, start, stop, True, origin=origin)
            if i in free:
                walk.uses.setdefault(leaves[i], []).append(Use(Explicit(columns), (part,), (v,), rule.name))
            else:
                _send(walk, leaves[i], part, columns, v, per_sample)

    _start_group(walk, pairs, send, paired=True, divisible=not per_sample)


def _residual_pairs(rule: Rule, call: Call, active: tuple, g: Any, place: Shard | None):
    """Pairs of columns for every active input, from each sample's Hessian of <g, op>.

    With a place: [2D, *x] for sharded inputs, [2D, N, *h] for sample-free ones. Without (an op of sample-free values, g
    with a row per sample): [2D * N, *h].
    """
    leaves = pytree.tree_leaves(call.args)
    gs = g if isinstance(g, tuple) else (g,)
    gs = tuple(samples_first(t.squeeze(0), place) for t in gs) if place is not None else gs
    n = gs[0].shape[0]
    slices = {
        i: samples_first(leaves[i], p)
        for i, p in enumerate(call.places)
        if place is not None and isinstance(p, Shard) and isinstance(leaves[i], Tensor)
    }
    inputs = [slices[i] if i in slices else leaves[i].expand(n, *leaves[i].shape) for i in active]
    h = _residuals(rule, call, dict(zip(active, inputs, strict=True)), slices, gs, place)
    columns = pairs_of(widened((h + h.mT) / 2))
    out = []
    widths = [t[0].numel() for t in inputs]
    for i, part, t in zip(active, torch.split(columns, widths, 2), inputs, strict=True):
        part = part.reshape(columns.shape[0], *t.shape).to(t.dtype)
        if place is None:
            part = part.flatten(0, 1)
        elif i in slices:
            part = samples_back(part, call.places[i], 1)
        out.append(part)
    return out


def _residuals(rule: Rule, call: Call, inputs: dict, slices: dict, gs: tuple, place: Shard | None) -> Tensor:
    """Every sample's Hessian [N, D, D] of <g, op>, jointly in `inputs`, position -> [N, *slice]."""
    leaves, spec = pytree.tree_flatten(call.args)
    alone = (
        leaves
        if place is None
        else [leaf if s is None else said(s) for s, leaf in zip(call.sizes, leaves, strict=True)]
    )
    constants = {i: t for i, t in slices.items() if i not in inputs}
    first = [slices[i][0] if i in slices else leaf for i, leaf in enumerate(alone)]
    whole = place is not None and not serves_alone(call, first, [t[0] for t in gs])
    widths = [t[0].numel() for t in inputs.values()]

    def hessian(joint: Tensor, g_n: tuple, sample: Tensor, rest: dict) -> Tensor:
        def in_batch(i: int, part: Tensor) -> Tensor:
            row = sample.view(-1, *[1] * part.ndim)
            return samples_back(torch.where(row, part, slices[i]), call.places[i])

        def value(flat: Tensor) -> Tensor:
            new = list(leaves) if whole else [rest.get(i, leaf) for i, leaf in enumerate(alone)]
            for (i, t), part in zip(inputs.items(), torch.split(flat, widths), strict=True):
                part = part.reshape(t.shape[1:])
                new[i] = in_batch(i, part) if whole and i in slices else part
            out = rule.formula(call.op, pytree.tree_unflatten(new, spec))
            out = out if isinstance(out, tuple | list) else (out,)
            if whole and place is not None:
                row = [samples_first(o, place) for o in out]
                out = [(o * sample.view(-1, *[1] * (o.ndim - 1))).sum(0) for o in row]
            return sum((a * b).sum() for a, b in zip(g_n, out, strict=False))

        _, pull = torch.func.vjp(torch.func.grad(value), joint)
        return torch.vmap(pull)(torch.eye(sum(widths), dtype=joint.dtype, device=joint.device))[0]

    joint = torch.cat([t.reshape(t.shape[0], -1) for t in inputs.values()], 1)  # `len` would fix N
    samples = torch.eye(gs[0].shape[0], dtype=torch.bool, device=joint.device)
    return torch.vmap(hessian)(joint, gs, samples, constants)
