"""`Again` under `mesh=`: a call of the same kind as an earlier one, on every rank.

The message that goes before a call (`runtime.spread`) is the same as the long way's, so one rank may go this way and
another that: where the rows are not those of equal calls, all go the long way. If the first sum over ranks is a few
numbers that follow from the data alone (how many targets are counted), the message has them, and the sum is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import SymInt, Tensor, fx

from fxcurv.front.requests import Request
from fxcurv.ir.graph import ancestors
from fxcurv.ir.program import Program
from fxcurv.passes.distribute import BEGUN
from fxcurv.result import Result
from fxcurv.rules.traits import over_ranks, random
from fxcurv.runtime.again import Again
from fxcurv.runtime.call import run_error
from fxcurv.runtime.direct import direct
from fxcurv.runtime.programs import Programs, Ready
from fxcurv.runtime.ranks import NUMBERS, Ranks


class AgainOnRanks(Again):
    """A call that can be repeated on every rank of a mesh."""

    def __init__(self, ready: Ready, request: Request, inputs: Any, targets: tuple):
        super().__init__(ready, request, inputs, targets)
        self.request, self.gm, self.early = (request.subject, request.mode), ready.program.gm, _early(ready.program)
        if self.early is not None:
            self.gm = self.early.rest
            self.run = direct(self.gm)
        self.counts = [k for k, what in enumerate(ready.program.inputs) if what.kind == "samples"]
        self.firsts = [k for k, what in enumerate(ready.program.inputs) if what.kind == "first"]

    @classmethod
    def of(cls, ready: Ready, request: Request, inputs: Any, targets: tuple) -> Self | None:
        """As `Again.of`; None also for sharded parameters, sums that one rank has, and where the last sum does not end a call."""
        spread = ready.program.spread
        plain = spread.broken is not None and not request.sharded and not spread.owners
        return super().of(ready, request, inputs, targets) if plain else None

    def says(self, inputs: Any, targets: tuple, drawn: Sequence[int]) -> list[int]:
        """This rank's row of the message: (samples, program, seed, whether given, 0 checks, 1 for this way, numbers in bits)."""
        row = [self.n, *drawn, 0]
        if self.early is None:
            return [*row, 1]
        try:
            with torch.no_grad():
                value = self.early.value(*self.bound(inputs, targets, 0, None))
        except (RuntimeError, IndexError):
            return row  # the long way names the op
        return [*row, 1, *value.reshape(-1).double().view(torch.long).tolist()]

    def agrees(self, rows: Sequence[Sequence[int]]) -> bool:
        """Whether all ranks make this call, this way."""
        equal = any(row[0] for row in rows) and all(row[1] == self.ready.digest and row[5] for row in rows)
        return equal and len({row[2] for row in rows if row[3]}) < 2 and len({row[3] for row in rows}) == 1

    def call_with(
        self, ranks: Ranks, programs: Programs[Ready], inputs: Any, targets: tuple, rows: Sequence[Sequence[int]]
    ) -> Result:
        """The result; as in a call that goes the long way, all ranks raise if one does."""
        sizes, program, memory = [row[0] for row in rows], self.ready.program, list[Tensor]()
        flat = self.bound(inputs, targets, rows[0][2], None)
        for position in self.counts:
            flat[position] = sum(sizes)
        for position in self.firsts:
            flat[position] = torch.tensor(sum(sizes[: ranks.rank]), device=self.device)

        def arguments() -> list[Any]:
            memory.extend(self.memory())
            return [*flat, *memory, *([] if self.early is None else [self.early.total(rows, self.device)])]

        def run() -> tuple:
            try:
                with torch.no_grad():
                    return ranks.run(self.gm, arguments, lambda given: self.run(*given), sum(sizes))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError) as error:
                subject, mode = self.request
                request = programs.request(subject, inputs, targets, mode)
                raise run_error(program, request.arguments, flat, error) from error

        result = self.result(ranks.told(run, program), flat, memory)
        result.spread_over(sizes, functools.partial(ranks.whole, sizes=sizes), program.spread.places)
        return result


@dataclass(frozen=True)
class _Early:
    """A program in two: numbers of the data alone, and the rest, whose last argument is their sum over ranks."""

    value: Callable[..., Tensor]
    rest: fx.GraphModule
    like: Tensor

    def total(self, rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """The sum, from the rows of a message."""
        bits = torch.tensor([row[6 : 6 + self.like.numel()] for row in rows])
        return bits.view(torch.double).sum(0).to(device, self.like.dtype).view(self.like.shape)


def _early(program: Program) -> _Early | None:
    """The program in two, if its first sum over ranks, and not its last one, is of a few numbers of the data."""
    first, *others = [n for n in program.graph.nodes if over_ranks(n) in BEGUN]
    value: Any = first.args[0]
    if not others or over_ranks(first) != "sum" or not _of_data(program, value):
        return None
    given, needed = _placeholders(program.graph), {*ancestors([value])}
    given = given[: len(program.inputs) - len(program.buffers)]  # without memory for results
    alone, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in [*given, *(n for n in program.graph.nodes if n in needed and n.op != "placeholder")]:
        copies[node] = alone.node_copy(node, copies.__getitem__)
    alone.output(copies[value])
    return _Early(direct(fx.GraphModule(program.gm, alone)), _without(program, first), value.meta["val"])


def _without(program: Program, first: fx.Node) -> fx.GraphModule:
    """The program's graph, with one more argument in place of its first sum over ranks."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(program.graph, copies))
    with graph.inserting_after(_placeholders(graph)[-1]):
        told = graph.placeholder("told")
    for wait in first.users:
        told.meta = {"val": wait.meta["val"]}
        copies[wait].replace_all_uses_with(told)
        graph.erase_node(copies[wait])
    graph.erase_node(copies[first])
    graph.eliminate_dead_code()
    return fx.GraphModule(program.gm, graph)


def _of_data(program: Program, value: fx.Node) -> bool:
    """Whether a value is a few numbers that no parameter and no drawing have part in."""
    kinds = dict(zip(_placeholders(program.graph), (i.kind for i in program.inputs), strict=True))
    needed, val = ancestors([value]), value.meta["val"]
    if any(isinstance(s, SymInt) for s in val.shape) or val.numel() > NUMBERS or not val.is_floating_point():
        return False
    plain = not any(random(n.target) for n in needed)
    return plain and {kinds[n] for n in needed if n in kinds} <= {"input", "target", "buffer", "constant"}


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]
