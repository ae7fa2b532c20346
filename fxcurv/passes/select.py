"""select: for each `contract` node the cheapest candidate at these shapes, recorded in `program.decisions`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from fxcurv.contractions.candidates import CANDIDATES, TOGETHER, Candidate, Materialise
from fxcurv.contractions.contract import Contract, Spec, reduce_p
from fxcurv.contractions.sizes import dims
from fxcurv.cost import Cost, Machine
from fxcurv.ir.emit import emit
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Decision, Program
from fxcurv.passes.chunks import sums_of_positions


def select(program: Program) -> Program:
    """Replace every `contract` node by the nodes of its cheapest candidate."""
    nodes = [n for n in program.graph.nodes if isinstance(n.target, Contract)]
    by_positions = _sums_over_positions(program, nodes)
    shared = _materialised_anyway(nodes)
    for key, p in shared.items():
        first = next(n for n in nodes if _key(n) == key)
        if first is not p:
            first.prepend(p)  # it has the same arguments, and the others are to read it
    order = [*shared.values(), *(n for n in nodes if n not in shared.values())]
    done: dict[fx.Node, fx.Node] = {}
    for group in _groups([n for n in nodes if _key(n) not in shared]):
        done.update(_select_together(program, group, by_positions))
    for node in (n for n in order if n not in done):
        source = done.get(shared.get(_key(node)))
        done[node] = _select(program, node, source, by_positions)
    program.rename(done)
    program.refresh_output()
    return program


def _key(node: fx.Node):
    """What identifies the P of a contraction: its factors and samples."""
    return (node.target.spec.samples, str(node.target.tree), node.args)


def _materialised_anyway(nodes: list[fx.Node]) -> dict[tuple, fx.Node]:
    """P's that a result holds in full (individual gradients): other quantities of one column can read them."""
    found = {}
    for node in nodes:
        factors, weights = node.target.parts(node.args)
        one_column = weights is None and factors[0].g.meta["val"].shape[0] == 1
        if node.target.spec.power == 1 and node.target.spec.reduce == "v" and one_column:
            found[_key(node)] = node
    return found


def _groups(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Contractions of the same P."""
    found: dict[tuple, list[fx.Node]] = {}
    for node in nodes:
        found.setdefault(_key(node), []).append(node)
    return [group for group in found.values() if len(group) > 1]


def _fake_factors(factors):
    return pytree.tree_map(lambda n: n.meta["val"] if isinstance(n, fx.Node) else n, factors)


def ranked(spec: Spec, factors: list, machine: Machine, again: bool = False) -> list[tuple[Candidate, Cost]]:
    """The candidates for a contraction, the one predicted to be the fastest first.

    Args:
        factors: with fake tensors, or any that have a shape and a dtype.
        again: whether the result is to be differentiated again, which not all candidates allow.
    """
    allowed = [c for c in CANDIDATES if c.applies(spec, factors) and (c.differentiable or not again)]
    return sorted(((c, c.cost(spec, factors)) for c in allowed), key=lambda option: option[1].seconds(machine))


def _sums_over_positions(program: Program, nodes: list[fx.Node]) -> dict[fx.Node, bool]:
    """Contraction -> whether it needs P, for those that have to be sums over positions.

    It needs P if samples are weighted, since their weights may be computed from the same columns, or if several
    contractions read these columns.
    """
    wide = [n for n in nodes if sums_of_positions(program, n)]
    parts = {n: n.target.parts(n.args) for n in wide}
    read = Counter(f.g for factors, _ in parts.values() for f in factors)
    return {n: weights is not None or any(read[f.g] > 1 for f in factors) for n, (factors, weights) in parts.items()}


def _options(program: Program, node: fx.Node, fake, by_positions: dict[fx.Node, bool]) -> list[tuple[Candidate, Cost]]:
    found = ranked(node.target.spec, fake, program.machine, bool(program.options.create_graph))
    if node not in by_positions:
        return found
    found = [option for option in found if option[0].by_positions]
    return [option for option in found if isinstance(option[0], Materialise)] if by_positions[node] else found


def _select_together(
    program: Program, group: list[fx.Node], by_positions: dict[fx.Node, bool]
) -> dict[fx.Node, fx.Node]:
    """Compute the contractions of one P by one op, if this is cheaper than the cheapest way for each."""
    specs = [node.target.spec for node in group]
    factors, weights = group[0].target.parts(group[0].args)
    fake = _fake_factors(factors)
    apart_only = program.options.create_graph or weights is not None or group[0] in by_positions
    if apart_only or not TOGETHER.applies(specs, fake):
        return {}
    cost = TOGETHER.cost(specs, fake)
    apart = [_options(program, node, fake, by_positions)[0] for node in group]
    alone = sum(k.seconds(program.machine) for _, k in apart)
    if cost.seconds(program.machine) >= alone:
        return {}
    first = min(group, key=list(program.graph.nodes).index)
    origin = _origin(program, first, len(group))
    news = emit(program, TOGETHER.run, specs, factors, origin=origin, before=first)
    share = Cost(cost.flops / len(group), cost.bytes / len(group), cost.fresh / len(group), cost.calls // len(group))
    for node, new, (candidate, k) in zip(group, news, apart, strict=True):
        _record(program, node, "together", share, [(candidate.name, k)])
        program.stand_in(node, new)
        program.graph.erase_node(node)
    return dict(zip(group, news, strict=True))


def _select(program: Program, node: fx.Node, source: fx.Node | None, by_positions: dict[fx.Node, bool]) -> fx.Node:
    spec = node.target.spec
    factors, weights = node.target.parts(node.args)
    fake = _fake_factors(factors)
    options: list[tuple[str, Cost, Callable, Any]] = [
        (c.name, cost, c.run, factors) for c, cost in _options(program, node, fake, by_positions)
    ]
    if source is not None and "v" in spec.reduce:
        options.append(("reuse P", _reuse_cost(spec, fake), _reduce_given_p, source))
    priced = sorted(options, key=lambda option: option[1].seconds(program.machine))
    name, cost, run, operands = priced[0]
    origin = _origin(program, node, 1)
    new = emit(program, run, spec, operands, weights, origin=origin, before=node)
    _record(program, node, name, cost, [(other, k) for other, k, *_ in priced[1:]])
    program.stand_in(node, new)
    program.graph.erase_node(node)
    return new


def _origin(program: Program, node: fx.Node, count: int) -> dict:
    """Origin of the nodes that replace a contraction, with the numbers of the `count` decisions recorded next."""
    start = len(program.decisions)
    return {**node.meta["origin"], "stage": "select", "decisions": tuple(range(start, start + count))}


def _record(program: Program, node: fx.Node, name: str, cost: Cost, rejected: list[tuple[str, Cost]]) -> None:
    origin, machine = node.meta["origin"], program.machine
    param, extension, rule = (origin.get(key, "") for key in ("param", "extension", "rule"))
    program.decisions.append(
        Decision(
            param, extension, rule, name, int(cost.flops), int(cost.bytes), cost.seconds(machine),
            tuple((other, k.seconds(machine)) for other, k in rejected), savefield=origin.get("savefield", ""),
        )
    )  # fmt: skip


def _reduce_given_p(spec: Spec, p: Tensor, weights) -> Tensor:
    return reduce_p(spec, p.unsqueeze(0), weights)


def _reuse_cost(spec: Spec, factors) -> Cost:
    d = dims(factors[0])
    p = d.item * d.n * d.p
    square = spec.power == 2
    return Cost(0, p * (3 if square else 1), p if square else 0, 3)
