"""The typed sections of a `Program`: what was asked for, what the analysis found, what the walk left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Options:
    """The options of `compile`, for all programs, and those that a call adds for one of them.

    Attributes:
        batch_dim: the samples' dimension in the inputs, as the user says it.
        split: path of the submodule whose output is f, None for the model's output.
        rules: {op: Rule}, which override registered ones.
        update_buffers: new values of buffers go to the model, not to the result.
        memory_budget: bytes that the columns of the walk may take; None: a share of the free memory.
        check: "first", "always", "probe" or None.
        debug: verify the program between passes and check values at every call.
        params: which parameters the gradient and all quantities are of, as the user says it.
        sample: "sequence" or "token".
        sample_index: the input that says which sample an entry belongs to, as the user names it.
        as_written: no op of the model may be rewritten in others.
        outputs: the model's output is a result.
        lengths: sizes other than the batch's may become symbolic; dynamic_shapes: those that are from the start, as the
            user says it.
        schedules: a float that changes at every call may become an input of the program.
        create_graph: of one program: results can be differentiated again, so only algorithms that autograd can follow are
            chosen.
        batch_dims: of one program: the samples' dimension of every input, None for one without samples.
        alone: of one program: the batch is one sample, wherever the model keeps it.
        index, edges: of one program: which input has the sample of every entry, and which inputs are pairs of entries.
        counted: the number of the first sample is an input of the program, for batches that are parts of a larger one.
        rank, size: the number of this rank, and how many there are.
        sharded: of one program: buckets of parameters (`ir.shards`) of which every rank holds a shard.
        ranks: the name of a process group whose ranks have a part of the batch each; empty: this process has all of it.
    """

    batch_dim: Any = 0
    split: str | None = None
    rules: dict[Any, Any] = field(default_factory=dict)
    update_buffers: bool = True
    memory_budget: int | None = None
    check: str | None = None
    debug: bool = False
    params: Any = None
    loss_params: bool = False
    sample: str = "sequence"
    sample_index: int | str | None = None
    as_written: bool = False
    outputs: bool = True
    lengths: bool = False
    dynamic_shapes: Any = None
    schedules: bool = True
    create_graph: bool = False
    batch_dims: tuple[int | None, ...] = ()
    alone: bool = False
    index: int | None = None
    edges: tuple[int, ...] = ()
    counted: bool = False
    rank: int = 0
    size: int = 1
    sharded: tuple[Any, ...] = ()
    ranks: str = ""


@dataclass
class Spread:
    """What `passes.distribute` made of a program.

    Attributes:
        ops: the captured ops, in words.
        buckets: values that are sent together, a label for each.
        places: where the parts of results are: "output" (a list), "results" and "extras", by field.
        owners: field -> parameter name -> the rank that has the sums, where one has them alone.
        summed: fields that have a sum over samples for each parameter.
        shards: (field, parameter name) of results of which every rank has its shard.
        broken: how many ranks broke off before the last sum, if that says it (`passes.last_word`).
    """

    ops: list[str] = field(default_factory=list)
    buckets: list[list[str]] = field(default_factory=list)
    places: dict[str, Any] = field(default_factory=dict)
    owners: dict[str, dict[str, int]] = field(default_factory=dict)
    summed: set[str] = field(default_factory=set)
    shards: set[tuple[str, str]] = field(default_factory=set)
    broken: fx.Node | None = None


@dataclass
class Analysis:
    """What the passes before the walk found.

    Attributes:
        terms: the sources of curvature in the loss (`walks.loss`), where an extension needs them.
        positions: (T, axis of classes), where every position of the output is a sample.
        rows: the positions are the rows of the output, the batch is one sample, and its rows are what the user calls
            samples.
        ends: what f is, where it is not the model's output; `hidden`: why f is not known, as a message with room for
            `{asked}`.
        left_out: trainable parameters of a loss module, for which there are no derivatives.
        said: (op, module path, reason) for each op that has a fused kernel in PyTorch: "" if it uses the kernel, else
            why it is written out in mathematics.
        mixing: where samples interact, as a message with room for `{asked}`; empty where they do not.
    """

    terms: list[Any] = field(default_factory=list)
    positions: tuple[int, int | None] | None = None
    rows: bool = False
    said: list[tuple[str, str, str]] = field(default_factory=list)
    mixing: str = ""
    left_out: tuple[str, ...] = ()
    ends: str = ""
    hidden: str = ""


@dataclass
class Walked:
    """What the walk left for `extract`.

    Attributes:
        uses: parameter name -> its per-sample uses.
        direct: parameter name -> the gradient that arrives there without samples, [1, *P].
        weights: group -> node of its columns' weights [V, N].
        columns: group -> number of its columns.
        wanted: group -> the parameters that it was carried to.
        residuals: the groups that ops with curvature gave birth to.
        parts: group -> its parts, where it was too large for one sweep.
        sweeps: how often the walk went down.
        arrivals: loss op -> the cotangent that arrived there.
        products: (what was required, parameter names) -> (blocks, operator), of `passes.products`.
        averaged: parameter names -> op -> its averaged matrix, of `passes.average`.
    """

    uses: dict[str, list[Any]] = field(default_factory=dict)
    direct: dict[str, fx.Node] = field(default_factory=dict)
    weights: dict[Any, fx.Node] = field(default_factory=dict)
    columns: dict[Any, int] = field(default_factory=dict)
    wanted: dict[Any, frozenset[str]] = field(default_factory=dict)
    residuals: list[Any] = field(default_factory=list)
    parts: dict[Any, list[Any]] = field(default_factory=dict)
    sweeps: int = 1
    arrivals: dict[fx.Node, fx.Node] = field(default_factory=dict)
    products: dict[Any, Any] = field(default_factory=dict)
    averaged: dict[tuple[str, ...], dict[fx.Node, Any]] = field(default_factory=dict)
