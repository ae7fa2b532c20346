"""fxcurv in front of Opacus' optimizers: individual gradients where they look for them.

::

    engine = opacus.PrivacyEngine()
    samples, optimizer, loader = make_private(engine, model, loss, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0)
    for x, y in loader:
        samples(x, y)  # in place of forward and backward
        optimizer.step()
        optimizer.zero_grad()

With `make_private(..., grad_sample_mode="ghost")` the sum of clipped gradients is computed without a gradient per sample.

A training loop that is to stay as it is, with its `loss.backward()`, takes the engine of `fxcurv.backpack.opacus`.

Opacus' optimizers take the gradients of each sample's own loss, whatever the reduction. For a mean, fxcurv's gradients
have a factor 1/N, which is undone here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn, optim

from fxcurv.api import compile as compile_model
from fxcurv.data.weights import Weights
from fxcurv.errors import ArgumentError, LossError
from fxcurv.extensions import BatchGrad, ClippedGrad, Extension
from fxcurv.front.arguments import filled, templated
from fxcurv.ir.placement import Shard
from fxcurv.result import Result

__all__ = ["ClippedGradients", "GradSamples", "add_rows", "make_private"]


class _OfOwnLoss:
    """What the loss is, for gradients of each sample's own: a sum over samples or their mean."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], extension: Extension, options: dict[str, Any]):
        self.model, self.loss = model, loss
        self.compiled = compile_model(model, loss, [extension], **options)
        self.compiled.alone(type(self).__name__)
        self._weights = Weights(model, loss, None)

    @property
    def reduction(self) -> str | None:
        """What the loss is, "mean" or "sum"; None before the first batch."""
        return None if self._weights.mean is None else "mean" if self._weights.mean else "sum"

    def _factor(self, result: Result, inputs: Any, targets: tuple) -> float:
        """What makes gradients of the loss, [N, *P], those of each sample's own: of a mean, its denominator in this batch.

        Raises:
            LossError: for a loss that is neither a sum nor a mean over samples, or gives those of a batch weights of their own.
        """
        arguments = self.compiled.arguments(inputs, *targets)
        if not arguments.batch_size:
            return 1.0
        if self._weights.mean is None:
            self._weights.of(result, inputs, targets, arguments, self.compiled)
        if not self._weights.mean:
            return 1.0
        leaves: list[Tensor] = []
        template = templated(result.output, leaves)

        def value(outputs: list[Tensor], goals: list[Tensor]) -> Tensor:
            return self.loss(filled(template, outputs), *filled(arguments.target_template, goals)).reshape(())

        nodes = self.compiled.program_of(inputs, *targets).output_leaves
        dims = [_samples_at(t, node, arguments.batch_size) for t, node in zip(leaves, nodes, strict=True)]
        return _denominator(value, leaves, dims, list(arguments.targets), arguments.target_dims(), arguments.batch_size)


