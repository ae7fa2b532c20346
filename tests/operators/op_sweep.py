"""Every differentiable op of PyTorch's own database as a model of one op, against the oracle.

    python tests/operators/op_sweep.py                                   # all ops, a line for each that is not right
    python tests/operators/op_sweep.py --only cumsum linalg.det          # some of them, with messages
    python tests/operators/op_sweep.py --write docs/coverage.md          # the table

A model scales its input by a parameter and calls the op; the op's other differentiable arguments are parameters
too. Its samples are found, not declared:

    slices   the op's own sample, along a dimension whose slices it keeps apart (found by redrawing one slice)
    vmap     where there is no such dimension: three samples of one shape under `torch.vmap`
    lookup   where that is refused and there is an index: three indices under `torch.vmap`, all else parameters
    mixing   the op's own sample, along a dimension whose slices it mixes: to be refused, its gradient to be right
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from oracle import Oracle
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxcurv
from fxcurv.errors import FxcurvError, MixedSamplesError
from fxcurv.extensions import BatchGrad, DiagGGNExact
from fxcurv.ir.origin import module_path
from fxcurv.ir.program import is_active
from fxcurv.rules import RULES

N = 3
MOST = 200
"""Elements of an output, where an op has such a sample; four times as many of an argument."""


# ---- samples ------------------------------


def _plainly(op: Callable, *args: Any, **kwargs: Any) -> Any:
    return op(*args, **kwargs)


@dataclasses.dataclass
class Sample:
    """A call of an op: flattened arguments, and which of them are differentiable."""

    info: Any
    leaves: list[Any]
    spec: Any
    process: Callable[[Any], Any]
    able: list[int]

    def call(self, leaves: list[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        # `wrapper_set_seed`, of the op or around it, hides that ops are random
        around = self.info.gradcheck_wrapper
        around = _plainly if around.__name__ == "wrapper_set_seed" else around
        with mock.patch.object(methods(), "wrapper_set_seed", _plainly):
            return self.process(around(self.info.op, *args, **kwargs))

    @property
    def shapes(self) -> str:
        described = [f"[{', '.join(map(str, a.shape))}]" if isinstance(a, Tensor) else a for a in self.leaves]
        args, kwargs = pytree.tree_unflatten(described, self.spec)
        return ", ".join([*map(str, args), *(f"{k}={v}" for k, v in kwargs.items())])

    @property
    def finite(self) -> bool:
        return all(bool(self.leaves[i].isfinite().all()) for i in self.able if self.leaves[i].layout is torch.strided)

    def output_sizes(self) -> list[int]:
        with torch.no_grad():
            return [o.numel() for o in pytree.tree_leaves(self.call(self.leaves)) if isinstance(o, Tensor)]

    @property
    def sizes(self) -> list[int]:
        return [a.numel() for a in self.leaves if isinstance(a, Tensor)]


def drawn(info, seed: int, most: int) -> list[Sample]:
    """Samples of an op with a differentiable argument; equal seeds give equal ones, others the same shapes."""
    random.seed(0)  # sizes are drawn with it
    torch.manual_seed(seed)
    out = []
    for s in itertools.islice(info.sample_inputs("cpu", torch.float64, requires_grad=True, set_seed=False), most):
        leaves, spec = pytree.tree_flatten(((s.input, *s.args), s.kwargs))
        able = [i for i, a in enumerate(leaves) if isinstance(a, Tensor) and a.requires_grad]
        leaves = [a.detach() if isinstance(a, Tensor) else a for a in leaves]
        out.append(Sample(info, leaves, spec, s.output_process_fn_grad, able))
    return out


def spread(found: list, count: int) -> list:
    """`count` entries, evenly spread over a list."""
    if len(found) <= count:
        return found
    return [found[round(k * (len(found) - 1) / max(count - 1, 1))] for k in range(count)]


def samples(info, count: int) -> list[list[Sample]]:
    """Up to `count` samples of different shapes or options, each with N draws of its values."""
    draws = [drawn(info, seed, 200) for seed in range(N)]
    seen: dict[str, list[Sample]] = {}
    for several in zip(*draws, strict=False):
        first = several[0]
        if first.able and min(first.sizes) > 0 and all(s.shapes == first.shapes and s.finite for s in several):
            seen.setdefault(first.shapes, list(several))
    weight = {
        key: max([*(s // 4 for s in several[0].sizes), *several[0].output_sizes()]) for key, several in seen.items()
    }
    small = [several for key, several in seen.items() if weight[key] <= MOST]
    fewest = [seen[key] for key in sorted(seen, key=weight.__getitem__)[:1] if weight[key] <= 5 * MOST]
    return spread(small or fewest, count)


class Unfit(Exception):
    """An op that no trial can be made of, with the kind of outcome and why."""


# ---- models ------------------------------


def real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


class Op(nn.Module):
    """The op as a function of one argument, `at`; its other differentiable arguments are parameters."""

    def __init__(self, sample: Sample, at: int, outputs: list[int], batched: bool):
        super().__init__()
        self.sample, self.at, self.outputs, self.batched = sample, at, outputs, batched
        self.inside = nn.ParameterDict({f"arg{i}": sample.leaves[i].clone() for i in sample.able if i != at})
        for i, a in enumerate(sample.leaves):
            if isinstance(a, Tensor) and i not in sample.able:
                self.register_buffer(f"constant{i}", a.clone())

    def one(self, x: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.sample.leaves)
        leaves[self.at] = x
        for name, p in self.inside.items():
            leaves[int(name.removeprefix("arg"))] = p
        for name, b in self.named_buffers():
            leaves[int(name.removeprefix("constant"))] = b
        out = pytree.tree_leaves(self.sample.call(leaves))
        return tuple(real(out[k]) for k in self.outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.vmap(self.one)(x) if self.batched else self.one(x)


class OneOp(nn.Module):
    def __init__(self, op: Op, shape):
        super().__init__()
        if op.at in op.sample.able:
            self.scale = nn.Parameter(torch.ones(shape, dtype=torch.float64))
        self.op = op

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.op(x * self.scale if x.is_floating_point() else x)


def squares(outputs: tuple[Tensor, ...], *targets: Tensor) -> Tensor:
    return sum(F.mse_loss(o.double(), t, reduction="sum") for o, t in zip(outputs, targets, strict=True))


@dataclasses.dataclass
class Trial:
    mode: str
    model: OneOp
    x: Tensor
    dim: int
    out_dim: int
    targets: list[Tensor]


def differentiable_outputs(sample: Sample) -> list[int]:
    """The outputs that autograd has a derivative for."""
    leaves = [a.clone().requires_grad_(i in sample.able) if isinstance(a, Tensor) else a
              for i, a in enumerate(sample.leaves)]  # fmt: skip
    with torch.enable_grad():
        out = pytree.tree_leaves(sample.call(leaves))
    return [k for k, o in enumerate(out) if isinstance(o, Tensor) and o.requires_grad]


def moves(op: Op, draws: list[Sample], dim: int) -> list[list[Tensor]]:
    """For every slice of the argument along `dim`: which elements of the outputs move when it is redrawn."""
    x = draws[0].leaves[op.at]
    base = [o.nan_to_num() for o in op(x)]
    moved = []
    for k in range(x.shape[dim]):
        here = [torch.zeros_like(b, dtype=torch.bool) for b in base]
        for other in draws[1:]:
            new = x.clone()
            new.select(dim, k).copy_(other.leaves[op.at].select(dim, k))
            here = [h | (o.nan_to_num() != b) for h, o, b in zip(here, op(new), base, strict=True)]
        moved.append(here)
    return moved


def sample_dim(moved: list[list[Tensor]]) -> int | None:
    """The outputs' dimension along which slice k of the argument moves slice k only."""
    n, ndim = len(moved), min(m.ndim for m in moved[0])
    for dim in range(ndim):
        if all(m.shape[dim] == n for m in moved[0]) and all(
            not m.movedim(dim, 0)[[j for j in range(n) if j != k]].any() for k, here in enumerate(moved) for m in here
        ):
            return dim
    return None


