"""chunks: run head and loss in chunks of positions, where nobody asks for the output (`compile(outputs=False)`).

Positions do not interact between the input of a head [N, T, d] and what is left of its output [N, T, vocabulary]: the
loss, the cotangent of that input, and sums over positions (P of the head's weight, Kronecker factors). That part of the
graph becomes one node, which runs it chunk by chunk, adds up sums and concatenates values with positions. So the
output, its softmax and its columns never exist whole. `rules.positions` says which axis holds the positions. The part
has the values with at least as many entries as the output, what they need of it, and the nodes that read them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from fxcurv.contractions.contract import Contract
from fxcurv.ir.chunked import ROOM, Chunked
from fxcurv.ir.emit import part_samples
from fxcurv.ir.graph import copied, is_tensor
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Shard, places_of
from fxcurv.ir.precision import HALF
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program
from fxcurv.ir.ranks import IN_TURNS
from fxcurv.passes.distribute import in_order
from fxcurv.rules.positions import Positions, of_sizes
from fxcurv.rules.traits import ADDED

# The batch size at which the part is tried on tensors without values.
SAMPLES = 3


def wide_output(program: Program) -> fx.Node | None:
    """The output, if it should not exist whole: nobody asks for it, and a sample takes more bytes than a chunk."""
    if program.options.ranks != IN_TURNS or program.fixed or program.loss is None or len(program.heads) != 1:
        return None
    (head,) = program.heads
    val, place = head.meta["val"], head.meta.get("place")
    bytes_of_one = program.batch.per_sample(val) * val.element_size()
    return head if type(place) is Shard and not program.batch.whole and bytes_of_one > ROOM else None


def sums_of_positions(program: Program, node: fx.Node) -> bool:
    """Whether a contraction reads columns as large as a wide output, so that it has to be a sum over positions."""
    head = wide_output(program)
    if head is None or not isinstance(node.target, Contract):
        return False
    least = program.batch.per_sample(head.meta["val"])
    vals = [f.g.meta["val"] for f in node.target.parts(node.args)[0]]
    return any(program.batch.per_sample(v) // v.shape[0] >= least for v in vals)


def chunks(program: Program) -> Program:
    """See the module."""
    head = wide_output(program)
    if head is None or head not in set(program.graph.nodes):
        return program
    program.heads = []  # the walk is over, and the output is no result
    program.refresh_output()
    _sizes_of_inputs(program)
    why = []
    for place, count in _axes(program, head):
        part = _Part(program, head, place, count)
        if not part.refusal:
            part.replace()
            program.notes.append(f"head and loss: {count} positions of the output {_describe_shape(head)} in chunks")
            return program
        why.append(part.refusal)
    reason = why[0] if why else "it has no positions"
    program.notes.append(f"head and loss: the output {_describe_shape(head)} is whole, since {reason}")
    return program


def _sizes_of_inputs(program: Program) -> None:
    """Let sizes be read from inputs: a node that read the batch size of the output would need it whole."""
    batch, base = program.batch, part_samples(program)
    for node in list(program.graph.nodes):
        val = node.meta.get("val")
        if not isinstance(val, SymInt) or not any(is_tensor(i) and i.op != "placeholder" for i in node.all_input_nodes):
            continue
        per, new = batch.evaluate(val, 1), base
        if batch.evaluate(val, 2) != 2 * per or batch.evaluate(val, 3) != 3 * per:
            continue
        if per > 1:
            with program.graph.inserting_after(base):
                new = program.graph.call_function(operator.mul, (base, per))
            new.meta = dict(node.meta)
        program.replace(node, new)
        program.graph.erase_node(node)


def _describe_shape(head: fx.Node) -> str:
    return str([str(s) for s in head.meta["val"].shape]).replace("'", "")


def _axes(program: Program, head: fx.Node) -> list[tuple[Shard, int]]:
    """(placement, size) of every axis of f besides the samples', whose dimension two of them may share."""
    where, n = head.meta["place"], program.batch.stand_in
    out: list[tuple[Shard, int]] = []
    for dim, size in enumerate(program.batch.shape(head.meta["val"])):
        if dim != where.dim:
            out.append((Shard(dim), size))
            continue
        out += [(Shard(dim, where.outer * n, 1), where.inner), (Shard(dim, 1, n * where.inner), where.outer)]
    return [axis for axis in out if axis[1] > 1]


