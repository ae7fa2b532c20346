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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim

from fxcurv.api import compile as compile_model
from fxcurv.data.weights import Weights
from fxcurv.errors import ArgumentError, LossError
from fxcurv.extensions import BatchGrad, ClippedGrad, Extension
from fxcurv.result import Result

__all__ = ["ClippedGradients", "GradSamples", "add_rows", "make_private"]


class _OfOwnLoss:
    """What the loss is, for gradients of each sample's own: a sum over samples or their mean."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], extension: Extension, options: dict[str, Any]):
        self.model = model
        self.compiled = compile_model(model, loss, [extension], **options)
        self.compiled.alone(type(self).__name__)
        self._weights = Weights(model, loss, None)

    @property
    def reduction(self) -> str | None:
        """What the loss is, "mean" or "sum"; None before the first batch."""
        return None if self._weights.mean is None else "mean" if self._weights.mean else "sum"

    def _find(self, result: Result, inputs: Any, targets: tuple, n: int) -> None:
        """Find out what the loss is, if no batch has said so."""
        if self._weights.mean is None and n:
            z = self._weights.of(result, inputs, targets, self.compiled.arguments(inputs, *targets), self.compiled)
            if z is not None and abs(z - n) > 1e-3 * n:
                raise LossError(
                    "the loss is a mean in which samples have weights of their own, so a sample's gradient is not its own. Way "
                    "out: a sum, or a mean over samples."
                )

    def _factor(self, n: int) -> float:
        """What makes gradients of the loss, [N, *P], those of each sample's own."""
        return float(n) if self._weights.mean and n else 1.0


class GradSamples(_OfOwnLoss):
    """Writes `p.grad_sample`, [N, *P], on every trainable parameter: of each sample's own loss, for a mean and a sum alike.

    A call before `optimizer.zero_grad()` adds another batch, as Opacus does (virtual steps, `BatchMemoryManager`). An empty batch
    gives no rows. `p.grad` is left to the optimizer.

    Args:
        model, loss: as for `fxcurv.compile`; the module itself, not Opacus' wrapper of it.
        options: those of `fxcurv.compile`.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], **options: Any):
        super().__init__(model, loss, BatchGrad(), options)

    def __call__(self, inputs: Any, *targets: Any) -> Result:
        """Compute and write the gradients; return the result, for the loss as it is.

        Raises:
            LossError: for a loss that is neither a sum nor a mean over samples.
        """
        result = self.compiled(inputs, *targets)
        n = self.compiled.arguments(inputs, *targets).batch_size
        self._find(result, inputs, targets, n)
        factor, named = self._factor(n), dict(self.model.named_parameters())
        for name, g in result.grad_batch.items():
            add_rows(named[name], g * factor if factor != 1 else g)
        return result


class ClippedGradients(_OfOwnLoss):
    """Adds the sum of clipped gradients, [*P], to `p.grad`: of each sample's own loss, for a mean and a sum alike.

    This is what Opacus' `DPOptimizerFastGradientClipping` reads. Gradients per sample, [N, *P], are not stored.

    Args:
        model, loss, options: as for `GradSamples`.
        max_norm: what each gradient is clipped to, over all parameters.

    Attributes:
        max_norm: may be changed between calls.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], max_norm: float, **options: Any):
        self.max_norm = max_norm
        some = next(model.parameters())
        self._bound = torch.tensor(float(max_norm), dtype=torch.float64, device=some.device)
        super().__init__(model, loss, ClippedGrad(self._bound), options)

    def __call__(self, inputs: Any, *targets: Any) -> Result:
        """Compute and add; returns the result, of the loss as it is.

        Raises:
            LossError: for a loss that is neither a sum nor a mean over samples.
        """
        n = self.compiled.arguments(inputs, *targets).batch_size
        if self.reduction is None:
            with torch.random.fork_rng():
                self._find(self.compiled(inputs, *targets), inputs, targets, n)
        factor, named = self._factor(n), dict(self.model.named_parameters())
        self._bound.fill_(self.max_norm / factor)
        result = self.compiled(inputs, *targets)
        for name, g in result.grad_clipped.items():
            own = g * factor if factor != 1 else g
            named[name].grad = own if named[name].grad is None else named[name].grad + own
        return result


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
    return ClippedGradients(model, loss, options["max_grad_norm"]), taker, loader


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