@torch.no_grad()
def alone(op: Op, draws: list[Sample]) -> list[Trial]:
    """The op's own sample, along the first dimension whose slices it keeps apart and the first whose it mixes."""
    found: dict[str, Trial] = {}
    x = draws[0].leaves[op.at]
    for dim in [d for d, s in enumerate(x.shape) if s > 1]:
        try:
            moved = moves(op, draws, dim)
        except RuntimeError:
            continue  # redrawing leaves the op's domain
        if any(m.any() for here in moved for m in here):
            out_dim = sample_dim(moved)
            if out_dim is None and not mixes(moved):
                continue
            mode = "mixing" if out_dim is None else "slices"
            shape = [1 if d == dim else s for d, s in enumerate(x.shape)]
            targets = [torch.randn(o.shape, dtype=torch.float64) for o in op(x)]
            found.setdefault(mode, Trial(mode, OneOp(op, shape), x, dim, out_dim or 0, targets))
    return list(found.values())


@torch.no_grad()
def stacked(op: Op, draws: list[Sample]) -> Trial:
    """The draws under `torch.vmap`."""
    x = torch.stack([s.leaves[op.at] for s in draws])
    targets = [torch.randn(N, *o.shape, dtype=torch.float64) for o in op(x[0])]
    batched = Op(op.sample, op.at, op.outputs, batched=True)
    return Trial("vmap", OneOp(batched, x.shape[1:]), x, 0, 0, targets)