class GradSamples(_OfOwnLoss):
    """Writes `p.grad_sample`, [N, *P], on every trainable parameter: of each sample's own loss, for a mean and a sum alike.

    Samples that a mean leaves out (`ignore_index`) have the gradient zero, and count in no other sample's. A call before
    `optimizer.zero_grad()` adds another batch, as Opacus does (virtual steps, `BatchMemoryManager`). An empty batch gives no
    rows. `p.grad` is left to the optimizer.

    Args:
        model, loss: as for `fxcurv.compile`; the module itself, not Opacus' wrapper of it.
        options: those of `fxcurv.compile`.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], **options: Any):
        super().__init__(model, loss, BatchGrad(), options)

    def __call__(self, inputs: Any, *targets: Any) -> Result:
        """Compute and write the gradients; return the result, for the loss as it is.

        Raises:
            LossError: for a loss that is neither a sum nor a mean over samples, or gives those of a batch weights of their own.
        """
        result = self.compiled(inputs, *targets)
        factor, named = self._factor(result, inputs, targets), dict(self.model.named_parameters())
        for name, g in result.grad_batch.items():
            add_rows(named[name], g * factor if factor != 1 else g)
        return result


class ClippedGradients(_OfOwnLoss):
    """Adds the sum of clipped gradients, [*P], to `p.grad`: of each sample's own loss, for a mean and a sum alike.

    This is what Opacus' `DPOptimizerFastGradientClipping` reads. Gradients per sample, [N, *P], are not stored. Where a mean
    leaves out samples (`ignore_index`), the batch is computed a second time.

    Args:
        model, loss, options: as for `GradSamples`.
        max_norm: what each gradient is clipped to, over all parameters: a number, or an optimizer of Opacus', whose
            `max_grad_norm` is read at every call, as its noise has to be for the same bound.

    Attributes:
        max_norm: may be changed between calls; it is the optimizer's, if that was given.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], max_norm: Any, **options: Any):
        self._bounded = max_norm if hasattr(max_norm, "max_grad_norm") else SimpleNamespace(max_grad_norm=max_norm)
        some = next(model.parameters())
        self._bound = torch.tensor(float(self.max_norm), dtype=torch.float64, device=some.device)
        super().__init__(model, loss, ClippedGrad(self._bound), options)

    @property
    def max_norm(self) -> float:
        """The bound of the next call."""
        return self._bounded.max_grad_norm

    @max_norm.setter
    def max_norm(self, bound: float) -> None:
        self._bounded.max_grad_norm = bound

    def __call__(self, inputs: Any, *targets: Any) -> Result:
        """Compute and add; returns the result, of the loss as it is.

        Raises:
            LossError: for a loss that is neither a sum nor a mean over samples, or gives those of a batch weights of their own.
        """
        n = self.compiled.arguments(inputs, *targets).batch_size
        likely = float(n) if n and self.reduction != "sum" else 1.0
        result = self._clipped(likely, inputs, targets)
        factor = self._factor(result, inputs, targets)
        if factor != likely:
            with torch.random.fork_rng():
                result = self._clipped(factor, inputs, targets)
        named = dict(self.model.named_parameters())
        for name, g in result.grad_clipped.items():
            own = g * factor if factor != 1 else g
            named[name].grad = own if named[name].grad is None else named[name].grad + own
        return result

    def _clipped(self, factor: float, inputs: Any, targets: tuple) -> Result:
        self._bound.fill_(self.max_norm / factor)
        return self.compiled(inputs, *targets)


def _samples_at(t: Tensor, node: Any, n: int) -> int | None:
    """The dimension of an output's samples, or of all their positions: from the program, or by sizes if that is from disk."""
    place = node.meta.get("place")
    if place is None:
        return next((d for d, size in enumerate(t.shape) if size and size % n == 0), None)
    return place.dim if isinstance(place, Shard) else None


def _denominator(
    value: Callable[..., Tensor], outputs: list[Tensor], dims: Sequence[int | None], goals: list[Tensor],
    goal_dims: Sequence[int | None], n: int,
) -> float:  # fmt: skip
    """The denominator of a mean over the samples of a batch, those apart that it leaves out.

    It is the ratio of a sample's slopes alone and in the batch, which has to be the same for all samples.

    Args:
        value: (outputs, targets) -> the loss.
        dims, goal_dims: the samples' dimension in each output and target.
        n: the batch size.
    """
    alone, within = _slopes(value, outputs, dims, goals, goal_dims, n)
    counted = within.isfinite().all(1) & within.any(1)
    alone, within = alone[counted], within[counted]
    if not len(within):
        return 1.0
    ratio = (alone * within).sum() / within.square().sum()
    size = alone.norm(dim=1)
    if not bool(((alone - ratio * within).norm(dim=1) <= 1e-3 * size + 1e-6 * size.max()).all()):
        raise LossError(
            "the loss is a mean in which samples have weights of their own (class weights, or tokens that are left out of some), "
            "so a sample's gradient is not its own. Way out: a sum, or a mean over samples."
        )
    found = float(ratio)
    return float(round(found)) if abs(found - round(found)) <= 1e-5 * found else found


