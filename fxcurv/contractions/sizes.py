"""Sizes of a use in dense form, which every candidate's cost is made of."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import SymInt, Tensor

from fxcurv.contractions.factors import Conv, Dense, Factor, Gather
from fxcurv.ir.lengths import said


def size(t: Tensor) -> tuple[int, ...]:
    """A shape with symbolic sizes replaced by their value at capture."""
    return tuple(s.node.hint if isinstance(s, SymInt) else int(s) for s in t.shape)


@dataclass(frozen=True)
class Dims:
    """Sizes of one use in dense form; `unfold` counts the elements that unfolding writes (0: nothing to unfold)."""

    v: int
    n: int
    s: int
    k: int
    o: int
    i: int
    unfold: int = 0
    item: int = 4

    @property
    def p(self) -> int:
        """Elements of one parameter."""
        return self.k * self.o * self.i

    @property
    def flops(self) -> int:
        """Operations that all of P takes."""
        return 2 * self.v * self.n * self.s * self.p

    @property
    def inputs(self) -> int:
        """Bytes of the factors."""
        return self.item * self.n * self.k * self.s * (self.v * self.o + self.i)


def dims(factor: Factor) -> Dims:
    """Sizes of a factor; a P without structure counts as one output per element."""
    item = factor.g.element_size()
    if isinstance(factor, Conv):
        return _conv_dims(factor, item)
    g = size(factor.g)
    if isinstance(factor, Dense):
        return Dims(g[0], g[1], g[2], g[3], g[4], size(factor.a)[3], 0, item)
    if isinstance(factor, Gather):
        return Dims(g[0], g[1], g[2], 1, g[3], factor.rows, 0, item)
    return Dims(g[0], g[1], 1, 1, prod(g[2:]), 1, 0, item)


def _conv_dims(f: Conv, item: int) -> Dims:
    g, a, w = size(f.g), size(f.a), f.weight_shape
    merged = said(f.place.outer * f.place.inner)
    kernel = prod(f.kernel)
    if f.transposed:
        s = prod(a[2:])
        unfolded = g[0] * g[1] * g[2] * kernel * s
        return Dims(g[0], g[1] // merged, s * merged, f.groups, w[1] * kernel, w[0] // f.groups, unfolded, item)
    s = prod(g[3:])
    unfolded = a[0] * a[1] * kernel * s if kernel * s > 1 else 0
    return Dims(g[0], g[1] // merged, s * merged, f.groups, w[0] // f.groups, w[1] * kernel, unfolded, item)
