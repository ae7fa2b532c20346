"""Identities between the quantities of one result, and equality up to rounding (for `selfcheck`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcurv.extensions import (
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    Jacobian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from fxcurv.ir.placement import samples_first
from fxcurv.ir.program import Program
from fxcurv.runtime.probe import ROUNDING

# A rectifier or a maximum within rounding of its kink may take the other branch in the plain pass. In single and half precision
# that moves entries of a gradient further than the rounding of any op, but not the gradient as a whole.
KINKS = 0.02


@dataclass(frozen=True)
class Pair:
    """A value of the program and what it must equal.

    Attributes:
        scale: rounding is relative to its magnitude: that of the terms, where they cancel (default: `want`).
        allowed: an absolute difference that passes even if the dtype's rounding is smaller (0-dim).
        power: 2 for squares of gradients, which noise in the gradient moves as squares.
        extension, param: the quantity that the value is of, for an identity.
    """

    name: str
    got: Tensor
    want: Tensor
    scale: Tensor | None = None
    allowed: Tensor | None = None
    power: int = 1
    extension: str = ""
    param: str = ""

    def within(self, allowed: Tensor) -> Pair:
        """The same pair, with at least this difference allowed."""
        return dataclasses.replace(
            self, allowed=allowed if self.allowed is None else torch.maximum(allowed, self.allowed)
        )

    def excused(self, factor: int, noise: Tensor | None) -> Pair:
        """The same pair with e allowed, `factor` times the gradient's `noise`; a square v moves by 2 sqrt(v) e + e²."""
        if noise is None:
            return self
        noise = factor * noise
        moved = noise if self.power == 1 else 2 * self.size().sqrt() * noise + noise.square() * max(1, self.spread())
        return self.within(moved)

    def size(self) -> Tensor:
        """The magnitude that rounding is relative to, 0-dim."""
        return _largest(self.want if self.scale is None else self.scale)

    def spread(self) -> int:
        """The largest number of squares that one value may sum."""
        return max(self.got.numel(), self.want.numel(), 1)

    def equal(self) -> Tensor:
        """Whether the two are equal, 0-dim; NaN equals NaN, infinity itself."""
        got, want = self.got.detach(), self.want.detach()
        if got.shape != want.shape:
            return torch.zeros((), dtype=torch.bool, device=want.device)
        if not want.is_floating_point() or not got.is_floating_point():
            return (got == want).all()
        got, want = _to_common_dtype(got, want), _to_common_dtype(want, got)
        finite = got.isfinite() & want.isfinite()
        same = (finite | (got == want) | (got.isnan() & want.isnan())).all()
        difference = (
            (got - want).abs().where(finite, torch.zeros_like(got)).amax().double()
            if got.numel()
            else same.double() - 1
        )
        limit = tolerance(self.got, self.want) * self.size()
        limit = limit if self.allowed is None else torch.maximum(limit, self.allowed)
        return same & (difference <= limit)

    def alike(self) -> Tensor:
        """Whether the two differ by no more than kinks explain, 0-dim."""
        got, want = self.got.detach(), self.want.detach()
        if got.shape != want.shape or not got.is_floating_point() or torch.float64 in (got.dtype, want.dtype):
            return torch.zeros((), dtype=torch.bool, device=want.device)
        got, want = got.double(), want.double()
        return (got - want).norm() <= KINKS * want.norm()

    def said(self) -> str:
        """Describe the largest difference."""
        if self.got.shape != self.want.shape:
            return f"{self.name} is of shape {tuple(self.got.shape)}, and should be {tuple(self.want.shape)}"
        got, want = self.got.double(), self.want.double()
        if bool((got.isnan() != want.isnan()).any()):
            return f"{self.name} is NaN at {int(got.isnan().sum())} entries, and should be at {int(want.isnan().sum())}"
        worst = int((got - want).abs().nan_to_num().argmax())
        return f"{self.name} is {got.flatten()[worst].item():.6g}, and should be {want.flatten()[worst].item():.6g}"


def tolerance(*values: Tensor) -> float:
    """The relative difference that counts as rounding, for the coarsest dtype of the values."""
    kinds = [t.dtype for t in values if t.is_floating_point()]
    return max(ROUNDING.get(kind, 1000) * torch.finfo(kind).eps for kind in kinds)


