"""Extensions: what a user can ask for. A file per family; the table in the README has shapes and formulas."""

from fxcurv.extensions.base import Extension, Param
from fxcurv.extensions.first_order import BatchGrad, BatchL2Grad, ClippedGrad, SumGradSquared, Variance
from fxcurv.extensions.ggn import (
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    DiagGGNExact,
    DiagGGNMC,
    Jacobian,
    SqrtGGNExact,
    SqrtGGNMC,
)
from fxcurv.extensions.hessian import BatchDiagHessian, DiagHessian
from fxcurv.extensions.kfac import EKFAC, KFAC, KFLR
from fxcurv.extensions.kfra import KFRA
from fxcurv.extensions.pairs import NTK, Dots, EighGGN, GramGGN, GramGrad
from fxcurv.extensions.products import GGNMP, HMP, PCHMP
from fxcurv.extensions.projected import Projected
from fxcurv.extensions.quadratic import Quadratic

__all__ = [
    "BatchDiagGGNExact", "BatchDiagGGNMC", "BatchDiagHessian", "BatchGrad", "BatchL2Grad", "ClippedGrad",
    "DiagGGNExact", "DiagGGNMC", "DiagHessian", "Dots", "EKFAC", "EighGGN", "Extension", "GGNMP", "GramGGN", "GramGrad", "HMP",
    "Jacobian", "KFAC", "KFLR", "KFRA", "NTK", "PCHMP", "Param", "Projected", "Quadratic", "SqrtGGNExact", "SqrtGGNMC",
    "SumGradSquared", "Variance",
]  # fmt: skip
