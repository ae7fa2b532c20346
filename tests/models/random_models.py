"""Random models against the oracle: chains of blocks that branch, share, gate, index, mask and write in place.

An example is data: a list of numbers, read from the left, each pair of which chooses one of the blocks that fit the current
shape and a size for it; how the model ends; its loss; two batch sizes, the second of which comes after the first with the same
compiled object, when the numbers that Python holds have changed; and which quantities are asked for. Quantities that are
refused must be refused by name, and the gradient alone is never refused.

Many of them, resumable by ranges of seeds, with what was refused and what failed:

    python tests/models/random_models.py --first 0 --last 1000 --log random.log
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import logging
import re
import time
import traceback
import warnings
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from model_checks import GROUPS, Checked
from oracle import Named
from oracle_kron import KroneckerOracle
from random_blocks import BLOCKS, Changing, Mixing
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError, InternalError, SelfCheckError
from fxcurv.extensions import DiagGGNExact, DiagHessian

# ---- losses: k -> (loss, targets for an output, the oracle's kind) ------------------------------


def classes(f: Tensor, k: int) -> Any:
    options = [{}, {"reduction": "sum"}, {"label_smoothing": 0.2}, {"weight": torch.rand(f.shape[1]).to(f)}]
    return (lambda out, y: F.cross_entropy(out, y, **options[k % 4])), labels, "ce" if f.shape[1] > 1 else None


def labels(f: Tensor) -> Tensor:
    return torch.randint(f.shape[1], (f.shape[0], *f.shape[2:]))


def squares(f: Tensor, k: int) -> Any:
    return (lambda out, y: F.mse_loss(out, y, reduction=("mean", "sum")[k % 2])), torch.randn_like, "mse"


def binary(f: Tensor, k: int) -> Any:
    return (
        (lambda out, y: 0.5 * F.binary_cross_entropy_with_logits(out, y)),
        lambda f: torch.rand_like(f).round(),
        "bce",
    )


def huber(f: Tensor, k: int) -> Any:
    return F.smooth_l1_loss, torch.randn_like, None


def log_cosh(f: Tensor, k: int) -> Any:
    return (lambda out, y: torch.log(torch.cosh(out - y)).flatten(1).sum(1).mean()), torch.randn_like, None


def negative_log_likelihood(f: Tensor, k: int) -> Any:
    return (lambda out, y: F.nll_loss(torch.log_softmax(out, 1), y)), labels, "ce" if f.shape[1] > 1 else None


def broadcast(f: Tensor, k: int) -> Any:
    """Targets that PyTorch broadcasts: a row, a number, a column, and all pairs of samples."""
    row = torch.randn(f.shape[-1])
    options = [
        (lambda out, y: F.mse_loss(out, row), lambda f: torch.zeros(len(f))),
        (lambda out, y: F.mse_loss(out, torch.tensor(0.5)), lambda f: torch.zeros(len(f))),
        (F.mse_loss, lambda f: torch.randn(len(f), *[1] * (f.ndim - 1))),
        (lambda out, y: F.mse_loss(out[:, None], y[None]), torch.randn_like),
    ]
    return *options[k % len(options)], None


def linear_loss(f: Tensor, k: int) -> Any:
    """A critic's mean: no curvature in the output."""
    return (lambda out, y: (out * y).mean()), torch.rand_like, None


LOSSES = [classes, squares, binary, huber, log_cosh, negative_log_likelihood, broadcast, linear_loss]
OF_ONE = [squares, binary, huber, broadcast]  # also of an output without axes


# ---- how a model ends: (width, k) -> what its head is made of ------------------------------


