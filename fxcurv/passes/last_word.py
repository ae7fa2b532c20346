"""last_word: the last sum over ranks also counts the ranks that broke off before it, so that no message has to follow it.

A rank that fails sends what the others still wait for (`distribute.rest`): zeros, and a one as the last number of the last
sum. Where the last collective is none (shards, a sum that one rank gets, rows of all ranks), ranks ask each other after
the call. Runs when the order of collectives is final.
"""

from __future__ import annotations

import torch
from torch import SymInt, Tensor, fx

from fxcurv.ir.emit import emit
from fxcurv.ir.program import Program
from fxcurv.ir.ranks import across
from fxcurv.passes.distribute import BEGUN
from fxcurv.rules.traits import over_ranks

ORIGIN = {"stage": "distribute", "op": "whether all ranks got here", "module": ""}


def last_word(program: Program) -> Program:
    """See the module."""
    begun = [n for n in program.graph.nodes if over_ranks(n) in BEGUN]
    if not begun or not across(program.options.ranks) or program.options.create_graph:
        return program
    last, users = begun[-1], list(begun[-1].users)
    sizes = last.meta["val"].shape if over_ranks(last) == "sum" else ()
    if over_ranks(last) == "sum" and len(users) == 1 and not any(isinstance(s, SymInt) for s in sizes):
        program.spread.broken = _lengthen(program, last, users[0])
        program.refresh_output()
        program.graph.lint()
        program.gm.recompile()
    return program


def _lengthen(program: Program, last: fx.Node, wait: fx.Node) -> fx.Node:
    """Let a sum travel with one more number, zero here, and return the node with the number's sum."""
    (value, *others), readers = last.args, list(wait.users)
    joined = (
        value.meta["val"].ndim == 1
        and len(value.users) == 1
        and len(value.args) == 1
        and isinstance(value.args[0], list | tuple)
    )
    longer = emit(program, _with_zero, value.args[0] if joined else [value], origin=ORIGIN, before=last)
    last.args = (longer, *others)
    if joined:
        program.graph.erase_node(value)
    shape = wait.meta["val"].shape
    last.meta["val"] = wait.meta["val"] = longer.meta["val"]
    last.meta["last_word"] = True
    total, broken = emit(program, lambda t: (t[:-1].view(shape), t[-1]), wait, origin=ORIGIN, before=wait.next)
    for reader in readers:
        reader.replace_input_with(wait, total)
    return broken


def _with_zero(values: list[Tensor]) -> Tensor:
    return torch.cat([*[v.reshape(-1) for v in values], values[0].new_zeros(1)])
