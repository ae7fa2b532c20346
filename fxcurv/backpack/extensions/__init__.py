"""The extensions, with BackPACK's names and order of arguments."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fxcurv import extensions
from fxcurv.backpack.extensions.module_extension import set_module_extension
from fxcurv.errors import ExtensionError
from fxcurv.extensions import *  # noqa: F403
from fxcurv.extensions import KFAC, KFLR, Extension


@dataclass(frozen=True)
class HMP(extensions.HMP):  # type: ignore[no-redef]  # in place of the imported one
    """Products with the Hessian's diagonal blocks: a callable per parameter, [V, *P] or [*P] -> the same."""

    savefield: str = "hmp"


@dataclass(frozen=True)
class GGNMP(extensions.GGNMP):  # type: ignore[no-redef]
    """Products with the Gauss-Newton's diagonal blocks: a callable per parameter, [V, *P] or [*P] -> the same."""

    savefield: str = "ggnmp"


class Curvature(StrEnum):
    """The matrix whose blocks `HBP` approximates."""

    HESSIAN = "hessian"
    GGN = "ggn"
    PCH_ABS = "pch-abs"
    PCH_CLIP = "pch-clip"


class LossHessianStrategy(StrEnum):
    """What `HBP` starts from: a root of the loss Hessian, samples of it, or its sum over samples."""

    EXACT = "exact"
    SAMPLING = "sampling"
    SUM = "sum"


class BackpropStrategy(StrEnum):
    """What `HBP` carries backward: columns per sample, or a matrix averaged over samples."""

    SQRT = "sqrt"
    BATCH_AVERAGE = "average"


class ExpectationApproximation(StrEnum):
    """How `HBP` approximates the expectation over samples in a parameter's block."""

    BOTEV_MARTENS = "E[J^T E(H) J]"
    CHEN = "E(J^T) E(H) E(J)"


def HBP(  # noqa: N802
    curv_type: str, loss_hessian_strategy: str, backprop_strategy: str, ea_strategy: str, savefield: str = "hbp"
) -> Extension:
    """The extension that Hessian backpropagation with these choices is: `KFLR`, `KFAC` or `KFRA`.

    Args:
        curv_type: a `Curvature`. Columns carry no residuals, so with "sqrt" every choice gives the Gauss-Newton.
        loss_hessian_strategy: with "sqrt": "exact" (`KFLR`) or "sampling" (`KFAC`); with "average": "sum" (`KFRA`).
        backprop_strategy: a `BackpropStrategy`.
        ea_strategy: "E[J^T E(H) J]".
        savefield: the field of the result.

    Raises:
        ExtensionError: for other choices.
    """
    try:
        curvature, start = Curvature(curv_type), LossHessianStrategy(loss_hessian_strategy)
        carried, expectation = BackpropStrategy(backprop_strategy), ExpectationApproximation(ea_strategy)
    except ValueError as error:
        raise ExtensionError(f"HBP: {error}; see the classes Curvature to ExpectationApproximation") from None
    asked = f"HBP({curvature}, {start}, {carried}, {expectation})"
    if expectation == ExpectationApproximation.CHEN:
        raise ExtensionError(f"{asked}: factors of averaged inputs are not defined. Way out: 'E[J^T E(H) J]'")
    if carried == BackpropStrategy.SQRT and start != LossHessianStrategy.SUM:
        return KFLR(savefield=savefield) if start == LossHessianStrategy.EXACT else KFAC(savefield=savefield)
    if carried != BackpropStrategy.BATCH_AVERAGE or start != LossHessianStrategy.SUM:
        raise ExtensionError(f"{asked}: use ('exact' or 'sampling', 'sqrt'), or ('sum', 'average')")
    if curvature != Curvature.GGN:
        raise ExtensionError(f"{asked}: an average carries no residuals. Way out: 'ggn', or PCHMP and HMP for products")
    return extensions.KFRA(savefield=savefield)


def _get_subsampling(self: Extension) -> list[int] | None:
    """The indices of the samples that count; None for all."""
    return getattr(self, "subsampling", None)


# methods of BackPACK's extensions that code written for BackPACK calls
Extension.set_module_extension = set_module_extension  # type: ignore[attr-defined]
Extension.get_subsampling = _get_subsampling  # type: ignore[attr-defined]

__all__ = [
    *(name for name in extensions.__all__ if name != "Param"), "BackpropStrategy", "Curvature",
    "ExpectationApproximation", "HBP", "LossHessianStrategy",
]  # fmt: skip
