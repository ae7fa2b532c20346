"""Training samples that a prediction is owed to: influence functions, TracIn, TRAK.

::

    attribution = Attribution(model, nn.CrossEntropyLoss(), train_loader)
    curvature = attribution.curvature()  # EKFAC of the training data
    scores = attribution.influence(query_loader, curvature, damping=1e-3)  # [Q, N]

Gradients are those of each sample's own loss, whether the loss is a sum or a mean over samples, and the curvature is of
the mean of these losses. A score is large where training on the sample lowers the query's loss. Queries are taken in
blocks, the batches of their loader. Each block takes one pass over the training data, which holds the block's
gradients, [block, *P], and the training samples' gradients of one batch. With `to=` a folder, scores are written to a
file, block after block, and the same call resumes after the blocks that are there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.api import Compiled
from fxcurv.api import compile as compile_model
from fxcurv.data.batches import Batches, check_given
from fxcurv.data.identity import differences, digest, digests, identity, told
from fxcurv.data.rows import Rows
from fxcurv.data.weights import Weights
from fxcurv.errors import ArgumentError, LossError
from fxcurv.extensions import EKFAC, BatchGrad, Dots, Extension, Projected, Quadratic
from fxcurv.kronecker import Blocks, eigenbasis
from fxcurv.over import Totals, saved
from fxcurv.result import Result

__all__ = ["Attribution", "margin"]

Data = Iterable[Any]
ROWS = 64  # rows of several files that are added up at a time


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """sum_n log(p_n / (1 - p_n)), p_n the labels' probabilities, which TRAK explains; [N, C] and [N]."""
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.masked_fill(nn.functional.one_hot(labels, logits.shape[1]).bool(), -torch.inf)
    return (own - others.logsumexp(1)).sum()


