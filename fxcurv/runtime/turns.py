"""A call that computes its batch in parts, one after the other: `compile(outputs=False)`.

The program is that of a batch on several ranks (`passes.distribute`), and each part of the batch plays a rank. What a
collective adds up is accumulated part by part; nodes that read such a sum run, again part by part, once it is complete.
So only results per sample are ever held for all samples, and the numbers are those of the whole batch.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import ArgumentError
from fxcurv.front.requests import Request, Subject
from fxcurv.ir.chunked import Chunked
from fxcurv.ir.graph import layout
from fxcurv.ir.placement import Shard, samples_back, samples_first
from fxcurv.ir.private import compile_lock, pytree
from fxcurv.ir.program import Program
from fxcurv.passes.recycle import without_memory
from fxcurv.result import Result
from fxcurv.rules.traits import ADDING, IN_PLACE, of_one, over_ranks
from fxcurv.runtime.bind import bind, cuda_devices, seed_tensor
from fxcurv.runtime.call import refuse_values
from fxcurv.runtime.memory import alone
from fxcurv.runtime.programs import Programs, Ready

# Bytes of a part's widest value; but a part has at least one sample, and at most a quarter of the batch.
ROOM = 32 << 20


@torch.compiler.disable
def call_in_turns(
    programs: Programs[Ready],
    subject: Subject,
    inputs: Any,
    targets: tuple,
    *,
    seed: Any,
    generator: torch.Generator | None,
) -> Result:
    """`Compiled.__call__` under `outputs=False`."""
    request = programs.request(subject, inputs, targets, subject.autocast())
    n = request.arguments.batch_size
    if not n:
        raise ArgumentError("the batch is empty, which outputs=False cannot be of: pass at least one sample")
    with request.apart():
        with compile_lock:
            ready = programs.held(request) or programs.spread(request, max(n, 2))
        program, drawn = ready.program, seed_tensor(seed, generator, subject.device())
        size = part_size(program, n)
        if not ready.checked:
            with compile_lock:
                _check(ready, request, drawn, size)
        loss, _, mutations, results, extras = program.unpack(
            _values(program, _bind_parts(program, request, drawn, size)), _unchanged
        )
        program.python.run_effects(subject.modules())
    fields: dict[str, Any] = {"loss": loss, **results, **extras}
    if not program.options.update_buffers:
        fields["buffers"] = mutations
    else:
        buffers = dict(subject.model.named_buffers(remove_duplicate=False))
        with torch.no_grad():
            for name, value in mutations.items():
                buffers[name].copy_(value)
    return Result(fields, program.extensions, subject.holder)


def _unchanged(value: Any) -> Any:
    return value


def part_size(program: Program, n: int) -> int:
    """How many of `n` samples are computed at once."""
    vals = [
        v for node in program.graph.nodes for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)
    ]
    batch = program.batch
    widest = max(
        (batch.per_sample(v) * v.element_size() for v in vals if batch.shape(v, 2) != batch.shape(v, 3)), default=1
    )
    return max(1, min(n // 4, ROOM // widest))


def _bind_parts(program: Program, request: Request, seed: Tensor, size: int) -> list[list[Any]]:
    """What the placeholders are bound to, for each part of `size` samples."""
    arguments, n = request.arguments, request.arguments.batch_size
    flats = []
    for start in range(0, n, size):
        count = min(size, n - start)
        part = arguments.along_samples(functools.partial(_narrow, start, count))
        flats.append(bind(program, request.subject, part, seed, None, part=(n, start)))
    return flats


def _narrow(start: int, count: int, t: Tensor, d: int) -> Tensor:
    return t.narrow(d, start, count)


def _values(program: Program, flats: Sequence[list[Any]]) -> tuple:
    """What the program returns for all samples."""
    places = _places(program)
    found = Turns(without_memory(program), [isinstance(p, Shard) for p in places]).run(flats)
    return tuple(map(_join, found, places))


def _check(ready: Ready, request: Request, seed: Tensor, size: int) -> None:
    """Check conditions on all values, and do what `check=` asks for on two parts."""
    flats = _bind_parts(ready.program, request, seed, size)
    if ready.program.check_module is not None:
        module = ready.program.check_module
        with torch.random.fork_rng(cuda_devices(flats[0])):
            for holds in zip(*Turns(module, [True] * len(ready.program.verdicts)).run(flats), strict=True):
                refuse_values(ready.program, holds)
    n = min(request.arguments.batch_size, 2 * size)
    few = dataclasses.replace(request, arguments=request.arguments.along_samples(functools.partial(_narrow, 0, n)))
    flat = bind(ready.program, few.subject, few.arguments, seed, None, part=(n, 0))
    with torch.random.fork_rng(cuda_devices(flat)), torch.no_grad():
        if ready.probe is not None:
            ready.probe.run(flat, n)
        if ready.selfcheck is not None:
            check = ready.selfcheck.begin(ready.program, few, flat)
            check.compare(
                ready.program.unpack(_values(ready.program, _bind_parts(ready.program, few, seed, size)), _unchanged)
            )
    ready.checked = ready.verified = True


class Turns:
    """Runs a graph with collectives in one process, for one part of the batch after the other.

    Every node has a level, and a sum over parts is one level above its argument. A node gets the latest level that its
    readers allow, so that little is kept between levels. All parts run level 0, then all of them level 1, and so on.

    Args:
        every: for each output, whether its values in all parts are wanted, or only that in the first.
    """

    def __init__(self, gm: fx.GraphModule, every: Sequence[bool]):
        self.gm = gm
        self.nodes = list(self.gm.graph.nodes)
        self.given = [n for n in self.nodes if n.op == "placeholder"]
        self.outputs: list[fx.Node] = list(self.gm.graph.output_node().args[0])
        self.every = dict(zip(self.outputs, every, strict=True))
        self.level = _levels(self.nodes, self.every)
        self.begun = _find_chunked_sums(self.nodes, self.level)

    def run(self, flats: Sequence[list[Any]]) -> list[list[Any]]:
        """A list of values for each output; `flats`: what the placeholders are bound to, for each part."""
        parts = [_Part(self, flat) for flat in flats]
        totals: dict[fx.Node, Tensor] = {}
        found: dict[fx.Node, list[Any]] = collections.defaultdict(list)
        for level in range(max(self.level.values()) + 1):
            here = [n for n in self.nodes if self.level[n] == level and n.op in ("call_function", "get_attr")]
            sums = [n for n in self.nodes if self.level[n] == level + 1 and over_ranks(n) == "sum"]
            ends = [n for n in self.outputs if self.level[n] == level]
            for k, part in enumerate(parts):
                part.run(here, sums, totals)
                for node in dict.fromkeys(ends):
                    value = part.take(node)
                    if not k or self.every[node]:
                        found[node].append(value)
        return [found[node] for node in self.outputs]


def _levels(nodes: list[fx.Node], outputs: dict[fx.Node, bool]) -> dict[fx.Node, int]:
    """See `Turns`; an output that is wanted of all parts is taken as early as possible, since nothing waits for it."""
    first: dict[fx.Node, int] = {}
    for node in nodes:
        first[node] = max((first[i] for i in node.all_input_nodes), default=0) + (over_ranks(node) == "sum")
    last = max(first.values())
    level: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        read = [level[u] - (over_ranks(u) == "sum") for u in node.users if u.op == "call_function"]
        wanted = [first[node] if outputs[node] else last] if node in outputs else []
        level[node] = min([*read, *wanted], default=first[node])
    return level


def _find_chunked_sums(nodes: list[fx.Node], level: dict[fx.Node, int]) -> dict[fx.Node, dict[int, fx.Node]]:
    """node that runs in chunks -> {index of its value: the sum over parts that this value is a term of}.

    Such a value is itself a sum over positions. Other terms may be added to it, but nothing else reads it: so the node
    goes on with the total of the parts before, and one total serves both sums.
    """
    found: dict[fx.Node, dict[int, fx.Node]] = {}
    for node in [n for n in nodes if over_ranks(n) == "sum"]:
        value = node.args[0]
        while isinstance(value, fx.Node) and len(value.users) == 1 and _adds(value):
            value = value.args[0]
        of = value.args[0] if isinstance(value, fx.Node) and value.target is operator.getitem else None
        if isinstance(of, fx.Node) and isinstance(of.target, Chunked) and len(value.users) == 1:
            k = value.args[1]
            if of.target.own[k] and level[of] + 1 == level[node]:
                found.setdefault(of, {})[k] = node
    return found


def _adds(node: fx.Node) -> bool:
    """Whether a node adds something to its first argument, and keeps its shape and dtype."""
    if node.target not in ADDING or node.kwargs or not isinstance(node.args[0], fx.Node):
        return False
    x, y = node.meta["val"], node.args[0].meta.get("val")
    return isinstance(y, Tensor) and x.dtype == y.dtype and layout(x)[0] == layout(y)[0]


class _Part:
    """One part's values, each kept until all of its readers have run."""

    def __init__(self, turns: Turns, flat: list[Any]):
        self.gm, self.values = turns.gm, dict(zip(turns.given, flat, strict=True))
        self.left = {n: len(n.users) for n in turns.nodes}  # an output's reader is the end of the graph
        self.begun = turns.begun

    def run(self, nodes: Sequence[fx.Node], sums: Sequence[fx.Node], totals: dict[fx.Node, Tensor]) -> None:
        """Compute nodes; what is to be added up is added as soon as it is there, so that it need not be kept."""
        waiting: dict[fx.Node, list[fx.Node]] = {}
        for total in sums:
            waiting.setdefault(total.args[0], []).append(total)  # type: ignore[arg-type]
        for value in [v for v in waiting if v in self.values]:
            self._add(value, waiting[value], totals)
        for node in nodes:
            if node.op == "get_attr":
                self.values[node] = getattr(self.gm, node.target)  # type: ignore[arg-type]
            elif over_ranks(node) == "sum":  # its argument was taken when it was added
                self.values[node] = totals[node]
            else:
                self.values[node] = self._call(node, totals)
                for read in node.all_input_nodes:
                    self._release(read)
            self._add(node, waiting.get(node, ()), totals)

    def _add(self, node: fx.Node, sums: Sequence[fx.Node], totals: dict[fx.Node, Tensor]) -> None:
        for total in sums:
            _add(totals, total, [self.take(node)])

    def _call(self, node: fx.Node, totals: dict[fx.Node, Tensor]) -> Any:
        if node in self.begun:
            args = fx.node.map_arg(node.args, self.values.__getitem__)
            known = {k: totals.pop(total) for k, total in self.begun[node].items() if total in totals}
            return node.target(*args, begun=known)  # type: ignore[operator]
        first = node.args[0] if node.args else None
        if node.target in IN_PLACE and isinstance(first, fx.Node) and self.left[first] == 1:
            box = [self.values[first]]
            self.values[first] = None
            if node.args.count(first) == 1 and _fits(box[0], node.meta["val"]) and alone(box):
                args, kwargs = fx.node.map_arg((node.args[1:], node.kwargs), self.values.__getitem__)
                if all(t.numel() <= box[0].numel() for t in args if isinstance(t, Tensor)):
                    return IN_PLACE[node.target](box.pop(), *args, **kwargs)
            self.values[first] = box.pop()
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        if of_one(node.target, *args, **kwargs):
            return args[0].squeeze(args[1])
        return args[0] if over_ranks(node) else node.target(*args, **kwargs)  # type: ignore[operator]

    def take(self, node: Any) -> Any:
        """The value of `node`, for one of its readers."""
        value = self.values[node]
        self._release(node)
        return value

    def _release(self, node: fx.Node) -> None:
        self.left[node] -= 1
        if not self.left[node]:
            del self.values[node]


