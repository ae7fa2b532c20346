"""FLOPs and bytes of a program and of the plain pass, counted on fake tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from fxcurv.contractions.sizes import size
from fxcurv.ir.origin import STAGES, stage_of
from fxcurv.ir.private import FakeTensorMode, TorchDispatchMode, pytree
from fxcurv.ir.program import Program


@dataclass(frozen=True)
class Total:
    """Counted work: FLOPs of products, bytes that all ops but views read and write, nodes of the graph."""

    flops: int = 0
    bytes: int = 0
    nodes: int = 0

    def __add__(self, other: Total) -> Total:
        return Total(self.flops + other.flops, self.bytes + other.bytes, self.nodes + other.nodes)


# what it costs --------------------------------------------------------------------------------------------


class _Traffic(TorchDispatchMode):
    """Counts the bytes that every op reads and writes; views move none."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            self.bytes += _bytes((args, kwargs, out))
        return out


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(tree) if isinstance(t, Tensor))


class _Counter(fx.Interpreter):
    """Runs a graph on fake tensors and keeps the work of each stage."""

    def __init__(self, gm: fx.GraphModule):
        super().__init__(gm)
        self.stages = dict.fromkeys(STAGES, Total())
        self.flops, self.traffic = FlopCounterMode(display=False), _Traffic()

    def run_node(self, node: fx.Node) -> Any:
        """Run one node and book its work."""
        before = self.flops.get_total_flops(), self.traffic.bytes
        out = super().run_node(node)
        if node.op == "call_function":
            done = self.flops.get_total_flops() - before[0], self.traffic.bytes - before[1]
            self.stages[stage_of(node)] += Total(*done, nodes=1)
        return out


def count_program(program: Program) -> dict[str, Total]:
    """FLOPs and traffic of the emitted graph, by stage."""
    counter = _Counter(program.gm)
    with _fake_mode(), torch.no_grad(), counter.traffic, counter.flops:
        counter.run(*_fakes(program))
    return {**counter.stages, "program": sum(counter.stages.values(), Total())}


def count_plain(program: Program) -> Total | None:
    """The work of a forward and backward pass by autograd, of the loss or else the output's sum; None if it fails."""
    counter = _Counter(_cut_at(program, [program.loss] if program.loss is not None else program.output_leaves))
    with _fake_mode(), torch.enable_grad(), counter.traffic, counter.flops:
        fakes = _fakes(program)
        bound = zip(fakes, program.inputs, strict=True)
        params = [t.requires_grad_() for t, what in bound if what.kind == "param" and what.name in program.params]
        outputs = counter.run(*fakes)
        try:
            total = sum(t.sum() for t in outputs if t.is_floating_point())
            torch.autograd.grad(total, params, allow_unused=True)
        except (RuntimeError, NotImplementedError):  # a custom op whose only derivative is its rule
            return None
    return Total(counter.flops.get_total_flops(), counter.traffic.bytes)


def _cut_at(program: Program, targets: list[fx.Node]) -> fx.GraphModule:
    """The program's graph cut at `targets`, with provenance."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(program.graph, copies)
    graph.output(tuple(copies[t] for t in targets))
    # by the default test, ops that write to given memory would stay
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return fx.GraphModule(program.gm, graph)


def _fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def _fakes(program: Program) -> list[Any]:
    """A fake tensor for every placeholder, at the batch size of capture."""
    out = []
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            val = torch.empty(size(val), dtype=val.dtype, device=val.device)
        out.append(val)
    return out