class Attribution:
    """A model, the loss that it was trained with, and its training data.

    Args:
        model, loss: as for `fxcurv.compile`; the loss is a sum, or a mean over samples.
        train: a loader of batches (inputs, *targets) that can be gone over again, in the same order (`shuffle=False`).
            Batches are compared by checksums.
        params: the parameters that count, as for `fxcurv.compile`.
        unpack: batch -> (inputs, *targets), of all loaders.
        progress: whether passes over the training data show a bar.
        options: those of `fxcurv.compile`.

    Raises:
        ArgumentError: for an iterator, which can be gone over only once; in a later pass, for training data or queries that
            come in another order than before.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], train: Data, *, params: Any = None,
        unpack: Callable[[Any], tuple] | None = None, progress: bool = True, **options: Any,
    ):  # fmt: skip
        if iter(train) is train:
            raise ArgumentError("train is an iterator, which every pass would begin anew: pass a list or a DataLoader")
        self.model, self.loss, self._unpack, self._progress = model, loss, unpack, progress
        self._options = {**options, "params": params}
        self._compiled = self._compile(loss)
        self._train = Batches(self._compiled, train, unpack, "the training data")
        self._programs: dict[Any, Compiled] = {}  # of queries, by measure and parameters
        self._weights: dict[Any, Weights] = {}

    # ---- scores ------------------------------

    def curvature(self, extension: Extension | None = None, seed: int = 0) -> Blocks:
        """The curvature of the mean of the training losses, by Kronecker factors.

        Args:
            extension: `EKFAC(fisher="empirical")` by default, or another one (`joint=True`: one block for weight and bias), or
                `KFAC`, `KFLR`.
            seed: the seed of sampled columns.
        """
        extension = extension or EKFAC(fisher="empirical")
        result, n, factor = self._pass(self._compiled.asking([extension]), seed=seed)
        blocks = Blocks(result[extension]).basis()
        return blocks.scaled(1 / n) if factor == 1 else blocks

    def influence(
        self, queries: Data, curvature: Blocks | None = None, damping: float = 0.0, *, measure: Any = None, to: Any = None
    ) -> Tensor:  # fmt: skip
        """<v_q, g_n>, [Q, N], where v_q = (curvature + damping I)^-1 times the gradient of query q.

        Args:
            queries: a loader, whose batches are the blocks.
            curvature: from `curvature()`, or any other `Blocks`; only its parameters count then. None: the identity.
            damping: added to its eigenvalues.
            measure: the function of the queries that is explained, in the form of a loss; by default the loss.
            to: a folder for `scores.npy`, which the result reads from (`numpy.memmap`), and the state of an interrupted call.

        Raises:
            ArgumentError: where the curvature is singular without damping; for a folder with the state of another call: of
                another model (parameters, structure or code), loss, measure, curvature, damping, `params=` or other data.
            LossError: for a loss that is neither a sum nor a mean over samples.
        """
        inverse = curvature.inverse(damping) if curvature is not None else None
        names = list(curvature) if curvature is not None else None
        vectors = _VectorMemory(self._compiled, names)

        def scores(inputs: Any, targets: tuple) -> Tensor:
            grads = self._gradients(inputs, targets, measure, names)
            held, count = vectors.of(inverse @ grads if inverse is not None else grads)
            result, _, factor = self._pass(held)
            return result.dots_total[:, :count].t() * factor

        asked = {"damping": str(damping), "curvature": _digest(curvature), "measure": told(measure)}
        return self._in_blocks(self._batches(queries), scores, to, asked)

    def self_influence(self, curvature: Blocks, damping: float = 0.0, *, to: Any = None, every: int = 100) -> Tensor:
        """<(curvature + damping I)^-1 g_n, g_n> of every training sample, [N]; `to`, `every`: as for `features`."""
        form = Quadratic(curvature.inverse(damping), params=list(curvature), total=True)
        result, _, factor = self._pass(self._compiled.asking([form]), to=to, every=every)
        return result.quadratic_total * factor**2

    def tracin(
        self, queries: Data, checkpoints: Iterable[Any], rates: Sequence[float], *, measure: Any = None, to: Any = None
    ) -> Tensor:  # fmt: skip
        """sum_t rates[t] <g_q, g_n> at the parameters of each checkpoint, [Q, N] (Pruthi et al. 2020, TracInCP).

        Args:
            queries, measure, to: as for `influence`; the folder gets a folder per checkpoint.
            checkpoints: state dicts of the model, or files with them. In the end the model has its own values back.
            rates: the learning rate at each checkpoint.
        """
        states = list(checkpoints)
        if len(states) != len(rates) or not states:
            raise ArgumentError(f"{len(states)} checkpoints and {len(rates)} rates: give one rate for each")
        parts: list[tuple[float, Tensor]] = []
        queries = self._batches(queries)
        with contextlib.closing(self._load_each(states)) as loaded:
            for k in loaded:
                folder = Path(to) / f"checkpoint_{k}" if to is not None else None
                parts.append((rates[k], self.influence(queries, measure=measure, to=folder)))
        total = len(parts[0][1])
        return _written(to, total, lambda own: torch.stack([rate * scores[own] for rate, scores in parts]).sum(0))

    # ---- features ------------------------------

    def features(
        self, dim: int, seed: int = 0, *, data: Data | None = None, measure: Any = None, to: Any = None, every: int = 100
    ) -> Tensor:  # fmt: skip
        """Random projections of the samples' gradients, [N, dim]; see `fxcurv.extensions.Projected`.

        Args:
            dim, seed: of the projection.
            data: a loader; by default the training data.
            measure: as for `influence`.
            to: a folder for `projected_total.npy` and for the state of the pass, from which the same call resumes; rows
                in the file are for the loss as it is reduced.
            every: how many batches lie between two states.
        """
        compiled = self._compiled if measure is None else self._compile(measure)
        result, _, factor = self._pass(compiled.asking([Projected(dim, seed, total=True)]), data, to=to, every=every)
        return result.projected_total if factor == 1 else result.projected_total * factor

    def trak(
        self, queries: Data, dim: int, seed: int = 0, *, measure: Any = margin, damping: float = 0.0,
        models: Iterable[Any] | None = None, to: Any = None,
    ) -> Tensor:  # fmt: skip
        """TRAK's scores, [Q, N] (Park et al. 2023, section 3): Phi_q (Phi^T Phi + damping I)^-1 Phi^T times R.

        Both factors are means over models. Phi are the projected gradients of `measure`. -R are the losses' derivatives
        in the measure; for cross-entropy and the margin, R is 1 - p_n. A loss' gradient is -R times the measure's, so R
        follows from the projections of both.

        Args:
            queries: a loader.
            dim, seed: of the projection, the same for all models.
            measure: a sum over samples, in the form of a loss; a sample's loss has to be a function of its term.
            damping: see above.
            models: an ensemble: state dicts of the model, or files with them; None: the model as it is. In the end the
                model has its own values back.
            to: a folder for `scores.npy`, which the result reads from, and for the features of each model.
        """
        ensemble: list[tuple[Tensor, Tensor]] = []
        slopes: list[Tensor] = []
        queries = self._batches(queries)
        with contextlib.closing(self._load_each(models)) as loaded:
            for k in loaded:
                folders = [Path(to) / f"{kind}_{k}" if to is not None else None for kind in ("measure", "loss")]
                phi = self.features(dim, seed, measure=measure, to=folders[0])
                of_queries = self.features(dim, seed, data=queries, measure=measure)
                of_losses = self.features(dim, seed, to=folders[1])
                kernel = phi.t() @ phi + damping * torch.eye(dim, dtype=phi.dtype, device=phi.device)
                ensemble.append((torch.linalg.solve(kernel, of_queries.t()).t(), phi))
                # zero where there is no gradient
                slopes.append(-((of_losses * phi).sum(1) / phi.square().sum(1)).nan_to_num())
        if not ensemble:
            raise ArgumentError("models is empty: pass a state dict at least, or None for the model as it is")
        r = torch.stack(slopes).mean(0)
        total = len(ensemble[0][0])
        return _written(to, total, lambda own: torch.stack([q[own] @ phi.t() for q, phi in ensemble]).mean(0) * r)

    # ---- what they share ------------------------------

    def _load_each(self, states: Iterable[Any] | None) -> Generator[int, None, None]:
        """Load one state after another, yielding their numbers, and the model's own in the end; None: only its own."""
        if states is None:
            yield 0
            return
        kept = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        try:
            for k, state in enumerate(states):
                self.model.load_state_dict(
                    torch.load(state, weights_only=True) if isinstance(state, str | Path) else state
                )
                yield k
        finally:
            self.model.load_state_dict(kept)

    def _compile(self, loss: Any) -> Compiled:
        """The model compiled with a loss, without extensions."""
        compiled = compile_model(self.model, loss, [], **self._options)
        compiled.alone("Attribution")
        return compiled

    def _pass(
        self, compiled: Compiled, data: Data | None = None, *, to: Any = None, every: int = 100, seed: int = 0
    ) -> tuple[Result, int, int]:
        """(the result over the data, the number of samples, the factor from its gradients to single losses')."""
        totals = Totals(compiled, unpack=tuple, seed=seed, to=to)
        file = Path(to) / "pass.pt" if to is not None else None
        totals.load(file)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        batches = self._train if data is None else self._batches(data)
        result = totals.run(batches, checkpoint=file, every=every, progress=self._progress)
        n, weight = totals.counted, totals.weight
        _check_even(weight, n)
        return result, n, 1 if weight is None else n

    def _batches(self, queries: Data) -> Batches:
        """Queries, whose batches are the same ones every time."""
        check_given(self._compiled, queries, "Attribution")
        if isinstance(queries, Batches):
            return queries
        return Batches(self._compiled, queries, self._unpack, "the data of the queries")

    def _gradients(self, inputs: Any, targets: tuple, measure: Any, names: list[str] | None) -> dict[str, Tensor]:
        """The gradients of queries, [q, *P] by name."""
        key = measure, tuple(names or ())
        if key not in self._programs:
            of = self._compiled if measure is None else self._compile(measure)
            self._programs[key] = of.asking([BatchGrad(params=names)])
        compiled = self._programs[key]
        result, arguments = compiled(inputs, *targets), compiled.arguments(inputs, *targets)
        weights = self._weights.setdefault(key, Weights(self.model, compiled.loss, None))
        z = weights.of(result, inputs, targets, arguments, compiled)
        _check_even(z, arguments.batch_size)
        factor = 1 if z is None else arguments.batch_size
        return {name: g * factor for name, g in result.grad_batch.items()}

    def _in_blocks(self, queries: Batches, scores: Callable[..., Tensor], to: Any, asked: dict[str, str]) -> Tensor:
        """The scores of all blocks one below the other, in memory or in a file."""
        rows = Rows(Path(to) / "scores.npy" if to is not None else None, 0)
        file = Path(to) / "state.pt" if to is not None else None
        state: dict[str, Any] = {"marks": [], "done": 0}
        if file is not None:
            state |= {"asked": {**asked, **identity(self._compiled)}, "model": digests(self._compiled.subject)}
            state["train"] = self._train.known()
            if file.exists():
                rows, state = _resume(file, state)
        for k, (own, (inputs, *targets)) in enumerate(queries.marked()):
            if k < len(state["marks"]):
                if state["marks"][k] != own:
                    raise ArgumentError(
                        f"block {k} of the queries is another than {file} has: begin anew, in another folder"
                    )
                continue
            block = scores(inputs, tuple(targets))
            rows.add(block, None, state["done"])
            state = {**state, "done": state["done"] + len(block), "marks": [*state["marks"], own]}
            if file is not None:
                torch.save({**state, "rows": rows.state_dict()}, file.with_suffix(".new"))
                os.replace(file.with_suffix(".new"), file)
        if not state["done"]:
            raise ArgumentError("there are no queries: pass a loader with at least one")
        found = rows.finish(1, state["done"])
        if file is not None:
            file.unlink()
        return found