def _add(totals: dict[fx.Node, Tensor], node: fx.Node, box: list[Tensor]) -> None:
    """Add the term in `box` to a node's total. The first term is cloned if something else may read its memory."""
    if node in totals:
        totals[node].add_(box.pop())
    else:
        totals[node] = box.pop() if alone(box) and _dense(box[0]) else box.pop().clone()


# Values of fewer bytes are not worth overwriting.
LARGE = 1 << 20


def _fits(value: Any, like: Any) -> bool:
    """Whether a result like this may overwrite a value: a large one of its dtype, which fills its memory alone."""
    large = isinstance(value, Tensor) and value.numel() * value.element_size() >= LARGE
    return large and value.dtype == like.dtype and value.ndim == like.ndim and _dense(value)


def _dense(value: Tensor) -> bool:
    return value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()


def _places(program: Program) -> list[Any]:
    """The placement of every output of the graph."""
    found: dict[fx.Node, Any] = {}
    for kind in ("results", "extras"):
        for field, places in program.spread.places[kind].items():
            nodes = pytree.tree_leaves(getattr(program, kind)[field])
            found |= {n: p for n, p in zip(nodes, pytree.tree_leaves(places), strict=True) if isinstance(n, fx.Node)}
    return [found.get(n) for n in program.output.args[0]]


def _join(values: list[Any], place: Any) -> Any:
    if not isinstance(place, Shard) or len(values) == 1:
        return values[0]
    if place.outer == place.inner == 1:
        return torch.cat(values, place.dim)
    return samples_back(torch.cat([samples_first(v, place) for v in values]), place)
