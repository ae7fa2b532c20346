"""Fix a program at one batch size; recompute the values of a changed graph."""

from __future__ import annotations

import torch
from torch import SymInt, Tensor, fx

from fxcurv.ir.batch import Batch
from fxcurv.ir.private import enable_python_dispatcher
from fxcurv.ir.program import Program


def propagate_values(program: Program) -> None:
    """Compute every node's fake value anew, from those of the placeholders."""
    with program.fake_mode, torch.no_grad(), enable_python_dispatcher():
        for node in program.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda a: a.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)


def specialise(program: Program, n: int) -> Program:
    """The captured program at the fixed batch size `n`: sizes become numbers, values are propagated anew."""
    batch = program.batch
    for node in list(program.graph.nodes):
        val = node.meta.get("val")
        if node.op == "placeholder" and isinstance(val, Tensor):
            with program.fake_mode:
                strides = [batch.evaluate(s, n) for s in val.stride()]
                node.meta["val"] = torch.empty_strided(batch.shape(val, n), strides, dtype=val.dtype, device=val.device)
        elif isinstance(val, SymInt):
            number = batch.evaluate(val, n)
            for user in list(node.users):
                user.args = fx.node.map_arg(user.args, lambda a, old=node, new=number: new if a is old else a)
                user.kwargs = fx.node.map_arg(user.kwargs, lambda a, old=node, new=number: new if a is old else a)
            program.graph.erase_node(node)
    propagate_values(program)
    program.batch = Batch(frozenset(), n)
    return program
