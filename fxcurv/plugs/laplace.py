"""Backends for laplace-torch: `Laplace(model, "classification", backend=FxcurvGGN)`.

All of them take the loss that laplace-torch defines: a sum over samples, halved for regression. Programs are traced at
the first batch and kept for the next ones. For a last-layer approximation only the last layer is traced, on its
features.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from math import prod
from typing import Any

import torch
from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface  # type: ignore[import-not-found, unused-ignore]
from laplace.utils import Kron  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor, nn

from fxcurv.api import Compiled
from fxcurv.api import compile as compile_model
from fxcurv.errors import ArgumentError
from fxcurv.extensions import (
    HMP,
    KFAC,
    KFLR,
    BatchGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    Extension,
    Jacobian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
)
from fxcurv.ir.private import without_forward_hooks
from fxcurv.kronecker import Kronecker
from fxcurv.result import Result

__all__ = ["FxcurvEF", "FxcurvGGN", "FxcurvHessian", "FxcurvInterface"]


class Flat(nn.Module):
    """The loss over all positions of the output, classes last."""

    def __init__(self, loss: nn.Module, classes: bool):
        super().__init__()
        self.loss, self.classes = loss, classes

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return self.loss(f.flatten(0, -2), y.flatten()) if self.classes and f.ndim > 2 else self.loss(f, y)


class Mapped(nn.Module):
    """Calls a model that takes one mapping with its keyword arguments as that mapping."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(inputs)


class FxcurvInterface(CurvatureInterface):
    """Base of the backends: individual gradients and Jacobians by fxcurv; see `CurvatureInterface`."""

    def _result_of(self, x: Any, y: Tensor | None, *extensions: Extension, **call: Any) -> Result:
        """The result of a program for these extensions; without a loss if `y` is None."""
        mapped = isinstance(x, MutableMapping)
        if self.last_layer:
            with torch.no_grad():
                x = self.model.forward_with_features(x)[1]
        programs = self.__dict__.setdefault("_compiled", {})
        key = (extensions, y is None, mapped, id(self._model), self.model.training)
        if key not in programs:
            model = (
                without_forward_hooks(self._model) if self.last_layer else Mapped(self.model) if mapped else self.model
            )
            loss = None if y is None else Flat(self.lossfunc, self.likelihood == "classification")
            programs[key] = compile_model(model, loss, extensions, batch_dim=0)
        compiled: Compiled = programs[key]
        inputs = {k: v for k, v in x.items() if isinstance(v, Tensor)} if mapped and not self.last_layer else x
        return compiled(inputs, *([] if y is None else [y]), **call)

    def _vector(self, field: dict[str, Tensor], lead: int = 0) -> Tensor:
        """The field's values side by side, [*lead, D], of the subnetwork if there is one."""
        flat = torch.cat([t.reshape(*t.shape[:lead], prod(t.shape[lead:])) for t in field.values()], lead)
        return flat if self.subnetwork_indices is None else flat[..., self.subnetwork_indices]

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """(J [N, C, D], f)."""
        result = self._result_of(x, None, Jacobian(), create_graph=enable_backprop)
        f = result.output
        return self._vector({n: j.reshape(len(f), prod(f.shape[1:]), -1) for n, j in result.jacobian.items()}, 2), f

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """(individual gradients [N, D], the loss)."""
        result = self._result_of(x, y, BatchGrad())
        return self._vector(result.grad_batch, 1), result.loss

    def _diag(self, x: Any, y: Tensor, extension: Extension) -> tuple[Tensor, Tensor]:
        result = self._result_of(x, y, extension)
        return self.factor * result.loss, self.factor * self._vector(result[extension])

    def _kron(self, x: Any, y: Tensor, n: int, extension: Extension) -> tuple[Tensor, Kron]:
        """A is a mean over the batch, and B a sum, so A is scaled by the batch's share of all `n` samples."""
        if self.subnetwork_indices is not None:
            raise ArgumentError("Kronecker factors of a subnetwork do not exist: use a full or a diagonal Hessian")
        result = self._result_of(x, y, extension)
        factors = [_as_laplace(name, f, len(y) / n) for name, f in result[extension].items()]
        return self.factor * result.loss, self.factor * Kron(factors)


