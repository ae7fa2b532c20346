"""distribute: the program of a batch whose parts are on the ranks of a process group (`compile(mesh=)`).

A `Partial` value is added up over the ranks where an op reads it complete, or where it is a result. A value that is
linear in values that are added up anyway is computed from their sums. Values that need no other sums are of stage 0,
those that read sums of stage k - 1 are of stage k; a few numbers that only results read, as the loss, are of the last.
The values of a stage travel together, in buckets of one dtype, in the order in which they are ready; of a symmetric matrix
only a triangle travels. Results of sharded parameters are left
in shards (`passes.scatters`). The number of samples, and the number of the first one, become inputs of the program.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import MixedSamplesError
from fxcurv.ir.crossings import Read, Sum
from fxcurv.ir.emit import emit, number_of_samples
from fxcurv.ir.graph import ancestors, is_tensor
from fxcurv.ir.origin import locate, stage_of
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Placement, places_of
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Input, Program
from fxcurv.ir.ranks import IN_TURNS, across, plain_text, summed
from fxcurv.ir.shards import Dtypes, Reduce, Reduced, Scatter, Scattered
from fxcurv.ir.state import Spread
from fxcurv.passes.owners import at_one_rank, owners
from fxcurv.passes.scatters import in_shards
from fxcurv.passes.schedule import as_soon_as_possible
from fxcurv.rules.traits import over_ranks

# One collective takes at most this many bytes, unless a single value is larger.
BUCKET = 25 << 20
FEW = 256  # numbers that may wait for the last stage
BEGUN = ("sum", "scatter", "replicas", "reduce", "gather", "rows")
"""The nodes that begin a collective, by what they do (`rules.traits.over_ranks`)."""


def distribute(program: Program) -> Program:
    """See the module.

    Raises:
        MixedSamplesError: where a result needs the samples of other ranks in another way than by a sum, or the batch size is
            a number.
    """
    if program.fixed:
        among, _, alone = _words(program)
        raise MixedSamplesError(
            f"the batch size is {program.batch_note}, so the batch cannot be split {among}. Way out: a model "
            "that takes batches of any size; where samples interact (batch norm in training mode), ask for the gradient "
            f"alone, or eval(); or {alone}."
        )
    _check(program)
    given(program)
    _Sums(program).add_up()
    in_order(program)
    program.spread.summed = {"grad", *(e.savefield for e in program.extensions if e.sample_axis is None)}
    program.spread.places = {
        "output": [_place(n) for n in program.output_leaves],
        **{kind: _places(program, getattr(program, kind)) for kind in ("results", "extras")},
    }
    program.refresh_output()
    return program


def _places(program: Program, fields: dict[str, Any]) -> dict[str, Any]:
    """Field -> placements, without values that are only kept to compute with."""
    return {field: pytree.tree_map(_place, value) for field, value in fields.items() if field not in program.borrowing}


def _place(node: Any) -> Placement:
    return node.meta["across"] if isinstance(node, fx.Node) else REPLICATE


def _check(program: Program) -> None:
    checks = {c.node for c in program.checks}  # every rank checks its own samples
    for root in program.roots():
        if root in checks or root in program.heads and root not in program.output_leaves:
            continue
        if root.meta["across"] == MIXED:
            first = next(n for n in ancestors([root]) if MIXED in places_of(n.meta["across"]))
            fields = {**program.results, **program.extras}
            field = next((f for f, nodes in fields.items() if root in pytree.tree_leaves(nodes)), "the model's output")
            among, others, alone = _words(program)
            raise MixedSamplesError(
                f"{locate(first)}\nfor {field}, {first.target} of stage {stage_of(first)} needs samples of {others} in "
                f"another way than by a sum over them, or its placement is not known, so the batch cannot be split {among}. "
                f"Way out: where samples interact (a contrastive loss), {alone}."
            )


def _words(program: Program) -> tuple[str, str, str]:
    """Words for messages: what the batch is split into, the other parts, and how to avoid it."""
    if program.options.ranks == IN_TURNS:
        return "into parts, as outputs=False computes it", "other parts", "ask for it without outputs=False"
    return "over the ranks of mesh=", "other ranks", "ask for it without mesh=, of each rank's own batch"


# ---- inputs ------------------------------


def given(program: Program) -> None:
    """Make the number of all samples, and that of the rank's first one, inputs of the program."""
    named = {"samples": [n for n in program.graph.nodes if n.target is number_of_samples]}
    named["first"] = [n for n in program.graph.nodes if "first" in n.meta]
    for kind, (node,) in [(k, found) for k, found in named.items() if found]:
        last = [n for n in program.graph.nodes if n.op == "placeholder"][-1]
        with program.graph.inserting_after(last):
            new = program.graph.placeholder(kind)
        new.meta = {**node.meta, "across": REPLICATE, "complete": ()}
        program.inputs.append(Input(kind))
        program.replace(node, new)
        program.graph.erase_node(node)