class Ended(nn.Module):
    """A body and heads: `logits` are values with samples first, `head` makes the output of them."""

    def __init__(self, body: nn.Module, kind: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.body, self.kind = body, kind
        self.first = nn.Linear(shape[-1], 1 if kind in ("column", "squeezed") else 2)
        if kind in ("tuple", "dict"):
            self.second = nn.Linear(shape[-1], 1)

    def logits(self, x: Tensor) -> Any:
        h = self.body(x)
        return (self.first(h), self.second(torch.tanh(h))) if hasattr(self, "second") else self.first(h)

    def head(self, f: Any) -> Any:
        if self.kind == "dict":
            return {"logits": f[0], "value": f[1]}
        return f.squeeze() if self.kind == "squeezed" else f

    def forward(self, x: Tensor) -> Any:
        return self.head(self.logits(x))


ENDINGS = ["plain", "plain", "plain", "column", "squeezed", "tuple", "dict"]


# ---- examples ------------------------------


@dataclasses.dataclass(frozen=True)
class Example:
    """Everything that a random model is made of; `seed` draws its numbers."""

    shape: tuple[int, ...]
    recipe: tuple[tuple[int, int], ...]
    ending: str
    loss: tuple[int, int]
    sizes: tuple[int, ...]
    groups: tuple[str, ...]
    check: str | None
    seed: int


NUMBERS = st.integers(0, 99)
VECTORS = st.tuples(st.integers(2, 4))
SEQUENCES = st.tuples(st.integers(2, 3), st.integers(2, 3))
IMAGES = st.tuples(st.integers(1, 2), st.integers(2, 5), st.integers(2, 5))
SIZES = st.sampled_from([(3, 1), (2, 1), (1, 3), (2, 3), (1, 1), (4, 2)])


def examples(shapes: Any = None, longest: int = 4) -> Any:
    """A strategy."""
    asked = st.lists(st.sampled_from([g for g in GROUPS if g != "gradient"]), min_size=1, max_size=3, unique=True)
    return st.builds(
        Example,
        shape=st.one_of(VECTORS, SEQUENCES, IMAGES) if shapes is None else shapes,
        recipe=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=longest).map(tuple),
        ending=st.sampled_from(ENDINGS), loss=st.tuples(NUMBERS, NUMBERS), sizes=SIZES, groups=asked.map(tuple),
        check=st.sampled_from([None, None, "first"]), seed=st.integers(0, 999),
    )  # fmt: skip


class Made:
    """The model of an example, its loss and its batches."""

    def __init__(self, example: Example) -> None:
        self.example = example
        torch.manual_seed(example.seed)
        blocks, shape = [], example.shape
        for choice, k in example.recipe:
            options = BLOCKS[len(shape)]
            block, shape = options[choice % len(options)](shape, k)
            blocks.append(block)
        if len(shape) == 3 or prod(shape) > 12 or example.ending != "plain":
            blocks.append(nn.Flatten())
            shape = (prod(shape),)
        self.model = Ended(nn.Sequential(*blocks), example.ending, shape).double().eval()
        self.kind, self.loss, self.targets = None, None, None
        with torch.no_grad():
            self.set_loss(self.model(torch.randn(3, *example.shape)))

    def set_loss(self, f: Any) -> None:
        choice, k = self.example.loss
        if isinstance(f, Tensor):
            options = OF_ONE if self.example.ending == "squeezed" else LOSSES
            self.loss, self.targets, self.kind = options[choice % len(options)](f, k)
            return
        parts = list(f.values()) if isinstance(f, dict) else list(f)
        (a, of_a, _), (b, of_b, _) = LOSSES[choice % len(LOSSES)](parts[0], k), squares(parts[1], k)
        keys = list(f) if isinstance(f, dict) else [0, 1]
        self.loss = lambda out, y: a(out[keys[0]], y[0]) + 0.5 * b(out[keys[1]], y[1])
        self.targets = lambda out: (of_a(out[keys[0]]), of_b(out[keys[1]]))

    @property
    def mixes(self) -> bool:
        """Whether samples meet behind a parameter."""
        seen = False
        for block in self.model.body:
            if any(isinstance(m, Mixing) for m in block.modules()) and seen:
                return True
            seen |= any(True for _ in block.parameters())
        return False

    def groups(self) -> list[str]:
        """What of the example's groups the oracle can say."""
        weights = [id(m.weight) for m in self.model.modules() if hasattr(m, "weight")]
        without = {
            "Jacobian": self.example.ending != "plain",
            "Kronecker": len(set(weights)) < len(weights),  # a layer's uses are known by the module
        }
        found = [g for g in self.example.groups if not without.get(g, False)]
        return [*found, "whole batch"] if self.mixes else found

    def batch(self, n: int) -> tuple[Tensor, Any]:
        x = torch.randn(n, *self.example.shape)
        with torch.no_grad():
            return x, self.targets(self.model(x))

    def change(self) -> None:
        """Give other values to the numbers of Python that the model reads."""
        for module in self.model.modules():
            if isinstance(module, Changing):
                module.change()


