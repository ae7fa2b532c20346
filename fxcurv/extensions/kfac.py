"""Kronecker factors of the Gauss-Newton's blocks (Martens & Grosse 2015; Botev et al. 2017; George et al. 2018).

Per use of a weight [out, in]: a_{n,s} the inputs at the shared positions s, b_{v,n,s} the columns there, so that
P[v,n] = sum_s b a^T. With S positions of all uses together, the block B (x) A is

    sharing         A                                          B
    "convolution"   1/N     sum_{n,s} a a^T                    sum_{v,n} (sum_s b)(sum_s b)^T
    "expand"        1/(N S) sum_{n,s} a a^T                    sum_{v,n,s} b b^T
    "reduce"        1/N     sum_n (mean_s a)(mean_s a)^T       sum_{v,n} (sum_s b)(sum_s b)^T

which are one and the same where S = 1. `weight_sharing="backpack"` is "convolution" for a convolution that is used once
and has no groups, and "expand" for everything else. Inputs are averaged over groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv._torch import pytree
from fxcurv.candidates import dims
from fxcurv.cost import Cost
from fxcurv.errors import ExtensionError, locate
from fxcurv.extensions.base import Extension, Param
from fxcurv.factors import Arrange, Conv, Dense, Factor, Gather, Jacobian, Spec
from fxcurv.kronecker import Arrangement, Eigenbasis, Kronecker
from fxcurv.layers import Embed, Layer, LayerUse, NoLayer, averaged, features, gram, inputs, read, second_moment
from fxcurv.placement import Shard
from fxcurv.precision import wide, widely
from fxcurv.program import Decision, Program
from fxcurv.quantity import GRADIENT, Group, Quantity, SqrtGGN, groups_of
from fxcurv.rules.base import rule_of
from fxcurv.uses import Use, columns_of

CHOICES = {
    "weight_sharing": ("backpack", "expand", "reduce"),
    "fisher": ("mc", "empirical"),
    "blocks": ("kron", "exact"),
}


class _Factored(Extension):
    """What all Kronecker-factored quantities share."""

    needs_convex = True
    weight_sharing: str
    blocks: str

    def check(self) -> None:
        for argument, allowed in CHOICES.items():
            value = getattr(self, argument, allowed[0])
            if value not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ExtensionError(f"{type(self).__name__}({argument}={value!r}): use one of {choices}")

    def extract(self, param: Param) -> Kronecker | Eigenbasis:
        groups = groups_of(param.program, self.requires)
        reached = param.program.state["uses"][param.name]
        uses = [u for u in reached if any(g in u.groups for g in groups)]
        # a loss that is linear in f has no columns, but its layers have inputs
        uses = uses or [u for u in reached if GRADIENT in u.groups]
        if not uses:
            return self._unreached(param)
        found = {g: self._layer(param, _distinct(uses, g)) for g in groups}
        layers = {g: layer for g, layer in found.items() if layer is not None}
        if not layers:
            p = param.contract(power=1, reduce="", precise=True)
            b = param.emit(_exact_block, p)
            return self._of_exact(param, b, p)
        layer, sharing = layers[groups[0]], self.weight_sharing
        if sharing == "backpack":
            sharing = "convolution" if layer.single_convolution else "expand"
        factors = [param.emit(_sum, [_outputs(param, layers[g], g, sharing) for g in groups])]
        if not layer.bias:
            given = [(u.use.factor, u.columns) for u in layer.uses]
            factors.append(param.emit(widely, _input_factor, given, sharing, _dtype(param)))
        _record(param, layer, sharing)
        return self._of_layer(param, layers, Kronecker(factors, layer.arrangement))

    def _layer(self, param: Param, uses: list[Use]) -> Layer | None:
        """The layer that a parameter is, None for one that has its exact block."""
        try:
            return read(tuple(param.node.meta["val"].shape), uses, param.program.rules)
        except NoLayer as why:
            if self.blocks == "exact":
                return None
            at = next((u.op for u in uses if u.op is not None), None) or next(iter(param.node.users))
            name = type(self).__name__
            raise ExtensionError(
                f"{name}: parameter '{param.name}' has no Kronecker factors: {why}.\nIt is used by {locate(at)}\n"
                f'Way out: {name}(blocks="exact") gives its exact block, {name}(params=...) leaves it out.'
            ) from why

    def _unreached(self, param: Param) -> Any:
        """Zeros, for a parameter that the loss does not reach."""
        shape = tuple(param.node.meta["val"].shape)
        arrangement = Arrangement(shape, shape, tuple(range(min(1, len(shape)))), tuple(range(1, len(shape))))
        sides = (arrangement.rows, arrangement.columns)[: 2 if len(shape) > 1 else 1]
        zeros = [param.emit(_square_zeros, param.node, size) for size in sides]
        return self._of_zeros(param, Kronecker(zeros, arrangement))

    # what KFAC and KFLR return; EKFAC goes on from there

    def _of_layer(self, param: Param, layers: dict[Group, Layer], factors: Kronecker) -> Any:
        return factors

    def _of_exact(self, param: Param, block: fx.Node, p: fx.Node) -> Any:
        return Kronecker([block], _flat(param))

    def _of_zeros(self, param: Param, factors: Kronecker) -> Any:
        return factors


def _distinct(uses: list[Use], group: Group) -> list[Use]:
    """The uses of a parameter, each once, with the columns of `group` where it has them: a sweep of its own makes it anew."""
    found: dict[Any, Use] = {}
    for use in uses:
        where = (use.op, use.value, use.path) if use.op is not None else id(use)
        if where not in found or group in use.groups:
            found[where] = use
    return list(found.values())


def _check_sampled(extension: KFAC | EKFAC) -> None:
    name, m = type(extension).__name__, extension.mc_samples
    if not isinstance(m, int) or m < 1:
        raise ExtensionError(f"{name}(mc_samples={m}): use a positive integer")
    if extension.fisher == "empirical" and m != 1:
        raise ExtensionError(f'{name}(mc_samples={m}, fisher="empirical"): there is one empirical column, not {m}')


def _sampled(extension: KFAC | EKFAC) -> Quantity:
    return SqrtGGN(empirical=True) if extension.fisher == "empirical" else SqrtGGN(mc=extension.mc_samples)


@dataclass(frozen=True)
class KFAC(_Factored):
    """Kronecker factors from sampled columns: `Kronecker` [B, A] for a weight, [B] for a bias.

    B: [out, out]; A: [in, in], or [in] for an embedding, whose A is diagonal (its diagonal, under "reduce").

    Args:
        mc_samples: number of sampled columns.
        weight_sharing: "backpack", "expand" or "reduce": how shared positions are approximated, see the module.
        fisher: "mc" for sampled columns, "empirical" for the gradient in their place.
        blocks: "exact" gives a parameter that is no layer's weight or bias (a norm's scale) its exact block [B], of
            the flattened parameter; "kron" refuses it by name.
    """

    mc_samples: int = 1
    weight_sharing: str = "backpack"
    fisher: str = "mc"
    blocks: str = "kron"
    savefield = "kfac"

    @property
    def requires(self) -> Quantity:
        return _sampled(self)

    def check(self) -> None:
        super().check()
        _check_sampled(self)


@dataclass(frozen=True)
class KFLR(_Factored):
    """Kronecker factors from the exact columns: `Kronecker` [B, A] for a weight, [B] for a bias.

    Under "reduce", the columns of one class at all positions of the loss are summed first. (For squares and binary
    cross-entropy, the last axis of the prediction counts as the classes.)

    Args:
        weight_sharing: as for `KFAC`.
        blocks: as for `KFAC`.
    """

    weight_sharing: str = "backpack"
    blocks: str = "kron"
    savefield = "kflr"
    requires = SqrtGGN()

    @property
    def shows_columns(self) -> bool:
        """A sum of columns over the positions of the loss depends on which columns they are."""
        return self.weight_sharing == "reduce"


@dataclass(frozen=True)
class EKFAC(_Factored):
    """The eigenbasis of KFAC's factors and the exact second moments in it: `Eigenbasis` [Q_B, Q_A, lambda].

    lambda[out, in] = sum_{v,n} (Q_B^T P[v,n] Q_A)^2. A bias has [Q_B, lambda], with lambda [out]; an embedding's Q_A is
    a vector of ones.

    Args:
        mc_samples: as for `KFAC`.
        weight_sharing: as for `KFAC`.
        fisher: as for `KFAC`.
        blocks: as for `KFAC`.
    """

    mc_samples: int = 1
    weight_sharing: str = "backpack"
    fisher: str = "mc"
    blocks: str = "kron"
    savefield = "ekfac"

    @property
    def requires(self) -> Quantity:
        return _sampled(self)

    def check(self) -> None:
        super().check()
        _check_sampled(self)

    def _of_layer(self, param: Param, layers: dict[Group, Layer], factors: Kronecker) -> Eigenbasis:
        basis = [param.emit(_eigenvectors, f) for f in factors]
        bias = next(iter(layers.values())).bias
        rotate = _rotated_bias if bias else _rotated_lookup if factors[-1].meta["val"].ndim == 1 else _rotated
        parts = []
        for group, layer in layers.items():
            given = [(*_source(param, u, group), u.rows, u.columns) for u in layer.uses if group in u.use.groups]
            if given:
                rotated = param.emit(widely, rotate, given, basis, _dtype(param))
                parts.append(param.contract_factors(Spec(2, "vn"), rotated, layer.uses[0].use.rule))
        if not parts:
            return Eigenbasis([*basis, param.emit(_zero_moments, factors)], factors.arrangement)
        moments = param.emit(_sum, parts)
        if rotate is _rotated_lookup:
            moments = param.emit(_transposed, moments)
        return Eigenbasis([*basis, moments], factors.arrangement)

    def _of_exact(self, param: Param, block: fx.Node, p: fx.Node) -> Eigenbasis:
        basis = param.emit(_eigenvectors, block)
        return Eigenbasis([basis, param.emit(_moments, p, basis)], _flat(param))

    def _of_zeros(self, param: Param, factors: Kronecker) -> Eigenbasis:
        basis = [param.emit(_identity_like, f) for f in factors]
        return Eigenbasis([*basis, param.emit(_zero_moments, factors)], factors.arrangement)


# emitting ----------------------------------------------------------------------------------------------------------


def _dtype(param: Param) -> torch.dtype:
    """The dtype of factors."""
    return wide(param.node.meta["val"].dtype)


def _flat(param: Param) -> Arrangement:
    shape = tuple(param.node.meta["val"].shape)
    return Arrangement(shape, (prod(shape),), (0,))


def _source(param: Param, use: LayerUse, group: Group) -> tuple[Factor, fx.Node, tuple[Shard, int | None] | None]:
    """The arguments of `features` for the columns of `group`."""
    return use.use.factor, columns_of(param.program, use.use, group, use.source, param.origin()), use.at


def _outputs(param: Param, layer: Layer, group: Group, sharing: str) -> fx.Node:
    """B of the columns of one group."""
    given = [(*_source(param, u, group), u.rows) for u in layer.uses if group in u.use.groups]
    if not given:
        return param.emit(_square_zeros, param.node, layer.arrangement.rows)
    fold = _fold(param.program, group) if sharing == "reduce" else None
    return param.emit(widely, _output_factor, given, sharing, fold, _dtype(param))


def _fold(program: Program, group: Group) -> tuple[int, int] | None:
    """(axis, classes): how exact columns [V] are classes times positions, with the positions at `axis`."""
    term = program.state["terms"][group.term]
    if group.kind != "exact":
        return None
    z, where = term.prediction.meta["val"], term.prediction.meta["place"]
    rule: Any = rule_of(term.node.target, program.rules)
    axis = rule.class_axis(z.ndim)
    if axis is not None:
        return 1, z.shape[axis]
    return 0, where.outer * where.inner if where.dim == z.ndim - 1 else z.shape[-1]


def _record(param: Param, layer: Layer, sharing: str) -> None:
    """What is computed goes into the report, though there was nothing to choose."""
    cost = Cost(0, 0)
    for u in layer.uses:
        d = dims(pytree.tree_map(lambda n: n.meta["val"] if isinstance(n, fx.Node) else n, u.use.factor))
        pairs = d.v * d.n * (d.s if sharing == "expand" else 1)
        squares = 2 * pairs * d.o**2 * d.k + (0 if layer.bias else 2 * d.n * d.s * d.i**2)
        cost = cost + Cost(squares, d.inputs + d.item * (d.unfold + d.o**2 + d.i**2), 0, 4)
    param.program.decisions.append(
        Decision(
            param.name, param.label, layer.uses[0].use.rule, f"covariances, {sharing}", int(cost.flops),
            int(cost.bytes), cost.seconds(param.program.machine), savefield=param.origin()["savefield"], stage="extract",
        )
    )  # fmt: skip


# traced ------------------------------------------------------------------------------------------------------------

Given = Sequence[tuple[Factor, Tensor, Any, Embed | None]]


def _samples_and_positions(f: Any) -> tuple[int, int]:
    if isinstance(f, Conv):
        merged = f.place.outer * f.place.inner
        return f.a.shape[0] // merged, merged * prod(f.g.shape[3:])
    return (f.index if isinstance(f, Gather) else f.a).shape[:2]


def _input_factor(given: Sequence[tuple[Any, Embed | None]], sharing: str, dtype: torch.dtype) -> Tensor:
    """A, [in, in], or [in] for lookups."""
    factors = [f for f, _ in given]
    n = _samples_and_positions(factors[0])[0]
    s = sum(_samples_and_positions(f)[1] for f in factors)
    if isinstance(factors[0], Gather):
        counts = _sum([_counts(f, dtype) for f in factors])
        return (counts / s).square().sum(0) / n if sharing == "reduce" else counts.sum(0) / (n * s)
    if sharing == "reduce":
        mean = _sum([_embedded(averaged(inputs(f)).to(dtype).sum(1), e, 1) for f, e in given]) / s
        return mean.t() @ mean / n
    total = _sum([_embedded(_embedded(second_moment(f).to(dtype), e, 0), e, 1) for f, e in given])
    return total / n if sharing == "convolution" else total / (n * s)


def _counts(f: Gather, dtype: torch.dtype) -> Tensor:
    """How often each sample looks up each row, [N, rows]; never the padding."""
    counted = (f.index != f.padding).to(dtype)
    return counted.new_zeros(f.index.shape[0], f.rows).scatter_add(1, f.index, counted)


def _output_factor(given: Given, sharing: str, fold: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """B, [out, out]."""
    parts = []
    for factor, source, at, rows in given:
        b = features(factor, source, at).to(dtype)
        if fold is not None:
            axis, classes = fold
            b = b.unflatten(0, (classes, -1) if axis == 1 else (-1, classes)).sum(axis)
        parts.append(_embedded(b, rows, 2))
    if sharing == "expand":
        return _sum([_moment(b.transpose(2, 3).flatten(0, 2)) for b in parts])
    total = _sum([b.squeeze(3) if b.shape[3] == 1 else b.sum(3) for b in parts])
    return _moment(total.flatten(0, 1))


def _moment(rows: Tensor) -> Tensor:
    return gram(rows)


def _embedded(t: Tensor, embed: Embed | None, dim: int) -> Tensor:
    return t if embed is None else embed(t, dim)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])


def _exact_block(p: Tensor) -> Tensor:
    return _moment(p.flatten(2).flatten(0, 1))


def _eigenvectors(factor: Tensor) -> Tensor:
    return torch.ones_like(factor) if factor.ndim == 1 else torch.linalg.eigh(factor)[1]


def _rotated(given: Sequence[tuple], basis: Sequence[Tensor], dtype: torch.dtype) -> list[Factor]:
    """The factors of Q_B^T P Q_A, [out, in]."""
    out: list[Factor] = []
    for factor, source, at, rows, columns in given:
        a = inputs(factor).to(dtype)  # [N, S, K, I]
        b = features(factor, source, at).to(dtype).transpose(2, 3)  # [V, N, S, K O]
        if a.shape[2] > 1:  # groups are positions of their own, whose columns are zero in the other groups
            k = a.shape[2]
            eye = torch.eye(k, dtype=dtype, device=b.device).unsqueeze(-1)
            b = (b.unflatten(3, (k, -1)).unsqueeze(3) * eye).flatten(4).flatten(2, 3)
        a = _embedded(a.flatten(1, 2), columns, 2) @ basis[1]
        g = _embedded(b, rows, 3) @ basis[0]
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
    p = _sum([_embedded(features(f, source, at).to(dtype).sum(3), rows, 2) for f, source, at, rows, _ in given])
    return [Jacobian(p @ basis[0])]


def _moments(p: Tensor, basis: Tensor) -> Tensor:
    return (p.flatten(2) @ basis).square().sum((0, 1))


def _transposed(t: Tensor) -> Tensor:
    return t.t()


def _square_zeros(param: Tensor, size: int) -> Tensor:
    return param.new_zeros(size, size, dtype=wide(param.dtype))


def _identity_like(factor: Tensor) -> Tensor:
    return torch.eye(factor.shape[0], dtype=factor.dtype, device=factor.device)


def _zero_moments(factors: Sequence[Tensor]) -> Tensor:
    return factors[0].new_zeros([f.shape[0] for f in factors])
