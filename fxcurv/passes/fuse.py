"""fuse: keep ops that have a forward and a backward kernel in PyTorch, or rewrite them in mathematics where needed.

A rewrite is needed where something looks inside an op: for its second derivative, its tangent, or the derivative of its
derivative. Each op is decided by itself; `analysis.said` records the decision and its reason.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import fx

from fxcurv.ir.emit import emit, substitute
from fxcurv.ir.graph import canonical_args, descendants, invoke
from fxcurv.ir.origin import module_path, origin_of
from fxcurv.ir.placement import MIXED
from fxcurv.ir.program import Program
from fxcurv.passes.independence import independence, visit
from fxcurv.passes.normalize import may_stay, say_in_others
from fxcurv.rules.base import AGAIN, REWRITES
from fxcurv.rules.fused import FUSED


def fuse(program: Program) -> Program:
    """Replace each op of `FUSED` by its kernels or by its rewrite; an op that has neither keeps its rule."""
    looked_into, mixed = _reasons_to_rewrite(program), False
    for node in [n for n in program.graph.nodes if may_stay(n, program)]:
        found = looked_into.get(node) or FUSED[node.target](node)
        why, fn = (found, REWRITES.get(node.target)) if isinstance(found, str) else ("", found)
        name = str(node.target).removeprefix("aten.").removesuffix(".default")
        program.analysis.said.append((name, module_path(node), why))
        if fn is None:
            continue
        mixed = mixed or bool(why) and node.meta["place"] == MIXED
        said = functools.partial(invoke, node.target, fn=fn)
        new = emit(program, said, canonical_args(node), origin=origin_of(node, "forward"), before=node)
        substitute(program, node, new)
    if any(why for *_, why in program.analysis.said):
        say_in_others(program)
    if program.options.create_graph or any(e.requires.inside for e in program.extensions):
        program.rules = AGAIN | program.rules
    if mixed:
        return independence(program)  # the rewrite may show where the samples are
    for node in program.graph.nodes:
        if "place" not in node.meta and node.op == "call_function":
            visit(program, node)
    return program


def _reasons_to_rewrite(program: Program) -> dict[fx.Node, str]:
    """Node -> what looks inside it, and why."""
    if program.options.create_graph:
        return dict.fromkeys(program.graph.nodes, "create_graph differentiates its derivative")
    found: dict[fx.Node, str] = {}

    def needed(nodes: Iterable[fx.Node], by: object, what: str) -> None:
        for node in nodes:
            found.setdefault(node, f"{type(by).__name__} needs {what}")

    for e in program.extensions:
        if e.requires.inside:
            reached = descendants([program.params[name] for name in program.names_of(e)])
            needed(reached, e, e.requires.inside)
        elif e.requires.of_loss:
            needed(descendants(program.heads) - set(program.heads), e, "the loss's second derivative")
    return found