class Plain(KroneckerOracle):
    """Individual gradients by plain autograd, sample by sample: a backward need not be linear (clipping)."""

    @cached_property
    def _individual(self) -> Named:
        values, rows = list(self.params.values()), []
        for n in range(len(self.f)):
            one = torch.zeros_like(self.s)
            one[n] = self.s[n]
            grads = torch.autograd.grad(self.f, values, one, retain_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(values, grads, strict=True)])
        return {k: torch.stack(column) for k, column in zip(self.params, zip(*rows, strict=True), strict=True)}

    def grad_batch(self, subsampling: Any = None) -> Named:
        return self._individual


ASKED = {
    **GROUPS,
    "whole batch": [DiagGGNExact(), DiagHessian()],
    "Kronecker": [*GROUPS["Kronecker"], *GROUPS["sampled"]],
}


class Call(Checked):
    """A call's result and the oracle of the same model and batch."""

    def __init__(self, made: Made, result: Any, x: Tensor, y: Any) -> None:
        model = made.model
        self.result, self.tolerance = result, 1e-8
        self.ambiguous = made.example.ending in ("tuple", "dict")
        self.oracle = Plain(
            model, made.loss, x, y, kind=made.kind, logits=lambda m, x: m.logits(x), head=model.head,
        )  # fmt: skip

    def close(self, actual: Tensor, expected: Tensor, what: str, scale: float | None = None) -> None:
        """A quantity that is zero is so up to the rounding of what it is a sum of."""
        scale = expected.abs().max().item() if scale is None else scale
        super().close(actual, expected, what, max(scale, 1e-4))

    def check(self, group: str) -> list[str]:
        if group != "whole batch":
            return super().check(group)
        for field in ("diag_ggn_exact", "diag_h"):
            self.same(getattr(self.result, field), getattr(self.oracle, field)(), field)
        return []


# No error of these says that something is not supported.
FAULTS = (InternalError, SelfCheckError)


class Fault(AssertionError):
    """A number is wrong, or what is refused is not refused properly."""


def run(example: Example) -> list[str]:
    """Raise where anything is wrong; returns what was refused, 'group: error'."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using a target size")
            made = Made(example)
            batches = served(made, example.sizes)
            groups = made.groups()
            refused = attempt(made, ["gradient", *groups], batches)
            if refused is None:
                return []
            if not groups:
                raise Fault(f"the gradient is refused: {refused}")
            found = []
            for group in ["gradient", *groups] if len(groups) > 1 else ["gradient"]:
                made = Made(example)
                said = attempt(made, [group], served(made, example.sizes))
                if group == "gradient" and said is not None:
                    raise Fault(f"the gradient is refused: {said}")
                if said is not None:
                    found.append(f"{group}: {said}")
            return found if len(groups) > 1 else [f"{groups[0]}: {refused}"]
    finally:
        torch.set_default_dtype(default)


def served(made: Made, sizes: tuple[int, ...]) -> list[Any]:
    """Batches of the sizes at which PyTorch itself runs model and loss."""
    found = []
    for n in sizes:
        with contextlib.suppress(IndexError, RuntimeError, TypeError, ValueError):
            x, y = made.batch(n)
            made.loss(made.model(x), y)
            found.append((x, y))
    return found


def attempt(made: Made, groups: list[str], batches: list[Any]) -> str | None:
    """Compile and compare at every batch; the error's message where the first call is refused."""
    asked: list[Any] = []
    for group in groups:
        asked += [e for e in ASKED[group] if e not in asked]
    compiled = fxcurv.compile(made.model, made.loss, asked, debug=True, check=made.example.check)
    for k, (x, y) in enumerate(batches):
        try:
            result = compiled(x, y, seed=7)
        except FAULTS:
            raise
        except FxcurvError as error:
            if k:
                raise Fault(f"refused at the second call only: {error}") from error
            return f"{type(error).__name__}: {error}"
        call = Call(made, result, x, y)
        torch.testing.assert_close(result.loss, call.oracle.loss(), rtol=1e-9, atol=1e-12)
        if made.mixes and len(x) > 1:  # one sample meets no other
            allowed_across_samples(groups)
        for group in groups:
            call.check(group)
        made.change()
    return None


