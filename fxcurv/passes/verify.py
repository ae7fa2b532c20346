"""verify: the invariants that hold between passes."""

from __future__ import annotations

from torch import Tensor, fx

from fxcurv.errors import InternalError
from fxcurv.ir.origin import locate
from fxcurv.ir.private import FakeTensor, schema_of
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
    for field, results in program.results.items():
        if set(results) != set(wanted.get(field, program.params)):
            raise InternalError(f"after {after}: {field} covers {sorted(results)}, not every parameter")


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