# ---- sums ------------------------------


class _Sums:
    """The collectives of one program.

    Attributes:
        wanted: the values whose sum over the ranks something reads; `reduced`: those of them that travel.
        complete: value -> its sum.
    """

    def __init__(self, program: Program):
        self.program, self.graph = program, program.graph
        read = {a for n in self.graph.nodes for a in n.meta.get("complete", ())}
        results = {n for n in program.roots() if n.meta["across"] == PARTIAL}
        self.wanted = [n for n in self.graph.nodes if n in read or n in results]
        known: set[fx.Node] = set()
        self.reduced = []
        for node in self.wanted:
            if not self._sum_follows(node, known):
                self.reduced.append(node)
            known.add(node)
        self.complete: dict[fx.Node, fx.Node] = {}
        self.layouts = in_shards(program, self.reduced, self._parts) if program.options.sharded else {}
        self.shards: dict[fx.Node, fx.Node] = {}
        self.owners = owners(program, program.options.size)
        self.owner = at_one_rank(program, self.reduced, self._parts, self.owners)

    def _sum_follows(self, node: fx.Node, known: set[fx.Node]) -> bool:
        """Whether linear ops compute the sum of a value from sums that are known."""
        parts = self._parts(node)
        return is_tensor(node) and bool(parts) and all(p in known or self._sum_follows(p, known) for p in parts)

    def _parts(self, node: fx.Node) -> list[fx.Node]:
        """The arguments that an op reads as this rank's terms."""
        return [i for i in node.all_input_nodes if i.meta["across"] == PARTIAL and i not in node.meta["complete"]]

    def add_up(self) -> None:
        """Emit the collectives, and let every op that needs a sum read it."""
        stages, found = self._stages(), []
        ready = as_soon_as_possible(self.program)  # those that are ready first travel first
        for stage in sorted(set(stages.values())):
            nodes = sorted((n for n in self.reduced if stages[n] == stage), key=lambda n: ready[n])
            most = 0 if self.program.options.ranks == IN_TURNS else None  # nothing travels, so nothing has to wait
            for bucket in _buckets([n for n in nodes if n not in self.layouts and n not in self.owner], most):
                found.append(bucket)
                self._reduce(bucket, f"stage {stage}")
            for rank in sorted({self.owner[n] for n in nodes if n in self.owner}):
                for bucket in _buckets([n for n in nodes if self.owner.get(n) == rank]):
                    found.append(bucket)
                    self._reduce_to(rank, bucket, f"stage {stage}")
            for places in dict.fromkeys(self.layouts[n][1:] for n in nodes if n in self.layouts):
                for bucket in _buckets([n for n in nodes if n in self.layouts and self.layouts[n][1:] == places]):
                    found.append(bucket)
                    self._scatter(bucket, places, f"stage {stage}")
        for node in self.wanted:
            if node not in self.layouts:
                self._sum_of(node)
        kept = self._shards_of_results()
        for node in list(self.graph.nodes):
            for value in node.meta.get("complete", ()):
                if node not in self.layouts or node in self.reduced:  # what is computed in shards is not computed whole
                    node.replace_input_with(value, self.complete[value])
        self.program.rename({n: self.complete[n] for n in self.program.roots() if n.meta["across"] == PARTIAL})
        if self.program.options.create_graph:
            self._read_by_each()
        buckets = [[_label(n) for n in bucket] for bucket in found]
        self.program.spread = Spread(_describe_ops(self.graph), buckets, shards=kept, owners=self.owners)

    def _reduce_to(self, rank: int, bucket: list[fx.Node], title: str) -> None:
        """Emit sums over ranks that one of them gets."""
        options, vals = self.program.options, [n.meta["val"] for n in bucket]
        triangles = tuple(bool(n.meta.get("symmetric")) for n in bucket)
        begin, end = Reduce(triangles, rank, options.ranks), Reduced(triangles, rank == options.rank)
        begun = self._node(begin, (bucket,), None, title)
        ended = self._node(end, (begun, [tuple(v.shape) for v in vals]), vals, title)
        for node, total in zip(bucket, self._items(ended), strict=True):
            self._finish(node, total)

    def _node(self, target: Any, args: tuple, val: Any, title: str) -> fx.Node:
        with self.graph.inserting_before(self.program.output):
            node = self.graph.call_function(target, args)
        origin = {"stage": "distribute", "op": title, "module": ""}
        node.meta = {"origin": origin, "across": REPLICATE, "complete": (), "val": val}
        return node

    def _items(self, node: fx.Node) -> list[fx.Node]:
        """The items of a node that gives several values."""
        title = node.meta["origin"]["op"]
        return [self._node(operator.getitem, (node, k), val, title) for k, val in enumerate(node.meta["val"])]

    def _scatter(self, bucket: list[fx.Node], places: tuple[str, str, Dtypes], title: str) -> None:
        """Emit sums over ranks, of which every rank gets its shard."""
        cuts, (group, replicas, dtypes) = tuple(self.layouts[n][0] for n in bucket), places
        sent, given = dtypes.reduced, dtypes.result(bucket[0].meta["val"].dtype)
        with self.program.fake_mode:
            flat = bucket[0].meta["val"].new_empty(sum(cut.numel for cut in cuts), dtype=sent)
            vals = [n.meta["val"].new_empty(cut.local(), dtype=given) for n, cut in zip(bucket, cuts, strict=True)]
        begun = self._node(Scatter(cuts, group, sent), (bucket,), flat, title)
        ended = self._node(Scattered(cuts, replicas, given), (begun,), vals, title)
        self.shards |= dict(zip(bucket, self._items(ended), strict=True))

    def _shards_of_results(self) -> set[tuple[str, str]]:
        """Let results be shards where they may; returns (field, parameter name) of these."""
        kept = {
            (field, name)
            for field, table in self.program.results.items()
            for name, node in table.items()
            if isinstance(node, fx.Node) and node in self.layouts
        }
        ends = {self.program.results[field][name] for field, name in kept}
        self.program.rename({node: self._shard_of(node) for node in ends})
        self.program.refresh_output()
        return kept

    def _shard_of(self, node: fx.Node) -> fx.Node:
        """The shard of a value, or of a term's sum: one that travelled, or the op applied to shards."""
        if node not in self.shards:
            known = {a: self._shard_of(a) for a in node.all_input_nodes if a in self.layouts}
            for a in [a for a in node.all_input_nodes if a not in known]:
                known[a] = self._sum_of(a) if a in node.meta["complete"] or a in self._parts(node) else a
            with self.graph.inserting_before(self.program.output):
                new = self.graph.node_copy(node, lambda a: known.get(a, a))
            args, kwargs = fx.node.map_arg((new.args, new.kwargs), lambda a: a.meta["val"])
            with self.program.fake_mode:
                new.meta = {**node.meta, "across": REPLICATE, "complete": (), "val": new.target(*args, **kwargs)}
            self.shards[node] = new
        return self.shards[node]

    def _read_by_each(self) -> None:
        """Where ranks read a replicated value for their own samples, let autograd add up its derivatives over ranks."""
        known: dict[fx.Node, fx.Node] = {}
        for node in list(self.graph.nodes):
            if node.op != "call_function" or all(place == REPLICATE for place in places_of(node.meta["across"])):
                continue
            for value in node.all_input_nodes:
                val = value.meta["val"]
                if value.meta["across"] != REPLICATE or not isinstance(val, Tensor) or not val.is_floating_point():
                    continue
                if value not in known:
                    known[value] = self._node(Read(self.program.options.ranks), (value,), val, "read")
                node.replace_input_with(value, known[value])

    def _stages(self) -> dict[fx.Node, int]:
        """For each value that travels, its stage."""
        stages = self._earliest()
        read = {a for n in ancestors(self.reduced) for a in n.meta.get("complete", ())}
        for node in reversed(self.graph.nodes):
            if node in read and node not in stages:
                read.update(self._parts(node))
        if not across(self.program.options.ranks):
            return stages
        last = max(stages.values(), default=0)
        return {n: k if n in read or n.meta["val"].numel() > FEW else last for n, k in stages.items()}

    def _earliest(self) -> dict[fx.Node, int]:
        """For each value that travels, how many collectives have to come before it."""
        stage: dict[fx.Node, int] = {}
        after: dict[fx.Node, int] = {}  # the same for a value's sum, if all that it is computed from has one
        reduced = set(self.reduced)
        for node in self.graph.nodes:
            read = node.meta.get("complete", ())
            stage[node] = max((after[i] if i in read else stage[i] for i in node.all_input_nodes), default=0)
            if node in reduced:
                after[node] = stage[node] + 1
            elif node.meta.get("across") == PARTIAL:
                parts = (*read, *self._parts(node))
                after[node] = max((after[i] if i in parts else stage[i] for i in node.all_input_nodes), default=0)
        return {n: stage[n] for n in self.reduced}

    def _reduce(self, bucket: list[fx.Node], title: str) -> None:
        triangles = tuple(bool(n.meta.get("symmetric")) for n in bucket)
        group = self.program.options.ranks
        if self.program.options.create_graph:
            sums = self._items(self._node(Sum(triangles, group), (bucket,), [n.meta["val"] for n in bucket], title))
        else:
            origin = {"stage": "distribute", "op": title}
            sums = emit(self.program, functools.partial(summed, triangles, group), bucket, origin=origin)
        for node, total in zip(bucket, sums, strict=True):
            self._finish(node, total)

    def _sum_of(self, node: fx.Node) -> fx.Node:
        """The sum of a value: one that travelled, or the op applied to sums."""
        if node not in self.complete:
            sums = {a: self._sum_of(a) for a in self._parts(node)}
            with self.graph.inserting_before(self.program.output):
                new = self.graph.node_copy(node, lambda a: sums.get(a, a))
            self._finish(node, new)
        return self.complete[node]

    def _finish(self, node: fx.Node, total: fx.Node) -> None:
        total.meta = {**node.meta, "across": REPLICATE, "val": total.meta["val"]}
        total.meta["complete"] = node.meta["complete"] if total.target == node.target else ()
        self.complete[node] = total