class _Part:
    """The part of the graph that runs in chunks of positions along one axis of f.

    Attributes:
        refusal: why it cannot, "" if it can.
        members: its nodes, in order; `ends`: those that nodes outside read.
        given: the nodes outside that it reads.
    """

    def __init__(self, program: Program, head: fx.Node, place: Shard, count: int):
        self.program, self.graph, self.count, self.refusal = program, program.graph, count, ""
        self.least = program.batch.per_sample(head.meta["val"])
        self.order = {n: k for k, n in enumerate(self.graph.nodes)}
        self.positions = Positions(program, count)
        self.members: list[fx.Node] = []
        self.ends: list[fx.Node] = []
        if self._follow(head, place):
            self._find()

    def _place(self, node: fx.Node) -> Any:
        return self.positions.across.get(node, REPLICATE)

    def _is_wide(self, node: fx.Node) -> bool:
        return is_tensor(node) and self.program.batch.per_sample(node.meta["val"]) >= self.least

    def _is_apart(self, node: fx.Node) -> bool:
        """Whether a node depends on the output, and only slice by slice."""
        return node in self.after and all(isinstance(p, Shard) for p in places_of(self._place(node)))

    # ---- what is computed from the output ------------------------------

    def _follow(self, head: fx.Node, place: Shard) -> bool:
        chain, stack = {head}, [head]
        while stack:
            for node in stack.pop().all_input_nodes:
                if node.op == "call_function" and self._is_wide(node) and node not in chain and node is not head:
                    chain.add(node)
                    stack.append(node)
        first = min(self.order[n] for n in chain)
        self.after = set(chain)
        for node in self.graph.nodes:
            if (
                self.order[node] > first
                and node.op == "call_function"
                and any(i in self.after for i in node.all_input_nodes)
            ):
                self.after.add(node)
        inner = [n for n in self.graph.nodes if n in chain]
        if not self.positions.begin(inner, place):
            self.refusal = f"{head.target} is not known to keep positions apart"
            return False
        for node in self.graph.nodes:
            if node in self.after and node not in chain:
                self.positions.follow(node)
        return True

    # ---- the part ------------------------------

    def _find(self) -> None:
        found: set[fx.Node] = set()
        self._add(found, [n for n in self.after if self._is_apart(n) and self._is_wide(n)])
        waiting = list(found)
        while waiting:
            node = waiting.pop()
            if is_tensor(node) and not (self._is_apart(node) and self._is_wide(node)):
                continue  # its readers need it of all positions, so they stay outside
            for user in [u for u in node.users if u not in found]:
                if not self._can_run(user):
                    self.refusal = f"{user.target} of it is no sum over positions"
                    return
                waiting += self._add(found, [user])
        self.members = sorted(found, key=self.order.__getitem__)
        self.ends = [n for n in self.members if is_tensor(n) and any(u not in found for u in n.users)]
        self.given = list(dict.fromkeys(i for n in self.members for i in n.all_input_nodes if i not in found))
        self._build()

    def _can_run(self, node: fx.Node) -> bool:
        """Whether a reader can run in chunks."""
        known = not isinstance(node.meta.get("val"), SymInt) and MIXED not in places_of(self._place(node))
        return node in self.after and known

    def _add(self, found: set[fx.Node], nodes: list[fx.Node]) -> list[fx.Node]:
        """Add nodes, and what they need that depends on the output, to `found`; returns those that are new."""
        stack, new = list(nodes), []
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                new.append(node)
                stack += [i for i in node.all_input_nodes if i in self.after]
        return new

    def _build(self) -> None:
        graph = fx.Graph()
        here = graph.placeholder("positions")
        self.at, self.made = (
            tuple(p if isinstance(p := self._place(n), Shard) else None for n in nodes)
            for nodes in (self.given, self.ends)
        )
        totals = {n: graph.placeholder(f"total_{k}") for k, n in enumerate(self.ends) if self._accumulates(n)}
        self.own = tuple(n in totals for n in self.ends)
        env = {node: graph.placeholder(f"given_{k}") for k, node in enumerate(self.given)}
        for node in self.members:
            new = env[node] = copied(graph, node, env)
            places = self._place(node)
            if node in totals:
                new.target, new.args = ADDED[node.target], (totals[node], *new.args)
            elif isinstance(places, Shard):
                for k in of_sizes(node):
                    self._resize(graph, new, k, places, here)
        graph.output([env[n] for n in self.ends])
        self.part = fx.GraphModule(self.program.gm, graph)
        if any(self.at):
            self._check_shapes()
        else:
            self.refusal = "nothing that it is computed from has positions"

    def _accumulates(self, node: fx.Node) -> bool:
        """Whether a node is a sum over positions that nothing in the part reads, and its op can add to the total."""
        alone = not any(u in set(self.members) for u in node.users)
        return alone and self._place(node) == PARTIAL and node.target in ADDED and node.meta["val"].dtype not in HALF

    def _resize(self, graph: fx.Graph, node: fx.Node, k: int, place: Shard, here: fx.Node) -> None:
        """Let the size argument that holds the positions be that of a chunk."""
        sizes = list(node.args[k])  # type: ignore[arg-type]
        size = sizes[place.dim]
        if isinstance(size, int) and size < 0:
            return
        with graph.inserting_before(node):
            if isinstance(size, fx.Node):
                size = graph.call_function(operator.floordiv, (size, self.count))
                sizes[place.dim] = graph.call_function(operator.mul, (size, here))
            else:
                sizes[place.dim] = graph.call_function(operator.mul, (here, size // self.count))
        node.args = (*node.args[:k], sizes, *node.args[k + 1 :])

    def _check_shapes(self) -> None:
        """Check the part's shapes by running it on tensors without values."""
        some = self.count - 1
        given = [self._without_values(n, p, some) for n, p in zip(self.given, self.at, strict=True)]
        try:
            with torch.no_grad():
                shapes = [tuple(v.shape) for v in self.part(some, *[None] * sum(self.own), *given)]
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            self.refusal = f"it cannot be computed in parts: {str(error).splitlines()[0][:100]}"
            return
        if shapes != [tuple(self._without_values(n, p, some).shape) for n, p in zip(self.ends, self.made, strict=True)]:
            self.refusal = "its sizes cannot be told from others"

    def _without_values(self, node: fx.Node, place: Shard | None, some: int) -> Any:
        val = node.meta["val"]
        if not isinstance(val, Tensor):
            return self.program.batch.evaluate(val, SAMPLES) if isinstance(val, SymInt) else val
        shape = list(self.program.batch.shape(val, SAMPLES))
        if place:
            shape[place.dim] = shape[place.dim] // self.count * some
        return torch.empty(shape, dtype=val.dtype, device="meta")

    def replace(self) -> None:
        """Replace the part by one node."""
        batch = self.program.batch
        first = next(n for n, p in zip(self.given, self.at, strict=True) if p)
        widest = max(
            batch.per_sample(v) * v.element_size() for n in self.members if self._is_apart(n) for v in _vals(n)
        )
        entries = batch.per_sample(first.meta["val"]) // self.count
        target = Chunked(self.part, self.count, self.at, self.made, self.own, entries, widest // self.count)
        origin = {"stage": "columns", "op": "head and loss in chunks", "module": ""}
        with self.graph.inserting_before(self.program.output):
            whole = self.graph.call_function(target, tuple(self.given))
            whole.meta = {"val": [n.meta["val"] for n in self.ends], "origin": origin}
            values = []
            for k, node in enumerate(self.ends):
                new = self.graph.call_function(operator.getitem, (whole, k))
                new.meta = {**node.meta, "origin": origin}
                self.program.replace(node, new)
                values.append(new)
        self.program.refresh_output()
        for node in reversed(self.members):
            self.graph.erase_node(node)
        in_order(self.program)
        for new in values:  # so that the list of them dies at once
            whole.append(new)


def _vals(node: fx.Node) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