def _to_common_dtype(t: Tensor, other: Tensor) -> Tensor:
    kind = torch.promote_types(torch.promote_types(t.dtype, other.dtype), torch.float32)
    return t.to(kind)


def _largest(t: Tensor) -> Tensor:
    if not t.numel():
        return torch.zeros((), dtype=torch.float64, device=t.device)
    return t.detach().abs().nan_to_num(0.0, 0.0, 0.0).amax().double()


def unequal(pairs: Sequence[Pair], kinks: Sequence[str] = ()) -> list[str]:
    """The names of the pairs that differ, those in `kinks` by more than kinks explain. Waits for the device once."""
    if not pairs:
        return []
    device = pairs[0].want.device
    held = torch.stack([(p.equal() | p.alike() if p.name in kinks else p.equal()).to(device) for p in pairs]).tolist()
    return [p.name for p, same in zip(pairs, held, strict=True) if not same]


@dataclass(frozen=True)
class Jacobians:
    """A cotangent of the output, its products with the plain model's derivatives, and the output's placement."""

    cotangent: Tensor
    products: dict[str, Tensor]
    place: Any


def sums(
    program: Program, results: dict[str, Any], extras: dict[str, Any], grads: dict[str, Tensor], direct: set[str],
    jacobians: Jacobians | None, n: int,
) -> list[Pair]:  # fmt: skip
    """The identities between the quantities that were requested together.

    Args:
        results, extras: as the program returned them.
        grads: the part of the gradient that is a sum over samples, by name.
        direct: parameters that the loss itself reads.
        jacobians: for `Jacobian`.
        n: the batch size.
    """
    table = _Sums(program, results, n)
    return [
        *table.of_gradients(grads),
        *table.of_squares(),
        *table.of_norms(extras),
        *table.of_diagonals(direct),
        *(table.of_jacobians(jacobians) if jacobians is not None else []),
    ]


