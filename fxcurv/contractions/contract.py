"""One contraction of P: its specification, its reference, and the call that stands in the graph."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxcurv.contractions.factors import Dense, Explicit, Factor, Gather, is_one, summed, weighted
from fxcurv.ir.private import pytree


@dataclass(frozen=True)
class Spec:
    """A reduction of P: sum over the axes in `reduce` ("v", "n", "p": the parameter's) of weights * P**power.

    samples: indices of the samples to keep, or None for all.
    """

    power: int
    reduce: str
    samples: tuple[int, ...] | None = None


def combine(spec: Spec, factors: list[Factor]) -> list[Factor]:
    """The factors on the samples of `spec`, as one if possible: uses of one kind are shared positions, exactly."""
    if len(factors) > 1 or spec.samples is not None:
        factors = [f.dense() for f in factors]
    if spec.samples is not None:
        device = factors[0].g.device
        # built from scalars, because a traced tensor constant would not be symbolic
        index = torch.stack([torch.full((), i, dtype=torch.long, device=device) for i in spec.samples])
        factors = [f.samples(index) for f in factors]
    if len(factors) == 1:
        return factors
    return _join(factors)


def _join(factors: list[Any]) -> list[Any]:
    """Several uses as one factor, where they are of one kind."""
    first = factors[0]
    if all(isinstance(f, Explicit) for f in factors):
        return [Explicit(sum(f.g for f in factors))]
    if all(isinstance(f, Dense) and f.arrange == first.arrange for f in factors):
        a, g = (torch.cat([getattr(f, t) for f in factors], axis) for t, axis in (("a", 1), ("g", 2)))
        return [Dense(a, g, first.arrange)]
    same = lambda f: isinstance(f, Gather) and (f.rows, f.padding) == (first.rows, first.padding)  # noqa: E731
    if isinstance(first, Gather) and all(map(same, factors)):
        index, g = torch.cat([f.index for f in factors], 1), torch.cat([f.g for f in factors], 2)
        return [Gather(index, g, first.rows, first.padding)]
    return factors


def reduce_p(spec: Spec, p: Tensor, weights: Tensor | None) -> Tensor:
    """The reduction of a materialised P, [V, N, *param]."""
    no_columns = "v" in spec.reduce and weights is None and is_one(p.shape[0])
    t = p.squeeze(0) if no_columns else p
    t = weighted(t.square() if spec.power == 2 else t, weights)
    if "v" in spec.reduce and not no_columns:  # by itself, so that several reductions of one P share it
        t = summed(t, 0)
    n = 0 if "v" in spec.reduce else 1
    dims = [*([n] if "n" in spec.reduce else []), *(range(n + 1, t.ndim) if "p" in spec.reduce else [])]
    for d in [d for d in reversed(dims) if is_one(t.shape[d])]:
        t, dims = t.squeeze(d), [k - (k > d) for k in dims if k != d]
    return t.sum(dims) if dims else t


def contract(spec: Spec, factors: list[Factor], weights: Tensor | None = None) -> Tensor:
    """The reference implementation of every quantity: materialise P, then reduce it.

    Contract nodes call this until `select` replaces them, so a program computes the same before and after.
    """
    p = sum(f.materialise() for f in combine(spec, factors))
    return reduce_p(spec, p, weights)


@dataclass(frozen=True)
class Contract:
    """A `contract` node's target: `contract` with its static arguments bound, a function of tensors alone.

    Symbolic (passes read `spec` and the factors from it), yet executable: calling it runs the reference.
    """

    spec: Spec
    tree: Any
    __name__: ClassVar[str] = "contract"
    __qualname__: ClassVar[str] = "contract"

    @classmethod
    def of(cls, spec: Spec, factors: list[Factor], weights: Any) -> tuple[Contract, list[Any]]:
        """The target and the flat arguments."""
        leaves, tree = pytree.tree_flatten((list(factors), weights))
        return cls(spec, tree), leaves

    def parts(self, args) -> tuple[list[Factor], Any]:
        """(factors, weights) of flat arguments: nodes or tensors."""
        return pytree.tree_unflatten(list(args), self.tree)

    def __hash__(self) -> int:
        return hash((self.spec, str(self.tree)))

    def __call__(self, *args):
        factors, weights = self.parts(args)
        return contract(self.spec, factors, weights)

    def value(self, *args) -> Tensor:
        """An empty tensor of the shape and dtype of a call's result."""
        factors, _ = self.parts(args)
        v, n, *param = factors[0].shape()
        n = n if self.spec.samples is None else len(self.spec.samples)
        lead = [s for axis, s in (("v", v), ("n", n)) if axis not in self.spec.reduce]
        dtypes = [t.dtype for t in args if t is not None and t.is_floating_point()]
        return args[0].new_empty(
            (*lead, *([] if "p" in self.spec.reduce else param)), dtype=functools.reduce(torch.promote_types, dtypes)
        )
