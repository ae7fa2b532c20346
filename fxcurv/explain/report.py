"""The report of a program: what was chosen for every parameter and quantity, and what it costs.

FLOPs of the totals are counted, not predicted: the emitted graph, and the plain forward and backward pass of
the same model, run on fake tensors under PyTorch's FLOP counter (matrix products, convolutions, attention).
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, fx

from fxcurv.explain.counts import Total, count_plain, count_program
from fxcurv.explain.timing import RUNS, measure
from fxcurv.ir.origin import STAGES, stage_of
from fxcurv.ir.private import OpOverload, pytree
from fxcurv.ir.program import Decision, Program, is_active
from fxcurv.quantity import GRADIENT, KINDS
from fxcurv.rules.base import FALLBACK, rule_of
from fxcurv.walks.groups import groups_of

WIDTH = 118


@dataclass(frozen=True)
class Row:
    """One quantity of one parameter.

    Attributes:
        seconds: predicted by the cost model.
        share: of the predicted time of all quantities, in [0, 1].
        measured: seconds on real values (see `measure`), 0 where all nodes are shared with rows above; None where there
            was nothing to choose, or no values were given.
    """

    param: str
    extension: str
    rule: str
    algorithm: str
    flops: int
    bytes: int
    seconds: float
    share: float
    measured: float | None = None


class Report:
    """What `Compiled.explain` returns; prints as tables.

    Attributes:
        rows: one `Row` per parameter and quantity, in the order of parameters and extensions.
        totals: stage -> `Total`, for "forward", "columns", "propagate", "results" and their sum "program".
        plain: `Total` of a plain forward and backward pass; None where autograd cannot do it.
        columns: (name of the group, its number of columns, the quantities that need it).
        sweeps: how often the walk goes down, for columns beyond the memory budget.
        fallbacks: ops on the walk that have no rule of their own.
        said: which ops run as PyTorch's own kernels, and which are written out in mathematics, where, and why.
        batch: whether the batch size is symbolic, or what fixed it.
        lengths: the same for other sizes, if they differed between calls.
        output: what f is, and whether the loss is linear in it; "" for the model's output and a loss with curvature.
        left_out: trainable parameters of a loss module, which get no gradient.
        python: the values of attributes, closures and globals that the program depends on.
        notes: how derivatives that the model takes were captured, and the numbers that it makes of the data's values.
        timings: pass -> seconds.
        check: what was compared at the first call, and how long that took (`compile(check=)`).

    Args:
        program: a finished program.
        flat: the graph's arguments without memory for results, on which decisions are timed (default: they are not).
        samples: the batch size of `flat`; predictions are for the batch size at capture.
        check: what was compared.
    """

    def __init__(self, program: Program, flat: list[Any] | None = None, samples: int = 0, check: str = "off"):
        self._captured, self._samples = program.batch.size, samples
        self.left_out = program.analysis.left_out
        self.totals = count_program(program)
        self.plain = count_plain(program)
        self.rows = _rows(program, None if flat is None else measure(program, flat, samples))
        self.columns = _columns(program)
        self.sweeps = program.walked.sweeps
        self.fallbacks = _fallbacks(program)
        self.said = _describe_kernels(program)
        self.batch = program.batch_note
        self.lengths = program.lengths
        self.output = _output(program)
        self.python = program.python.names()
        numbers = zip(program.reads.values, program.reads.lines, strict=True) if program.reads is not None else ()
        made = [f"{value} is a value of the data, which every call compares: {line}" for value, line in numbers]
        self.notes = [*program.notes, *dict.fromkeys(made)]
        self.timings = dict(program.timings)
        self.check = check

    def __rich__(self) -> Group:
        parts: list[Any] = [self._table_of_rows(), Text(), self._table_of_totals(), Text()]
        for name, count, users in self.columns:
            parts.append(Text(f"columns on the V axis: {count} {name}, for {', '.join(users)}"))
        if self.sweeps > 1:
            parts.append(Text(f"sweeps of the walk, to stay within the memory budget: {self.sweeps}"))
        parts.append(Text(f"ops on the walk without a rule: {', '.join(self.fallbacks) or 'none'}"))
        parts += [Text(line) for line in self.said]
        if self.output:
            parts.append(Text(f"f: {self.output}"))
        parts.append(Text(f"batch size: {self.batch}"))
        if self.lengths:
            parts.append(Text(f"other sizes: {self.lengths}"))
        if self.left_out:
            said = "held constant: trainable parameters of the loss (loss_params=True has them among the parameters)"
            parts.append(Text(f"{said}: {', '.join(self.left_out)}"))
        if self.python:
            more = f", and {len(self.python) - 6} more" if len(self.python) > 6 else ""
            parts.append(Text(f"values that Python holds: {', '.join(self.python[:6])}{more}"))
        parts += [Text(note) for note in self.notes]
        parts.append(Text(f"checked: {self.check}"))
        passes = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in self.timings.items())
        return Group(*parts, Text(f"compiled in: {passes}"))

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=WIDTH, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    __repr__ = __str__

    def _table_of_rows(self) -> Table:
        timed = any(row.measured is not None for row in self.rows)
        numbers = ["FLOPs", "bytes", "time", "predicted", *(["measured"] if timed else [])]
        table = _table("What was chosen", ["parameter", "quantity", "rule", "algorithm"], numbers)
        previous = None
        for row in self.rows:
            if previous not in (None, row.param):
                table.add_section()
            style = "yellow" if row.rule == FALLBACK.name else None
            table.add_row(
                row.param if row.param != previous else "", row.extension, row.rule, row.algorithm,
                short(row.flops), short(row.bytes), f"{row.share:.0%}", _duration(row.seconds),
                *(["shared" if row.seconds and row.measured == 0 else _duration(row.measured)] if timed else []), style=style,
            )  # fmt: skip
            previous = row.param
        table.caption = "predicted by the cost model; time: share among these rows"
        if timed:
            table.caption += f"; measured: median of {RUNS} runs, op by op"
            if self._samples != self._captured:
                table.caption += f"; predicted for {self._captured} samples, measured with {self._samples}"
        return table

    def _table_of_totals(self) -> Table:
        table = _table("What it costs", [""], ["FLOPs", "bytes", "nodes", "FLOPs / plain", "bytes / plain"])
        plain = self.plain or Total()

        def add(name: str, total: Total) -> None:
            pairs = (total.flops, plain.flops), (total.bytes, plain.bytes)
            ratios = [f"{own / unit:.2f}" if unit else "-" for own, unit in pairs]
            table.add_row(name, short(total.flops), short(total.bytes), str(total.nodes or "-"), *ratios)

        for stage, name in STAGES.items():
            add(name, self.totals[stage])
        table.add_section()
        add("all", self.totals["program"])
        if self.plain is not None:
            add("plain gradient", plain)
        table.caption = "counted: FLOPs of products and convolutions; bytes read and written, views none"
        return table


def _table(title: str, texts: list[str], numbers: list[str]) -> Table:
    table = Table(*texts, title=title, title_justify="left", caption_justify="left")
    for header in numbers:
        table.add_column(header, justify="right")
    return table


def short(value: float) -> str:
    """Three digits and a power of 1000, as in 4.72 M."""
    units = ["", " k", " M", " G", " T"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g}{units[0]}"


def _duration(seconds: float | None) -> str:
    """In microseconds or milliseconds; a dash where nothing is computed."""
    if not seconds:
        return "-"
    return f"{1e6 * seconds:.3g} us" if seconds < 999.5e-6 else f"{short(1e3 * seconds)} ms"


# what was chosen ------------------------------------------------------------------------------------------


def _rows(program: Program, measured: list[float] | None) -> list[Row]:
    """A row for every decision, with its measured time, and for every quantity that needed none of its own."""
    taken = {id(d): s for d, s in zip(program.decisions, measured or [], strict=measured is not None)}
    seconds = sum(d.seconds for d in program.decisions) or 1.0
    rows = []
    for param in program.params:
        for field, label in _fields(program):
            own = [d for d in program.decisions if d.param == param and d.extension == label]
            if param not in program.results[field] and not own:
                continue
            own = own or [_decision_without_contraction(program, param, label, program.results[field][param])]
            for d in own:
                predicted = d.seconds, d.seconds / seconds
                row = Row(param, label, d.rule, d.algorithm, d.flops, d.bytes, *predicted, taken.get(id(d)))
                if row not in rows:  # two extensions of one class have one label
                    rows.append(row)
    return rows


def _fields(program: Program) -> list[tuple[str, str]]:
    """(field of the result, label of its nodes), the gradient first."""
    own = [("grad", "gradient")] if "grad" in program.results else []
    return own + [(e.savefield, type(e).__name__) for e in program.extensions]


def _decision_without_contraction(program: Program, param: str, label: str, result: Any) -> Decision:
    """Why a quantity has no contraction of its own: it reads others', is known on the walk, or is zero."""
    if not any(stage_of(n) in ("columns", "propagate") for n in _sources(result)):
        return Decision(param, label, "", "zero: not reached by the loss", 0, 0, 0.0)
    others = list(dict.fromkeys(_label(n) for n in _sources(result, label) if _label(n) not in ("", label)))
    rules = [d.rule for d in program.decisions if d.param == param and d.extension in others]
    how = "as " + ", ".join(others) if others else "on the walk"
    return Decision(param, label, rules[0] if rules else "", how, 0, 0, 0.0)


