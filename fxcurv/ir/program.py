"""The program that every pass reads and writes: one `torch.fx` graph and what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.cost import Machine, machine
from fxcurv.ir.batch import Batch
from fxcurv.ir.graph import is_tensor, layout, pruned
from fxcurv.ir.lengths import Length
from fxcurv.ir.origin import source_line
from fxcurv.ir.placement import REPLICATE, Placement, Shard
from fxcurv.ir.private import pytree
from fxcurv.ir.state import Analysis, Options, Spread, Walked


@dataclass(frozen=True)
class Input:
    """What a placeholder of the graph is bound to at a call.

    kind: "param", "buffer", "constant" (by `name`), "input", "target" (by `index` among the tensor leaves), "seed",
        "number" (a float that Python holds, by `index` among `python_state.State.numbers`),
        "memory" (by `index` among the program's buffers), "samples" (how many all ranks have), "first" (the number of this
        rank's first one).
    """

    kind: str
    name: str = ""
    index: int = 0


@dataclass(frozen=True)
class Decision:
    """How `select` computes one contraction, or an extension something else, and the predicted cost.

    stage: "select", or "extract" for an extension's own computation.
    """

    param: str
    extension: str
    rule: str
    algorithm: str
    flops: int
    bytes: int
    seconds: float
    rejected: tuple[tuple[str, float], ...] = ()
    savefield: str = ""
    stage: str = "select"


@dataclass(frozen=True)
class Check:
    """A condition on values: `node` is a boolean scalar that must be true at the first call."""

    node: fx.Node
    error: Callable[[], Exception]


@dataclass(frozen=True)
class Numbers:
    """Values of the data that tracing turned into numbers: a module for them, the numbers, the user's lines."""

    module: fx.GraphModule
    values: tuple[Any, ...]
    lines: tuple[str, ...]

    def differences(self, flat: Sequence[Any]) -> list[str]:
        """Which numbers differ for these arguments of the program's graph, in words."""
        with torch.no_grad():
            try:
                now = [t.item() for t in self.module.forward(*flat)]  # called as a module, it prints where it fails
            except (RuntimeError, IndexError):
                return ["values cannot be computed as they were"]  # for a batch of another size
        rows = zip(now, self.values, self.lines, strict=True)
        return [f"a value is {new} instead of {old} ({line})" for new, old, line in rows if new != old]


@dataclass(frozen=True)
class Observed:
    """What a forward hook looks at in one call of its module (see `front.observers`).

    Attributes:
        module: the number of the module that was called.
        where: the place of the hook; None for values that are kept without a hook.
        title: the hook in words, for messages.
        template: the hook's arguments after the module, with a `Slot` for each of `nodes`.
        attribute: of the module, which the forward pass sets to the value, and every call as well; "" for none.
    """

    module: int
    where: tuple[int, str, int] | None
    title: str
    template: Any
    nodes: tuple[fx.Node, ...]
    attribute: str = ""


@dataclass(frozen=True)
class Memory:
    """A buffer that large results are written to: its fake value, and the (field, parameter name) of those results."""

    val: Tensor
    results: tuple[tuple[str, str], ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the numbers in it."""
        return self.val.dtype

    def shape(self, batch: Batch, n: int, lengths: Any) -> tuple[int, ...]:
        """Its sizes at `n` samples."""
        return batch.shape(self.val, n, lengths)


@dataclass
class Program:
    """One graph from the forward pass to all results.

    Attributes:
        gm: the GraphModule; its graph's last node is the output.
        inputs: what each placeholder is bound to, in order.
        batch: the batch size and its symbols.
        params: trainable parameter name -> placeholder.
        output_leaves: tensor leaves of the model's output.
        heads: f, the leaves that the loss reads (all of them without a loss).
        loss: the scalar loss, or None.
        mutations: buffer name -> node with its new value.
        results: field -> parameter name -> node, or a pytree of nodes; `extras`: field -> the same without names.
        covers: extension -> names of its parameters, for those that chose them.
        borrowing: fields that hold values to compute with later: those of parameters and inputs are not copied.
        fake_mode: the mode that all values of the graph belong to.
        fixed_by: the op, module and line that turned the batch size into a number.
        pieces: traced functions by their kinds of arguments (see `ir.emit`); `blanks`: values to trace on (`ir.pieces`).
        options: what was asked for; `analysis`: what the passes before the walk found; `walked`: what the walk left;
            `spread`: the collectives.
        notes: how parts that a trace cannot follow were captured, for a report.
        reads: the values of the data that tracing turned into numbers, if there are any.
        observed: the values that forward hooks look at.
        python: the values of attributes, closures and globals that tracing read.
        checks: conditions on values, verified at the first call; `finish` moves them to `check_module`, which computes
            them, and `verdicts`, the errors that go with them.
        decisions: what was chosen for each contraction.
        largest: the batch size up to which the columns fit the memory budget, if more sweeps would help.
        stale: nodes whose input now has other strides than when they were traced.
        lengths: what became of sizes other than the batch's that should be symbolic, for a report.
        served: batch sizes, or (batch size, lengths), that were asked for -> whether the guards allow them.
        conditions: further conditions on a batch size, where indices that are made of it keep samples apart.
        buffers: the memory that large results are written to (see `passes.recycle`).
    """

    gm: fx.GraphModule
    inputs: list[Input]
    batch: Batch
    params: dict[str, fx.Node]
    shapes: dict[str, torch.Size]
    output_leaves: list[fx.Node]
    heads: list[fx.Node]
    loss: Any
    mutations: dict[str, fx.Node]
    output_template: Any = None
    constants: dict[str, Tensor] = field(default_factory=dict)
    extensions: tuple = ()
    covers: dict[Any, list[str]] = field(default_factory=dict)
    rules: dict = field(default_factory=dict)
    seed: fx.Node | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    borrowing: set[str] = field(default_factory=set)
    checks: list[Check] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    fake_mode: Any = None
    fixed_by: dict[str, str] | None = None
    pieces: dict = field(default_factory=dict)
    blanks: dict = field(default_factory=dict)
    options: Options = field(default_factory=Options)
    analysis: Analysis = field(default_factory=Analysis)
    walked: Walked = field(default_factory=Walked)
    notes: list[str] = field(default_factory=list)
    reads: Numbers | None = None
    observed: list[Observed] = field(default_factory=list)
    spread: Spread = field(default_factory=Spread)
    python: Any = None
    timings: dict[str, float] = field(default_factory=dict)
    buffers: list[Memory] = field(default_factory=list)
    largest: int | None = None
    lengths: str = ""
    stale: set[fx.Node] = field(default_factory=set)
    served: dict[Any, bool] = field(default_factory=dict)
    conditions: list[Callable[[int], bool]] = field(default_factory=list)
    check_module: fx.GraphModule | None = None
    verdicts: list[Callable[[], Exception]] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        """The graph of `gm`."""
        return self.gm.graph

    @property
    def graph_module(self) -> fx.GraphModule:
        """The emitted GraphModule; its arguments are `inputs`, in order."""
        return self.gm

    @property
    def output(self) -> fx.Node:
        """The node that returns."""
        return next(iter(reversed(self.graph.nodes)))  # PyTorch 2.11 gives no iterator

    @property
    def machine(self) -> Machine:
        """What the cost model knows of the device that the parameters are on."""
        return machine(next(iter(self.params.values())).meta["val"].device)

    def names_of(self, extension: Any) -> list[str]:
        """The parameters of an extension's quantity."""
        return self.covers.get(extension, list(self.params))

    def roots(self) -> list[fx.Node]:
        """Every node that must be computed."""
        nodes = [*self.output_leaves, *self.heads, *self.mutations.values()]
        nodes += [self.loss] if self.loss is not None else []
        nodes += pytree.tree_leaves(self.results)
        nodes += [*pytree.tree_leaves(self.extras), *(c.node for c in self.checks), *self.looked_at()]
        nodes += [self.spread.broken] if self.spread.broken is not None else []
        return list(dict.fromkeys(nodes))

    def looked_at(self) -> list[fx.Node]:
        """The values that forward hooks look at."""
        return [n for look in self.observed for n in look.nodes]

    def refresh_output(self) -> None:
        """Make the graph's output node return `roots()`, so that dead code elimination sees what is alive."""
        self.output.args = (tuple(self.roots()),)

    def finish(self) -> None:
        """Set the output to what a call returns, and the checks apart in a module of their own."""
        if self.checks:
            outputs = self.output.args
            self.output.args = (tuple(c.node for c in self.checks),)
            self.check_module = fx.GraphModule(self.gm, pruned(self.graph))
            self.verdicts = [c.error for c in self.checks]
            self.checks = []
            self.output.args = outputs
        self.heads = []
        self.refresh_output()
        self.graph.eliminate_dead_code()
        self.gm.recompile()

    def unpack(self, values: tuple, own: Callable[[Any], Any]) -> tuple:
        """(loss, output leaves, mutations, results, extras) from what the finished GraphModule returned.

        Args:
            own: gives a value memory of its own.
        """
        given = dict(zip(self.output.args[0], values, strict=True))

        def filled(field: str, nodes: Any) -> Any:
            if field not in self.borrowing and all(isinstance(n, fx.Node) for n in nodes.values()):
                return {name: own(given[n]) for name, n in nodes.items()}  # the usual case, and the fast one
            return pytree.tree_map(lambda n: given[n] if field in self.borrowing else own(given[n]), nodes)

        return (
            own(given.get(self.loss)),
            [own(given[n]) for n in self.output_leaves],
            {name: own(given[n]) for name, n in self.mutations.items()},
            {f: filled(f, nodes) for f, nodes in self.results.items()},
            {f: filled(f, {f: node})[f] for f, node in self.extras.items()},
        )

    def given(self, length: Length) -> fx.Node:
        """The placeholder of the tensor that has a length."""
        placeholders = self.graph.find_nodes(op="placeholder")
        where = length.kind, length.index
        return next(n for n, i in zip(placeholders, self.inputs, strict=False) if (i.kind, i.index) == where)

    def length_values(self) -> list[Any]:
        """The lengths as symbolic sizes."""
        return [self.given(x).meta["val"].shape[x.dim] for x in self.batch.lengths]

    @property
    def fixed_lengths(self) -> tuple[Length, ...]:
        """The lengths that tracing turned into numbers."""
        if not self.batch.lengths:
            return ()
        replaced = self.fake_mode.shape_env.replacements
        return tuple(x for x in self.batch.lengths if x.symbol in replaced and not replaced[x.symbol].free_symbols)

    def lengths_of(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[int, ...]:
        """The lengths of a call, from its tensors, as the program takes them."""
        kinds = {"input": inputs, "target": targets}
        return tuple(kinds[x.kind][x.index].shape[x.dim] for x in self.batch.lengths)

    def fits(self, n: int, lengths: tuple[int, ...], inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> bool:
        """Whether all tensors have the sizes that these lengths make."""
        kinds, placeholders = {"input": inputs, "target": targets}, self.graph.find_nodes(op="placeholder")
        pairs = [
            (p, kinds[i.kind][i.index]) for p, i in zip(placeholders, self.inputs, strict=False) if i.kind in kinds
        ]
        return all(self.batch.shape(p.meta["val"], n, lengths) == tuple(t.shape) for p, t in pairs)

    def serves(self, n: int, lengths: tuple[int, ...] | None = None) -> bool:
        """Whether this program computes batches of `n` samples: its size, or any that its guards allow.

        Args:
            lengths: the call's (default: those at capture).
        """
        if lengths is not None and lengths != self.batch.sizes:
            return self._serves_lengths(n, lengths)
        if n == self.batch.size:
            return True
        if not self.batch.symbols or n > (self.largest or n):
            return False
        if n < 2:  # see `runtime.one`
            return self.served.get(n, False)
        if n not in self.served:  # evaluating guards takes as long as a small problem
            self.served[n] = self.guards_hold(n)
        return self.served[n]

    def _serves_lengths(self, n: int, lengths: tuple[int, ...]) -> bool:
        """`serves` at other lengths than those at capture; tracing turns a size of one into a number."""
        if min(n, *lengths) < 2 and not (n == 1 and self.served.get(1, False) and min(lengths) > 1):
            return False
        longer = prod(new / old for new, old in zip(lengths, self.batch.sizes, strict=True))
        if self.largest is not None and n * longer > self.largest:
            return False
        if (n, lengths) not in self.served:
            self.served[n, lengths] = self.guards_hold(n, lengths)
        return self.served[n, lengths]

    def guards_hold(self, n: int, lengths: Sequence[int] | None = None) -> bool:
        """Whether the batch size is symbolic, and all that tracing assumed about it holds for `n`.

        Assumptions about an input's strides (that of a slice, say) are left out: one program serves all strides.
        """
        values = self.batch.values(n, lengths)
        assumed = [g.expr.subs(values) for g in self.fake_mode.shape_env.guards]
        held = not self.fixed and all(bool(e) for e in assumed if not e.free_symbols)
        return held and all(holds(n) for holds in self.conditions)

    @property
    def fixed(self) -> bool:
        """Whether the batch size became a number, by the model's capture or by a traced piece since."""
        if not self.batch.symbols:
            return True
        replaced = self.fake_mode.shape_env.replacements
        return any(s in replaced and not replaced[s].free_symbols for s in self.batch.symbols)

    @property
    def batch_note(self) -> str:
        """Whether the batch size is symbolic, or the op, module path and user's line that fixed it."""
        if not self.fixed:
            return f"symbolic (captured at {self.batch.size})"
        if self.batch.size == 1:
            return "fixed at 1: one sample runs as a program of its own"
        if self.batch.whole:
            why = "interact" if self.options.sample_index is None else "are merged"
            return f"fixed at {self.batch.size}: samples {why}, so all of it is one sample"
        return f"fixed at {self.batch.size} by {self.fixing()}"

    def fixing(self) -> str:
        """What turned a symbolic size into a number: op, module path and the user's line."""
        origin = self.fixed_by or {}
        where = f" in module '{origin['module']}'" if origin.get("module") else ""
        line = source_line(origin.get("stack_trace") or "")
        return f"{origin.get('op') or 'the model'}{where}" + (f", {line}" if line else "")

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let `new` stand for `old` everywhere, in the graph and in this program's own fields."""
        self.stand_in(old, new)
        self.rename({old: new})

    def stand_in(self, old: fx.Node, new: fx.Node) -> None:
        """`replace` in the graph alone; `rename` does the rest, for many nodes at once."""
        if is_tensor(old) and is_tensor(new) and layout(old.meta["val"]) != layout(new.meta["val"]):
            self.stale.update(old.users)
        old.replace_all_uses_with(new)

    def rename(self, pairs: dict[fx.Node, fx.Node]) -> None:
        """Replace nodes in this program's own fields, which may be large, in one go: each new node has to stay."""
        swap = lambda n: pairs.get(n, n) if isinstance(n, fx.Node) else n  # noqa: E731
        self.output_leaves = [swap(n) for n in self.output_leaves]
        self.heads = [swap(n) for n in self.heads]
        self.loss = swap(self.loss)
        self.mutations = {name: swap(n) for name, n in self.mutations.items()}
        self.results, self.extras = (pytree.tree_map(swap, fields) for fields in (self.results, self.extras))
        self.checks = [Check(swap(c.node), c.error) for c in self.checks]
        self.observed = [replace(look, nodes=tuple(map(swap, look.nodes))) for look in self.observed]


@dataclass(frozen=True)
class Kept:
    """The memory of a result: its program, a flat tensor for each buffer of that, and the fields that lie there."""

    program: Program
    tensors: tuple[Tensor, ...]
    fields: dict[str, Any]


def place(node: fx.Node) -> Placement:
    """The placement of a node's value (set by `passes.independence`)."""
    return node.meta.get("place", REPLICATE)


def is_active(node: Any) -> bool:
    """Whether a node's value depends differentiably on a trainable parameter."""
    return isinstance(node, fx.Node) and bool(node.meta.get("active", False))


def is_sharded(node: Any) -> bool:
    """Whether a node's value has a slice per sample."""
    return isinstance(node, fx.Node) and isinstance(place(node), Shard)
