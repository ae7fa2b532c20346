"""Kronecker products, as lists of their factors. `fxcurv.kronecker` knows a parameter's arrangement too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor

# Smaller eigenvalues of a factor are inverted as if they had this size.
SMALLEST = 1e-8


def kfacs_to_mat(factors: Sequence[Tensor]) -> Tensor:
    """[A, B, C, ...] -> A (x) B (x) C ..., a matrix."""
    _check_matrices(factors)
    return functools.reduce(torch.kron, factors)


def two_kfacs_to_mat(A: Tensor, B: Tensor) -> Tensor:  # noqa: N803
    """A (x) B, [rows A * rows B, columns A * columns B]."""
    return kfacs_to_mat([A, B])


def kfac_mat_prod(factors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The function M -> (A (x) B (x) ...) M, of a matrix [D, K] or a vector [D], for matrices [A, B, ...]."""
    _check_matrices(factors)
    columns = [f.shape[1] for f in factors]

    def product(mat: Tensor) -> Tensor:
        if mat.ndim not in (1, 2) or mat.shape[0] != prod(columns):
            raise ValueError(f"the product takes [{prod(columns)}] or [{prod(columns)}, K], not {list(mat.shape)}")
        out = mat.reshape(*columns, -1)
        for k, factor in enumerate(factors):
            out = torch.tensordot(factor, out, dims=([1], [k])).movedim(0, k)
        return out.reshape(-1) if mat.ndim == 1 else out.reshape(-1, mat.shape[1])

    return product


def apply_kfac_mat_prod(factors: Sequence[Tensor], mat: Tensor) -> Tensor:
    """(A (x) B (x) ...) M."""
    return kfac_mat_prod(factors)(mat)


def inv_kfac_mat_prod(
    factors: Sequence[Tensor], shift: float | Sequence[float] | None = None
) -> Callable[[Tensor], Tensor]:
    """The function M -> ((A + s_A I)^-1 (x) (B + s_B I)^-1 (x) ...) M; see `inv_kfacs`."""
    return kfac_mat_prod(inv_kfacs(factors, shift))


def apply_inv_kfac_mat_prod(
    factors: Sequence[Tensor], mat: Tensor, shift: float | Sequence[float] | None = None
) -> Tensor:
    """((A + s_A I)^-1 (x) (B + s_B I)^-1 (x) ...) M; see `inv_kfacs`."""
    return inv_kfac_mat_prod(factors, shift)(mat)


def inv_kfacs(factors: Sequence[Tensor], shift: float | Sequence[float] | None = None) -> list[Tensor]:
    """[(A + s_A I)^-1, (B + s_B I)^-1, ...] of symmetric factors.

    Args:
        factors: symmetric matrices.
        shift: one number for all, one for each, or none.
    """
    if shift is None or isinstance(shift, int | float):
        shift = [shift or 0.0] * len(factors)
    return [_inverse(f, s) for f, s in zip(factors, shift, strict=True)]


def _inverse(factor: Tensor, shift: float) -> Tensor:
    values, vectors = torch.linalg.eigh(factor)
    inverse = (values + shift).reciprocal().clamp(-1 / SMALLEST, 1 / SMALLEST)
    return (vectors * inverse) @ vectors.mT


def _check_matrices(factors: Sequence[Tensor]) -> None:
    if not factors or not all_tensors_of_order(2, factors):
        raise ValueError(f"factors are matrices, one at least, not {[list(f.shape) for f in factors]}")


def kfac_mat_prod_einsum_equation(num_factors: int) -> str:
    """The equation of M, A, B, ... -> (A (x) B (x) ...) M, with M's rows as one axis per factor."""
    letters = get_letters(2 * num_factors + 1)
    pairs = [(next(letters), next(letters)) for _ in range(num_factors)]
    last = next(letters)
    factors = "".join(f",{row}{column}" for row, column in pairs)
    rows, columns = ("".join(side) for side in zip(*pairs, strict=True))
    return f"{columns}{last}{factors}->{rows}{last}"


def all_tensors_of_order(order: int, tensors: Sequence[Tensor]) -> bool:
    """Whether every tensor has this many axes."""
    return all(is_tensor_of_order(order, t) for t in tensors)


def is_tensor_of_order(order: int, tensor: Tensor) -> bool:
    """Whether a tensor has this many axes."""
    return tensor.ndim == order


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor has two axes."""
    return is_tensor_of_order(2, tensor)


def is_vector(tensor: Tensor) -> bool:
    """Whether a tensor has one axis."""
    return is_tensor_of_order(1, tensor)


def get_letters(max_letters: int = 26) -> Iterator[str]:
    """The first letters of the alphabet."""
    return map(chr, range(ord("a"), ord("a") + max_letters))