class FxcurvGGN(FxcurvInterface, GGNInterface):
    """The generalised Gauss-Newton, exact, or with sampled columns under `stochastic=True`; see `GGNInterface`."""

    def full(self, x: Any, y: Tensor, mc_samples: int | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(loss, [D, D])."""
        root: Extension = SqrtGGNMC(mc_samples or self.num_samples) if self.stochastic else SqrtGGNExact()
        result = self._result_of(x, y, root)
        rows = self._vector(result[root], 2).flatten(0, 1)
        return self.factor * result.loss, self.factor * rows.mT @ rows

    def diag(self, x: Any, y: Tensor, mc_samples: int | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(loss, [D])."""
        return self._diag(x, y, DiagGGNMC(mc_samples or self.num_samples) if self.stochastic else DiagGGNExact())

    def kron(
        self, x: Any, y: Tensor, N: int, mc_samples: int | None = None, kfac_approx: str = "expand", **kwargs: Any  # noqa: N803
    ) -> tuple[Tensor, Kron]:  # fmt: skip
        """(loss, factors)."""
        known: Any = {"weight_sharing": kfac_approx, "others": "exact"}
        sampled = KFAC(mc_samples or self.num_samples, **known)
        return self._kron(x, y, N, sampled if self.stochastic else KFLR(**known))


class FxcurvEF(FxcurvInterface, EFInterface):
    """The empirical Fisher; see `EFInterface`."""

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(loss, [D])."""
        return self._diag(x, y, SumGradSquared())

    def kron(self, x: Any, y: Tensor, N: int, kfac_approx: str = "expand", **kwargs: Any) -> tuple[Tensor, Kron]:  # noqa: N803
        """(loss, factors)."""
        return self._kron(x, y, N, KFAC(weight_sharing=kfac_approx, fisher="empirical", others="exact"))


class FxcurvHessian(FxcurvInterface):
    """The Hessian, in full or its diagonal."""

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(loss, [D, D])."""
        result = self._result_of(x, y, HMP())
        eye = torch.eye(result.hessian.shape[0], dtype=result.loss.dtype, device=result.loss.device)
        found = result.hessian @ eye
        chosen = self.subnetwork_indices
        return self.factor * result.loss, self.factor * (found if chosen is None else found[chosen][:, chosen])

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(loss, [D])."""
        return self._diag(x, y, DiagHessian())

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:  # noqa: N803
        """Refused: a sum of Kronecker products is only known of the Gauss-Newton and the Fisher."""
        raise ArgumentError(
            "FxcurvHessian with hessian_structure='kron': the Hessian has no Kronecker factors. Way out: backend=FxcurvGGN or "
            "FxcurvEF; or hessian_structure='full' or 'diag'"
        )


def _as_laplace(name: str, factors: Kronecker, share: float) -> list[Tensor]:
    """[B, share A], or [share A, B], in the order in which the weight is flattened; [B] for a bias."""
    if len(factors) == 1:
        return [factors[0]]
    b, a = factors[0], share * factors[1]
    a = torch.diag(a) if a.ndim == 1 else a
    if b.numel() == a.numel() == 1:
        return [b * a]
    arrangement: Any = factors.arrangement  # of one parameter
    order: Iterable[int] = [*arrangement.outputs, *arrangement.inputs]
    wide = [d for d in order if arrangement.sizes[d] > 1]
    outputs = [d for d in arrangement.outputs if arrangement.sizes[d] > 1]
    if wide == sorted(wide):
        return [b, a]
    if wide[len(outputs) :] + outputs == sorted(wide):
        return [a, b]
    raise ArgumentError(
        f"'{name}' has its outputs between its inputs, which a Kron of laplace-torch cannot say: use another Hessian structure"
    )