def _written(to: Any, total: int, rows_of: Callable[[slice], Tensor]) -> Tensor:
    """Collect the scores of `total` queries, some at a time, in a file of the folder `to` if there is one."""
    rows = Rows(Path(to) / "scores.npy" if to is not None else None, 0)
    for start in range(0, total, ROWS):
        rows.add(rows_of(slice(start, start + ROWS)), None, start)
    return rows.finish(1, total)


def _check_even(weight: float | None, n: int) -> None:
    """Refuse a mean whose samples do not count alike; `weight`: its denominator over n samples, None for a sum."""
    if weight is not None and abs(weight - n) > 1e-3 * n:
        raise LossError(
            "the loss is a mean in which samples have weights of their own, so a sample's gradient is not its own. Way out: a "
            "sum, or a mean over samples."
        )


class _VectorMemory:
    """Memory for the vectors of a block, which a program reads: later blocks are written into it."""

    def __init__(self, compiled: Compiled, names: list[str] | None):
        self._compiled, self._names = compiled, names
        self._memory: dict[str, Tensor] = {}
        self._program: Compiled | None = None

    def of(self, vectors: dict[str, Tensor]) -> tuple[Compiled, int]:
        """(the program for inner products with these vectors, their number); it may have zero vectors after them."""
        count = len(next(iter(vectors.values())))
        if self._program is None or count > len(next(iter(self._memory.values()))):
            self._memory = {name: v.detach().clone().contiguous() for name, v in vectors.items()}
            self._program = self._compiled.asking([Dots(self._memory, params=self._names, total=True)])
        for name, v in vectors.items():
            self._memory[name].zero_()[:count] = v.detach()
        return self._program, count


def _resume(file: Path, state: dict[str, Any]) -> tuple[Rows, dict[str, Any]]:
    found = saved(file)
    if not isinstance(found, dict) or not {*state, "rows"} <= {*found}:
        raise ArgumentError(f"{file} is no state of this call, or of another fxcurv: delete it to begin anew")
    named = [("parameters or buffers", "model"), ("batches of the training data", "train")]
    other = [f"{what} differ" for what, key in named if found[key] != state[key]]
    other.append(differences(found["asked"], state["asked"]))
    if any(other):
        raise ArgumentError(
            f"{file} is of another call ({'; '.join(filter(None, other))}): begin anew, in another folder"
        )
    return Rows.of(found.pop("rows"), file.parent), found


def _digest(curvature: Blocks | None) -> str:
    if curvature is None:
        return "none"
    return ", ".join(f"{name} {' '.join(map(digest, eigenbasis(f)))}" for name, f in curvature.factors.items())
