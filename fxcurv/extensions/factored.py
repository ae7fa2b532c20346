"""What all Kronecker-factored quantities share: inputs, columns and their second moments."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.contractions.factors import Conv, Factor, Gather
from fxcurv.contractions.sizes import dims
from fxcurv.cost import Cost
from fxcurv.errors import ExtensionError
from fxcurv.extensions.base import Extension, Param
from fxcurv.extensions.joint import partners
from fxcurv.extensions.layers import (
    Embed,
    Layer,
    LayerUse,
    NoLayer,
    averaged,
    features,
    first_moment,
    gram,
    inputs,
    read,
    second_moment,
)
from fxcurv.ir.lengths import said
from fxcurv.ir.origin import locate
from fxcurv.ir.placement import Shard
from fxcurv.ir.precision import wide, widely
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Decision, Program
from fxcurv.ir.traced import sum_of
from fxcurv.kronecker import Arrangement, Eigenbasis, Joint, Kronecker, Within
from fxcurv.quantity import GRADIENT, KINDS, Group
from fxcurv.rules.base import rule_of
from fxcurv.walks.groups import groups_of
from fxcurv.walks.uses import Use, columns_of

CHOICES = {
    "assign": ("all", "layers"),
    "weight_sharing": ("backpack", "expand", "reduce"),
    "fisher": ("mc", "empirical"),
    "others": ("auto", "exact", "skip", "error"),
    "joint": (False, True),
}


class Factored(Extension):
    """What all Kronecker-factored quantities share."""

    needs_convex = True
    weight_sharing: str
    others: str

    @property
    def leaves_out(self) -> bool:
        """Whether parameters that are no layer are skipped."""
        return getattr(self, "others", "error") == "skip"  # KFRA refuses it

    def check(self) -> None:
        for argument, allowed in CHOICES.items():
            value = getattr(self, argument, allowed[0])
            if value not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ExtensionError(f"{type(self).__name__}({argument}={value!r}): use one of {choices}")

    def extract_all(self, params: list[Param]) -> tuple[dict[str, Any], dict[str, fx.Node]]:
        biases = self._partners(params)
        weights = {bias: weight for weight, bias in biases.items()}
        found: dict[str, Any] = {}
        for p in params:
            if p.name in weights:
                _note(p, f"in the block of '{weights[p.name]}'")
                found[p.name] = Within(weights[p.name])
            else:
                found[p.name] = self._factors(p, biases[p.name]) if p.name in biases else self.extract(p)
        return {name: factors for name, factors in found.items() if factors is not None}, {}

    def _partners(self, params: list[Param]) -> dict[str, str]:
        """Weight -> the bias that shares its block."""
        if not getattr(self, "joint", False) or not params:
            return {}
        group, layers = groups_of(params[0].program, self.requires)[0], dict[str, Layer]()
        for p in params:
            uses = self._uses(p)
            layer = self._layer(p, _distinct_uses(uses, group)) if uses else None
            layers |= {p.name: layer} if layer is not None else {}
        return partners(params[0].program, layers)

    def _uses(self, param: Param) -> list[Use]:
        groups, reached = groups_of(param.program, self.requires), param.program.walked.uses[param.name]
        uses = [u for u in reached if any(g in u.groups for g in groups)]
        # a loss that is linear in f has no columns, but its layers have inputs
        return uses or [u for u in reached if GRADIENT in u.groups]

    def extract(self, param: Param) -> Kronecker | Eigenbasis | None:
        return self._factors(param, None)

    def _factors(self, param: Param, bias: str | None) -> Kronecker | Eigenbasis | None:
        """The factors of a parameter; with `bias` those of a weight and its bias as one matrix."""
        groups, uses = groups_of(param.program, self.requires), self._uses(param)
        if not uses:
            return self._unreached(param)
        found = {g: self._layer(param, _distinct_uses(uses, g)) for g in groups}
        layers = {g: layer for g, layer in found.items() if layer is not None}
        if not layers:
            return self._factors_without_layer(param)
        layer, sharing = layers[groups[0]], self.weight_sharing
        if sharing == "backpack":
            sharing = "convolution" if layer.single_convolution else "expand"
        factors = [param.emit(sum_of, [_outputs(param, layers[g], g, sharing) for g in groups])]
        if not layer.bias:
            given = [(u.use.factor, u.columns) for u in layer.uses]
            factors.append(param.emit(widely, input_factor, given, sharing, dtype_of(param), bias is not None))
        _record(param, layer, f"{sharing}, with '{bias}'" if bias is not None else sharing)
        for factor in factors:
            factor.meta["symmetric"] = factor.meta["val"].ndim == 2
        arrangement = layer.arrangement if bias is None else self._joint_arrangement(param, layer.arrangement, bias)
        return self._of_layer(param, layers, Kronecker(factors, arrangement))

    def _joint_arrangement(self, param: Param, weight: Arrangement, bias: str) -> Joint:
        other = Param(param.program, bias, self)
        uses = _distinct_uses(self._uses(other), groups_of(param.program, self.requires)[0])
        layer = self._layer(other, uses)
        return Joint(weight, layer.arrangement, bias)  # type: ignore[union-attr]

    def _layer(self, param: Param, uses: list[Use]) -> Layer | None:
        """The layer of a parameter, None if it has none."""
        try:
            return read(tuple(param.node.meta["val"].shape), uses, param.program.rules)
        except NoLayer as why:
            if self.others != "error":
                return None
            at = next((u.op for u in uses if u.op is not None), None) or next(iter(param.node.users))
            name = type(self).__name__
            raise ExtensionError(
                f"{name}: parameter '{param.name}' has no Kronecker factors: {why}.\nIt is used by {locate(at)}\n"
                f'Way out: {name}(others="exact") gives its exact block, {name}(others="skip") leaves it out.'
            ) from why

    def _factors_without_layer(self, param: Param) -> Kronecker | Eigenbasis | None:
        """The factors of a parameter that is no layer, by `others`."""
        shape = tuple(param.node.meta["val"].shape)
        exact = self.others == "exact" or sum(s > 1 for s in shape) <= 1
        if self.others == "skip":
            _note(param, "left out")
            return None
        if not exact:
            _note(param, "diagonal of its block")
            squares = param.contract(power=2, reduce="vn")
            return self._of_diagonal(param, param.emit(torch.flatten, squares))
        _note(param, f"exact block [{prod(shape)}, {prod(shape)}]")
        p = param.contract(power=1, reduce="", precise=True)
        return self._of_exact(param, param.emit(_exact_block, p), p)

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
        return Kronecker([block], flat(param))

    def _of_diagonal(self, param: Param, diagonal: fx.Node) -> Any:
        return Kronecker([diagonal], flat(param))

    def _of_zeros(self, param: Param, factors: Kronecker) -> Any:
        return factors


def _distinct_uses(uses: list[Use], group: Group) -> list[Use]:
    """The uses of a parameter, each once: of those that several sweeps made, the one with the columns of `group`."""
    found: dict[Any, Use] = {}
    for use in uses:
        where = (use.op, use.value, use.path) if use.op is not None else id(use)
        if where not in found or group in use.groups:
            found[where] = use
    return list(found.values())


# emitting ----------------------------------------------------------------------------------------------------------


def dtype_of(param: Param) -> torch.dtype:
    """The dtype of factors."""
    return wide(param.node.meta["val"].dtype)


def flat(param: Param) -> Arrangement:
    """The flattened parameter as a column: all of its entries are outputs."""
    shape = tuple(param.node.meta["val"].shape)
    return Arrangement(shape, (prod(shape),), (0,))


def source_of(param: Param, use: LayerUse, group: Group) -> tuple[Factor, fx.Node, tuple[Shard, int | None] | None]:
    """The arguments of `features` for the columns of `group`."""
    return use.use.factor, columns_of(param.program, use.use, group, use.source, param.origin()), use.at


def _outputs(param: Param, layer: Layer, group: Group, sharing: str) -> fx.Node:
    """B from the columns of one group."""
    given = [(*source_of(param, u, group), u.rows) for u in layer.uses if group in u.use.groups]
    if not given:
        return param.emit(_square_zeros, param.node, layer.arrangement.rows)
    fold = _fold(param.program, group) if sharing == "reduce" else None
    return param.emit(widely, _output_factor, given, sharing, fold, dtype_of(param))


def _fold(program: Program, group: Group) -> tuple[int, int] | None:
    """(axis, classes): how exact columns [V] split into classes and positions, the latter at `axis`."""
    term = program.analysis.terms[group.term]
    if not KINDS[group.kind].by_class:
        return None
    z, where = term.prediction.meta["val"], term.prediction.meta["place"]
    rule: Any = rule_of(term.node.target, program.rules)
    axis = rule.class_axis(z.ndim)
    if axis is not None:
        return 1, z.shape[axis]
    return 0, said(where.outer * where.inner) if where.dim == z.ndim - 1 else z.shape[-1]


def _record(param: Param, layer: Layer, sharing: str) -> None:
    """Enter the computation into the report, though there was nothing to choose."""
    cost = Cost(0, 0)
    for u in layer.uses:
        d = dims(pytree.tree_map(lambda n: n.meta["val"] if isinstance(n, fx.Node) else n, u.use.factor))
        pairs = d.v * d.n * (d.s if sharing.startswith("expand") else 1)
        squares = 2 * pairs * d.o**2 * d.k + (0 if layer.bias else 2 * d.n * d.s * d.i**2)
        cost = cost + Cost(squares, d.inputs + d.item * (d.unfold + d.o**2 + d.i**2), 0, 4)
    param.program.decisions.append(
        Decision(
            param.name, param.label, layer.uses[0].use.rule, f"covariances, {sharing}", int(cost.flops),
            int(cost.bytes), cost.seconds(param.program.machine), savefield=param.origin()["savefield"], stage="extract",
        )
    )  # fmt: skip


def _note(param: Param, what: str) -> None:
    """Enter into the report how a parameter is treated; its cost has a row of its own."""
    savefield = param.origin()["savefield"]
    program = param.program
    program.decisions.append(
        Decision(param.name, param.label, "", what, 0, 0, 0.0, savefield=savefield, stage="extract")
    )


# traced ------------------------------------------------------------------------------------------------------------

Given = Sequence[tuple[Factor, Tensor, Any, Embed | None]]


def _samples_and_positions(f: Any) -> tuple[int, int]:
    if isinstance(f, Conv):
        merged = said(f.place.outer * f.place.inner)
        return f.a.shape[0] // merged, merged * prod(f.g.shape[3:])
    return (f.index if isinstance(f, Gather) else f.a).shape[:2]


def input_factor(
    given: Sequence[tuple[Any, Embed | None]], sharing: str, dtype: torch.dtype, joint: bool = False
) -> Tensor:
    """A, [in, in], or [in] for lookups; `joint`: of the inputs and a one, [in + 1, in + 1]."""
    factors = [f for f, _ in given]
    n = _samples_and_positions(factors[0])[0]
    s = sum(_samples_and_positions(f)[1] for f in factors)
    if isinstance(factors[0], Gather):
        counts = sum_of([_counts(f, dtype) for f in factors])
        return (counts / s).square().sum(0) / n if sharing == "reduce" else counts.sum(0) / (n * s)
    if sharing == "reduce":
        mean = sum_of([embedded(averaged(inputs(f)).to(dtype).sum(1), e, 1) for f, e in given]) / s
        mean = with_ones(mean) if joint else mean
        return mean.t() @ mean / n
    total = sum_of([_moment_of_inputs(f, e, dtype, joint) for f, e in given])
    return total / n if sharing == "convolution" else total / (n * s)


def _moment_of_inputs(f: Any, embed: Embed | None, dtype: torch.dtype, joint: bool) -> Tensor:
    moment = embedded(embedded(second_moment(f).to(dtype), embed, 0), embed, 1)
    if not joint:
        return moment
    first, count = first_moment(f)
    first = embedded(first.to(dtype), embed, 0).unsqueeze(1)
    last = torch.cat([first, count.to(dtype).reshape(1, 1)])
    return torch.cat([torch.cat([moment, first.t()]), last], 1)


def with_ones(a: Tensor) -> Tensor:
    """[*, in] -> [*, in + 1]: append the one that the bias multiplies."""
    return torch.nn.functional.pad(a, (0, 1), value=1.0)


def _counts(f: Gather, dtype: torch.dtype) -> Tensor:
    """How often each sample looks up each row, [N, rows]; look-ups of the padding do not count."""
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
        parts.append(embedded(b, rows, 2))
    if sharing == "expand":
        return sum_of([gram(b.transpose(2, 3).flatten(0, 2)) for b in parts])
    total = sum_of([b.squeeze(3) if b.shape[3] == 1 else b.sum(3) for b in parts])
    return gram(total.flatten(0, 1))


def embedded(t: Tensor, embed: Embed | None, dim: int) -> Tensor:
    """`t` with zeros along `dim` where a slice leaves features out."""
    return t if embed is None else embed(t, dim)


def entries(p: Tensor) -> Tensor:
    """[V, N, *P] -> [V, N, entries]; the parameter may be 0-dim."""
    return p.flatten(2) if p.ndim > 2 else p.unsqueeze(2)


def _exact_block(p: Tensor) -> Tensor:
    return gram(entries(p).flatten(0, 1))


def _square_zeros(param: Tensor, size: int) -> Tensor:
    return param.new_zeros(size, size, dtype=wide(param.dtype))
