"""gathers: parameters of `fully_shard` arrive as shards, and are gathered where they are used, a bucket at a time.

A bucket is gathered for the forward pass and, if `reshard_after_forward` says so, again behind it; no rank holds it
whole between and after its uses. If `reshard_after_forward` is a number of ranks, each of them holds a larger piece in
between, and the bucket is gathered over these ranks. A value that is computed from parameters alone (a transposed
weight) and read in both halves is computed in both. The next bucket travels while one is used. Runs after `schedule`,
whose order it keeps.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from fxcurv.ir.origin import stage_of
from fxcurv.ir.program import Program
from fxcurv.ir.shards import Begin, Bucket, End, Hold
from fxcurv.rules.traits import over_ranks, random


def gathers(program: Program) -> Program:
    """See the module."""
    for bucket in program.options.sharded:
        cuts = {name: cut for name, cut in zip(bucket.names, bucket.cuts, strict=True)}
        given = {name: node for name, node in _given(program) if name in cuts and node.users}
        for name, node in given.items():
            with program.fake_mode:
                node.meta["whole"] = node.meta["val"]
                node.meta["val"] = node.meta["val"].new_empty(cuts[name].local(), dtype=bucket.dtypes.own)
        params, bucket = list(given.values()), bucket.only(given)
        pieces, halves = params, _halves(program, params, bucket.again)
        for k, half in enumerate(halves):
            whole = _gather(program, bucket, pieces, params, half)
            if bucket.between and k + 1 < len(halves):
                bucket = bucket.held()
                pieces = _hold(program, bucket, whole)
    _begin_early(program)
    program.refresh_output()
    program.graph.lint()
    return program


def _given(program: Program) -> Iterator[tuple[str, fx.Node]]:
    for what, node in zip(program.inputs, program.graph.find_nodes(op="placeholder"), strict=True):
        if what.kind == "param":
            yield what.name, node


def _halves(program: Program, params: list[fx.Node], again: bool) -> list[list[fx.Node]]:
    """The nodes that read parameters, in the order of the graph: those of the forward pass, and those behind it.

    What the forward pass computes from parameters alone, and a node behind it reads, is computed there once more.
    """
    alone = _computed_from(program, params)
    behind = [
        n for n in program.graph.nodes if n.op == "output" or n.op == "call_function" and stage_of(n) != "forward"
    ]
    if not again or not params:
        return [[n for n in program.graph.nodes if any(p in n.all_input_nodes for p in params)]] if params else []
    copies: dict[fx.Node, fx.Node] = {}
    later = set(behind)
    for node in behind:
        for value in [i for i in node.all_input_nodes if i in alone and i not in later and i not in params]:
            node.replace_input_with(value, _again(program, value, alone, params, copies, node))
    renamed = {old: new for old, new in copies.items() if old in program.roots()}
    program.rename(renamed)
    later.update(copies.values())
    reads = [n for n in program.graph.nodes if any(p in n.all_input_nodes for p in params)]
    return [half for half in ([n for n in reads if n not in later], [n for n in reads if n in later]) if half]


def _computed_from(program: Program, params: list[fx.Node]) -> set[fx.Node]:
    """These parameters, and all that is computed from them and constants alone."""
    known = set(params)
    for node in program.graph.nodes:
        if node.op == "call_function" and not random(node.target) and not over_ranks(node):
            sources = [i for i in node.all_input_nodes if i.op != "get_attr"]
            if sources and all(i in known for i in sources):
                known.add(node)
    return known


def _again(
    program: Program,
    value: fx.Node,
    alone: set[fx.Node],
    params: list[fx.Node],
    copies: dict[fx.Node, fx.Node],
    before: fx.Node,
) -> fx.Node:
    """`value` computed once more, in front of its first reader."""
    if value in params or value not in alone:
        return value
    if value not in copies:
        for source in value.all_input_nodes:
            _again(program, source, alone, params, copies, before)
        with program.graph.inserting_before(before):
            copies[value] = program.graph.node_copy(value, lambda a: copies.get(a, a))
    return copies[value]


def _gather(
    program: Program, bucket: Bucket, pieces: list[fx.Node], params: list[fx.Node], reads: list[fx.Node]
) -> list[fx.Node]:
    """Gather the bucket in front of the first of these nodes, and let all of them read it.

    Args:
        pieces: the nodes to gather, in place of `params`.
    """
    graph, origin = program.graph, {"stage": "distribute", "op": "gather", "module": ""}
    with graph.inserting_before(reads[0]):
        begun = graph.call_function(Begin(bucket), (pieces,))
        ended = graph.call_function(End(bucket), (begun,))
        whole = [graph.call_function(operator.getitem, (ended, k)) for k in range(len(params))]
    vals = [p.meta["whole"] for p in params]
    begun.meta, ended.meta = {"val": None, "origin": origin}, {"val": vals, "origin": origin}
    for node, param in zip(whole, params, strict=True):
        node.meta = {**param.meta, "val": param.meta["whole"], "origin": origin}
        for reader in reads:
            reader.replace_input_with(param, node)
    if any(r.op == "output" for r in reads):
        program.rename(dict(zip(params, whole, strict=True)))
    return whole


def _hold(program: Program, bucket: Bucket, whole: list[fx.Node]) -> list[fx.Node]:
    """The pieces of the gathered values that this rank keeps, cut right behind the gather."""
    graph, origin = program.graph, {"stage": "distribute", "op": "hold", "module": ""}
    with program.fake_mode:
        vals = [n.meta["val"].new_empty(c.local()) for n, c in zip(whole, bucket.cuts, strict=True)]
    with graph.inserting_after(whole[-1]):
        held = graph.call_function(Hold(bucket), (whole,))
    held.meta = {"val": vals, "origin": origin}
    pieces: list[fx.Node] = []
    for k, val in enumerate(vals):
        with graph.inserting_after(pieces[-1] if pieces else held):
            pieces.append(graph.call_function(operator.getitem, (held, k)))
        pieces[-1].meta = {"val": val, "origin": origin}
    return pieces


def _begin_early(program: Program) -> None:
    """Begin every gather right behind the arrival of the one before it."""
    begun = [n for n in program.graph.nodes if over_ranks(n) == "gather"]
    for one, other in zip(begun, begun[1:], strict=False):
        (last,) = one.users
        arrived = {last}
        while _is_part_of(last.next, arrived):
            last = last.next
            arrived.add(last)
        last.append(other)


def _is_part_of(node: fx.Node, arrived: set[fx.Node]) -> bool:
    """Whether a node takes an item of what arrived, or holds pieces of it."""
    plain = node.target is operator.getitem or over_ranks(node) == "hold"
    return plain and all(i in arrived for i in node.all_input_nodes)
