"""fxcurv in front of Opacus' optimizers: individual gradients where they look for them.

::

    engine = opacus.PrivacyEngine()
    samples, optimizer, loader = make_private(engine, model, loss, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0)
    for x, y in loader:
        samples(x, y)  # in place of forward and backward
        optimizer.step()
        optimizer.zero_grad()

A training loop that is to stay as it is, with its `loss.backward()`, takes the engine of `fxcurv.backpack.opacus`.

Opacus' optimizers take the gradients of each sample's own loss, whatever the reduction. For a mean, fxcurv's gradients
have a factor 1/N, which is undone here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn, optim

from fxcurv.api import compile as compile_model
from fxcurv.data.weights import Weights
from fxcurv.errors import LossError
from fxcurv.extensions import BatchGrad
from fxcurv.result import Result

__all__ = ["GradSamples", "add_rows", "make_private"]


class GradSamples:
    """Writes `p.grad_sample`, [N, *P], on every trainable parameter: of each sample's own loss, for a mean and a sum alike.

    A call before `optimizer.zero_grad()` adds another batch, as Opacus does (virtual steps, `BatchMemoryManager`). An empty batch
    gives no rows. `p.grad` is left to the optimizer.

    Args:
        model, loss: as for `fxcurv.compile`; the module itself, not Opacus' wrapper of it.
        options: those of `fxcurv.compile`.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], **options: Any):
        self.model = model
        self.compiled = compile_model(model, loss, [BatchGrad()], **options)
        self.compiled.alone("GradSamples")
        self._weights = Weights(model, loss, None)

    @property
    def reduction(self) -> str | None:
        """What the loss is, "mean" or "sum"; None before the first batch."""
        return None if self._weights.mean is None else "mean" if self._weights.mean else "sum"

    def __call__(self, inputs: Any, *targets: Any) -> Result:
        """Compute and write the gradients; return the result, for the loss as it is.

        Raises:
            LossError: for a loss that is neither a sum nor a mean over samples.
        """
        result = self.compiled(inputs, *targets)
        n = self.compiled.arguments(inputs, *targets).batch_size
        factor = self._factor(result, inputs, targets, n) if n else 1.0
        named = dict(self.model.named_parameters())
        for name, g in result.grad_batch.items():
            add_rows(named[name], g * factor if factor != 1 else g)
        return result

    def _factor(self, result: Result, inputs: Any, targets: tuple, n: int) -> float:
        if self._weights.mean is None:
            arguments = self.compiled.arguments(inputs, *targets)
            z = self._weights.of(result, inputs, targets, arguments, self.compiled)
            if z is not None and abs(z - n) > 1e-3 * n:
                raise LossError(
                    "the loss is a mean in which samples have weights of their own, so a sample's gradient is not its own. Way "
                    "out: a sum, or a mean over samples."
                )
        return float(n) if self._weights.mean else 1.0


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
) -> tuple[GradSamples, Any, Any]:
    """`engine.make_private` without hooks on the model.

    Args:
        engine: an `opacus.PrivacyEngine`, which counts the steps.
        model, loss: as for `GradSamples`.
        optimizer, data_loader: what is made private.
        options: of `PrivacyEngine.make_private` (`noise_multiplier`, `max_grad_norm`, `clipping`, `poisson_sampling`, ...).

    Returns:
        (the gradients of samples, Opacus' optimizer, its loader).
    """
    _, private, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=data_loader, criterion=loss, grad_sample_mode="no_op", **options
    )
    return GradSamples(model, loss), private, loader
