"""Quantities of a data set: those of its batches, combined while a loader goes by.

Over the samples of all batches the loss is a sum (`reduction="sum"`), or a mean whose denominators Z_b add up. So the
loss of batch b has the factor w = 1, or w = Z_b / sum Z_b, and a value of degree d in the loss (`Combine`) has w**d.
Only sums and rows of a batch are kept. Under `mesh=` every rank goes over a loader of its own, and a batch is made of
the parts on all ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from fxcurv.api import Compiled
from fxcurv.data.batches import Batch, check_apart, check_given, given, mark, moved
from fxcurv.data.blame import bad_sample
from fxcurv.data.identity import differences, digests, identity
from fxcurv.data.rows import Rows
from fxcurv.data.together import Empty, Together, emptied, local, sample_place
from fxcurv.data.weights import Weights
from fxcurv.errors import ArgumentError
from fxcurv.extensions import Extension
from fxcurv.extensions.base import Combine
from fxcurv.front.arguments import Arguments
from fxcurv.ir.private import pytree
from fxcurv.kronecker import Kronecker, Within, arranged, plain
from fxcurv.result import Result
from fxcurv.runtime.bind import seed_tensor
from fxcurv.runtime.ranks import Ranks

LOSS = Combine("sum")
GOLDEN = 0x9E3779B97F4A7C15


def over(
    compiled: Compiled,
    loader: Iterable[Any],
    *,
    unpack: Callable[[Any], tuple] | None = None,
    reduction: str | Callable[..., float] | None = None,
    seed: int = 0,
    decay: float | None = None,
    to: str | Path | None = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress: bool = True,
) -> Result:
    """Compute all quantities of `compiled` over all samples of a loader, in one pass (two for `EKFAC`).

    Sums and means over samples equal those of one call on the whole data set; per-sample values are concatenated in order.
    The result has no `output`. Under `mesh=` every rank has a loader of its own part of the data. The parts, one after the other,
    are the data set. As after a call, sums are of all samples, and per-sample values are of the rank's own.

    Args:
        compiled: from `fxcurv.compile`. Samples must not interact (eval mode, with batch norm).
        loader: yields batches (inputs, *targets), or inputs alone if there is no loss; tensors are moved to the model's
            device. Empty batches are skipped. Two passes go over it twice, so an iterator will not do.
        unpack: batch -> (inputs, *targets), for a loader that yields something else.
        reduction: how the loss is reduced. By default this is found out by calls of the loss, a function of the model's output:
            a sum, or a mean over any weights (samples, counted positions, class weights). If the model computes the loss
            itself, say "sum" or "mean" (over samples), or pass a function (inputs, *targets) -> Z, which gives the weight
            of a batch in a mean, such as the number of its tokens.
        seed: seed of sampled columns, which equal those of one call with this seed. Under `mesh=` every batch has a seed of its
            own, made of this one and the number of samples before it.
        decay: the result is the running average of the values of single batches, with weights proportional to
            decay**age that add up to 1. Not for per-sample values; the norms of `ClippedGrad` are left out.
        to: a folder for per-sample values: one file `<field>.<parameter>.npy` each (`numpy.memmap`). The result holds tensors
            that read from these files. Another pass with this folder overwrites them.
        checkpoint: a file for the state of the pass, written every `every` batches and where the pass is interrupted. If
            the file exists, the pass resumes from it, given the same batches in the same order; the end of the pass removes it.
            Batches that are counted are read again, and their numbers compared, but nothing is computed.
        every: see `checkpoint`.
        progress: show a bar on a terminal, or a counter if the loader has no length.

    Raises:
        ArgumentError: for a batch of another form; for a sample with a value that is not finite (the message has its number);
            if the model has changed since the pass began; if a checkpoint is of other batches, another model, loss,
            `params=`, `reduction=` or other extensions, or is none; for a `checkpoint` in no folder; for `to=` or
            `checkpoint=` under `mesh=`; on all ranks, if one of them has no batch.
        ExtensionError: for an extension whose value does not follow from those of batches (`KFRA`, products), or for
            `subsampling=`.
        LossError: for a loss that is no sum or mean over samples, or for a sum with a regulariser.
        MixedSamplesError: where samples interact in the model.
    """
    check_given(compiled, loader, "fxcurv.over")
    totals = Totals(compiled, unpack=unpack, reduction=reduction, seed=seed, decay=decay, to=to)
    totals.load(checkpoint)
    return totals.run(loader, checkpoint=checkpoint, every=every, progress=progress)


def accumulate(
    compiled: Compiled,
    micro_batches: Iterable[Any],
    *,
    unpack: Callable[[Any], tuple] | None = None,
    reduction: str | Callable[..., float] | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Result:
    """Compute a batch that is too large in micro-batches, one at a time.

    The result equals that of `compiled(inputs, *targets, seed=seed)` on their concatenation, to rounding, sampled columns
    included; it has no `output`. Under `mesh=` every rank has any number of micro-batches of its own: the batch is those of
    rank 0, then those of rank 1, and so on, as in a call.

    Args:
        compiled: from `fxcurv.compile`. Samples must not interact (eval mode, with batch norm).
        micro_batches: batches (inputs, *targets), or inputs alone if there is no loss; all are held in a list.
        unpack, reduction: see `over`. By default the weight of every micro-batch in the mean is found by a few evaluations of
            the loss on the output; "sum" or "mean" (over samples) saves these.
        seed, generator: as in a call.

    Raises:
        ArgumentError: for micro-batches of another form, or without a sample; for `ClippedGrad` of a mean, whose bound
            applies to gradients divided by the number of all samples.
        ExtensionError: for an extension whose value does not follow from those of batches (`KFRA`, products), or for
            `subsampling=`.
        LossError: for a loss that is no sum or mean over samples, or for a sum with a regulariser.
        MixedSamplesError: where samples interact in the model.
    """
    check_given(compiled, micro_batches, "fxcurv.accumulate")
    batches = list(micro_batches)
    totals = Totals(compiled, unpack=unpack, reduction=reduction)
    totals.count_on(batches, seed, generator)
    return totals.run(batches, progress=False)


@dataclass(frozen=True)
class Pass:
    """What is counted of a pass. It is replaced as a whole, so a batch is counted whole or not at all, whatever interrupts.

    Attributes:
        earlier: the totals of finished passes.
        samples, batches: their numbers; `averaged`: of batches in a running average; `sizes`: of the samples of every rank.
        weight: the sum of the batches' weights.
        sums: field -> parameter name -> the sum.
        marks, rows: they grow, also by a batch that is not counted in the end: the first `batches`, and those of the first
            `samples`, count.
        weights: finds the weights of batches.
    """

    earlier: tuple[dict[str, Any], ...]
    sizes: tuple[int, ...]
    weights: Weights
    samples: int = 0
    batches: int = 0
    averaged: int = 0
    weight: float = 0.0
    sums: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    marks: list[str] = dataclasses.field(default_factory=list)
    rows: dict[str, dict[str, Rows]] = dataclasses.field(default_factory=dict)


class Totals:
    """The sums of `over` between two batches; `run` resumes where an earlier one was interrupted.

    Raises:
        ArgumentError: for what is no compiled object; for a `decay` out of range; for a `to` that is no folder.

    Attributes:
        counted: the number of samples in the last finished pass.
        weight: the denominator of a mean over all these samples, in units of one of them; None where the loss is a sum.
    """

    def __init__(
        self,
        compiled: Compiled,
        *,
        unpack: Callable[[Any], tuple] | None = None,
        reduction: str | Callable[..., float] | None = None,
        seed: int = 0,
        decay: float | None = None,
        to: str | Path | None = None,
    ):
        check_given(compiled, (), "Totals")
        if compiled.ranks is not None and to is not None:
            raise ArgumentError("to= with mesh=: leave it out, and write what the result of each rank holds")
        if decay is not None and not 0 <= decay < 1:
            raise ArgumentError(f"decay={decay!r}: use a number from 0 (the last batch alone) to below 1")
        compiled = compiled.counting()
        self.compiled, self._unpack, self._seed, self._decay = compiled, unpack, seed, decay
        self._to = _folder(to)
        self._reduction = reduction
        self._compiled: dict[int, Compiled] = {}
        self._all = Together(compiled.ranks, lambda batch: emptied(self._read(compiled, self._given(batch))[2]))
        self._first: int | None = None  # for one call in parts: the number of this rank's first sample
        self.counted = 0
        self.weight: float | None = None
        self._model: dict[str, str] = {}
        self._pass = self._begin(())
        self._plan()  # refuses extensions that cannot be combined, before anything is computed

    def _begin(self, earlier: tuple[dict[str, Any], ...]) -> Pass:
        """Count from zero, after finished passes."""
        sizes = (0,) * (1 if self._all.ranks is None else self._all.ranks.size)
        return Pass(earlier, sizes, Weights(self.compiled.model, self.compiled.loss, self._reduction))

    @property
    def samples(self) -> int:
        """The number of samples counted in the present pass."""
        return self._pass.samples

    @property
    def batches(self) -> int:
        """The number of batches counted in the present pass."""
        return self._pass.batches

    def count_on(self, batches: list[Any], seed: Any, generator: torch.Generator | None) -> None:
        """Draw the columns that one call on all of these batches draws; no other batches may follow."""
        ranks = self._all.ranks

        def read() -> tuple[int, int]:
            drawn = int(seed_tensor(seed, generator, torch.device("cpu")))
            own = batches if ranks is not None else []
            return sum(self._read(self.compiled, self._given(b))[2].batch_size for b in own), drawn

        (_, drawn), rows = self._all.do(read, lambda known: known)
        self._seed = drawn if seed is not None else rows[0][1]  # `compiled` refuses seeds that differ between ranks
        self._first = sum(row[0] for row in rows[: ranks.rank]) if ranks is not None else 0

    # ---- passes ------------------------------

    def _plan(self) -> tuple[list[Extension], dict[str, Any]]:
        """(the extensions that this pass sums, none if all is known; the known values by field)."""
        asked: list[Extension] = []
        known: dict[str, Any] = {}
        for e in self.compiled.extensions:
            if self._averages(e):
                if self._pass.earlier:
                    known[e.savefield] = self._pass.earlier[0][e.savefield]
                else:
                    asked.append(e)
                continue
            steps = e.gather()
            wanted = next(steps)
            try:
                for totals in self._pass.earlier:
                    wanted = steps.send([totals.get(w.savefield, {}) for w in wanted])
                asked += wanted
            except StopIteration as end:
                known[e.savefield] = end.value
        for e in asked:
            rows = [c for c in e.combine if c.how == "rows"]
            if rows and self._decay is not None:
                raise ArgumentError(f"{type(e).__name__} is per sample, which decay= does not average: drop one")
        return asked, known

    def _averages(self, e: Extension) -> bool:
        """Whether `decay=` averages an extension's own values, which are no sum over batches (a variance)."""
        return (
            self._decay is not None and type(e).gather is not Extension.gather and not e.combine and e.data_passes == 1
        )

    def run(
        self, loader: Iterable[Any], *, checkpoint: str | Path | None = None, every: int = 100, progress: bool = True
    ) -> Result:
        """Go over the loader as often as it takes, skipping batches that are counted already.

        Raises:
            ArgumentError: also after the end of the last pass, whose result was returned.
            FxcurvError: see `over`. Batches that are counted stay counted, so another `run` continues after them.
        """
        passes = max((e.data_passes for e in self.compiled.extensions), default=1)
        file = self._check_run(loader, checkpoint, every, passes)
        asked, known = self._plan()
        while asked or not self._pass.earlier:
            compiled = self._compiled_for(asked)
            self._all.do(self._check_model)
            with self._kept(file), _bar(loader, progress, len(self._pass.earlier), passes) as tell:
                seen = 0
                for batch in self._all.batches(loader):
                    tell()
                    if seen < self.batches:
                        self._all.do(lambda: self._check_mark(seen, batch))  # noqa: B023
                    else:
                        self._add(compiled, asked, batch)
                        if file is not None and self.batches % every == 0:
                            self._save(file)
                    seen += 1
                self._check_length(seen)
                self._all.do(self._check_model)
            self._pass = self._begin((*self._pass.earlier, self._finished(asked)))
            asked, known = self._plan()
        first = self._pass.earlier[0]
        fields = {name: first[name] for name in ("loss", "grad", *self._extra_fields(first)) if name in first}
        if self.compiled.loss is not None and "loss" not in first:  # the mean over nothing
            fields["loss"] = next(iter(first["grad"].values())).new_full((), torch.nan)
        if file is not None:
            file.unlink(missing_ok=True)
        result = Result({**fields, **known}, self.compiled.extensions, self.compiled.subject.holder)
        if self._all.ranks is not None:
            self._spread(result, self._all.ranks, first["sizes"])
        return result

    def _check_run(self, loader: Any, checkpoint: Any, every: Any, passes: int) -> Path | None:
        """Refuse, before the work, what would fail during it; the file of the checkpoint."""
        check_given(self.compiled, loader, "a pass")
        if self._pass.earlier and not self._plan()[0]:
            raise ArgumentError(
                f"this pass is over, of {self._pass.earlier[0]['samples']} samples, and `run` has returned its result: make "
                "another Totals for other data"
            )
        if passes > 1 and iter(loader) is loader:
            names = ", ".join(type(e).__name__ for e in self.compiled.extensions if e.data_passes > 1)
            raise ArgumentError(
                f"{names} takes {passes} passes, and the loader is an iterator, which ends: pass a DataLoader or a list"
            )
        if checkpoint is None:
            return None
        if self._all.ranks is not None:
            raise ArgumentError("checkpoint= with mesh=: leave it out, state_dict() is of this rank's part")
        if not isinstance(every, int) or every < 1:
            raise ArgumentError(f"every={every!r}: pass how many batches lie between two states, 1 or more")
        file = Path(checkpoint)
        if file.is_dir() or not file.parent.is_dir():
            raise ArgumentError(f"checkpoint={str(file)!r} is no file in a folder that is there: make the folder first")
        self._identity  # noqa: B018  (as the model is before the first batch)
        return file

    def _spread(self, result: Result, ranks: Ranks, sizes: list[int]) -> None:
        """Note on the result that per-sample values are of this rank's own samples."""
        hows = {e.savefield: (e.combine or (LOSS,), e.sample_axis or 0) for e in self.compiled.extensions}
        extras = {
            n: ((how,), 0)
            for e in self.compiled.extensions
            for x, how in e.extras.items()
            for n in (x, f"{x}_{e.savefield}")
        }
        places = {
            field: pytree.tree_map(lambda _, how=how, axis=axis: sample_place(how[0].how, axis), result._fields[field])
            for field, (how, axis) in {**hows, **extras}.items()
            if field in result._fields
        }
        result.spread_over(
            sizes, functools.partial(ranks.whole, sizes=sizes), {"results": places, "extras": {}, "output": []}
        )

    def _extra_fields(self, totals: dict[str, Any]) -> Iterator[str]:
        for e in self.compiled.extensions:
            yield from (name for name in totals if any(name in (x, f"{x}_{e.savefield}") for x in e.extras))

    def _compiled_for(self, asked: list[Extension]) -> Compiled:
        stage = len(self._pass.earlier)
        if stage not in self._compiled:
            same = tuple(asked) == self.compiled.extensions
            self._compiled[stage] = self.compiled if same else self.compiled.asking(asked)
        return self._compiled[stage]

    # ---- a batch ------------------------------

    def _read(self, compiled: Compiled, batch: Batch) -> tuple[Any, tuple, Arguments]:
        """(inputs, targets, the tensors of both, flat)."""
        inputs, targets = moved(compiled, batch)
        return inputs, targets, compiled.arguments(inputs, *targets)

    def _given(self, batch: Any) -> Batch:
        """(inputs, targets), where the loader has them."""
        empty = isinstance(batch, Empty)
        return (batch.inputs, batch.targets) if empty else given(self.compiled, batch, self._unpack)

    def _add(self, compiled: Compiled, asked: list[Extension], batch: Any) -> None:
        """Count one batch; if anything fails, nothing of it is counted."""

        def read() -> tuple[Any, tuple, Arguments, str]:
            known = self._given(batch)
            return *self._read(compiled, known), self._mark(*known)

        (inputs, targets, arguments, own), rows = self._all.do(read, lambda found: (found[2].batch_size,))
        n = sum(row[0] for row in rows)  # nothing is computed on an empty batch
        now = self._pass
        new = dataclasses.replace(
            now, samples=now.samples + n, batches=now.batches + 1,
            sizes=tuple(size + row[0] for size, row in zip(now.sizes, rows, strict=True)),
        )  # fmt: skip
        if n:
            values, z = self._computed(compiled, asked, inputs, targets, arguments)
            self._add_rows(values, z)
            sums = self._added(values, n, z)
            weight, averaged = now.weight + (z or 0.0), now.averaged + bool(values)
            new = dataclasses.replace(new, sums=sums, weight=weight, averaged=averaged)
        del now.marks[now.batches :]
        now.marks.append(own)
        self._pass = new

    def _computed(
        self, compiled: Compiled, asked: list[Extension], inputs: Any, targets: tuple, arguments: Arguments
    ) -> tuple[dict, float | None]:
        """(the values of a batch, its weight), checked."""
        result = self._call(compiled, inputs, targets)
        values = dict(self._values(asked, result))
        self._all.do(lambda: self._check_finite(values, arguments))
        z = self._pass.weights.of(result, inputs, targets, arguments, compiled, self._all)
        self._check_degrees(asked)
        if z == 0 and self._decay is not None:  # a mean over nothing has no part in a running average
            values = {}
        elif z == 0 and ("loss", "") in values:
            del values["loss", ""]
        elif ("loss", "") in values and not bool(result.loss.isfinite()) and self._first is None:
            self._raise_not_finite(["loss"], arguments)
        return values, z

    @property
    def _own(self) -> int:
        """The number of counted samples that are this rank's."""
        return self._pass.sizes[self._all.ranks.rank if self._all.ranks is not None else 0]

    def _call(self, compiled: Compiled, inputs: Any, targets: tuple) -> Result:
        if self._all.ranks is None and not self.samples:
            check_apart(compiled.lower(inputs, *targets).program)
        if self._first is not None:
            return compiled.part(inputs, *targets, seed=self._seed, first=self._first + self._own)
        if self._all.ranks is None:
            return compiled.part(inputs, *targets, seed=self._seed, first=self.samples)
        return compiled.part(inputs, *targets, seed=seed_of(self._seed, self.samples), first=None)

    def _values(
        self, asked: list[Extension], result: Result
    ) -> Iterator[tuple[tuple[str, str], tuple[Any, tuple, int]]]:
        """((field, parameter name), (value, how each of its tensors combines, the samples' axis))."""
        fields = result._fields
        if "loss" in fields:
            yield ("loss", ""), (fields["loss"], (LOSS,), 0)
        for name, value in fields.get("grad", {}).items():
            yield ("grad", name), (value, (LOSS,), 0)
        for e in asked:
            for name, value in fields[e.savefield].items():
                hows = (LOSS,) * len(pytree.tree_leaves(value)) if self._averages(e) else e.combine
                yield (e.savefield, name), (value, hows, e.sample_axis or 0)
            for extra, how in e.extras.items():
                if self._decay is not None and how.how == "rows":
                    continue
                field = next(f for f in (f"{extra}_{e.savefield}", extra) if f in fields)
                yield (field, ""), (fields[field], (how,), 0)

    def _add_rows(self, values: dict, z: Any) -> None:
        """Write the rows of a batch behind those that are counted; this fails where a disk is full."""
        for (field, name), (value, hows, axis) in values.items():
            if hows[0].how == "rows":
                rows = self._pass.rows.setdefault(field, {})
                if name not in rows:
                    rows[name] = Rows(self._to and self._to / f"{field}{f'.{name}' if name else ''}.npy", axis)
                rows[name].add(value, z ** hows[0].degree if z is not None and hows[0].degree else None, self._own)

    def _added(self, values: dict, n: int, z: Any) -> dict[str, dict[str, Any]]:
        """The sums with those of a batch; the present ones stay."""
        sums = {f: dict(known) for f, known in self._pass.sums.items()}
        for (field, name), (value, hows, _) in values.items():
            if hows[0].how != "rows":
                known = sums.setdefault(field, {})
                known[name] = self._summed(known.get(name), value, hows, n, z)
        return sums

    def _summed(self, before: Any, value: Any, hows: tuple[Combine, ...], n: int, z: Any) -> Any:
        new, spec = pytree.tree_flatten(value)
        old = pytree.tree_leaves(before) if before is not None else [None] * len(new)
        if self._decay is not None:
            factors = [1 - self._decay] * len(new)
        else:
            factors = [
                n if h.how == "mean" else 1 if z is None or not h.degree else z**h.degree for h in hows[: len(new)]
            ]
        terms = [_wide(t.detach()) * f for t, f in zip(new, factors, strict=True)]
        keep = 1 if self._decay is None else self._decay
        return pytree.tree_unflatten([t if o is None else o * keep + t for o, t in zip(old, terms, strict=True)], spec)

    # ---- the end of a pass ------------------------------

    def _finished(self, asked: list[Extension]) -> dict[str, Any]:
        """The totals by field."""
        if not self.samples:
            raise ArgumentError("the loader yields no sample: pass one with at least one batch")
        if self._decay is not None and not self._pass.averaged:
            raise ArgumentError("no sample of the loader counts, so decay= has nothing to average: leave it out")
        hows = {"loss": (LOSS,), "grad": (LOSS,), **{e.savefield: e.combine for e in asked}}
        total = self._pass.weights.total(self._pass.weight)
        self.counted, self.weight = self.samples, total

        def scaled(value: Any, how: tuple[Combine, ...]) -> Any:
            leaves, spec = pytree.tree_flatten(value)
            out = [t / self._divisor(h, total) for t, h in zip(leaves, how or (LOSS,) * len(leaves), strict=False)]
            return pytree.tree_unflatten(out, spec)

        found: dict[str, Any] = {}
        for field, sums in self._pass.sums.items():
            found[field] = {name: scaled(value, hows[field]) for name, value in sums.items()}
        extras = {f: h for e in asked for x, h in e.extras.items() for f in (x, f"{x}_{e.savefield}")}
        for field, rows in self._pass.rows.items():
            how = extras[field] if field in extras else hows[field][0]
            found[field] = {n: r.finish(self._divisor(how, total), self._own) for n, r in rows.items()}
        found = {f: values.get("", values) for f, values in found.items()}
        forms = {f: {n: r.state_dict() for n, r in rows.items()} for f, rows in self._pass.rows.items()}
        files = {"files": forms} if self._to is not None else {}
        return {**found, "samples": self.samples, "sizes": list(self._pass.sizes), "own": self._own, **files}

    def _divisor(self, how: Combine, total: Any) -> Any:
        if self._decay is not None:
            return 1 - self._decay**self._pass.averaged
        if how.how == "mean":
            return self.samples
        return 1 if total is None or not how.degree else total**how.degree

    # ---- checks ------------------------------

    def _check_degrees(self, asked: list[Extension]) -> None:
        if self._pass.weights.mean and self._decay is None:
            for e in asked:
                if any(c.degree is None for c in e.combine):
                    raise ArgumentError(
                        f"{type(e).__name__} of a mean over samples: its bound is of gradients over the number of all samples, "
                        'which is not known before the end. Way out: reduction="sum" in the loss.'
                    )

    def _check_finite(self, values: dict, arguments: Any) -> None:
        if self._first is not None:  # a call returns values that are not finite, too
            return
        known = {k: pytree.tree_leaves(value) for k, (value, *_) in values.items() if k[0] != "loss"}
        leaves = {k: [local(t) for t in ts if not t.is_meta] for k, ts in known.items()}  # some are another rank's
        ends = [torch.stack(torch.aminmax(t.detach())).double() for ts in leaves.values() for t in ts if t.numel()]
        if ends and not bool(torch.stack(ends).isfinite().all()):
            bad = [f"{f} {n}".strip() for (f, n), ts in leaves.items() if not all(bool(t.isfinite().all()) for t in ts)]
            self._raise_not_finite(bad, arguments)

    def _raise_not_finite(self, bad: list[str], arguments: Any) -> None:
        # under mesh= a sharded model runs only on all ranks at once, so samples cannot be tried one by one
        said = f"something of batch {self.batches} is not finite"
        if self._all.ranks is None:
            said = bad_sample(self.compiled.model, self.compiled.loss, arguments, self.samples, self.batches)
        raise ArgumentError(
            f"{said}, so {', '.join(bad[:3])} is not finite. Way out: leave the sample out, or mend it; another run goes on at "
            "this batch."
        )

    def _check_model(self) -> None:
        if self._first is not None:  # one call
            return
        now = digests(self.compiled.subject)
        changed = [name for name in now if self._model and self._model.get(name) != now[name]]
        if changed or self._model and len(now) != len(self._model):
            raise ArgumentError(
                f"the model has changed since the pass began: {', '.join(changed[:3]) or 'other parameters'}. Way out: begin "
                "anew."
            )
        self._model = now

    def _mark(self, inputs: Any, targets: tuple) -> str:
        """What tells a batch from others: its numbers, and what a function `reduction=` says of it."""
        own = f"{mark((inputs, targets)):08x}"
        if not callable(self._reduction):
            return own
        inputs, targets = moved(self.compiled, (inputs, targets))
        n = self.compiled.arguments(inputs, *targets).batch_size
        return f"{own} weight {self._pass.weights.given(inputs, targets, n)!r}"

    def _check_mark(self, index: int, batch: Any) -> None:
        if self._pass.marks[index] != self._mark(*self._given(batch)):
            raise ArgumentError(
                f"batch {index} is not the one that was counted before: the loader has another order, or other data, or unpack= "
                "or reduction= takes it otherwise. Way out: the same order (no shuffling, or a seeded generator), or begin anew."
            )

    def _check_length(self, seen: int) -> None:
        if seen < self.batches:
            raise ArgumentError(
                f"the loader gave {seen} batches, and {self.batches} were counted before: pass the same loader, or begin anew"
            )
        if self._pass.earlier and self.samples != self._pass.earlier[0]["samples"]:
            raise ArgumentError(
                f"the loader gave {self._pass.earlier[0]['samples']} samples in the first pass and {self.samples} in this one: "
                "pass a loader that gives all samples every time"
            )

    # ---- the state ------------------------------

    @contextlib.contextmanager
    def _kept(self, checkpoint: Path | None) -> Iterator[None]:
        """Save the state, whatever ends the pass."""
        try:
            yield
        except BaseException:
            if checkpoint is not None and self.batches:
                with contextlib.suppress(OSError):
                    self._save(checkpoint)
            raise

    def _save(self, file: Path) -> None:
        """Write the state beside the old one, then replace that."""
        new = file.with_name(file.name + ".new")
        torch.save(self.state_dict(), new)
        os.replace(new, file)

    @functools.cached_property
    def _identity(self) -> dict[str, str]:
        """What a resumed pass has to share."""
        reduction = "a function" if callable(self._reduction) else repr(self._reduction)
        own = {"seed": str(self._seed), "decay": str(self._decay), "reduction": reduction}
        return {**own, **identity(self.compiled)}

    def state_dict(self) -> dict[str, Any]:
        """What is counted, in tensors and plain values; of rows in files (`to=`) their names and shapes."""
        now = self._pass
        rows = now.rows if now.samples else {}  # of a first batch that was not counted
        return {
            "of": self._identity,
            "model": dict(self._model),
            "samples": now.samples,
            "sizes": list(now.sizes),
            "batches": now.batches,
            "averaged": now.averaged,
            "weight": now.weight,
            "marks": now.marks[: now.batches],
            "weights": now.weights.state_dict(),
            "sums": _packed(now.sums),
            "rows": {f: {n: r.state_dict() for n, r in known.items()} for f, known in rows.items()},
            "earlier": [_packed({k: v for k, v in t.items() if k not in t.get("files", ())}) for t in now.earlier],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of an equal object.

        Raises:
            ArgumentError: if it is no state; if that object has another model (its structure and code), loss, `params=`,
                options of `compile`, extensions, seed, decay, reduction or folder. The numbers of the model and of batches
                are compared by `run`.
        """
        missing = [key for key in STATE if not isinstance(state, dict) or key not in state]
        if missing:
            raise ArgumentError(
                f"this is no state of a pass, or of another fxcurv (it has no {missing[0]!r}): begin anew"
            )
        other = differences(state["of"], self._identity)
        if other:
            raise ArgumentError(
                f"the state is of another pass ({other}): pass what it was begun with, or begin anew, with no state"
            )
        earlier = [self._with_files(_unpacked(totals)) for totals in state["earlier"]]
        begun = self._begin(tuple(earlier))
        begun.weights.load_state_dict(state["weights"])
        rows = {f: {n: Rows.of(r, self._to) for n, r in rows.items()} for f, rows in state["rows"].items()}
        self._model = dict(state["model"])
        self._pass = dataclasses.replace(
            begun, samples=state["samples"], batches=state["batches"], averaged=state["averaged"], weight=state["weight"],
            sizes=tuple(state["sizes"]), marks=list(state["marks"]), sums=_unpacked(state["sums"]), rows=rows,
        )  # fmt: skip

    def _with_files(self, totals: dict[str, Any]) -> dict[str, Any]:
        """The totals of a finished pass, with the rows that are in files."""
        for field, forms in totals.get("files", {}).items():
            found = {name: Rows.finished(form, totals["own"], self._to) for name, form in forms.items()}
            totals[field] = found.get("", found)
        return totals

    def load(self, checkpoint: str | Path | None) -> None:
        """Restore the state in a file, if there is one.

        Raises:
            ArgumentError: as `load_state_dict`; for a file that holds no state.
        """
        if checkpoint is None or not Path(checkpoint).is_file():
            return
        self.load_state_dict(saved(Path(checkpoint)))


STATE = (
    "of", "model", "samples", "sizes", "batches", "averaged", "weight", "marks", "weights", "sums", "rows", "earlier",
)  # fmt: skip


def saved(file: Path) -> Any:
    """What `torch.save` wrote to a file.

    Raises:
        ArgumentError: for a file that it has not written, or that is damaged.
    """
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:  # such a file may raise anything
        raise ArgumentError(
            f"{file} is no saved state ({type(error).__name__}): it is damaged, or another kind of file. Delete it to begin "
            "anew, or name another file"
        ) from error


def _folder(to: Any) -> Path | None:
    """The folder `to`, which is made when it is needed.

    Raises:
        ArgumentError: where there is a file in its way.
    """
    if to is None:
        return None
    path = Path(to)
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    if there.exists() and not there.is_dir():
        raise ArgumentError(f"to={str(to)!r}: {there} is a file, pass a folder")
    return path


def seed_of(seed: int, first: int) -> int:
    """The seed of the batch whose first sample has this number; the first batch has the seed itself."""
    return (seed + first * GOLDEN) % 2**62


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _packed(value: Any) -> Any:
    """A value with Kronecker factors as plain lists beside their arrangement, to be saved."""
    if isinstance(value, Kronecker):
        return {"kronecker": list(value), "arrangement": plain(value.arrangement)}
    if isinstance(value, Within):
        return {"within": value.weight}
    if isinstance(value, dict):
        return {k: _packed(v) for k, v in value.items()}
    return [_packed(v) for v in value] if isinstance(value, list) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"kronecker", "arrangement"}:
        return Kronecker(value["kronecker"], arranged(value["arrangement"]))
    if isinstance(value, dict) and set(value) == {"within"} and isinstance(value["within"], str):
        return Within(value["within"])
    if isinstance(value, dict):
        return {k: _unpacked(v) for k, v in value.items()}
    return [_unpacked(v) for v in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _bar(loader: Iterable[Any], progress: bool, stage: int, stages: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, if it is a terminal; a counter where the loader has no length."""
    console = Console(stderr=True)
    if not progress or not console.is_terminal:
        yield lambda: None
        return
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError:
        length = None
    title = "batches" if stages == 1 else f"batches, pass {stage + 1} of {stages}"
    known = (
        [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        if length is not None
        else [TextColumn("{task.completed}")]
    )
    with Progress(TextColumn(title), *known, TimeElapsedColumn(), console=console, transient=True) as shown:
        task = shown.add_task(title, total=length)
        yield lambda: shown.advance(task)
