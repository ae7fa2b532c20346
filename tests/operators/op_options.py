"""Every sample that PyTorch's own database has of every differentiable op, with second derivatives (see `test_op_options.py`).

A sample is a set of options and shapes. Each becomes up to three models (`trials`):

    slices   the op between samples: the argument is scaled by a parameter, batch along a dimension whose slices the op keeps
    vmap     where there is no such dimension: three draws of the sample under `torch.vmap`
    mixing   a dimension whose slices the op mixes: individual gradients are to be refused, sums to be right
    params   all differentiable arguments are parameters, and each sample weighs the result

and each model is compiled under settings (dtype, check) for the gradient, BatchGrad, DiagGGNExact, DiagHessian and HMP at once.
Where that is refused, each family is asked for alone. The reference is a loop of plain autograd in float64, and central
differences of its gradient where PyTorch has no second derivative, or has another one than the program.

float32: all values are numbers of float32, so both dtypes compute the same function at the same point. A program may be as far
from the float64 reference as plain autograd in float32 is, times FACTOR since it may add in another order, and FLOOR besides, as
plain autograd may be exact by chance.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import json
import multiprocessing
import random
import signal
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from op_sweep import (
    N,
    Op,
    Sample,
    Trial,
    Unfit,
    alone,
    database,
    differentiable_outputs,
    drawn,
    name_of,
    repeats,
    squares,
    stacked,
)  # fmt: skip
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxcurv
from fxcurv.errors import FxcurvError, InternalError, SelfCheckError
from fxcurv.extensions import HMP, BatchGrad, DiagGGNExact, DiagHessian

MOST = 500
"""Elements of all outputs; of all arguments, twice as many. Larger samples are counted, not tried."""
MODES = ("slices", "vmap", "params", "mixing")
SAMPLES = 200
"""Samples of an op, spread over what it has: pooling has 864."""
FACTOR, FLOOR = 64, 1e-5
ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""How far a float64 program may be off, by the lowest precision that the op itself returns."""
DIFFERENCES = 1e-5
"""How far central differences are to be trusted, relative to the largest second derivative."""
FAMILIES = {"individual": [BatchGrad()], "Gauss-Newton": [DiagGGNExact()], "Hessian": [DiagHessian(), HMP()]}
SETTINGS = [(torch.float64, None), (torch.float32, "first"), (torch.float64, "first"), (torch.float32, None)]
FOR_ALL = ("CaptureError", "gives complex numbers", "does not depend on any trainable", "is random and has no rule")
"""Refusals that say the same whatever is asked for."""
FAULTS = {"wrong", "failed", "false alarm"}
SINGLE_INSIDE = ("hardsigmoid", "hardswish")  # PyTorch has their 1/6 in float32


# ---- samples and models ------------------------------


def spread_order(count: int) -> list[int]:
    """0, last, middle, …: any beginning of it is spread over the whole."""
    order: list[int] = []
    step = 1 << max(count - 1, 1).bit_length()
    while step:
        order += [i for i in range(0, count, step) if i not in order]
        step //= 2
    return order


def options_of(info: Any) -> list[list[Sample]]:
    """Samples of different shapes or options, each with N draws of its values, in an order of which any beginning is spread."""
    seen: dict[str, list[Sample]] = {}
    for several in zip(*(drawn(info, seed, 1500) for seed in range(N)), strict=False):
        first = several[0]
        if first.able and min(first.sizes) > 0 and all(s.shapes == first.shapes and s.finite for s in several):
            seen.setdefault(first.shapes, [rounded(s) for s in several])
    found = list(seen.values())
    return [found[i] for i in spread_order(len(found))][:SAMPLES]


def given(sample: Sample) -> list[tuple]:
    """The options of a call: each argument that is no tensor, and of tensors the number of their dimensions."""
    described = [("tensor", a.ndim) if isinstance(a, Tensor) else a for a in sample.leaves]
    args, kwargs = pytree.tree_unflatten(described, sample.spec)
    return [(key, repr(value)) for key, value in [*enumerate(args), *kwargs.items()]]


def fits(sample: Sample) -> bool:
    try:
        return sum(sample.sizes) <= 2 * MOST and sum(sample.output_sizes()) <= MOST
    except RuntimeError:  # a view of more memory than a copy of its argument has
        return False


