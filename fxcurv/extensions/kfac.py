"""Kronecker factors of the Gauss-Newton's blocks (Martens & Grosse 2015; Botev et al. 2017; George et al. 2018).

Per use of a weight [out, in]: a_{n,s} the inputs at the shared positions s, b_{v,n,s} the columns there, so that
P[v,n] = sum_s b a^T. With S positions of all uses together, the block B (x) A is

    sharing         A                                          B
    "convolution"   1/N     sum_{n,s} a a^T                    sum_{v,n} (sum_s b)(sum_s b)^T
    "expand"        1/(N S) sum_{n,s} a a^T                    sum_{v,n,s} b b^T
    "reduce"        1/N     sum_n (mean_s a)(mean_s a)^T       sum_{v,n} (sum_s b)(sum_s b)^T

All three are the same where S = 1. Over several batches B is a sum, and A a mean. With `joint` a weight and its bias
are one matrix [out, in + 1], and a becomes [a, 1] everywhere. `weight_sharing="backpack"` is "convolution" for a
convolution that is used once and has no groups, and "expand" for everything else. Inputs are averaged over groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.contractions.contract import Spec
from fxcurv.contractions.factors import Arrange, Dense, Explicit, Factor, Gather
from fxcurv.errors import ExtensionError
from fxcurv.extensions.base import Combine, Extension, Param, Steps
from fxcurv.extensions.factored import Factored, dtype_of, embedded, entries, flat, source_of, with_ones
from fxcurv.extensions.layers import Layer, features, inputs
from fxcurv.ir.emit import constant
from fxcurv.ir.precision import widely
from fxcurv.ir.traced import sum_of
from fxcurv.kronecker import Arrangement, Eigenbasis, Joint, Kronecker, Within
from fxcurv.quantity import Group, Quantity, SqrtGGN


def _check_sampled(extension: KFAC | EKFAC) -> None:
    name, m = type(extension).__name__, extension.mc_samples
    if not isinstance(m, int) or m < 1:
        raise ExtensionError(f"{name}(mc_samples={m}): use a positive integer")
    if extension.fisher == "empirical" and m != 1:
        raise ExtensionError(f'{name}(mc_samples={m}, fisher="empirical"): there is one empirical column, not {m}')


def _sampled(extension: KFAC | EKFAC) -> Quantity:
    return SqrtGGN(empirical=True) if extension.fisher == "empirical" else SqrtGGN(mc=extension.mc_samples)


@dataclass(frozen=True)
class KFAC(Factored):
    """Kronecker factors from sampled columns: `Kronecker` [B, A] for a weight, [B] for a bias and for all else (`others`).

    B: [out, out]; A: [in, in], or [in] for an embedding, whose A is diagonal (under "reduce", cut to its diagonal).

    Args:
        mc_samples: number of sampled columns.
        weight_sharing: "backpack", "expand" or "reduce": how shared positions are approximated, see the module.
        fisher: "mc" for sampled columns, "empirical" for the gradient in their place.
        others: how parameters are treated that are no layer's weight or bias. "exact": the exact block [B] of the
            flattened parameter, B [numel, numel]. "auto" (default): the exact block for a parameter with one axis (a
            norm's scale, where it costs as much as the A of a layer nearby), else the diagonal of the block, [B] with a
            vector B [numel] (a tied embedding, a table of positions). "skip": the result leaves them out. "error": they
            are refused by name. The report says which.
        assign: under `mesh=`, who has the sums over all ranks: "all" ranks; or with "layers" one rank for each layer,
            where the others have tensors without values (`kronecker.Owner`), and `kronecker.Blocks` inverts each block
            on its owner. No effect without a mesh.
        joint: one block for a layer's weight and bias, B (x) A with A [in + 1, in + 1] of the inputs and a one. It is
            the weight's entry, whose arrangement is a `kronecker.Joint`; the bias' entry is `kronecker.Within(weight)`.
            A bias belongs to a weight if the same op, or a sum right behind it, adds it at every use (and both are
            among `params`). Other biases have blocks of their own, and so have the weights of embeddings. The report
            says which.
    """

    mc_samples: int = 1
    weight_sharing: str = "backpack"
    fisher: str = "mc"
    others: str = "auto"
    assign: str = "all"
    joint: bool = False
    savefield = "kfac"
    combine = (Combine("sum"), Combine("mean", 0))

    @property
    def requires(self) -> Quantity:
        return _sampled(self)

    def check(self) -> None:
        super().check()
        _check_sampled(self)


@dataclass(frozen=True)
class KFLR(Factored):
    """Kronecker factors from the exact columns: `Kronecker` [B, A] for a weight, [B] for a bias.

    Under "reduce", the columns of one class at all positions of the loss are summed first. (For squares and binary
    cross-entropy, the last axis of the prediction counts as the classes.)

    Args:
        weight_sharing: as for `KFAC`.
        others: as for `KFAC`.
        joint: as for `KFAC`.
    """

    weight_sharing: str = "backpack"
    others: str = "auto"
    joint: bool = False
    savefield = "kflr"
    combine = (Combine("sum"), Combine("mean", 0))
    requires = SqrtGGN()

    @property
    def shows_columns(self) -> bool:
        """Under "reduce", columns are summed over positions of the loss, which depends on the root that they are."""
        return self.weight_sharing == "reduce"


@dataclass(frozen=True)
class EKFAC(Factored):
    """The eigenbasis of KFAC's factors and the exact second moments in it: `Eigenbasis` [Q_B, Q_A, lambda].

    lambda[out, in] = sum_{v,n} (Q_B^T P[v,n] Q_A)^2. A bias has [Q_B, lambda], with lambda [out]; an embedding's Q_A is
    a vector of ones.

    Args:
        mc_samples: as for `KFAC`.
        weight_sharing: as for `KFAC`.
        fisher: as for `KFAC`.
        others: as for `KFAC`.
        joint: as for `KFAC`; lambda is [out, in + 1] then.
    """

    mc_samples: int = 1
    weight_sharing: str = "backpack"
    fisher: str = "mc"
    others: str = "auto"
    joint: bool = False
    savefield = "ekfac"
    data_passes = 2

    @property
    def requires(self) -> Quantity:
        return _sampled(self)

    def check(self) -> None:
        super().check()
        _check_sampled(self)

    def gather(self) -> Steps:
        known = {f.name: getattr(self, f.name) for f in fields(KFAC) if f.name not in ("savefield", "assign")}
        (found,) = yield (KFAC(**known, savefield=self.field_of("factors")),)
        bases = {name: vectors_of(k) for name, k in found.items()}
        (moments,) = yield (MomentsIn(**known, savefield=self.field_of("moments"), bases=Bases(bases)),)
        return {
            name: basis if isinstance(basis, Within) else Eigenbasis([*basis, moments[name]], basis.arrangement)
            for name, basis in bases.items()
        }

    def _of_layer(self, param: Param, layers: dict[Group, Layer], factors: Kronecker) -> Any:
        basis = self._basis(param, factors)
        bias = next(iter(layers.values())).bias
        rotate = _rotated_bias if bias else _rotated_lookup if factors[-1].meta["val"].ndim == 1 else _rotated
        parts = []
        for group, layer in layers.items():
            given = [(*source_of(param, u, group), u.rows, u.columns) for u in layer.uses if group in u.use.groups]
            if given:
                more = (isinstance(factors.arrangement, Joint),) if rotate is _rotated else ()
                rotated = param.emit(widely, rotate, given, basis, dtype_of(param), *more)
                parts.append(param.contract_factors(Spec(2, "vn"), rotated, layer.uses[0].use.rule))
        if not parts:
            return self._in_basis(basis, param.emit(_zero_moments, factors), factors.arrangement)
        moments = param.emit(sum_of, parts)
        if rotate is _rotated_lookup:
            moments = param.emit(_transposed, moments)
        return self._in_basis(basis, moments, factors.arrangement)

    def _of_exact(self, param: Param, block: fx.Node, p: fx.Node) -> Any:
        basis = self._basis(param, [block])
        return self._in_basis(basis, param.emit(_moments, p, basis[0]), flat(param))

    def _of_diagonal(self, param: Param, diagonal: fx.Node) -> Any:
        return self._in_basis([param.emit(torch.ones_like, diagonal)], diagonal, flat(param))

    def _of_zeros(self, param: Param, factors: Kronecker) -> Any:
        basis = [param.emit(_identity_like, f) for f in factors]
        return self._in_basis(basis, param.emit(_zero_moments, factors), factors.arrangement)

    def _basis(self, param: Param, factors: Sequence[fx.Node]) -> list[fx.Node]:
        return [param.emit(_eigenvectors, f) for f in factors]

    def _in_basis(self, basis: list[fx.Node], moments: fx.Node, arrangement: Arrangement | Joint) -> Any:
        return Eigenbasis([*basis, moments], arrangement)


def vectors_of(factors: Kronecker | Within) -> Kronecker | Within:
    """The eigenvectors of each factor; a bias `Within` another block stays as it is."""
    return factors if isinstance(factors, Within) else Kronecker(map(_eigenvectors, factors), factors.arrangement)


class Bases:
    """Parameter name -> its eigenvectors [Q_B, Q_A]; an object is equal only to itself."""

    def __init__(self, of: dict[str, Any]):
        self.of = of


@dataclass(frozen=True)
class MomentsIn(EKFAC):
    """EKFAC's lambda in a given eigenbasis (that of a data set, say): a sum over samples.

    Args:
        bases: the eigenvectors of every parameter.
    """

    bases: Any = None
    savefield = "ekfac_moments"
    combine = (Combine("sum"),)
    gather = Extension.gather

    def _basis(self, param: Param, factors: Sequence[fx.Node]) -> list[fx.Node]:
        with param.program.graph.inserting_before(param.program.output):
            return [constant(param.program, q) for q in self.bases.of[param.name]]

    def _in_basis(self, basis: list[fx.Node], moments: fx.Node, arrangement: Arrangement | Joint) -> Any:
        return moments


def _eigenvectors(factor: Tensor) -> Tensor:
    return torch.ones_like(factor) if factor.ndim == 1 else torch.linalg.eigh(factor)[1]


def _rotated(given: Sequence[tuple], basis: Sequence[Tensor], dtype: torch.dtype, joint: bool) -> list[Factor]:
    """The factors of Q_B^T P Q_A, [out, in], or [out, in + 1] of weight and bias."""
    out: list[Factor] = []
    for factor, source, at, rows, columns in given:
        a = inputs(factor).to(dtype)  # [N, S, K, I]
        b = features(factor, source, at).to(dtype).transpose(2, 3)  # [V, N, S, K O]
        if a.shape[2] > 1:  # groups are positions of their own, whose columns are zero in the other groups
            k = a.shape[2]
            eye = torch.eye(k, dtype=dtype, device=b.device).unsqueeze(-1)
            b = (b.unflatten(3, (k, -1)).unsqueeze(3) * eye).flatten(4).flatten(2, 3)
        a = embedded(a.flatten(1, 2), columns, 2)
        a = (with_ones(a) if joint else a) @ basis[1]
        g = embedded(b, rows, 3) @ basis[0]
        size = (g.shape[3], a.shape[2])
        out.append(Dense(a.unsqueeze(2), g.unsqueeze(3), Arrange(size, (0, 1), size)))
    return out


def _rotated_lookup(given: Sequence[tuple], basis: Sequence[Tensor], dtype: torch.dtype) -> list[Factor]:
    """The factors of P Q_B, [in, out]."""
    return [
        Gather(f.index, features(f, source, at).to(dtype).transpose(2, 3) @ basis[0], f.rows, f.padding)
        for f, source, at, *_ in given
    ]


def _rotated_bias(given: Sequence[tuple], basis: Sequence[Tensor], dtype: torch.dtype) -> list[Factor]:
    """The factor of Q_B^T P, [out]."""
    p = sum_of([embedded(features(f, source, at).to(dtype).sum(3), rows, 2) for f, source, at, rows, _ in given])
    return [Explicit(p @ basis[0])]


def _moments(p: Tensor, basis: Tensor) -> Tensor:
    return (entries(p) @ basis).square().sum((0, 1))


def _transposed(t: Tensor) -> Tensor:
    return t.t()


def _identity_like(factor: Tensor) -> Tensor:
    return torch.eye(factor.shape[0], dtype=factor.dtype, device=factor.device)


def _zero_moments(factors: Sequence[Tensor]) -> Tensor:
    return factors[0].new_zeros([f.shape[0] for f in factors])