class _Sums:
    def __init__(self, program: Program, results: dict[str, Any], n: int):
        self.extensions, self.results = program.extensions, results
        tokens = program.analysis.positions is not None and not program.analysis.rows
        self.axes = (0, 1) if tokens else (0,)
        self.count = n * (program.analysis.positions[0] if tokens and program.analysis.positions else 1)

    def asked(self, kind: type) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        """(extension, its field) for those of this kind without `subsampling`."""
        for e in self.extensions:
            if type(e) is kind and getattr(e, "subsampling", None) is None:
                yield e, self.results[e.savefield]  # type: ignore[attr-defined]

    def both(self, one: type, other: type) -> Iterator[tuple[Any, Any, str, Tensor, Tensor]]:
        """(extension, extension, parameter, value, value) for all of these kinds with the same columns."""
        for a, left in self.asked(one):
            for b, right in self.asked(other):
                if getattr(a, "mc_samples", None) == getattr(b, "mc_samples", None):
                    for name in left:
                        if name in right:
                            yield a, b, name, left[name], right[name]

    def pair(self, e: Any, said: str, param: str, got: Tensor, want: Tensor, **known: Any) -> Pair:
        kind = type(e).__name__
        return Pair(f"{e.savefield}['{param}'] ({kind}), {said},", got, want, extension=kind, param=param, **known)

    def of_gradients(self, grads: dict[str, Tensor]) -> Iterator[Pair]:
        for e, field in self.asked(BatchGrad):
            for name, g in field.items():
                if name in grads:
                    scale = g.detach().abs().sum(self.axes, dtype=_accumulation_dtype(g))
                    total = g.detach().sum(self.axes, dtype=_accumulation_dtype(g))
                    yield self.pair(e, "summed over samples", name, total, grads[name], scale=scale)
        for e, field in self.asked(Variance):
            for s, squares in self.asked(SumGradSquared):
                for name in [name for name in field if name in squares and name in grads]:
                    mean, square = _squares(grads[name] / self.count), squares[name] / self.count
                    # the gradient may be in half precision
                    known = {"scale": square, "allowed": tolerance(grads[name]) * _largest(mean)}
                    said = f"beside {s.savefield} and the gradient"
                    yield self.pair(e, said, name, field[name], square - mean, **known, power=2)

    def of_squares(self) -> Iterator[Pair]:
        for e, b, name, got, g in self.both(SumGradSquared, BatchGrad):
            want = _squares(g).sum(self.axes)
            yield self.pair(e, f"beside the squares of {b.savefield}", name, got, want, power=2)
        for e, b, name, got, g in self.both(BatchL2Grad, BatchGrad):
            want = _squares(g).flatten(len(self.axes)).sum(-1) if g.ndim > len(self.axes) else _squares(g)
            yield self.pair(e, f"beside the squares of {b.savefield}", name, got, want, power=2)
        for e, s, name, got, squares in self.both(BatchL2Grad, SumGradSquared):
            yield self.pair(e, f"summed, beside {s.savefield} summed", name, got.sum(), squares.sum(), power=2)

    def of_norms(self, extras: dict[str, Any]) -> Iterator[Pair]:
        """Norms over all parameters, if one extension alone makes them and `BatchL2Grad` has the same parameters."""
        clipped = list(self.asked(ClippedGrad))
        for e, field in clipped if len(clipped) == 1 and "sample_norms" in extras else []:
            for b, squares in self.asked(BatchL2Grad):
                if field.keys() == squares.keys():
                    want = sum(list(squares.values())[1:], next(iter(squares.values())))
                    got = extras["sample_norms"].square()
                    yield self.pair(e, f"its norms squared, beside {b.savefield}", "all", got, want, power=2)

    def of_diagonals(self, direct: set[str]) -> Iterator[Pair]:
        totals = [(DiagGGNExact, BatchDiagGGNExact), (DiagGGNMC, BatchDiagGGNMC), (DiagHessian, BatchDiagHessian)]
        for kind, per_sample in totals:
            largest = self._largest(kind)
            for e, b, name, total, each in self.both(kind, per_sample):
                if kind is not DiagHessian or name not in direct:
                    known = {"scale": each.abs().sum(0), "allowed": _squared_rounding(each, largest)}
                    yield self.pair(b, f"summed over samples, beside {e.savefield}", name, each.sum(0), total, **known)
        for root, total, axes in (
            (SqrtGGNExact, DiagGGNExact, (0, 1)),
            (SqrtGGNExact, BatchDiagGGNExact, (0,)),
            (SqrtGGNMC, DiagGGNMC, (0, 1)),
            (SqrtGGNMC, BatchDiagGGNMC, (0,)),
        ):
            largest = self._largest(total)
            for r, d, name, columns, diagonal in self.both(root, total):
                squares = _squares(columns).sum(axes)
                known = {"allowed": _squared_rounding(diagonal, largest), "scale": _larger_magnitude(squares, diagonal)}
                yield self.pair(d, f"beside the squares of {type(r).__name__}", name, diagonal, squares, **known)

    def _largest(self, kind: type) -> Tensor | None:
        """The largest entry of these diagonals over all parameters: rounding of J is relative to it."""
        found = [_largest(t) for _, field in self.asked(kind) for t in field.values()]
        return torch.stack([t.to(found[0].device) for t in found]).amax() if found else None

    def of_jacobians(self, known: Jacobians) -> Iterator[Pair]:
        rows = samples_first(known.cotangent, known.place).flatten()
        for e, field in self.asked(Jacobian):
            for name, j in field.items():
                if name in known.products:
                    want = known.products[name]
                    flat = j.detach().reshape(-1, *want.shape)
                    wide = torch.promote_types(rows.dtype, flat.dtype)  # a model may return another dtype than its own
                    product = torch.tensordot(rows.to(wide), flat.to(wide), 1)
                    scale = torch.tensordot(rows.abs().to(wide), flat.abs().to(wide), 1)
                    yield self.pair(e, "times a cotangent", name, product, want, scale=scale)


def _accumulation_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _squares(t: Tensor) -> Tensor:
    return t.detach().to(_accumulation_dtype(t)).square()


def _larger_magnitude(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a.abs().to(b.dtype), b.abs())


def _squared_rounding(t: Tensor, largest: Tensor | None) -> Tensor:
    """The square of J's rounding: J may be that large for a parameter that the output does not depend on."""
    return torch.zeros((), dtype=torch.float64) if largest is None else (tolerance(t) ** 2 * largest).to(t.device)