def allowed_across_samples(groups: list[str]) -> None:
    wrong = set(groups) - {"gradient", "products", "whole batch"}
    if wrong:
        raise Fault(f"{sorted(wrong)} of samples that meet")


# ---- many ------------------------------


def simpler(example: Example) -> Any:
    """Examples that are one step smaller."""
    for i in range(len(example.recipe)):
        if len(example.recipe) > 1:
            yield dataclasses.replace(example, recipe=example.recipe[:i] + example.recipe[i + 1 :])
    for group in example.groups:
        if len(example.groups) > 1:
            yield dataclasses.replace(example, groups=(group,))
    for change in ({"ending": "plain"}, {"loss": (1, 0)}, {"check": None}, {"sizes": example.sizes[:1]}):
        if any(getattr(example, k) != v for k, v in change.items()):
            yield dataclasses.replace(example, **change)


def failure(example: Example) -> tuple[str, str] | None:
    """(kind, message) of what is wrong with an example."""
    try:
        run(example)
    except Exception as error:
        return type(error).__name__, "".join(traceback.format_exception(error))
    return None


def shrunk(example: Example, kind: str) -> Example:
    """The smallest example with a failure of the same kind that dropping parts leads to."""
    for smaller in simpler(example):
        found = failure(smaller)
        if found is not None and found[0] == kind:
            return shrunk(smaller, kind)
    return example


def kind_of(refusal: str) -> str:
    """A refusal without what differs from model to model."""
    head = refusal.replace("\n", " ")
    named = "" if re.search(r"\bop \w|line \d|loss", head) else "[no op, no line] "
    return named + re.sub(r"'[^']*'|\d+|File .*?:", "_", head)[:150]


seen: set[tuple[str, str]] = set()


def block(first: int, count: int, log: Any) -> tuple[int, collections.Counter, int]:
    """Hypothesis' examples of one seed: how many ran, what was refused, how many failed."""
    refused: collections.Counter = collections.Counter()
    ran = failed = 0

    @seed(first)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(examples())
    def every(example: Example) -> None:
        nonlocal ran, failed
        ran += 1
        try:
            refused.update(map(kind_of, run(example)))
        except Exception as error:
            failed += 1
            told = "".join(traceback.format_exception(error)[-3:])
            log(f"FAILED seed {first}: {example}\n{told}")
            kind = type(error).__name__, re.sub(r"[\d.]+", "", told)[-300:]
            if kind not in seen:  # the same again is not made smaller again
                seen.add(kind)
                log(f"shrunk to: {shrunk(example, kind[0])}")

    every()
    return ran, refused, failed


def main() -> None:
    """Run seeds from `--first` to `--last`; those that the log has are left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=1000, help="the seed after the last one")
    parser.add_argument("--count", type=int, default=10, help="examples per seed")
    parser.add_argument("--log", type=Path, default=None)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # export says that one sample is a fixed size

    def log(text: str) -> None:
        print(text, flush=True)
        if asked.log:
            with asked.log.open("a") as file:
                file.write(text + "\n")

    before = asked.log.read_text() if asked.log and asked.log.exists() else ""
    done = {int(s) for s in re.findall(r"^seed (\d+):", before, re.M)}
    for one in range(asked.first, asked.last):
        if one in done:
            continue
        start = time.process_time()
        ran, refused, failed = block(one, asked.count, log)
        log(
            f"seed {one}: {ran} examples, {failed} failed, {sum(refused.values())} refusals, {time.process_time() - start:.0f} s"
        )
        for kind, count in refused.most_common():
            log(f"  refused {count} times: {kind}")


if __name__ == "__main__":
    main()