def _label(node: fx.Node) -> str:
    origin, val = node.meta.get("origin") or {}, node.meta["val"]
    names = [str(origin.get(k, "")) for k in ("stage", "op", "module", "extension", "param")]
    return f"{' '.join(filter(None, names))} {str(val.dtype).removeprefix('torch.')}{list(val.shape)}"


def _describe_ops(graph: fx.Graph) -> list[str]:
    """The captured ops, in words that are the same in every process."""
    return [
        plain_text(f"{n.target}{n.args}") for n in graph.nodes if n.op == "call_function" and stage_of(n) == "forward"
    ]


def _buckets(nodes: Sequence[fx.Node], most: int | None = None) -> list[list[fx.Node]]:
    """Values that travel together: of one dtype, up to `most` bytes, else `BUCKET`."""
    out, most = [], BUCKET if most is None else most  # type: ignore[var-annotated]
    for dtype in dict.fromkeys(n.meta["val"].dtype for n in nodes):
        size = most + 1
        for node in [n for n in nodes if n.meta["val"].dtype == dtype]:
            val = node.meta["val"]
            size += val.numel() * val.element_size()
            if size > most:
                out.append([])
                size = val.numel() * val.element_size()
            out[-1].append(node)
    return out


# ---- order ------------------------------


def in_order(program: Program) -> None:
    """Put every node behind what it reads, and keep the order otherwise."""
    done: set[fx.Node] = set()
    order: list[fx.Node] = []
    for root in program.graph.nodes:
        stack = [root]
        while stack:
            node = stack[-1]
            waiting = [i for i in node.all_input_nodes if i not in done]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            if node not in done:
                done.add(node)
                order.append(node)
    last = None
    for node in order:
        if last is not None:
            last.append(node)
        last = node
    program.graph.lint()