def _slopes(
    value: Callable[..., Tensor], outputs: list[Tensor], dims: Sequence[int | None], goals: list[Tensor],
    goal_dims: Sequence[int | None], n: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(the loss's slopes in each sample's outputs, [N, K], where the sample is alone; the same in the batch)."""
    sloped = [k for k, (t, d) in enumerate(zip(outputs, dims, strict=True)) if d is not None and t.is_floating_point()]

    def apart(t: Tensor, d: int | None) -> Tensor:
        return t if d is None else t.unflatten(d, (n, -1)).movedim(d, 0)

    def slopes(floats: list[Tensor], outs: list[Tensor], goals: list[Tensor]) -> Any:
        given = dict(zip(sloped, floats, strict=True))
        return value([given.get(k, t) for k, t in enumerate(outs)], goals)

    def plain(outs: list[Tensor], goals: list[Tensor]) -> list[Tensor]:
        floats = [outs[k].detach().requires_grad_() for k in sloped]
        with torch.enable_grad():
            found = torch.autograd.grad(slopes(floats, outs, goals), floats, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(floats, found, strict=True)]

    def each(outs: list[Tensor], goals: list[Tensor]) -> Sequence[Tensor]:
        stacks = [list(map(apart, *part)) for part in ((outs, dims), (goals, goal_dims))]
        where = [[None if d is None else 0 for d in part] for part in (dims, goal_dims)]
        try:
            call = torch.func.vmap(torch.func.grad(slopes), in_dims=([0] * len(sloped), *where))
            return call([stacks[0][k] for k in sloped], *stacks)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):  # a loss that looks at values, say
            pick = lambda k, part, at: [t if d is None else t[k] for t, d in zip(part, at, strict=True)]  # noqa: E731
            single = [plain(*map(functools.partial(pick, k), stacks, where)) for k in range(n)]
            return [torch.stack(own) for own in zip(*single, strict=True)]

    def rows(found: Sequence[Tensor]) -> Tensor:
        return torch.cat([g.flatten(1).double() for g in found], 1)

    for wide in (True, False):  # in float64, unless the loss holds tensors of another dtype
        given = [[t.double() if wide and t.is_floating_point() else t for t in ts] for ts in (outputs, goals)]
        try:
            within = plain(*given)
            return rows(each(*given)), rows([apart(g, dims[k]) for g, k in zip(within, sloped, strict=True)])
        except (RuntimeError, TypeError, IndexError) as error:
            if not wide:
                raise LossError(
                    f"the loss of a sample alone cannot be had: {error}\nWay out: a loss that is a sum over samples"
                ) from error
    raise AssertionError


def add_rows(p: Any, rows: Tensor) -> None:
    """Add one more batch to `p.grad_sample`, which is a list for several, as in Opacus."""
    before = getattr(p, "grad_sample", None)
    p.grad_sample = rows if before is None else [*before, rows] if isinstance(before, list) else [before, rows]


def make_private(
    engine: Any,
    model: nn.Module,
    loss: Callable[..., Tensor],
    optimizer: optim.Optimizer,
    data_loader: Any,
    **options: Any,
) -> tuple[GradSamples | ClippedGradients, Any, Any]:
    """`engine.make_private` without hooks on the model.

    Args:
        engine: an `opacus.PrivacyEngine`, which counts the steps.
        model, loss: as for `GradSamples`.
        optimizer, data_loader: what is made private.
        options: of `PrivacyEngine.make_private` (`noise_multiplier`, `max_grad_norm`, `clipping`, `poisson_sampling`, ...).
            `grad_sample_mode="ghost"`: by `ClippedGradients`, no gradient per sample is stored; for flat clipping.

    Returns:
        (what computes a batch's gradients, Opacus' optimizer, its loader).

    Raises:
        ArgumentError: for another mode, or for ghost clipping that is not flat.
    """
    mode = options.pop("grad_sample_mode", "no_op")
    if mode not in ("no_op", "ghost"):
        raise ArgumentError(f"grad_sample_mode={mode!r}: pass 'ghost', or leave it out")
    _, private, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=data_loader, criterion=loss, grad_sample_mode="no_op", **options
    )
    if mode == "no_op":
        return GradSamples(model, loss), private, loader
    taker = _of_sums(private)
    return ClippedGradients(model, loss, taker), taker, loader


def _of_sums(private: Any) -> Any:
    """The optimizer that takes sums of clipped gradients, in place of one that clips."""
    # whoever has an engine has the package; the rest of this module does without
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping  # type: ignore[import-not-found, unused-ignore]

    if type(private) is not DPOptimizer:
        raise ArgumentError(
            f"grad_sample_mode='ghost' with {type(private).__name__}: it is for clipping='flat' on one process"
        )
    found = DPOptimizerFastGradientClipping(
        private.original_optimizer, noise_multiplier=private.noise_multiplier, max_grad_norm=private.max_grad_norm,
        expected_batch_size=private.expected_batch_size, loss_reduction=private.loss_reduction,
        generator=private.generator, secure_mode=private.secure_mode,
    )  # fmt: skip
    found.attach_step_hook(private.step_hook)
    return found
