"""Time a program's decisions on real values, to compare with the cost model's predictions."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.ir.program import Program

RUNS = 5


def measure(program: Program, flat: list[Any], samples: int) -> list[float]:
    """Seconds of each of `program.decisions`: the median over a few runs of the graph, node by node, after one to warm up.

    A node that several decisions read counts for the first of them; the time of one that computes several is split.
    Large results are written into the same memory at every run, as for a caller who drops earlier results.

    Args:
        flat: the graph's arguments, without the memory for results.
        samples: the batch size.
    """
    given = [[t for i, t in zip(program.inputs, flat, strict=False) if i.kind == kind] for kind in ("input", "target")]
    lengths = program.lengths_of(*given)
    memory = [torch.empty(program.batch.shape(m.val, samples, lengths), dtype=m.val.dtype) for m in program.buffers]
    cuda = sorted({t.device.index or 0 for t in flat if isinstance(t, Tensor) and t.is_cuda})
    runs = []
    for _ in range(1 + RUNS):
        clock = _Clock(program, wait=bool(cuda))
        with torch.random.fork_rng(cuda):
            clock.run(*flat, *memory)
        runs.append(clock.seconds)
    return [statistics.median(each) for each in zip(*runs[1:], strict=True)]


class _Clock(fx.Interpreter):
    """Runs a program's graph and adds up the time of each decision's nodes."""

    def __init__(self, program: Program, wait: bool):
        super().__init__(program.gm)
        self.seconds = [0.0] * len(program.decisions)
        self._wait = wait
        self._decisions = _decisions_of(program)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, under the clock if it is a decision's."""
        mine = self._decisions.get(n)
        if not mine:
            return super().run_node(n)
        start = self._now()
        out = super().run_node(n)
        each = (self._now() - start) / len(mine)
        for index in mine:
            self.seconds[index] += each
        return out

    def _now(self) -> float:
        if self._wait:
            torch.cuda.synchronize()
        return time.perf_counter()


def _decisions_of(program: Program) -> dict[fx.Node, tuple[int, ...]]:
    """node -> indices of its decisions: `select` notes them on the node, `extract` the parameter and extension."""
    own: dict[tuple[str, str], tuple[int, ...]] = {}
    for index, d in enumerate(program.decisions):
        if d.stage == "extract":
            own[d.param, d.savefield] = (*own.get((d.param, d.savefield), ()), index)
    found = {}
    for node in program.graph.nodes:
        origin = node.meta.get("origin", {})
        if node.op != "call_function":
            continue
        if origin.get("stage") == "select":
            found[node] = origin["decisions"]
        elif origin.get("stage") == "extract":
            found[node] = own.get((origin.get("param", ""), origin.get("savefield", "")), ())
    return found
