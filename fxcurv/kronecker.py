"""Kronecker factors of a parameter's curvature block, and products with them.

    block = B (x) A  on the parameter arranged as a matrix [out, in]

`KFAC`, `KFLR` and `KFRA` give a `Kronecker`: [B, A] for a weight, [B] for a bias. `EKFAC` gives an `Eigenbasis`:
[Q_B, Q_A, lambda]. A factor that is diagonal (A of an embedding, B of which only the diagonal is known) is a vector of its
entries. Both know how the parameter is arranged (`.arrangement`), so everything here takes and gives vectors in the
parameter's own shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.private import pytree

__all__ = ["Arrangement", "Eigenbasis", "Kronecker", "dense", "matmul", "solve"]


@dataclass(frozen=True)
class Arrangement:
    """A parameter as a matrix: seen in `sizes`, the axes `outputs` are its rows and `inputs` its columns.

    Attributes:
        shape: the parameter's.
        sizes: a row-major view of it whose axes are each of outputs or of inputs.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """The size of B."""
        return prod(self.sizes[d] for d in self.outputs)

    @property
    def columns(self) -> int:
        """The size of A, 1 for a bias."""
        return prod(self.sizes[d] for d in self.inputs)

    def matrix(self, vectors: Tensor) -> Tensor:
        """[*lead, *shape] -> [*lead, rows, columns]."""
        k = vectors.ndim - len(self.shape)
        lead = vectors.shape[:k]
        order = [*range(k), *(k + d for d in (*self.outputs, *self.inputs))]
        return vectors.reshape(*lead, *self.sizes).permute(order).reshape(*lead, self.rows, self.columns)

    def vector(self, matrices: Tensor) -> Tensor:
        """[*lead, rows, columns] -> [*lead, *shape]."""
        k = matrices.ndim - 2
        lead, order = matrices.shape[:k], (*self.outputs, *self.inputs)
        t = matrices.reshape(*lead, *(self.sizes[d] for d in order))
        return t.permute(*range(k), *(k + order.index(d) for d in range(len(order)))).reshape(*lead, *self.shape)


class Kronecker(list):
    """[B, A] or [B], with the `arrangement` of the parameter that they belong to."""

    def __init__(self, factors: Iterable[Any], arrangement: Arrangement):
        super().__init__(factors)
        self.arrangement = arrangement


class Eigenbasis(list):
    """[Q_B, Q_A, lambda] or [Q_B, lambda]: the block is (Q_B (x) Q_A) diag(lambda) (Q_B (x) Q_A)^T.

    lambda: [out, in], or [out] without inputs. A vector of ones stands for the eigenvectors of a diagonal factor.
    """

    def __init__(self, factors: Iterable[Any], arrangement: Arrangement):
        super().__init__(factors)
        self.arrangement = arrangement


for _cls in (Kronecker, Eigenbasis):
    pytree.register_pytree_node(_cls, lambda x: (list(x), x.arrangement), _cls)


def matmul(factors: Kronecker | Eigenbasis, vectors: Tensor) -> Tensor:
    """The block times each vector.

    Args:
        factors: of one parameter.
        vectors: [*lead, *P], any number of leading axes.

    Returns:
        [*lead, *P].
    """
    m = _matrix(factors, vectors)
    if isinstance(factors, Eigenbasis):
        return _scaled(factors, m, factors[-1])
    b, a = _both(factors)
    return factors.arrangement.vector(_right(_left(b, m), a))


def solve(factors: Kronecker | Eigenbasis, vectors: Tensor, damping: float | tuple[float, float]) -> Tensor:
    """The inverse of the damped block times each vector.

    Args:
        factors: of one parameter.
        vectors: [*lead, *P].
        damping: a number d for (B (x) A + d I)^-1, by eigendecompositions of the factors; or a pair for
            (B + d_B I)^-1 (x) (A + d_A I)^-1, by solving with each (of a `Kronecker` only; d_A does nothing for [B]).

    Returns:
        [*lead, *P].
    """
    m = _matrix(factors, vectors)
    if isinstance(factors, Eigenbasis):
        if isinstance(damping, tuple):
            raise ValueError("damping is a pair, and an eigenbasis has no two factors to damp: pass a number")
        return _scaled(factors, m, factors[-1], damping)
    b, a = _both(factors)
    if isinstance(damping, tuple):
        m = m / (b + damping[0]).unsqueeze(-1) if b.ndim == 1 else torch.linalg.solve(_shifted(b, damping[0]), m)
        if len(factors) == 2:
            m = m / (a + damping[1]) if a.ndim == 1 else torch.linalg.solve(_shifted(a, damping[1]), m, left=False)
        return factors.arrangement.vector(m)
    (values_b, vectors_b), (values_a, vectors_a) = _eigh(b), _eigh(a)
    values = values_b.clamp(min=0).unsqueeze(1) * values_a.clamp(min=0)
    return _scaled(Eigenbasis([vectors_b, vectors_a, values], factors.arrangement), m, values, damping)


def dense(factors: Kronecker | Eigenbasis) -> Tensor:
    """The block as a matrix [numel, numel], in the order of the parameter flattened."""
    n = prod(factors.arrangement.shape)
    eye = torch.eye(n, dtype=factors[0].dtype, device=factors[0].device)
    return matmul(factors, eye.reshape(n, *factors.arrangement.shape)).reshape(n, n)


def _matrix(factors: Kronecker | Eigenbasis, vectors: Tensor) -> Tensor:
    shape = factors.arrangement.shape
    if tuple(vectors.shape[vectors.ndim - len(shape) :]) != shape:
        raise ValueError(f"vectors of shape {tuple(vectors.shape)} do not end in the parameter's shape {shape}")
    return factors.arrangement.matrix(vectors)


def _both(factors: list) -> tuple[Tensor, Tensor]:
    """(B, A), where A = [1] without inputs."""
    b = factors[0]
    return (b, factors[1]) if len(factors) == 2 else (b, b.new_ones(1))


def _right(m: Tensor, a: Tensor) -> Tensor:
    """m A, for a symmetric or diagonal A."""
    return m * a if a.ndim == 1 else m @ a


def _left(b: Tensor, m: Tensor) -> Tensor:
    """B m, for a matrix or a diagonal B."""
    return b.unsqueeze(-1) * m if b.ndim == 1 else b @ m


def _eigh(t: Tensor) -> tuple[Tensor, Tensor]:
    return (t, torch.ones_like(t)) if t.ndim == 1 else tuple(torch.linalg.eigh(t))


def _shifted(t: Tensor, damping: float) -> Tensor:
    return t + damping * torch.eye(len(t), dtype=t.dtype, device=t.device)


def _scaled(basis: Eigenbasis, m: Tensor, values: Tensor, damping: float | None = None) -> Tensor:
    """m in the eigenbasis, times the eigenvalues or divided by the damped ones, and back."""
    q_b, q_a = basis[0], basis[1] if len(basis) == 3 else basis[0].new_ones(1)
    values = values.reshape(basis.arrangement.rows, basis.arrangement.columns)
    inside = _right(_left(q_b.mT if q_b.ndim == 2 else q_b, m), q_a)
    inside = inside * values if damping is None else inside / (values + damping)
    return basis.arrangement.vector(_left(q_b, _right(inside, q_a.mT if q_a.ndim == 2 else q_a)))
