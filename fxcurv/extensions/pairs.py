"""Inner products of columns: of individual gradients, with vectors, of the Gauss-Newton's roots, of the outputs' derivatives."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import ExtensionError
from fxcurv.extensions.base import Combine, Extension, Param
from fxcurv.extensions.columns import WHOLE, combined, dots, pair, paired, record, rows_of_all
from fxcurv.ir.emit import constant, first_sample
from fxcurv.ir.placement import REPLICATE, Shard, samples_first
from fxcurv.ir.ranks import across
from fxcurv.ir.traced import sum_of
from fxcurv.quantity import GRADIENT, Gradient, Identity, Quantity, SqrtGGN
from fxcurv.walks.groups import groups_of


@dataclass(frozen=True)
class GramGrad(Extension):
    """The Gram matrix of the individual gradients of one parameter, <g_n, g_m>, [N, N]; by token [N, T, N, T].

    For a matrix product with S positions it is computed as sum_{s,t} <a_{n,s}, a_{m,t}> <b_{n,s}, b_{m,t}>, if that is
    cheaper than by blocks of P: the report says which. Its sum over parameters is the Gram matrix of the whole
    gradients, the empirical tangent kernel (Dangel et al. 2022, ViViT). Under `mesh=`, this and the other Gram matrices
    here have a row for each sample of this process, and a column for each sample of all.
    """

    savefield = "gram_grad"
    sample_axis = 0
    pairs = True

    def extract(self, param: Param) -> fx.Node:
        groups = groups_of(param.program, Gradient())
        rows = None if param.positions is None else param.program.analysis.rows
        return paired(param, Shard(0), _of_gradients, pair(param, groups, groups), rows)


@dataclass(frozen=True)
class _OfRoots(Extension):
    """Base of the quantities that are made of inner products of a root's columns.

    Args:
        mc_samples: number of sampled columns; None for the exact ones.
    """

    mc_samples: int | None = field(default=None, kw_only=True)
    needs_convex = True

    @property
    def requires(self) -> Quantity:
        return SqrtGGN(mc=self.mc_samples)

    def check(self) -> None:
        if self.mc_samples is not None and (not isinstance(self.mc_samples, int) or self.mc_samples < 1):
            raise ExtensionError(
                f"{type(self).__name__}(mc_samples={self.mc_samples!r}): use a positive integer, or None"
            )


@dataclass(frozen=True)
class GramGGN(_OfRoots):
    """The Gram matrix of the columns of `SqrtGGNExact` (or `SqrtGGNMC`), of one parameter, [V, N, V, N].

    Summed over the parameters of a group and seen as [V N, V N], its eigenvalues are those of the group's block of the
    Gauss-Newton, but for zeros (Dangel et al. 2022, ViViT, section 2).

    Args:
        mc_samples: number of sampled columns; None for the exact ones.
    """

    savefield = "gram_ggn"
    sample_axis = 1
    pairs = True
    shows_columns = True

    def extract(self, param: Param) -> fx.Node:
        groups = groups_of(param.program, self.requires)
        return pair(param, groups, groups)


@dataclass(frozen=True)
class EighGGN(_OfRoots):
    """The largest eigenvalues of the Gauss-Newton, its eigenvectors e_k, [K, *P], and derivatives along them.

    They are computed from the Gram matrix of the root's columns, which is small if samples times outputs are few. There
    is one matrix for all parameters of the extension, so `params=` chooses the block; e_k are unit vectors over these
    together, each up to its sign. If fewer than K eigenvalues are above rounding, the others are zero, and so are their
    e_k.

    Also sets `result.<savefield>_values` [K], descending; `_first` [N, K], <g_n, e_k>; `_second` [N, K], e_k^T G_n e_k of the
    sample's own Gauss-Newton. Summed over samples, these are <grad, e_k> and the eigenvalues (ViViT, eq. 6 and 7, has N times
    them for a mean).

    Args:
        top: K.
        mc_samples: number of sampled columns, for the Gauss-Newton that they estimate; None for the exact one.
    """

    top: int = 10
    savefield = "eigh_ggn"
    pairs = True
    reads_gradients = True

    def check(self) -> None:
        super().check()
        if not isinstance(self.top, int) or self.top < 1:
            raise ExtensionError(f"EighGGN(top={self.top!r}): use a positive integer")

    def extract_all(self, params: list[Param]) -> tuple[dict[str, Any], dict[str, fx.Node]]:
        first = params[0]
        groups = groups_of(first.program, self.requires)
        gram = paired(first, Shard(1), sum_of, [pair(p, groups, groups) for p in params])
        slopes = paired(first, Shard(1), sum_of, [pair(p, [GRADIENT], groups) for p in params])
        if across(first.program.options.ranks):
            # every rank decomposes the matrix of all samples, and computes the rest for its own
            found = paired(first, [REPLICATE] * 3, _eigenpairs, rows_of_all(first, gram, 1), self.top)
            values, weights, second = (paired(first, REPLICATE, operator.getitem, found, k) for k in range(3))
            here = [gram, first_sample(first.program)]
            own, second = (
                paired(first, Shard(2), _own_samples, weights, *here, 2),
                paired(first, Shard(0), _own_samples, second, *here, 0),
            )
        else:
            values, weights, second = first.emit(_eigenpairs, gram, self.top)
            own = weights
        vectors = {p.name: p.emit(_as_param, combined(p, groups, own), p.node) for p in params}
        along = {"values": values, "first": paired(first, Shard(0), _along, slopes, weights), "second": second}
        return vectors, {self.field_of(part): node for part, node in along.items()}


@dataclass(frozen=True)
class NTK(Extension):
    """The Gram matrix of the outputs' derivatives in one parameter, [N, *f.shape[1:], N, *f.shape[1:]]. Needs no loss.

    Its sum over parameters is the empirical neural tangent kernel (Jacot et al. 2018). [N, C, *P] is not formed for
    parameters that have factors. `fxcurv.linear.NTK` takes two batches, and does not form the kernel.
    """

    savefield = "ntk"
    sample_axis = 0
    pairs = True
    requires = Identity()

    def extract(self, param: Param) -> fx.Node:
        groups = groups_of(param.program, self.requires)
        head = param.program.heads[0]
        return paired(param, Shard(0), _by_outputs, pair(param, groups, groups), head, head.meta["place"])


class Vectors(Mapping):
    """Parameter name -> vectors [Q, *P]; an object is equal only to itself."""

    def __init__(self, of: Mapping[str, Tensor]):
        self._of = dict(of)

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name]

    def __iter__(self):
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __repr__(self) -> str:
        """Show values, so that the state of a pass over data recognises equal vectors."""
        marks = [f"{name}{list(t.shape)} {float(t.double().norm()):.17g}" for name, t in self._of.items()]
        return f"Vectors({', '.join(marks)})"


@dataclass(frozen=True)
class PerSample(Extension):
    """Rows per sample that add up over parameters.

    Args:
        total: give only the sum over the parameters, as `result.<savefield>_total`; the field itself is then empty.
    """

    total: bool = field(default=False, kw_only=True)
    sample_axis = 0
    combine = (Combine("rows"),)

    @property
    def leaves_out(self) -> bool:
        return self.total

    @property
    def extras(self) -> dict[str, Combine]:
        return {f"{self.savefield}_total": self.combine[0]} if self.total else {}

    def extract_all(self, params: list[Param]) -> tuple[dict[str, Any], dict[str, fx.Node]]:
        found = {p.name: self.extract(p) for p in params}
        if not self.total:
            return found, {}
        return {}, {f"{self.savefield}_total": params[0].emit(sum_of, list(found.values()))}


@dataclass(frozen=True)
class Dots(PerSample):
    """Inner products of the individual gradients with vectors, <g_n, v_q> of one parameter, [N, Q]; by token [N, T, Q].

    [N, *P] is not formed for matrix products. By `fxcurv.over`, where these are influence scores of a data set, it is
    formed for no more than a batch. The sum over parameters (`total=True`) is the inner product of whole gradients.

    Args:
        vectors: parameter name -> [Q, *P], for every parameter of the quantity (see `params=`). They are part of the
            program, which reads them at every call: other values may be written into the same tensors (`copy_`), if
            these are contiguous, on the model's device and in its dtype.
    """

    vectors: Any = None
    savefield = "dots"

    def check(self) -> None:
        if not isinstance(self.vectors, Mapping) or not all(isinstance(v, Tensor) for v in self.vectors.values()):
            raise ExtensionError(
                f"Dots({type(self.vectors).__name__}): pass a dict from parameter names to tensors [Q, *P]"
            )
        if not isinstance(self.vectors, Vectors):
            object.__setattr__(self, "vectors", Vectors(self.vectors))

    def extract(self, param: Param) -> fx.Node:
        shape, val = tuple(param.node.meta["val"].shape), param.node.meta["val"]
        if param.name not in self.vectors:
            raise ExtensionError(
                f"Dots: no vector for parameter '{param.name}': pass one, or Dots(params=...) without it"
            )
        given = self.vectors[param.name]
        if tuple(given.shape[1:]) != shape or given.ndim != len(shape) + 1:
            wanted = f"[Q, {', '.join(map(str, shape))}]"
            raise ExtensionError(f"Dots: the vectors of '{param.name}' are {list(given.shape)}: pass {wanted}")
        with param.program.graph.inserting_before(param.program.output):
            vectors = constant(param.program, given.detach().to(val.device, val.dtype).contiguous())
        found = dots(param, GRADIENT, vectors) if param.positions is None else None
        if found is not None:
            return param.emit(_first, found)
        record(param, WHOLE)
        return param.emit(_dots, param.contract(power=1, reduce="v"), vectors)


# traced ------------------------------------------------------------------------------------------------------------


def _first(t: Tensor) -> Tensor:
    return t[0]


def _of_gradients(gram: Tensor, rows: bool | None) -> Tensor:
    """[1, N, 1, N] -> [N, N]; for a column per position [T, N, T, N] -> [N, T, N, T], or [T, T] if these are rows."""
    if rows is None:
        return gram[0, :, 0]
    return gram[:, 0, :, 0] if rows else gram.permute(1, 0, 3, 2)


def _eigenpairs(gram: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """(eigenvalues [K], weights [K, V, N] of the columns that make unit eigenvectors, second derivatives [N, K])."""
    v, n = gram.shape[:2]
    matrix = gram.reshape(v * n, v * n)
    values, vectors = torch.linalg.eigh((matrix + matrix.t()) / 2)
    last = v * n - 1 - torch.arange(top, device=gram.device)  # below zero where there are fewer than `top`
    there = last.clamp(min=0)
    values, vectors = values[there], vectors[:, there].t().reshape(top, v, n)
    known = (last >= 0) & (values > values[:1] * torch.finfo(gram.dtype).eps * (v * n))
    values = torch.where(known, values, 0)
    second = (values.reshape(-1, 1) * vectors.square().sum(1)).t()
    scale = torch.where(known, values, 1).rsqrt() * known
    return values, vectors * scale.reshape(-1, 1, 1), second


def _own_samples(t: Tensor, gram: Tensor, first: Tensor, dim: int) -> Tensor:
    """This rank's samples along `dim`, from those of all ranks; `gram` has this rank's in dimension 1."""
    return t.index_select(dim, first + torch.arange(gram.shape[1], device=t.device))


def _along(slopes: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("nwm,kwm->nk", slopes[0], weights)


def _as_param(vectors: Tensor, param: Tensor) -> Tensor:
    return vectors.reshape(vectors.shape[0], *param.shape)


def _by_outputs(gram: Tensor, head: Tensor, place: Any) -> Tensor:
    axes = list(samples_first(head, place).shape[1:])
    if place.outer * place.inner == 1:
        del axes[place.dim]
    n, m = gram.shape[1], gram.shape[3]
    return gram.permute(1, 0, 3, 2).reshape((n, *axes, m, *axes))


def _dots(p: Tensor, vectors: Tensor) -> Tensor:
    lead = p.shape[: p.ndim - vectors.ndim + 1]
    size = prod(vectors.shape[1:])
    return p.reshape(*lead, size) @ vectors.reshape(vectors.shape[0], size).t()