def _describe_kernels(program: Program) -> tuple[str, ...]:
    """How the ops that PyTorch has kernels for are computed."""
    kernels = Counter(op for op, _, why in program.analysis.said if not why)
    lines = [f"as PyTorch's kernels: {', '.join(f'{op} ({n})' for op, n in kernels.items())}"] if kernels else []
    others: dict[tuple[str, str], list[str]] = {}
    for op, module, why in program.analysis.said:
        if why:
            others.setdefault((op, why), []).append(f"'{module}'" if module else "the model")
    return (*lines, *(f"in mathematics: {op} in {', '.join(at)}, because {why}" for (op, why), at in others.items()))


def _output(program: Program) -> str:
    linear = program.analysis.terms == []
    note = "; the loss is linear in it, so the Gauss-Newton is zero" if linear else ""
    return (program.analysis.ends or ("the model's output" if linear else "")) + note


def _label(node: fx.Node) -> str:
    return node.meta.get("origin", {}).get("extension", "")


def _sources(result: Any, label: str | None = None) -> list[fx.Node]:
    """`result` and what its value is computed from (sizes apart); given a label, not past other labels."""
    found: dict[fx.Node, None] = {}
    stack = pytree.tree_leaves(result)
    while stack:
        node = stack.pop()
        if node in found or not isinstance(node.meta.get("val"), Tensor | tuple | list):
            continue
        found[node] = None
        if label is None or _label(node) == label:
            stack.extend(node.all_input_nodes)
    return list(found)


def _columns(program: Program) -> list[tuple[str, int, tuple[str, ...]]]:
    totals: dict[str, tuple[int, tuple[str, ...]]] = {}
    for group, count in program.walked.columns.items():
        users = [type(e).__name__ for e in program.extensions if group in groups_of(program, e.requires)]
        if group == GRADIENT:
            users = ["gradient", *users]
        kind = KINDS[group.kind]
        several = len(program.analysis.terms) > 1 and kind.of_term
        name = kind.title + (f" of loss term {group.term}" if several else "")
        totals[name] = totals.get(name, (0,))[0] + count, tuple(dict.fromkeys(users))
    return [(name, count, users) for name, (count, users) in totals.items()]


def _fallbacks(program: Program) -> tuple[str, ...]:
    """Ops of the forward pass that cotangents went through without a rule."""
    found: dict[str, None] = {}
    for node in program.graph.nodes:
        differentiated = stage_of(node) == "forward" and is_active(node)
        if not differentiated or not isinstance(node.target, OpOverload):
            continue
        if rule_of(node.target, program.rules) is FALLBACK:
            found[str(node.target)] = None
    return tuple(found)