def covered(several: list[list[Sample]], most: int = 2) -> list[int]:
    """Which samples to try: the next one is that with most values of options that those before it have not."""
    left = {i: set(given(draws[0])) for i, draws in enumerate(several)}
    chosen: list[int] = []
    while len(chosen) < most and any(left.values()):
        best = max(left, key=lambda i: len(left[i]))
        had = left.pop(best)
        if fits(several[best][0]):
            chosen.append(best)
            left = {i: values - had for i, values in left.items()}
    return chosen


def rounded(sample: Sample) -> Sample:
    """The sample with values that float32 has too."""
    leaves = [a.float().double() if isinstance(a, Tensor) and a.dtype is torch.float64 else a for a in sample.leaves]
    return dataclasses.replace(sample, leaves=leaves)


class OnParameters(nn.Module):
    """The op on parameters alone; each sample weighs its result."""

    def __init__(self, op: Op, sample: Sample):
        super().__init__()
        self.op = op
        self.own = nn.Parameter(sample.leaves[op.at].clone())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(x * o.reshape(1, -1) for o in self.op.one(self.own))


def on_parameters(op: Op, sample: Sample) -> Trial:
    model = OnParameters(op, sample)
    x = torch.randn(N, 1).double()
    with torch.no_grad():
        targets = [torch.randn(o.shape).double() for o in model(x)]
    return Trial("params", model, x, 0, 0, targets)


def trials(draws: list[Sample], index: int) -> list[Trial]:
    sample = draws[0]
    if any(isinstance(a, Tensor) and a.layout is not torch.strided for a in sample.leaves):
        raise Unfit("sparse", "its samples are sparse tensors")
    outputs = differentiable_outputs(sample)
    if not outputs:
        raise Unfit("constant", "PyTorch has no derivative for it")
    if sum(sample.sizes) > 2 * MOST or sum(sample.output_sizes()) > MOST:
        raise Unfit("large", f"{sum(sample.sizes)} elements")
    op = Op(sample, sample.able[index % len(sample.able)], outputs, batched=False)
    torch.manual_seed(index)
    found = alone(op, draws)
    if all(t.mode != "slices" for t in found):
        with contextlib.suppress(RuntimeError):  # torch.vmap has no rule for it
            found.append(stacked(op, draws))
    return sorted([*found, on_parameters(op, sample)], key=lambda t: MODES.index(t.mode))


def kinds(draws: list[Sample]) -> int:
    """How many models a sample becomes."""
    try:
        return len(trials(draws, 0))
    except (Unfit, RuntimeError):
        return 1


def loss(outputs: Any, targets: Any) -> Tensor:
    return squares(outputs, *targets)


def cast(trial: Trial, dtype: torch.dtype) -> Trial:
    model, x = copy.deepcopy(trial.model), trial.x
    if dtype is torch.float32:
        for t in [*model.parameters(), *model.buffers()]:
            t.data = t.data.to({torch.float64: torch.float32, torch.complex128: torch.complex64}.get(t.dtype, t.dtype))
        x = x.float() if x.dtype is torch.float64 else x
    return dataclasses.replace(trial, model=model, x=x)


# ---- the reference ------------------------------


