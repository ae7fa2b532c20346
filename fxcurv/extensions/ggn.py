"""The generalised Gauss-Newton: diagonals, roots, and the Jacobian (Schraudolph 2002; Dangel et al. 2020, eq. 18)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxcurv.errors import ExtensionError
from fxcurv.extensions.base import Combine, Extension, Param
from fxcurv.extensions.first_order import freeze_indices
from fxcurv.ir.placement import samples_first
from fxcurv.quantity import Identity, Quantity, SqrtGGN


@dataclass(frozen=True)
class _Sampled(Extension):
    """Shared by the Monte-Carlo versions: columns sampled from the model's likelihood."""

    mc_samples: int = 1
    needs_convex = True

    @property
    def requires(self) -> Quantity:
        return SqrtGGN(mc=self.mc_samples)

    def check(self) -> None:
        if not isinstance(self.mc_samples, int) or self.mc_samples < 1:
            raise ExtensionError(f"{type(self).__name__}(mc_samples={self.mc_samples}): use a positive integer")


@dataclass(frozen=True)
class DiagGGNExact(Extension):
    """diag(sum_n J_n^T H_n J_n), [*P]; where samples interact, diag(J^T H J) of the whole batch."""

    savefield = "diag_ggn_exact"
    combine = (Combine("sum"),)
    whole_batch = True
    needs_convex = True
    any_sample = True
    requires = SqrtGGN(signed=True)

    def extract(self, param: Param) -> fx.Node:
        return param.contract(power=2, reduce="vn")


@dataclass(frozen=True)
class BatchDiagGGNExact(Extension):
    """diag(J_n^T H_n J_n) of every sample, [N, *P]."""

    savefield = "diag_ggn_exact_batch"
    combine = (Combine("rows"),)
    sample_axis = 0
    holds_samples = True
    needs_convex = True
    requires = SqrtGGN(signed=True)

    def extract(self, param: Param) -> fx.Node:
        return param.contract(power=2, reduce="v")


@dataclass(frozen=True)
class DiagGGNMC(_Sampled):
    """diag(sum_n J_n^T H_n J_n) estimated with `mc_samples` columns, [*P].

    Where samples interact in the model, diag(J^T H J) of the whole batch; the loss itself has to be one of cross-entropy,
    squares or binary cross-entropy with logits.
    """

    savefield = "diag_ggn_mc"
    combine = (Combine("sum"),)
    whole_batch = True
    any_sample = True

    def extract(self, param: Param) -> fx.Node:
        return param.contract(power=2, reduce="vn")


@dataclass(frozen=True)
class BatchDiagGGNMC(_Sampled):
    """diag(J_n^T H_n J_n) of every sample, estimated with `mc_samples` columns, [N, *P]."""

    savefield = "diag_ggn_mc_batch"
    combine = (Combine("rows"),)
    sample_axis = 0

    def extract(self, param: Param) -> fx.Node:
        return param.contract(power=2, reduce="v")


@dataclass(frozen=True)
class SqrtGGNExact(Extension):
    """P[v, n] = J_n^T s_{v,n} for the exact columns, [V, N, *P]; flattened to [V N, P], the GGN is P^T P.

    Args:
        subsampling: indices of samples; the scaling stays the full batch's.
    """

    subsampling: tuple[int, ...] | None = None
    savefield = "sqrt_ggn_exact"
    combine = (Combine("rows", 0.5),)
    sample_axis = 1
    shows_columns = True
    needs_convex = True
    requires = SqrtGGN()

    def check(self) -> None:
        freeze_indices(self)

    def extract(self, param: Param) -> fx.Node:
        return param.contract(power=1, samples=self.subsampling)


@dataclass(frozen=True)
class SqrtGGNMC(_Sampled):
    """P[v, n] = J_n^T s_{v,n} for `mc_samples` sampled columns, [M, N, *P].

    Args:
        subsampling: indices of samples; the scaling stays the full batch's.
    """

    subsampling: tuple[int, ...] | None = None
    savefield = "sqrt_ggn_mc"
    combine = (Combine("rows", 0.5),)
    sample_axis = 1

    def check(self) -> None:
        super().check()
        freeze_indices(self)

    def extract(self, param: Param) -> fx.Node:
        return param.contract(power=1, samples=self.subsampling)


@dataclass(frozen=True)
class Jacobian(Extension):
    """J_n, the derivative of the model's output, [N, *f.shape[1:], *P]. Needs no loss."""

    savefield = "jacobian"
    combine = (Combine("rows", 0),)
    sample_axis = 0
    any_sample = True
    requires = Identity()

    def extract(self, param: Param) -> fx.Node:
        head = param.program.heads[0]
        return param.emit(_by_output, param.contract(power=1), head, head.meta["place"])


def _by_output(p, head, place):
    axes = list(samples_first(head, place).shape[1:])
    if place.outer * place.inner == 1:
        del axes[place.dim]
    return p.movedim(0, 1).reshape((p.shape[1], *axes, *p.shape[2:]))


@dataclass(frozen=True)
class SqrtEmpirical(Extension):
    """P[n] of the empirical column, [1, N, *P]: the individual gradient over the root of the loss' factor."""

    savefield = "sqrt_empirical"
    combine = (Combine("rows", 0.5),)
    sample_axis = 1
    needs_convex = True
    requires = SqrtGGN(empirical=True)

    def extract(self, param: Param) -> fx.Node:
        return param.contract(power=1)


@dataclass(frozen=True)
class DiagEmpirical(Extension):
    """The diagonal of the empirical Fisher, the squares of `SqrtEmpirical` summed over samples, [*P]."""

    savefield = "diag_empirical"
    combine = (Combine("sum"),)
    needs_convex = True
    requires = SqrtGGN(empirical=True)

    def extract(self, param: Param) -> fx.Node:
        return param.contract(power=2, reduce="vn")


@dataclass(frozen=True)
class JacobianNorms(Extension):
    """The squared norms of every output's derivative, [N, C]."""

    savefield = "jacobian_norms"
    combine = (Combine("rows", 0),)
    sample_axis = 0
    any_sample = True
    requires = Identity()

    def extract(self, param: Param) -> fx.Node:
        return param.emit(_samples_first, param.contract(power=2, reduce="p"))


def _samples_first(norms):
    return norms.t().contiguous()
