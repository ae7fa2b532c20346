"""The program that every pass reads and writes: one `torch.fx` graph and what is known of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from fxcurv._torch import captured_size, enable_python_dispatcher, pytree
from fxcurv.cost import Machine, machine
from fxcurv.errors import source_line
from fxcurv.placement import REPLICATE, Placement, Shard

# Stands for the batch size wherever placements are computed: no size of a model has it as a factor by accident.
PRIME = 1_000_003


@dataclass(frozen=True)
class Input:
    """What a placeholder of the graph is bound to at a call.

    kind: "param", "buffer", "constant" (by `name`), "input", "target" (by `index` among the tensor leaves), "seed",
        "number" (a float that Python holds, by `index` among `python_state.State.numbers`),
        "memory" (by `index` among the program's buffers).
    """

    kind: str
    name: str = ""
    index: int = 0


@dataclass(frozen=True)
class Decision:
    """What `select` chose for one contraction, or what an extension computes otherwise, at which predicted cost.

    stage: "select", or of an extension's own "extract".
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
class Memory:
    """A buffer that large results are written to: its fake value, and the (field, parameter name) of those results."""

    val: Tensor
    results: tuple[tuple[str, str], ...]


@dataclass
class Batch:
    """The batch size: its symbols in the captured sizes and its value at capture; `whole`: all of it is one sample."""

    symbols: frozenset = frozenset()
    size: int = 0
    whole: bool = False

    def evaluate(self, value: int | SymInt, n: int) -> int:
        """`value` with the batch size replaced by `n`."""
        if not isinstance(value, SymInt) or not self.symbols:
            return int(value)
        # `_expr` is the size as captured: a later specialisation of the batch must not hide where the samples are.
        expr = captured_size(value).subs({s: n for s in self.symbols})
        # other symbols are sizes that turned out to be numbers
        return int(expr if expr.is_number else value.node.shape_env.replace(expr).subs({s: n for s in self.symbols}))

    def shape(self, val: Tensor, n: int | None = None) -> tuple[int, ...]:
        """The shape of a (fake) tensor with the batch size replaced by `n` (default: `PRIME`, if it is symbolic)."""
        n = n or (PRIME if self.symbols else self.size)
        return tuple(self.evaluate(s, n) for s in val.shape)

    def per_sample(self, val: Tensor) -> int:
        """The number of entries of a (fake) tensor with samples, divided by the number of samples."""
        return math.prod(self.shape(val)) // (1 if self.whole else self.probe)

    @property
    def samples(self) -> int:
        """The number of samples at capture."""
        return 1 if self.whole else self.size

    @property
    def probe(self) -> int:
        """The batch size in which placements are computed."""
        return PRIME if self.symbols else self.size


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
        checks: conditions on values, verified at the first call; `finish` moves them to `check_module`, which computes
            them, and `verdicts`, the errors that go with them.
        decisions: what was chosen for each contraction.
        largest: the batch size up to which the columns fit the memory budget, if more sweeps would help.
        stale: nodes that read a value of other strides than the one that they were traced with.
        served: batch sizes that were asked for -> whether the guards allow them.
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
    state: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    buffers: list[Memory] = field(default_factory=list)
    largest: int | None = None
    stale: set[fx.Node] = field(default_factory=set)
    served: dict[int, bool] = field(default_factory=dict)
    check_module: fx.GraphModule | None = None
    verdicts: list[Callable[[], Exception]] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    @property
    def graph_module(self) -> fx.GraphModule:
        """The emitted GraphModule; its arguments are `inputs`, in order."""
        return self.gm

    @property
    def fake_mode(self):
        """The fake mode that all values of the graph belong to."""
        return self.state["fake_mode"]

    @property
    def output(self) -> fx.Node:
        return next(iter(reversed(self.graph.nodes)))  # PyTorch 2.11 gives no iterator

    @property
    def machine(self) -> Machine:
        """What the cost model knows of the device that the parameters are on."""
        return machine(next(iter(self.params.values())).meta["val"].device)

    def names_of(self, extension: Any) -> list[str]:
        """The parameters that an extension's quantity is of."""
        return self.covers.get(extension, list(self.params))

    def print_readable(self, print_output: bool = True) -> str:
        """The emitted graph as Python with shapes."""
        return self.gm.print_readable(print_output=print_output)

    def draw(self, path: str) -> None:
        """Draw the emitted graph to `path` (.svg), coloured by the pass that made each node."""
        from fxcurv.draw import draw

        draw(self, path)

    def roots(self) -> list[fx.Node]:
        """Every node that must be computed."""
        nodes = [*self.output_leaves, *self.heads, *self.mutations.values()]
        nodes += [self.loss] if self.loss is not None else []
        nodes += pytree.tree_leaves(self.results)
        nodes += [*pytree.tree_leaves(self.extras), *(c.node for c in self.checks)]
        return list(dict.fromkeys(nodes))

    def refresh_output(self) -> None:
        """Make the graph's output node return `roots()`, so that dead code elimination sees what is alive."""
        self.output.args = (tuple(self.roots()),)

    def finish(self) -> None:
        """Set the output to what a call returns, and the checks apart in a module of their own."""
        if self.checks:
            outputs = self.output.args
            self.output.args = (tuple(c.node for c in self.checks),)
            self.check_module = fx.GraphModule(self.gm, _pruned(self.graph))
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

    def serves(self, n: int) -> bool:
        """Whether this program computes batches of `n` samples: its size, or any that its guards allow."""
        if n == self.batch.size:
            return True
        if not self.batch.symbols or n < 2 or n > (self.largest or n):
            return False
        if n not in self.served:  # evaluating guards takes as long as a small problem
            values = {s: n for s in self.batch.symbols}
            guards = self.fake_mode.shape_env.guards
            self.served[n] = not self.fixed and all(bool(g.expr.subs(values)) for g in guards)
        return self.served[n]

    @property
    def fixed(self) -> bool:
        """Whether the batch size became a number: by the model's capture, or by a traced piece since."""
        if not self.batch.symbols:
            return True
        replaced = self.fake_mode.shape_env.replacements
        return any(s in replaced and not replaced[s].free_symbols for s in self.batch.symbols)

    @property
    def batch_note(self) -> str:
        """Whether the batch size is symbolic, or what fixed it: op, module path and the user's line."""
        if not self.fixed:
            return f"symbolic (captured at {self.batch.size})"
        if self.batch.size == 1:
            return "fixed at 1: one sample runs as a program of its own"
        if self.batch.whole:
            return f"fixed at {self.batch.size}: samples interact, so all of it is one sample"
        origin = self.state.get("fixed_by", {})
        where = f" in module '{origin['module']}'" if origin.get("module") else ""
        line = source_line(origin.get("stack_trace") or "")
        return f"fixed at {self.batch.size} by {origin.get('op') or 'the model'}{where}" + (f", {line}" if line else "")

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
        """Replace nodes in this program's own fields, which may be large, each by one that stays."""
        swap = lambda n: pairs.get(n, n) if isinstance(n, fx.Node) else n  # noqa: E731
        self.output_leaves = [swap(n) for n in self.output_leaves]
        self.heads = [swap(n) for n in self.heads]
        self.loss = swap(self.loss)
        self.mutations = {name: swap(n) for name, n in self.mutations.items()}
        self.results, self.extras = (pytree.tree_map(swap, fields) for fields in (self.results, self.extras))
        self.checks = [Check(swap(c.node), c.error) for c in self.checks]


@dataclass(frozen=True)
class Kept:
    """The memory of a result: its program, a flat tensor for each of that program's buffers, its fields, which lie there."""

    program: Program
    tensors: tuple[Tensor, ...]
    fields: dict[str, Any]


def layout(val: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Sizes and strides, symbolic ones as expressions: equal where tensors are laid out alike."""
    plain = lambda s: s.node.expr if isinstance(s, SymInt) else s  # noqa: E731
    return tuple(map(plain, val.shape)), tuple(map(plain, val.stride()))


def place(node: fx.Node) -> Placement:
    """The placement of a node's value (set by `passes.independence`)."""
    return node.meta.get("place", REPLICATE)


def is_active(node: Any) -> bool:
    """Whether a node's value depends differentiably on a trainable parameter."""
    return isinstance(node, fx.Node) and bool(node.meta.get("active", False))


def is_sharded(node: Any) -> bool:
    """Whether a node's value has a slice per sample."""
    return isinstance(node, fx.Node) and isinstance(place(node), Shard)


def is_tensor(node: Any) -> bool:
    """Whether a node's value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def _pruned(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` without dead code."""
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    new.eliminate_dead_code()
    return new


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
