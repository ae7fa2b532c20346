"""Kronecker factors of a parameter's curvature block, and products with them.

    block = B (x) A  on the parameter arranged as a matrix [out, in]

`KFAC`, `KFLR` and `KFRA` give a `Kronecker`: [B, A] for a weight, [B] for a bias. `EKFAC` gives an `Eigenbasis`:
[Q_B, Q_A, lambda]. A factor that is diagonal (A of an embedding, B of which only the diagonal is known) is a vector of its
entries. Both know how the parameter is arranged (`.arrangement`), so everything here takes and gives vectors in the
parameter's own shape.
`Blocks` is the block-diagonal matrix of all parameters: products, inverses, roots, determinants, samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import ArgumentError
from fxcurv.ir.private import pytree

__all__ = ["Arrangement", "Blocks", "Eigenbasis", "Kronecker", "dense", "eigenbasis", "matmul", "solve"]


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
    basis = eigenbasis(factors)
    return _scaled(basis, m, basis[-1], damping)


def eigenbasis(factors: Kronecker | Eigenbasis) -> Eigenbasis:
    """The block by eigenvectors and eigenvalues, which are not negative: what rounding has made so is zero."""
    if isinstance(factors, Eigenbasis):
        return Eigenbasis([*factors[:-1], factors[-1].clamp(min=0)], factors.arrangement)
    found = [(f.clamp(min=0), torch.ones_like(f)) if f.ndim == 1 else _eigh(f) for f in factors]
    values = found[0][0] if len(found) == 1 else found[0][0].unsqueeze(1) * found[1][0]
    return Eigenbasis([*(vectors for _, vectors in found), values], factors.arrangement)


def _eigh(t: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((t + t.mT) / 2)
    return values.clamp(min=0), vectors


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


def _shifted(t: Tensor, damping: float) -> Tensor:
    return t + damping * torch.eye(len(t), dtype=t.dtype, device=t.device)


def _scaled(basis: Eigenbasis, m: Tensor, values: Tensor, damping: float | None = None) -> Tensor:
    """m in the eigenbasis, times the eigenvalues or divided by the damped ones, and back."""
    q_b, q_a = basis[0], basis[1] if len(basis) == 3 else basis[0].new_ones(1)
    values = values.reshape(basis.arrangement.rows, basis.arrangement.columns)
    inside = _right(_left(q_b.mT if q_b.ndim == 2 else q_b, m), q_a)
    inside = inside * values if damping is None else inside / (values + damping)
    return basis.arrangement.vector(_left(q_b, _right(inside, q_a.mT if q_a.ndim == 2 else q_a)))


# all parameters ----------------------------------------------------------------------------------------------------

Vector = Any  # a dict of tensors by name, or a flat tensor


class Blocks(Mapping):
    """The block-diagonal matrix of several parameters' blocks, `Blocks(result.kfac)`: parameter name -> its factors.

    Vectors are dicts of tensors [*lead, *P] by name, or flat: [D], or columns [D, K], in the order of the names. Eigenvalues
    are clamped at zero, so factors that are indefinite by rounding give no NaN.

    Attributes:
        shape: (D, D), D the number of entries of these parameters.
    """

    def __init__(self, factors: Mapping[str, Kronecker | Eigenbasis]):
        wrong = [name for name, f in factors.items() if not isinstance(f, Kronecker | Eigenbasis)]
        if wrong or not factors:
            raise ArgumentError(f"{wrong or 'nothing'}: pass the field of KFAC, KFLR, KFRA or EKFAC, parameter name -> factors")
        self._factors = dict(factors)
        self._bases: dict[str, Eigenbasis] = {}

    def __getitem__(self, name: str) -> Kronecker | Eigenbasis:
        return self._factors[name]

    def __iter__(self):
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    __hash__ = None  # type: ignore[assignment]

    @property
    def shape(self) -> tuple[int, int]:
        total = sum(self._sizes())
        return total, total

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self._factors.values()))[0].dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self._factors.values()))[0].device

    @property
    def T(self) -> Blocks:  # noqa: N802
        """The same: it is symmetric."""
        return self

    def __matmul__(self, v: Vector) -> Vector:
        """The product with a vector; see the class."""
        return self._each(v, lambda name, t: matmul(self._factors[name], t))

    def solve(self, v: Vector, damping: float = 0.0, pi: bool = False) -> Vector:
        """(self + damping I)^-1 v; with `pi` damped per factor, see `damped`."""
        return self.inverse(damping, pi) @ v

    def damped(self, damping: float, pi: bool = False) -> Blocks:
        """self + damping I, by its eigenvectors.

        Args:
            damping: a number d >= 0.
            pi: (B + sqrt(d)/pi I) (x) (A + pi sqrt(d) I) in its place, with pi^2 = (tr A / dim A) / (tr B / dim B)
                (Martens & Grosse 2015, section 6.3); of a block without A, B + d I.

        Raises:
            ArgumentError: for a negative number, or `pi` of an eigenbasis that has no two factors.
        """
        if not damping >= 0:
            raise ArgumentError(f"damping={damping!r}: pass a number that is not negative")
        return Blocks({name: self._damped(name, damping, pi) for name in self})

    def inverse(self, damping: float = 0.0, pi: bool = False) -> Blocks:
        """(self + damping I)^-1, as such a matrix; see `damped`.

        Raises:
            ArgumentError: also where it is singular.
        """
        return self.damped(damping, pi)._of_values(_inverted)

    def sqrt(self) -> Blocks:
        """The symmetric root."""
        return self._of_values(lambda name, values: values.sqrt())

    def logdet(self, damping: float = 0.0, pi: bool = False) -> Tensor:
        """log det(self + damping I), 0-dim; minus infinity where it is singular."""
        damped = self.damped(damping, pi)
        return torch.stack([damped._basis(name)[-1].log().sum() for name in self]).sum()

    def trace(self) -> Tensor:
        """The sum of its eigenvalues, 0-dim."""
        return torch.stack([self._trace(f) for f in self._factors.values()]).sum()

    def diag(self) -> dict[str, Tensor]:
        """Parameter name -> the diagonal, [*P]."""
        return {name: _diagonal(f) for name, f in self._factors.items()}

    def quadratic(self, v: Vector) -> Tensor:
        """v^T self v: 0-dim, or one for each of several vectors."""
        w, flat = self @ v, isinstance(v, Tensor)
        if flat:
            return (v * w).sum(0)
        dims = {name: len(f.arrangement.shape) for name, f in self._factors.items()}
        return sum((v[n] * w[n]).flatten(t.ndim - dims[n]).sum(-1) for n, t in v.items())

    def sample(self, count: int = 1, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draws from N(0, self), [count, *P] by name: `blocks.inverse(damping).sample()` is of the Laplace posterior."""
        root = self.sqrt()
        where = generator.device if generator is not None else self.device
        noise = {
            name: torch.randn(count, *f.arrangement.shape, dtype=f[0].dtype, device=where, generator=generator).to(f[0].device)
            for name, f in self._factors.items()
        }
        return root @ noise

    def dense(self) -> Tensor:
        """[D, D]."""
        return torch.block_diag(*(dense(f) for f in self._factors.values()))

    def __repr__(self) -> str:
        return f"Blocks({', '.join(self._factors)}: {self.shape[0]} x {self.shape[1]})"

    def _sizes(self) -> list[int]:
        return [prod(f.arrangement.shape) for f in self._factors.values()]

    def _basis(self, name: str) -> Eigenbasis:
        if name not in self._bases:
            self._bases[name] = eigenbasis(self._factors[name])
        return self._bases[name]

    def _damped(self, name: str, damping: float, pi: bool) -> Eigenbasis:
        basis, factors = self._basis(name), self._factors[name]
        if not pi or len(factors) == 1:
            return Eigenbasis([*basis[:-1], basis[-1] + damping], basis.arrangement)
        if isinstance(factors, Eigenbasis):
            raise ArgumentError(f"pi=True of '{name}', an eigenbasis, which has no two factors to damp: drop it")
        b, a = (f.clamp(min=0) if f.ndim == 1 else torch.linalg.eigvalsh((f + f.mT) / 2).clamp(min=0) for f in factors)
        ratio = (a.mean() / b.mean()).sqrt()
        ratio = torch.where((ratio > 0) & ratio.isfinite(), ratio, torch.ones_like(ratio))
        root = damping**0.5
        return Eigenbasis([*basis[:-1], (b + root / ratio).unsqueeze(1) * (a + root * ratio)], basis.arrangement)

    def _of_values(self, fn: Callable[[str, Tensor], Tensor]) -> Blocks:
        bases = {name: self._basis(name) for name in self}
        return Blocks({name: Eigenbasis([*b[:-1], fn(name, b[-1])], b.arrangement) for name, b in bases.items()})

    @staticmethod
    def _trace(f: Kronecker | Eigenbasis) -> Tensor:
        if isinstance(f, Eigenbasis):
            return f[-1].sum()
        traces = [t.sum() if t.ndim == 1 else t.trace() for t in f]
        return traces[0] if len(traces) == 1 else traces[0] * traces[1]

    def _each(self, v: Vector, fn: Callable[[str, Tensor], Tensor]) -> Vector:
        if isinstance(v, Mapping):
            if set(v) != set(self):
                raise ArgumentError(f"the vector has {sorted(v)}, the matrix {sorted(self)}: give one tensor for each")
            return {name: fn(name, v[name]) for name in self}
        total = self.shape[0]
        if not isinstance(v, Tensor) or v.ndim not in (1, 2) or v.shape[0] != total:
            got = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ArgumentError(f"the matrix is {[total, total]}: multiply a dict, [{total}] or [{total}, K], not {got}")
        found = []
        for (name, f), part in zip(self._factors.items(), v.split(self._sizes()), strict=True):
            own = fn(name, part.t().reshape(*part.shape[1:], *f.arrangement.shape))
            found.append(own.reshape(*part.shape[1:], -1).t() if v.ndim == 2 else own.flatten())
        return torch.cat(found)


def _inverted(name: str, values: Tensor) -> Tensor:
    if not bool((values > 0).all()):
        raise ArgumentError(f"the block of '{name}' is singular: pass damping=")
    return 1 / values


def _diagonal(factors: Kronecker | Eigenbasis) -> Tensor:
    if isinstance(factors, Eigenbasis):
        q_b, q_a = factors[0], factors[1] if len(factors) == 3 else factors[0].new_ones(1)
        values = factors[-1].reshape(factors.arrangement.rows, factors.arrangement.columns)
        inside = _left(q_b.square(), values)
        return factors.arrangement.vector(inside * q_a.square() if q_a.ndim == 1 else inside @ q_a.square().mT)
    b, a = _both(factors)
    b, a = (f if f.ndim == 1 else f.diagonal() for f in (b, a))
    return factors.arrangement.vector(b.unsqueeze(1) * a)