def _zeros_like(t: Tensor) -> Tensor:
    return torch.zeros(t.shape, dtype=t.dtype, device=t.device)


# ---- without other ranks ------------------------------


def _itself(t: Tensor, *_: Any) -> Tensor:
    return t


def alone(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph as one process runs it: a sum over ranks is the value itself."""
    copy = fx.GraphModule(gm, _copy_graph(gm.graph))
    for node in copy.graph.nodes:
        if over_ranks(node):
            node.target = node.target.alone() if hasattr(node.target, "alone") else _itself
    copy.recompile()
    return copy


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new


def rest(gm: fx.GraphModule, done: int, total: int) -> Iterator[Callable[[], Any]]:
    """The collectives that a rank that broke off after `done` of them still owes the others, on zeros (see `last_word`).

    Args:
        total: the number of samples of all ranks.
    """
    for n in gm.graph.nodes:
        if over_ranks(n) in BEGUN:
            if done <= 0:
                given = fx.node.map_arg(n.args, lambda a: a.meta["val"])
                if over_ranks(n) == "rows":
                    yield functools.partial(n.target.nothing, given[0], total)  # type: ignore[union-attr]
                    continue
                zeros = pytree.tree_map_only(Tensor, _zeros_like, given)
                if n.meta.get("last_word"):
                    zeros[0][-1] = 1
                yield functools.partial(n.target, *zeros)
            done -= 1