def mixes(moved: list[list[Tensor]]) -> bool:
    """Whether slices of the argument meet in an output, or leave their order."""
    n = len(moved)
    for outputs in zip(*moved, strict=True):
        every = torch.stack(outputs)
        owner = torch.where(every.any(0), every.int().argmax(0), -1)
        if (every.sum(0) > 1).any() or not any(
            ((slot == owner) | (owner == -1)).all()
            for d, size in enumerate(owner.shape)
            for inner in range(1, size + 1)
            if size % (n * inner) == 0
            for slot in [(torch.arange(size) // inner % n).view(-1, *[1] * (owner.ndim - d - 1))]
        ):
            return True
    return False


def trials(draws: list[Sample]) -> list[Trial]:
    sample = draws[0]
    if any(isinstance(a, Tensor) and a.layout is not torch.strided for a in sample.leaves):
        raise Unfit("sparse", "its samples are sparse tensors")
    outputs = differentiable_outputs(sample)
    if not outputs:
        raise Unfit("constant", "PyTorch has no derivative for it")
    op = Op(sample, sample.able[0], outputs, batched=False)
    indices = [i for i, a in enumerate(sample.leaves) if isinstance(a, Tensor) and a.dtype == torch.long]
    lookups = [stacked(Op(sample, i, outputs, batched=False), draws) for i in indices[:1]]
    return [*alone(op, draws), stacked(op, draws), *(dataclasses.replace(t, mode="lookup") for t in lookups)]


# ---- outcomes ------------------------------


@dataclasses.dataclass
class Outcome:
    """What came of a trial: right, wrong, refused (an error of fxcurv's own), failed (any other error), random, no number."""

    mode: str
    shapes: str
    kind: str
    deviation: float = 0.0
    message: str = ""
    gradient: str = ""
    """What came of the gradient alone where the quantities per sample were refused."""
    rules: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry; infinite for another shape or other non-finite entries."""
    if actual.shape != expected.shape or not torch.equal(actual.isfinite(), expected.isfinite()):
        return float("inf")
    actual, expected = (t[expected.isfinite()] for t in (actual, expected))
    if not expected.numel():
        return 0.0
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


def repeats(trial: Trial) -> bool:
    """Whether the model is a function: random ops are not."""
    with torch.no_grad():
        first, *others = ([o.nan_to_num() for o in trial.model(trial.x)] for _ in range(4))
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def roundings(trial: Trial) -> float:
    """The tolerance: that of the lowest precision among the outputs."""
    if "hardsigmoid" in trial.model.op.sample.info.name:
        return 1e-6  # PyTorch has its 1/6 in float32
    with torch.no_grad():
        return max({torch.float64: 1e-8, torch.float32: 1e-4}.get(o.dtype, 5e-2) for o in trial.model(trial.x))


def outcome_of(trial: Trial, sample: Sample, want_mixed: bool) -> Outcome:
    out = Outcome(trial.mode, sample.shapes[:300], "right")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            steady = repeats(trial)
    except Exception as error:
        return dataclasses.replace(out, kind="no number", message=f"PyTorch itself: {error}"[:300])
    if any("batching rule" in str(w.message) for w in said):
        return dataclasses.replace(out, kind="no number", message="torch.vmap has no batching rule for it")
    oracle = Oracle(trial.model, lambda o, t: squares(o, *t), trial.x, tuple(trial.targets), kind="mse",
                    out_dim=trial.out_dim)  # fmt: skip
    compiled = fxcurv.compile(trial.model, lambda o, t: squares(o, *t), [BatchGrad(), DiagGGNExact()],
                              batch_dim=trial.dim)  # fmt: skip
    try:
        torch.manual_seed(0)
        result = compiled(trial.x, tuple(trial.targets))
    except FxcurvError as error:
        out.kind, out.message = "refused", f"{type(error).__name__}: {error}"
        if isinstance(error, MixedSamplesError) and want_mixed:
            out.kind = "mixed"
        if steady:
            out.gradient = gradient_alone(trial, oracle)
        return out
    except Exception as error:
        out.kind, out.message = "failed", "".join(traceback.format_exception(error))[-3000:]
        return out
    program = compiled.lower(trial.x, tuple(trial.targets))
    served = [n for n in program.graph.nodes if "origin" not in n.meta or n.meta["origin"].get("stage") == "forward"]
    served = [n for n in served if is_active(n) and isinstance(n.target, torch._ops.OpOverload)]
    served = [n for n in served if (n.meta.get("origin", {}).get("module") or module_path(n)).split(".")[0] == "op"]
    names = {str(n.target).removeprefix("aten.") for n in served if n.target in RULES}
    others = {str(n.target).removeprefix("aten.") for n in served if n.target not in RULES}
    out.rules, out.fallbacks = tuple(sorted(names)), tuple(sorted(others))
    if not steady:
        return dataclasses.replace(out, kind="random")
    if want_mixed:
        return dataclasses.replace(out, kind="wrong", message="the op mixes samples, and was not refused")
    expected = {"grad": oracle.grad(), "grad_batch": oracle.grad_batch(), "diag_ggn_exact": oracle.diag_ggn_exact()}
    off = {
        f"{field} of {name}": deviation(getattr(result, field)[name].detach(), value.detach())
        for field, values in expected.items()
        for name, value in values.items()
    }
    out.deviation = max(off.values())
    if not out.deviation <= roundings(trial):
        out.kind, out.message = "wrong", str({k: v for k, v in off.items() if not v <= 1e-8})
    elif not all(v.isfinite().all() for values in expected.values() for v in values.values()):
        out.kind = "not finite"
    return out


def gradient_alone(trial: Trial, oracle: Oracle) -> str:
    try:
        result = fxcurv.compile(trial.model, lambda o, t: squares(o, *t), [], batch_dim=trial.dim)(
            trial.x, tuple(trial.targets)
        )
    except FxcurvError as error:
        return f"refused: {type(error).__name__}: {error}"
    except Exception as error:
        return f"failed: {traceback.format_exception(error)[-1]}"
    off = max(deviation(result.grad[k].detach(), v.detach()) for k, v in oracle.grad().items())
    return "right" if off <= roundings(trial) else f"wrong: {off}"


def outcomes(info, count: int) -> list[Outcome]:
    """All trials of `count` samples of one op, of more until one is right. A mixing one is made once."""
    out: list[Outcome] = []
    mixed = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, draws in enumerate(samples(info, 4 * count)):
            if k >= count and any(o.kind == "right" for o in out):
                break
            try:
                made = trials(draws)
            except Unfit as unfit:
                out.append(Outcome("", draws[0].shapes[:300], unfit.args[0], message=unfit.args[1]))
                continue
            kept_apart = False
            for trial in made:
                if (trial.mode in ("vmap", "lookup") and kept_apart) or (trial.mode == "mixing" and mixed):
                    continue
                mixed |= trial.mode == "mixing"
                out.append(outcome_of(trial, draws[0], trial.mode == "mixing"))
                kept_apart |= trial.mode != "mixing" and out[-1].kind == "right"
    return out or [Outcome("", "", "no number", message="no small sample with a derivative")]


# ---- the sweep ------------------------------


@functools.cache
def methods() -> Any:
    """The module of PyTorch's database."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("torch.testing._internal.common_methods_invocations")


def database() -> list[Any]:
    """The entries of PyTorch's database with a derivative in float64."""
    return [info for info in methods().op_db if info.supports_autograd and torch.float64 in info.dtypes]


def name_of(info) -> str:
    return info.name + (f" ({info.variant_test_name})" if info.variant_test_name else "")


def _child(info, count: int, pipe) -> None:
    torch.set_num_threads(1)
    try:
        found = [dataclasses.asdict(o) for o in outcomes(info, count)]
    except Exception as error:
        found = [
            dataclasses.asdict(Outcome("", "", "failed", message="".join(traceback.format_exception(error))[-3000:]))
        ]
    pipe.send(found)
    pipe.close()


def sweep(infos: list, count: int, jobs: int, limit: float, save: Callable = lambda out: None) -> dict[str, list[dict]]:
    """Every op in a process of its own, so that a crash or a hang is one row."""
    from rich.progress import track

    outcomes(next(i for i in database() if i.name == "exp"), 1)  # what PyTorch imports late is imported once
    context = multiprocessing.get_context("fork")
    waiting, running, out = collections.deque(infos), {}, {}
    progress = iter(track(range(len(infos)), description="ops"))
    while waiting or running:
        while waiting and len(running) < jobs:
            info = waiting.popleft()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(info, count, theirs), daemon=True)
            process.start()
            theirs.close()
            running[name_of(info)] = (process, ours, time.monotonic() + limit)
        for name, (process, pipe, end) in list(running.items()):
            if pipe.poll(0.02):
                try:
                    out[name] = pipe.recv()
                except EOFError:
                    process.join()
                    died = Outcome("", "", "failed", message=f"the process died with status {process.exitcode}")
                    out[name] = [dataclasses.asdict(died)]
            elif time.monotonic() > end:
                process.kill()
                out[name] = [dataclasses.asdict(Outcome("", "", "failed", message=f"took more than {limit:.0f} s"))]
            else:
                continue
            process.join()
            del running[name]
            next(progress, None)
            kinds = collections.Counter(o["kind"] for o in out[name])
            print(f"{len(out)}/{len(infos)} {name}: {dict(kinds)}", file=sys.stderr, flush=True)
            save(out)
    with contextlib.suppress(StopIteration):
        next(progress)
    return dict(sorted(out.items()))


# ---- the table ------------------------------

REASONS = {  # what a message says: what the table says
    "gives complex numbers": "complex numbers",
    "is random and has no rule": "random: its derivative would draw again",
    "the loss does not depend on any trainable parameter": "its derivative is zero everywhere",
    "its output is the same wherever it was tried": "constant wherever it was tried",
    "DataDependent": "torch.export: depends on values",
    "data-dependent": "torch.export: depends on values",
    "Unbacked": "torch.export: depends on values",
    "UnsupportedOperator": "torch.export: does not know it",
    "CaptureError": "torch.export cannot trace it",
    "is a model output without a sample axis": "an output without samples",
    "mixes samples": "samples on an axis that it works along",
    "no batching rule": "no batch: torch.vmap has no rule for it",
    "PyTorch itself": "no batch: torch.vmap fails",
    "sparse tensors": "sparse tensors",
    "no derivative": "PyTorch has no derivative",
    "no small sample": "the database has no small sample with a derivative",
    "no sample": "the database has no small sample with a derivative",
    "took more than": "too large to try",
}


def reason(o: dict) -> str:
    if o["kind"] in ("random", "not finite"):
        return {"random": "served, but random: not compared", "not finite": "not finite"}[o["kind"]]
    for said, short in REASONS.items():
        if said in o["message"]:
            return short
    line = next((line for line in o["message"].splitlines() if "fail" in line), o["message"][:120])
    return line.split("Exception raised")[0][:160]


def row(name: str, several: list[dict]) -> tuple[str, ...]:
    """op, what serves it, trials that are right, largest deviation, refused where samples mix, other refusals."""
    right = [o for o in several if o["kind"] == "right"]
    rules, others = (sorted({n for o in right for n in o[k]}) for k in ("rules", "fallbacks"))
    served = [f"{kind}: {', '.join(n.removesuffix('.default') for n in names)}"
              for kind, names in (("rule", rules), ("fallback", others)) if names]  # fmt: skip
    worst = f"{max(o['deviation'] for o in right):.0e}" if right else ""
    mixed = "yes" if any(o["kind"] == "mixed" for o in several) else ""
    rest = {f"{o['kind'].upper()}: {reason(o)}" if o["kind"] in ("wrong", "failed") else reason(o)
            for o in several if o["kind"] not in ("right", "mixed")}  # fmt: skip
    rest |= {f"GRADIENT {o['gradient'][:60]}" for o in several if o["gradient"].startswith(("wrong", "failed"))}
    served = served or (["nothing left to differentiate"] if right else [])
    return name, "; ".join(served), str(len(right) or ""), worst, mixed, "; ".join(sorted(rest))


HEAD = """# Coverage

Every entry of PyTorch's operator database (`torch.testing._internal.common_methods_invocations.op_db`) with a derivative
in float64, as a model of one op with a parameter before it and its other differentiable arguments as parameters:
the gradient, `BatchGrad` and `DiagGGNExact` against plain autograd (`tests/oracle/oracle.py`). Samples lie along a dimension
whose slices the op keeps apart, else `torch.vmap` makes them; where an op mixes the slices of a dimension, that is
to be refused by name ("mixing" in the table), and the gradient alone to be right.

Written by `python tests/operators/op_sweep.py --samples {samples} --write docs/coverage.md` with PyTorch {version}.
{counts}

Served by: the ops that were left to differentiate after export, by a rule or by the general fallback. Deviation: the
largest, relative to the largest entry. PyTorch's `hardsigmoid` has its 1/6 in float32, and some ops return a lower
precision.

| op | served by | right | deviation | mixing refused | not served, and why |
|---|---|---|---|---|---|
"""


def _off(o: dict) -> bool:
    return o["kind"] in ("wrong", "failed") or o["gradient"].startswith(("wrong", "failed"))


def table(found: dict[str, list[dict]], count: int) -> str:
    served = [n for n, several in found.items() if any(o["kind"] == "right" for o in several)]
    wrong = [n for n, several in found.items() if any(_off(o) for o in several)]
    kinds = collections.Counter(o["kind"] for several in found.values() for o in several)
    counts = (
        f"{len(found)} entries: {len(served)} served ({kinds['right']} trials right), {len(found) - len(served)} refused "
        f"or without a batch, each with a reason; {kinds['mixed']} mixing trials refused; wrong or failing: {len(wrong)}."
    )
    head = HEAD.format(samples=count, version=torch.__version__.split("+")[0], counts=counts)
    rows = [
        " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row(n, several))
        for n, several in found.items()
    ]
    return head + "".join(f"| {line} |\n" for line in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of ops")
    parser.add_argument("--samples", type=int, default=3, help="samples of each op")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600, help="seconds for an op")
    parser.add_argument("--json", type=Path, help="write all outcomes here")
    parser.add_argument("--write", type=Path, help="write the table here")
    options = parser.parse_args()
    infos = [i for i in database() if not options.only or i.name in options.only or name_of(i) in options.only]

    def save(out):
        if options.json:
            options.json.write_text(json.dumps(out, indent=1))

    found = sweep(infos, options.samples, options.jobs, options.limit, save)
    if options.write:
        options.write.write_text(table(found, options.samples))
    for name, several in found.items():
        for o in several:
            if len(found) <= 5 or o["kind"] not in ("right", "mixed", "random", "constant", "no number"):
                text = f"{o['message']} | gradient alone: {o['gradient']}"
                print(f"{name} [{o['mode']}] {o['kind']} {o['deviation']:.1e} {o['shapes']}\n    rules {o['rules']}, "
                      f"fallbacks {o['fallbacks']}\n    {text}")  # fmt: skip
    print(collections.Counter(o["kind"] for several in found.values() for o in several))


if __name__ == "__main__":
    sys.path[:0] = [str(folder) for folder in Path(__file__).parents[1].iterdir() if folder.is_dir()]
    main()
