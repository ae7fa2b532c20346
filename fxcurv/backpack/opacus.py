"""Opacus' engine with fxcurv's gradients, for a training loop that stays as it is.

::

    engine = FxcurvPrivacyEngine()  # in place of opacus.PrivacyEngine
    model, optimizer, loader = engine.make_private(module=model, optimizer=optimizer, data_loader=loader, ...)
    for x, y in loader:
        loss(model(x), y).backward()  # leaves p.grad_sample, as Opacus' hooks do
        optimizer.step()
        optimizer.zero_grad()

The model is extended, and each backward pass that reaches it runs in a context of its own that asks for `BatchGrad`.
"""

from __future__ import annotations

from typing import Any

from opacus import PrivacyEngine  # type: ignore[import-not-found, unused-ignore]
from opacus.grad_sample import AbstractGradSampleModule  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor, nn

from fxcurv.backpack.context import backpack, disable
from fxcurv.backpack.extended import extend
from fxcurv.errors import ArgumentError
from fxcurv.extensions import BatchGrad
from fxcurv.ir.private import pytree
from fxcurv.plugs.opacus import add_rows

__all__ = ["FxcurvGradSampleModule", "FxcurvPrivacyEngine"]


class _SamplesSecond(nn.Module):
    """Wraps a model whose inputs have samples along dimension 1; takes tensors that have them first."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _swap_samples((args, kwargs))
        return self.inner(*args, **kwargs)


def _swap_samples(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.transpose(0, 1) if t.ndim > 1 else t, values)


class FxcurvGradSampleModule(AbstractGradSampleModule):
    """Opacus' wrapper of a model, by fxcurv: in training mode, `loss.backward()` leaves `p.grad_sample`, [N, *P].

    Args:
        m: the model; it is extended (`fxcurv.backpack.extend`) until `to_standard_module()`.
        batch_first: whether its inputs have samples along dimension 0, or 1.
        loss_reduction: "mean" or "sum": the reduction of the loss that is to come. For a mean, rows are those of the backward
            pass times their number N, as in Opacus: where the loss leaves out samples (`ignore_index`) or weights them, that is
            not the gradient of a sample's own loss (`fxcurv.plugs.opacus.GradSamples` looks at the loss).
        options: those of Opacus' `GradSampleModule`, without effect.

    Raises:
        ArgumentError: for another `loss_reduction`; in `backward()`, for a second batch before `optimizer.zero_grad()` where
            Poisson sampling counts every batch as a step.
        FieldError: in `backward()`, if the model has run twice before it.
    """

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean", **options: Any):
        if loss_reduction not in ("mean", "sum"):
            raise ArgumentError(f"loss_reduction={loss_reduction!r}: pass 'mean' or 'sum'")
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)
        self._several = True
        # no submodule, so that names of parameters and of a state dict stay those of Opacus
        self.__dict__["_extended"] = extend(m if batch_first else _SamplesSecond(m))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not self.training or not tensors[0].shape[0 if self.batch_first or tensors[0].ndim < 2 else 1]:
            return self._run_plain(args, kwargs)
        given = (args, kwargs) if self.batch_first else _swap_samples((args, kwargs))
        output = self._extended(*given[0], **given[1])
        nodes = {t.grad_fn for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None}
        for node in nodes:  # one: all outputs share it
            node.found.context = backpack(BatchGrad(savefield="_fxcurv_rows"))
            node.register_hook(lambda *_: self._take_rows())
        return output

    def _run_plain(self, args: tuple, kwargs: dict) -> Any:
        """Run the plain model: in evaluation mode, or for an empty batch, whose backward pass leaves empty rows."""
        with disable():
            output = self._module(*args, **kwargs)
        for t in pytree.tree_leaves(output) if self.training else []:
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(
                    lambda _: self._write_rows({n: p.new_zeros(0, *p.shape) for n, p in self._trained_parameters()})
                )
                break
        return output

    def _trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._module.named_parameters() if p.requires_grad]

    def _take_rows(self) -> None:
        found = {}
        for name, p in self._trained_parameters():
            if hasattr(p, "_fxcurv_rows"):
                rows: Any = p.__dict__.pop("_fxcurv_rows")
                found[name] = rows * len(rows) if self.loss_reduction == "mean" else rows
        self._write_rows(found)

    def _write_rows(self, found: dict[str, Tensor]) -> None:
        for name, p in self._trained_parameters():
            if name in found:
                add_rows(p, found[name])
                if not self._several and isinstance(p.grad_sample, list):
                    raise ArgumentError(
                        "a second backward() before optimizer.zero_grad(), where Poisson sampling counts every batch as a step. "
                        "Way out: a step after each, or Opacus' BatchMemoryManager."
                    )

    def forbid_grad_accumulation(self) -> None:
        """Make a second batch before `optimizer.zero_grad()` an error."""
        self._several = False

    def allow_grad_accumulation(self) -> None:
        """Let batches add up until `optimizer.zero_grad()`."""
        self._several = True

    def remove_hooks(self) -> None:
        """Make the model a plain one again."""
        model: Any = self._module
        if hasattr(type(model), "plain"):
            model.__class__ = type(model).plain

    def to_standard_module(self) -> nn.Module:
        """The model, without what has been put on it."""
        self.cleanup()
        return self._module


class FxcurvPrivacyEngine(PrivacyEngine):
    """Opacus' engine, with `FxcurvGradSampleModule` for its wrapper of the model, whatever `grad_sample_mode` says.

    Raises:
        ArgumentError: for the modes that clip inside of the backward pass (`"ghost"`): `ClippedGrad` is fxcurv's way.
    """

    def _prepare_model(
        self, module: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean", grad_sample_mode: str = "hooks",
        **options: Any,
    ) -> FxcurvGradSampleModule:  # fmt: skip
        if "ghost" in grad_sample_mode:
            raise ArgumentError(
                f"grad_sample_mode={grad_sample_mode!r} clips inside of Opacus' own backward pass. Way out: "
                "ClippedGrad(max_norm), whose loss is a sum; or the default mode."
            )
        if isinstance(module, FxcurvGradSampleModule):
            return module
        self.validate(module=module, optimizer=None, data_loader=None)
        return FxcurvGradSampleModule(module, batch_first=batch_first, loss_reduction=loss_reduction)
