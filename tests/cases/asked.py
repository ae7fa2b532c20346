"""What can be asked for, by family: a test that tries all extensions takes them from here, so that a new one is tried everywhere.

Families are functions, since tests differ in the options that they need.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxcurv.extensions import (
    EKFAC,
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    NTK,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    Dots,
    EighGGN,
    Extension,
    GramGGN,
    GramGrad,
    Jacobian,
    Projected,
    Quadratic,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from fxcurv.kronecker import Arrangement, Blocks, Kronecker


def first(max_norm: float = 0.1) -> list[Extension]:
    """Of individual gradients."""
    return [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), ClippedGrad(max_norm)]


def exact() -> list[Extension]:
    """Of the GGN's exact columns."""
    return [DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact()]


def sampled(mc_samples: int = 1) -> list[Extension]:
    """Of sampled columns."""
    return [DiagGGNMC(mc_samples), BatchDiagGGNMC(mc_samples), SqrtGGNMC(mc_samples)]


def hessian() -> list[Extension]:
    """The Hessian's diagonals."""
    return [DiagHessian(), BatchDiagHessian()]


def kronecker(mc_samples: int = 1, **options: Any) -> list[Extension]:
    """Kronecker factors from columns; `options` of all three."""
    return [KFAC(mc_samples, **options), KFLR(**options), EKFAC(mc_samples, **options)]


def products() -> list[Extension]:
    """Products with blocks."""
    return [GGNMP(), HMP(), PCHMP()]


def pairs() -> list[Extension]:
    """Of pairs of samples or columns."""
    return [GramGrad(), GramGGN(), EighGGN(), NTK()]


def against(model: nn.Module) -> list[Extension]:
    """Of individual gradients and given vectors or a given (diagonal) matrix."""
    generator = torch.Generator().manual_seed(0)
    named = dict(model.named_parameters())
    vectors = {name: torch.randn(2, *p.shape, generator=generator).to(p) for name, p in named.items()}
    blocks = {
        name: Kronecker([torch.linspace(1, 2, p.numel()).to(p)], Arrangement(p.shape, p.shape, tuple(range(p.ndim))))
        for name, p in named.items()
    }
    return [Dots(vectors), Projected(8), Quadratic(Blocks(blocks))]


def arrays(max_norm: float = 0.1, mc_samples: int = 1, **options: Any) -> list[Extension]:
    """Everything that is a number per parameter's entry, or a root or factor of a block: all but products and pairs."""
    found = [*first(max_norm), *exact(), *sampled(mc_samples), Jacobian(), *hessian()]
    return [*found, *kronecker(mc_samples, **options), KFRA()]


def every(model: nn.Module) -> list[Extension]:
    """All extensions."""
    return [*arrays(), *products(), *pairs(), *against(model)]
