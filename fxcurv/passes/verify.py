"""verify: the invariants that hold between passes."""

from __future__ import annotations

from torch import Tensor, fx

from fxcurv.errors import InternalError
from fxcurv.ir.origin import locate
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Alike, Shard
from fxcurv.ir.private import FakeTensor, pytree, schema_of
from fxcurv.ir.program import Program


def verify(program: Program, after: str) -> None:
    """Raise `InternalError` when `program` is malformed after the pass `after`."""
    program.graph.lint()
    alive = set(program.graph.nodes)
    for root in program.roots():
        if root not in alive:
            raise InternalError(f"after {after}: result {root} is not in the graph")
    for node in program.graph.nodes:
        if node.op == "call_function":
            _check_node(node, after)
    wanted = {e.savefield: program.names_of(e) for e in program.extensions}
    fewer = {e.savefield for e in program.extensions if e.leaves_out}
    for field, results in program.results.items():
        names, missing = set(wanted.get(field, program.params)), field in fewer
        if not (names >= set(results) if missing else names == set(results)):
            raise InternalError(f"after {after}: {field} covers {sorted(results)}, not every parameter")
    if after == "placements":
        _check_placements(program)


def _check_placements(program: Program) -> None:
    """Check that every value has a placement across the parts of a batch, and every result the documented one."""
    for node in program.graph.nodes:
        if node.op != "output" and "across" not in node.meta:
            raise InternalError(f"after placements: {locate(node)} has no placement")
    ours = [e for e in program.extensions if type(e).__module__.startswith("fxcurv.")]  # a user's need not declare it
    axes = {"grad": None, **{e.savefield: e.sample_axis for e in ours}}
    some = {e.savefield for e in ours if getattr(e, "subsampling", None)}  # as many rows as samples are named
    for field in [f for f in axes if f in program.results and f not in program.borrowing]:
        axis = axes[field]
        allowed: tuple = (PARTIAL, REPLICATE) if axis is None else (Shard(axis), Alike(axis))
        allowed += (REPLICATE,) if field in some or program.fixed else ()  # the batch is not split
        for node in pytree.tree_leaves(program.results[field]):
            if node.meta["across"] not in (*allowed, MIXED):
                raise InternalError(f"after placements: {field} is {node.meta['across']}, not {allowed}")


def _check_node(node: fx.Node, after: str) -> None:
    if node.meta.get("val") is None and not node.users:
        return
    if "val" not in node.meta:
        raise InternalError(f"after {after}: {locate(node)} has no value")
    schema = schema_of(node.target)
    into_memory = isinstance(node.kwargs.get("out"), fx.Node) and node.kwargs["out"].op == "placeholder"
    if schema is not None and schema.is_mutable and not into_memory:
        raise InternalError(f"after {after}: {locate(node)} mutates its input")
    val = node.meta["val"]
    if isinstance(val, Tensor) and not isinstance(val, FakeTensor):
        raise InternalError(f"after {after}: {locate(node)} holds a real tensor")