@dataclasses.dataclass
class Reference:
    """What plain autograd says, flat over all parameters; the sample of each output for what is individual."""

    trial: Trial

    def __post_init__(self) -> None:
        self.params = dict(self.trial.model.named_parameters())
        where = list(self.params.values())
        outputs = self.trial.model(self.trial.x)
        raw = self.trial.model.op.one(self.trial.model.own) if self.trial.mode == "params" else ()
        self.lowest = max([*outputs, *raw], key=lambda o: ROUNDING[o.dtype]).dtype
        ends = [(o.double() - t) for o, t in zip(outputs, self.trial.targets, strict=True)]
        at = self.trial.out_dim
        self.owner = torch.cat([
            torch.arange(o.shape[at]).view(-1, *[1] * (o.ndim - at - 1)).expand(o.shape).flatten() if o.ndim > at else
            torch.zeros(o.numel(), dtype=torch.long) for o in ends])  # fmt: skip
        flat = torch.cat([e.flatten() for e in ends])
        self.residual = flat.detach()
        self.jacobian = torch.stack([self.flat(f, where, retain_graph=True) for f in flat])
        self.note = ""

    def flat(self, value: Tensor, where: list, **kwargs: Any) -> Tensor:
        found = (
            torch.autograd.grad(value, where, allow_unused=True, **kwargs)
            if value.requires_grad
            else [None] * len(where)
        )
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(found, where, strict=True)]
        return torch.cat([g.double().flatten() for g in filled])

    def gradient(self, create_graph: bool = False) -> Tensor:
        value = loss(self.trial.model(self.trial.x), self.trial.targets)
        return self.flat(value, list(self.params.values()), create_graph=create_graph)

    def hessian(self) -> Tensor:
        """Rows of double autograd; raises RuntimeError where PyTorch has none."""
        where = list(self.params.values())
        return torch.stack([self.flat(g, where, retain_graph=True) for g in self.gradient(create_graph=True)]).detach()

    def differences(self, step: float = 1e-5) -> Tensor:
        """The Hessian by central differences of the gradient."""
        rows = []
        for p in self.params.values():
            for i in range(p.numel()):
                ends = []
                for sign in (1, -1):
                    with torch.no_grad():
                        p.view(-1)[i] += sign * step
                    ends.append(self.gradient().detach())
                    with torch.no_grad():
                        p.view(-1)[i] -= sign * step
                rows.append((ends[0] - ends[1]) / (2 * step))
        return torch.stack(rows)

    def plain(self) -> dict[str, Tensor]:
        per_output = 2 * self.residual[:, None] * self.jacobian
        individual = (
            torch.zeros(int(self.owner.max()) + 1, per_output.shape[1]).double().index_add(0, self.owner, per_output)
        )
        return {"grad": per_output.sum(0), "grad_batch": individual, "diag_ggn_exact": 2 * (self.jacobian**2).sum(0)}

    def curved(self, hessian: Tensor, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The diagonal, and the products of each parameter's block with its vector."""
        sizes, start, products = [p.numel() for p in self.params.values()], 0, []
        for (_, v), size in zip(vectors.items(), sizes, strict=True):
            products.append(hessian[start : start + size, start : start + size] @ v.double().flatten())
            start += size
        return {"diag_h": hessian.diagonal(), "hmp": torch.cat(products)}


# ---- one model ------------------------------


@dataclasses.dataclass
class Outcome:
    """One setting of one model: right, wrong, failed (an error that is not fxcurv's), false alarm, refused, or why not tried."""

    mode: str
    setting: str
    kind: str
    deviation: float = 0.0
    message: str = ""
    note: str = ""


def away(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or not torch.equal(actual.isfinite(), expected.isfinite()):
        return float("inf")
    keep = expected.isfinite()
    off = (actual - expected)[keep].abs()
    return (off.max() / expected[keep].abs().max().clamp(min=1e-3)).item() if off.numel() else 0.0


class Tried:
    """A model with its reference, computed once for all settings."""

    def __init__(self, trial: Trial):
        self.trial = trial
        self.reference = Reference(cast(trial, torch.float64))
        torch.manual_seed(0)
        self.vectors = {k: torch.randn(p.shape) for k, p in self.reference.params.items()}
        self.expected = self.reference.plain()
        self.differences: dict[str, Tensor] | None = None
        try:
            self.expected |= self.reference.curved(self.reference.hessian(), self.vectors)
        except RuntimeError as error:
            self.reference.note = f"no double backward in PyTorch: {str(error)[:60]}"
        self.single: dict[str, float] = {}

    def by_differences(self) -> dict[str, Tensor]:
        if self.differences is None:
            self.differences = self.reference.curved(self.reference.differences(), self.vectors)
        return self.differences

    def plain_single(self) -> dict[str, float]:
        """How far plain autograd in float32 is from float64, per quantity."""
        if not self.single:
            single = Reference(cast(self.trial, torch.float32))
            found = single.plain()
            if "diag_h" in self.expected:
                found |= single.curved(single.hessian(), self.vectors)
            self.single = {k: away(v, self.expected[k]) for k, v in found.items()}
        return self.single

    def outcome(self, dtype: torch.dtype, check: str | None, families: Iterable[str] = FAMILIES) -> Outcome:
        """All families at once, or one by one where that is refused."""
        out = Outcome(self.trial.mode, f"{str(dtype).removeprefix('torch.')} {check}", "right")
        mixing = self.trial.mode == "mixing"
        asked_for = {name: FAMILIES[name] for name in families}
        together = {} if mixing else {"all": [e for several in asked_for.values() for e in several]}
        for name, asked in [*together.items(), *asked_for.items()]:
            kind, message, off = self.compare(asked, dtype, check)
            out.deviation, out.note = max(out.deviation, off), self.reference.note
            if kind in FAULTS:
                out.kind, out.message = kind, f"{name}: {message}"
                return out
            if kind == "refused":
                out.message = out.message or f"{name}: {message}"
                out.kind = "mixed" if mixing and message.startswith("MixedSamplesError") else "refused"
                if any(said in message for said in FOR_ALL):
                    break
            elif mixing and name == "individual":
                out.kind, out.message = "wrong", "the op mixes samples, and was not refused"
                return out
            elif name == "all":
                break
        return out

    def compare(self, asked: list, dtype: torch.dtype, check: str | None) -> tuple[str, str, float]:
        trial = cast(self.trial, dtype)
        try:
            torch.manual_seed(0)
            compiled = fxcurv.compile(trial.model, loss, asked, batch_dim=trial.dim, check=check)
            result = compiled(trial.x, tuple(trial.targets))
            fields = self.fields(result, asked, dtype)
        except InternalError as error:
            return "failed", last_lines(error), 0.0
        except SelfCheckError as error:
            kind, message, off = self.compare(asked, dtype, None)
            return ("false alarm" if kind == "right" else kind), f"{error} | unchecked: {kind} {message}", off
        except FxcurvError as error:
            return "refused", f"{type(error).__name__}: {error}", 0.0
        except Exception as error:
            return "failed", last_lines(error), 0.0
        worst, message = 0.0, {}
        for field, value in fields.items():
            off, allowed = self.off(field, value, dtype)
            worst = max(worst, off)
            if not off <= allowed:
                message[field] = f"{off:.1e} > {allowed:.1e}"
        return ("wrong", str(message), worst) if message else ("right", "", worst)

    def fields(self, result: Any, asked: list, dtype: torch.dtype) -> dict[str, Tensor]:
        names = list(self.reference.params)
        found = {"grad": torch.cat([result.grad[k].flatten() for k in names])}
        for field in (e.savefield for e in asked):
            values = getattr(result, field)
            if field == "hmp":
                found[field] = torch.cat([values[k](self.vectors[k].to(dtype)).flatten() for k in names])
            else:
                start = 1 if field == "grad_batch" else 0
                found[field] = torch.cat([values[k].reshape(*values[k].shape[:start], -1) for k in names], -1)
        return {k: v.detach().double() for k, v in found.items()}

    def off(self, field: str, value: Tensor, dtype: torch.dtype) -> tuple[float, float]:
        """How far a quantity is from the reference, and how far it may be."""
        name = self.trial.model.op.sample.info.name
        allowed = 1e-6 if any(s in name for s in SINGLE_INSIDE) else ROUNDING[self.reference.lowest]
        if field in self.expected:
            off = away(value, self.expected[field])
            if dtype is torch.float32 and not off <= allowed:
                allowed = max(allowed, FLOOR, FACTOR * self.plain_single()[field])
            if off <= allowed or field not in ("diag_h", "hmp"):
                return off, allowed
        trusted = max(DIFFERENCES, allowed, *([1e-3] if dtype is torch.float32 else []))
        differences = away(value, self.by_differences()[field])
        if field in self.expected and differences <= trusted:
            self.reference.note = "PyTorch's double backward is not the derivative of its gradient"
        return differences, trusted


def last_lines(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-1500:]


# ---- one sample ------------------------------


def outcomes(
    draws: list[Sample], index: int, every: bool = False, families: Iterable[str] = FAMILIES
) -> Iterator[Outcome]:
    """One model of a sample in one setting, which rotate with its index; or every model in every setting."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = trials(draws, index)
        except Unfit as unfit:
            yield Outcome("", "", unfit.args[0], message=unfit.args[1])
            return
        except RuntimeError as error:
            yield Outcome("", "", "no number", message=f"PyTorch itself: {error}"[:300])
            return
        for trial in made if every else [made[index % len(made)]]:
            settings = SETTINGS if every else [SETTINGS[(index + len(draws[0].info.name)) % 4]]
            yield from of_trial(trial, settings, families)


def of_trial(trial: Trial, settings: list[tuple], families: Iterable[str] = FAMILIES) -> Iterator[Outcome]:
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            steady = repeats(trial)
        if any("batching rule" in str(w.message) for w in said):
            yield Outcome(trial.mode, "", "no number", message="torch.vmap has no batching rule for it")
            return
        if not steady:
            yield Outcome(trial.mode, "", "random")
            return
        tried = Tried(trial)
        if not tried.reference.residual.isfinite().all():  # whose product with a derivative of zero is NaN
            yield Outcome(trial.mode, "", "no number", message="it is not finite")
            return
    except RuntimeError as error:
        yield Outcome(trial.mode, "", "no number", message=f"PyTorch itself: {error}"[:300])
        return
    for dtype, check in settings:
        yield tried.outcome(dtype, check, families)


# ---- all of them ------------------------------


def _child(info: Any, todo: list[int], every: bool, pipe: Any) -> None:
    torch.set_num_threads(1)
    draws = options_of(info)
    for i in todo:
        if i >= len(draws):
            break
        pipe.send(("begin", i, draws[i][0].shapes[:300]))
        start = time.monotonic()
        found = [dataclasses.asdict(o) for o in outcomes(draws[i], i, every)]
        pipe.send(("end", i, found, round(time.monotonic() - start, 1)))
    pipe.send(("done", len(draws)))
    pipe.close()


def record(info: Any, todo: list[int], every: bool, limit: float, save: Any) -> int | None:
    """Samples of an op in a process of its own; returns how many the op has. A crash or a hang is one line."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(info, todo, every, theirs), daemon=True)
    process.start()
    theirs.close()
    row: dict = {"op": name_of(info), "index": todo[0], "shapes": "", "outcomes": []}
    count, why = None, ""
    while count is None and not why:
        if not ours.poll(limit):
            process.kill()
            why = f"took more than {limit:.0f} s"
            break
        try:
            what, *rest = ours.recv()
        except EOFError:
            process.join()
            code = process.exitcode or 0
            why = f"the process died: {signal.Signals(-code).name if code < 0 else code}"
            break
        if what == "begin":
            row = {"op": name_of(info), "index": rest[0], "shapes": rest[1]}
        elif what == "end":
            save({**row, "outcomes": rest[1], "seconds": rest[2]})
        else:
            count = rest[0]
    if why:
        save({**row, "outcomes": [dataclasses.asdict(Outcome("", "", "failed", message=why))]})
    process.join()
    return count


def sweep(infos: list, path: Path, until: float, every: bool, limit: float, chunk: int = 1) -> None:
    """Round by round, `chunk` samples of every op, so that what has run when time is up is spread over all ops and options."""
    done: dict[str, set[int]] = collections.defaultdict(set)
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        done[row["op"]].add(row["index"])
    counts: dict[str, int] = {}
    with path.open("a") as file:

        def save(row: dict) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        for first in range(0, SAMPLES, chunk):
            for info in infos:
                name = name_of(info)
                todo = [i for i in range(first, first + chunk) if i not in done[name] and i < counts.get(name, SAMPLES)]
                if todo and time.time() < until:
                    count = record(info, todo, every, limit, save)
                    counts[name] = counts.get(name, SAMPLES) if count is None else count


def summary(path: Path) -> str:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = collections.Counter(o["kind"] for r in rows for o in r["outcomes"])
    settings = collections.Counter(o["setting"] for r in rows for o in r["outcomes"] if o["setting"])
    text = [f"{len({r['op'] for r in rows})} ops, {len(rows)} samples: {dict(kinds)}; settings {dict(settings)}"]
    for r in rows:
        text += [f"{r['op']} [{r['index']}] {r['shapes'][:120]} | {o['mode']} {o['setting']} {o['kind']}: {o['message'][:300]}"
                 for o in r["outcomes"] if o["kind"] in FAULTS]  # fmt: skip
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="JSON lines; what they have is not run again")
    parser.add_argument("--only", nargs="*", default=[], help="names of ops")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument(
        "--every", action="store_true", help="every model of a sample in every setting, not one by turns"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds for a sample")
    options = parser.parse_args()
    infos = [i for i in database() if not options.only or i.name in options.only or name_of(i) in options.only]
    random.Random(0).shuffle(infos)  # what has run when time is up is any part of the database, not its beginning
    # what PyTorch imports late is imported once
    list(outcomes(options_of(next(i for i in database() if i.name == "exp"))[0], 0))
    sweep(infos, options.path, time.time() + 60 * options.minutes, options.every, options.limit)
    print(summary(options.path))


if __name__ == "__main__":
    main()
