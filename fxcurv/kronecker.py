"""Kronecker factors of a parameter's curvature block, and products with them.

    block = B (x) A  on the parameter arranged as a matrix [out, in]

`KFAC`, `KFLR` and `KFRA` give a `Kronecker`: [B, A] for a weight, [B] for a bias. `EKFAC` gives an `Eigenbasis`:
[Q_B, Q_A, lambda]. A diagonal factor (A of an embedding, or B where only its diagonal is known) is the vector of its
diagonal. Both classes know how the parameter is arranged as a matrix (`.arrangement`), so all functions here take and
return vectors in the parameter's own shape.

Under `joint=True` the entry of a layer's weight is the block of weight and bias together, [out, in + 1] with the bias
as the last column: its arrangement is a `Joint`, its vectors are pairs (weight, bias). The bias' own entry is
`Within(weight)`. `Blocks` is the block-diagonal matrix of all parameters: products, inverses, roots, determinants,
samples.

Under `mesh=`, `KFAC(assign="layers")` leaves each layer's factors on one rank, its `owner`: only that rank multiplies,
inverts and solves, and `Blocks` broadcasts the results (a step [*P] per parameter: MEM-OPT of Pauloski et al. 2021,
"KAISA"). `Blocks.everywhere` broadcasts the eigendecompositions themselves (COMM-OPT there), after which nothing
travels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxcurv.errors import ArgumentError, NonFiniteError
from fxcurv.ir.private import group_named, pytree

__all__ = [
    "Arrangement", "Blocks", "Eigenbasis", "Joint", "Kronecker", "Owner", "Within", "dense", "eigenbasis", "matmul", "solve",
]  # fmt: skip

Vectors = Any  # a tensor [*lead, *P]; for a joint block a pair of these, (weight, bias)


@dataclass(frozen=True)
class Arrangement:
    """A parameter as a matrix: in a view of shape `sizes`, the axes `outputs` are the rows and `inputs` the columns.

    Attributes:
        shape: the parameter's shape.
        sizes: the shape of a row-major view of it, in which each axis belongs to the outputs or to the inputs.
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

    @property
    def numel(self) -> int:
        """The size of the block."""
        return prod(self.shape)

    def named(self, name: str) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, for the parameters in the block of `name`."""
        return {name: self.shape}

    def flat(self, vectors: Vectors) -> Tensor:
        """[*lead, *shape] -> [*lead, numel]."""
        return vectors.reshape(*vectors.shape[: vectors.ndim - len(self.shape)], self.numel)

    def shaped(self, flat: Tensor) -> Vectors:
        """[*lead, numel] -> [*lead, *shape]."""
        return flat.reshape(*flat.shape[:-1], *self.shape)

    def matrix(self, vectors: Vectors) -> Tensor:
        """[*lead, *shape] -> [*lead, rows, columns].

        Raises:
            ArgumentError: for another shape.
        """
        if not isinstance(vectors, Tensor):
            raise ArgumentError(f"a vector is a {type(vectors).__name__}: pass a tensor [*lead, {list(self.shape)}]")
        k = vectors.ndim - len(self.shape)
        if tuple(vectors.shape[max(k, 0) :]) != self.shape:
            raise ArgumentError(
                f"vectors of shape {list(vectors.shape)} do not end in the parameter's, {list(self.shape)}: pass [*lead, *P]"
            )
        lead = vectors.shape[:k]
        order = [*range(k), *(k + d for d in (*self.outputs, *self.inputs))]
        return vectors.reshape(*lead, *self.sizes).permute(order).reshape(*lead, self.rows, self.columns)

    def vector(self, matrices: Tensor) -> Vectors:
        """[*lead, rows, columns] -> [*lead, *shape]."""
        k = matrices.ndim - 2
        lead, order = matrices.shape[:k], (*self.outputs, *self.inputs)
        t = matrices.reshape(*lead, *(self.sizes[d] for d in order))
        return t.permute(*range(k), *(k + order.index(d) for d in range(len(order)))).reshape((*lead, *self.shape))


@dataclass(frozen=True)
class Joint:
    """A layer's weight and bias as one matrix [out, in + 1], whose last column is the bias; vectors are pairs.

    Attributes:
        weight, bias: their arrangements, with equally many rows.
        bias_name: the name of the bias among the parameters.
    """

    weight: Arrangement
    bias: Arrangement
    bias_name: str

    @property
    def rows(self) -> int:
        """The size of B."""
        return self.weight.rows

    @property
    def columns(self) -> int:
        """The size of A."""
        return self.weight.columns + 1

    @property
    def numel(self) -> int:
        """The size of the block."""
        return self.weight.numel + self.bias.numel

    def named(self, name: str) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, for the parameters in the block of `name`."""
        return {name: self.weight.shape, self.bias_name: self.bias.shape}

    def flat(self, vectors: Vectors) -> Tensor:
        """A pair -> [*lead, numel]."""
        return torch.cat([self.weight.flat(vectors[0]), self.bias.flat(vectors[1])], -1)

    def shaped(self, flat: Tensor) -> Vectors:
        """[*lead, numel] -> a pair."""
        weight, bias = flat.split([self.weight.numel, self.bias.numel], -1)
        return self.weight.shaped(weight), self.bias.shaped(bias)

    def matrix(self, vectors: Vectors) -> Tensor:
        """A pair -> [*lead, rows, columns].

        Raises:
            ArgumentError: for what is no pair, or of other shapes.
        """
        if not isinstance(vectors, tuple | list) or len(vectors) != 2:
            raise ArgumentError(
                "the block is of a weight and its bias together: pass a pair of vectors, (weight, bias)"
            )
        weight, bias = self.weight.matrix(vectors[0]), self.bias.matrix(vectors[1])
        if weight.shape[:-1] != bias.shape[:-1]:
            raise ArgumentError(
                f"{list(weight.shape[:-2])} vectors of the weight, {list(bias.shape[:-2])} of the bias: pass as many of both"
            )
        return torch.cat([weight, bias], -1)

    def vector(self, matrices: Tensor) -> Vectors:
        """[*lead, rows, columns] -> a pair."""
        weight, bias = matrices.split([self.weight.columns, 1], -1)
        return self.weight.vector(weight), self.bias.vector(bias)


@dataclass(frozen=True)
class Within:
    """Stands for the factors of a bias that is in the block of its layer's weight (`joint=True`).

    Attributes:
        weight: the name of the weight.
    """

    weight: str


@dataclass(frozen=True)
class Owner:
    """The rank that has a parameter's factors; on the others these are tensors without values, on the "meta" device.

    Attributes:
        rank: its number in the group of all ranks of the mesh; `here`: whether it is this rank.
        group: the name of that group.
        device: the device of the parameters.
    """

    rank: int
    here: bool
    group: str
    device: torch.device

    def send(self, t: Tensor) -> Tensor:
        """Broadcast the owner's `t`. All ranks have to call this; elsewhere `t` gives only the shape and dtype."""
        out = t.contiguous() if self.here else torch.empty(t.shape, dtype=t.dtype, device=self.device)
        dist.broadcast(out, group=group_named(self.group), group_src=self.rank)
        return out


class _Factors(list):
    """Tensors, with the `arrangement` of the parameter that they belong to, and the `owner` if one rank has them."""

    def __init__(self, factors: Iterable[Any], arrangement: Arrangement | Joint, owner: Owner | None = None):
        super().__init__(factors)
        self.arrangement, self.owner = arrangement, owner


class Kronecker(_Factors):
    """[B, A] or [B], with the `arrangement` of the parameter that they belong to, and the `owner` if one rank has them."""


class Eigenbasis(_Factors):
    """[Q_B, Q_A, lambda] or [Q_B, lambda]: the block is (Q_B (x) Q_A) diag(lambda) (Q_B (x) Q_A)^T.

    lambda: [out, in], or [out] without inputs. A vector of ones stands for the eigenvectors of a diagonal factor.
    """


for _cls in (Kronecker, Eigenbasis):
    pytree.register_pytree_node(
        _cls, lambda x: (list(x), (x.arrangement, x.owner)), lambda values, known, cls=_cls: cls(values, *known)
    )
pytree.register_pytree_node(Within, lambda x: ([], x.weight), lambda _, weight: Within(weight))


def plain(arrangement: Arrangement | Joint) -> list[Any]:
    """Turn an arrangement into lists of numbers and names, to be saved; `arranged` reverses it."""
    if isinstance(arrangement, Joint):
        return [plain(arrangement.weight), plain(arrangement.bias), arrangement.bias_name]
    return [list(x) for x in (arrangement.shape, arrangement.sizes, arrangement.outputs, arrangement.inputs)]


def arranged(saved: list[Any]) -> Arrangement | Joint:
    """Restore an arrangement from the lists that `plain` made of it."""
    if len(saved) == 3:
        return Joint(arranged(saved[0]), arranged(saved[1]), saved[2])  # type: ignore[arg-type]
    return Arrangement(*map(tuple, saved))


def matmul(factors: Kronecker | Eigenbasis, vectors: Vectors) -> Vectors:
    """The block times each vector.

    Args:
        factors: of one parameter.
        vectors: [*lead, *P], any number of leading axes; for a joint block a pair of these, (weight, bias).

    Returns:
        the products, in the form of `vectors`.

    Raises:
        ArgumentError: for vectors of another shape, dtype or device than the block's.
    """
    m = _matrix(factors, vectors)
    if isinstance(factors, Eigenbasis):
        return _scaled(factors, m, factors[-1])
    b, a = _both(factors)
    return factors.arrangement.vector(_right(_left(b, m), a))


def solve(factors: Kronecker | Eigenbasis, vectors: Vectors, damping: float | tuple[float, float]) -> Vectors:
    """The inverse of the damped block times each vector, by eigendecompositions of the factors.

    Args:
        factors: of one parameter.
        vectors: [*lead, *P]; for a joint block a pair of these, (weight, bias).
        damping: a number d for (B (x) A + d I)^-1; or a pair for (B + d_B I)^-1 (x) (A + d_A I)^-1 (for a `Kronecker`
            only; d_A has no effect on [B]).

    Returns:
        the solutions, in the form of `vectors`.

    Raises:
        ArgumentError: for vectors of another shape, dtype or device; for a damping that is negative or no number; for a pair
            with an eigenbasis; for damping 0 with a singular block; for factors that are not finite.
    """
    m = _matrix(factors, vectors)
    if not isinstance(damping, tuple | list):
        check_not_negative("damping", damping)
        basis = eigenbasis(factors)
        values = basis[-1] + damping
    elif isinstance(factors, Eigenbasis) or len(damping) != 2:
        raise ArgumentError(f"damping={damping!r}: a pair is of the two factors of a Kronecker; pass a number")
    else:
        for d in damping:
            check_not_negative("damping", d)
        basis, sides = _decomposed(factors)
        values = _product([side + d for side, d in zip(sides, damping, strict=False)])
    return _scaled(basis, m, _inverted("the block", values))


def check_not_negative(name: str, value: Any) -> None:
    """Refuse what is no number (or tensor of one), and a negative one.

    Raises:
        ArgumentError: saying the `name`.
    """
    number = isinstance(value, Real) or isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if not number or not value >= 0:
        raise ArgumentError(f"{name}={value!r}: pass a number that is not negative")


def _check_factors(factors: Kronecker | Eigenbasis, of: str = "the block") -> None:
    """Refuse factors that are not in the sizes of their arrangement, as stacks are, of several models."""
    rows, columns = factors.arrangement.rows, factors.arrangement.columns
    *sides, last = factors if isinstance(factors, Eigenbasis) else (*factors, None)
    sizes = [(rows,), (columns,)][: len(sides)]
    known = all(tuple(t.shape) in (n, n * 2) for t, n in zip(sides, sizes, strict=False))
    complete = len(sides) == 2 or len(sides) == 1 == columns
    if not known or not complete or last is not None and last.numel() != rows * columns:
        raise ArgumentError(
            f"{of} has factors {[list(t.shape) for t in factors]}, and is [{rows}, {columns}] as a matrix. Way out: the factors "
            "of one model; of stacks (params= of a call), those of each model, t[k] of every tensor"
        )


def _matrix(factors: Kronecker | Eigenbasis, vectors: Vectors) -> Tensor:
    """Vectors as matrices [*lead, rows, columns], if a block can be multiplied with them."""
    _check_factors(factors)
    m, like = factors.arrangement.matrix(vectors), factors[0]
    if m.dtype != like.dtype or m.device != like.device:
        raise ArgumentError(
            f"the vectors are {m.dtype} on {m.device}, the factors {like.dtype} on {like.device}: "
            "pass vectors.to(dtype and device of the factors)"
        )
    return m


def eigenbasis(factors: Kronecker | Eigenbasis, start: Eigenbasis | None = None, steps: int = 1) -> Eigenbasis:
    """The block's eigenvectors and eigenvalues; eigenvalues of a factor that are below its rounding become zero.

    Args:
        factors: of one parameter.
        start: the eigenbasis of similar factors. In place of a decomposition, `steps` orthogonal iterations
            Q <- qr(F Q) start from it, with Rayleigh quotients as eigenvalues (Vyas et al. 2024, SOAP). The result is
            orthogonal, keeps the block's trace, and converges to its eigenvectors.
        steps: see `start`.

    Raises:
        ArgumentError: if `start` has another arrangement; if the factors are not finite.
    """
    if isinstance(factors, Eigenbasis):
        _check_factors(factors)
        _check_finite("the block", factors)
        return Eigenbasis([*factors[:-1], factors[-1].clamp(min=0)], factors.arrangement, factors.owner)
    if start is not None:
        _check_start("the block", factors, start, steps)
    return _decomposed(factors, start, steps)[0]


def _check_start(of: str, factors: Kronecker, start: Any, steps: Any) -> None:
    """Refuse to start from what is not of the same parameters, or for no number of steps."""
    known = getattr(start, "arrangement", None)
    if known != factors.arrangement:
        raise ArgumentError(
            f"start is of {known}, {of} of {factors.arrangement}: pass the same parameter's, with the same joint="
        )
    _check_factors(Kronecker(start[:-1] if isinstance(start, Eigenbasis) else start, known), "start")
    if not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"steps={steps!r}: pass a positive integer")


def _check_finite(of: str, tensors: Iterable[Tensor]) -> None:
    if not all(t.is_meta or bool(t.isfinite().all()) for t in tensors):
        raise NonFiniteError(
            f"{of} is not finite (NaN or infinity), so no damping helps. Way out: leave out the batch that it came from, or look "
            "where its numbers begin, under torch.autograd.set_detect_anomaly"
        )


def _decomposed(
    factors: Kronecker, start: Eigenbasis | None = None, steps: int = 1, of: str = "the block"
) -> tuple[Eigenbasis, list[Tensor]]:
    """(the block's basis, the eigenvalues of each factor); `of`: what errors call the block."""
    _check_factors(factors, of)
    _check_finite(of, factors)
    known = start[:-1] if start is not None else [None] * len(factors)
    found = [_eigh(f, q, steps) for f, q in zip(factors, known, strict=True)]
    values = [v for v, _ in found]
    return Eigenbasis([*(q for _, q in found), _product(values)], factors.arrangement, factors.owner), values


def _product(sides: list[Tensor]) -> Tensor:
    """The block's eigenvalues [out, in], or [out], from those of each factor."""
    return sides[0] if len(sides) == 1 else sides[0].unsqueeze(1) * sides[1]


def _eigh(t: Tensor, start: Tensor | None = None, steps: int = 1) -> tuple[Tensor, Tensor]:
    """(eigenvalues, eigenvectors) of a factor, a matrix or a vector."""
    if t.ndim == 1:
        return t.clamp(min=0), torch.ones_like(t)
    t = (t + t.mT) / 2
    if start is None:
        values, vectors = torch.linalg.eigh(t)
        return _without_rounding(values), vectors
    vectors = start
    for _ in range(steps):  # in descending order: the largest converge first
        vectors = torch.linalg.qr(t @ vectors[:, _quotients(t, vectors).argsort(descending=True)])[0]
    return _without_rounding(_quotients(t, vectors)), vectors


def _without_rounding(values: Tensor) -> Tensor:
    """Eigenvalues of a matrix, zero where they are negative or within ten roundings of the largest one, which is their error."""
    if not len(values):
        return values
    least = 10 * torch.finfo(values.dtype).eps * values.amax()
    return torch.where(values <= least, 0, values)


def _quotients(t: Tensor, vectors: Tensor) -> Tensor:
    return (vectors * (t @ vectors)).sum(0)


def dense(factors: Kronecker | Eigenbasis) -> Tensor:
    """The block as a matrix [numel, numel], in the order of the flattened parameter (weight, then bias)."""
    eye = torch.eye(factors.arrangement.numel, dtype=factors[0].dtype, device=factors[0].device)
    return factors.arrangement.flat(matmul(factors, factors.arrangement.shaped(eye)))


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


def _scaled(basis: Eigenbasis, m: Tensor, values: Tensor) -> Vectors:
    """Rotate m into the eigenbasis, multiply by the eigenvalues, and rotate back."""
    q_b, q_a = basis[0], basis[1] if len(basis) == 3 else basis[0].new_ones(1)
    values = values.reshape(basis.arrangement.rows, basis.arrangement.columns)
    inside = _right(_left(q_b.mT if q_b.ndim == 2 else q_b, m), q_a) * values
    return basis.arrangement.vector(_left(q_b, _right(inside, q_a.mT if q_a.ndim == 2 else q_a)))


# all parameters ----------------------------------------------------------------------------------------------------

Vector = Any  # a dict of tensors by name, or a flat tensor


class Blocks(Mapping):
    """The block-diagonal matrix of several parameters' blocks, `Blocks(result.kfac)`: parameter name -> its factors.

    Vectors are dicts of tensors [*lead, *P] by name, or flat: [D], or columns [D, K], in the order of the names. Eigenvalues
    below the rounding of a factor are zero: factors that are indefinite by it give no NaN, and singular ones no large numbers.

    Args:
        factors: a field of `KFAC`, `KFLR`, `KFRA` or `EKFAC`. Where a block is of a weight and its bias (`joint=True`),
            the matrix and its vectors have both names.
        start: the `Blocks` of similar factors, from whose eigenvectors decompositions start; see `eigenbasis`.
        steps: see `start`.

    Attributes:
        shape: (D, D), D the number of entries of these parameters.

    Raises:
        ArgumentError: for what is no such field of one model, or a `start` of other blocks; by a method that decomposes blocks,
            for factors that are not finite.
    """

    def __init__(
        self, factors: Mapping[str, Kronecker | Eigenbasis | Within], *, start: Blocks | None = None, steps: int = 1
    ):
        named = dict(factors) if isinstance(factors, Mapping) else {type(factors).__name__: factors}
        wrong = [name for name, f in named.items() if not isinstance(f, Kronecker | Eigenbasis | Within)]
        if wrong or not named:
            raise ArgumentError(
                f"{wrong or 'nothing'}: pass the field of KFAC, KFLR, KFRA or EKFAC, parameter name -> factors, as result.kfac"
            )
        self._given = named
        self._factors = {name: f for name, f in named.items() if not isinstance(f, Within)}
        for name, f in self._factors.items():
            _check_factors(f, f"the block of '{name}'")
            if start is not None and isinstance(f, Kronecker):
                _check_start(f"the block of '{name}'", f, start.get(name), steps)
        self._shapes = self._ordered()
        self._start, self._steps = start, steps
        self._bases: dict[str, tuple[Eigenbasis, list[Tensor]]] = {}

    def _ordered(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, in the order of the names; a bias whose name is not given comes after its weight."""
        shapes = {n: shape for name, f in self._factors.items() for n, shape in f.arrangement.named(name).items()}
        order: list[str] = []
        for name, f in self._given.items():
            own = [name] if isinstance(f, Within) else f.arrangement.named(name)
            order += [n for n in own if n == name or n not in self._given]
        lost = [name for name in order if name not in shapes]
        if lost:
            raise ArgumentError(f"{lost} is in the block of a weight that is not given: pass both")
        return {name: shapes[name] for name in order}

    def __getitem__(self, name: str) -> Kronecker | Eigenbasis | Within:
        return self._given[name]

    def __iter__(self):
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    __hash__ = None  # type: ignore[assignment]

    @property
    def factors(self) -> dict[str, Kronecker | Eigenbasis]:
        """Parameter name -> factors, without the biases that are `Within` a weight's block."""
        return dict(self._factors)

    @property
    def shape(self) -> tuple[int, int]:
        """(D, D), D the number of entries of the parameters."""
        total = sum(map(prod, self._shapes.values()))
        return total, total

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return next(iter(self._factors.values()))[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return _device_of(next(iter(self._factors.values())))

    @property
    def T(self) -> Blocks:  # noqa: N802
        """The matrix itself, which is symmetric."""
        return self

    def adjoint(self) -> Blocks:
        """The matrix itself, which is symmetric."""
        return self

    def to_scipy(self):
        """The matrix as a `scipy.sparse.linalg.LinearOperator` (needs scipy)."""
        return linear_operator(self)

    def __matmul__(self, v: Vector) -> Vector:
        """The product with a vector; see the class.

        Raises:
            ArgumentError: for a vector of another structure, shape, dtype or device.
        """
        if isinstance(v, Mapping):
            if set(v) != set(self._shapes):
                raise ArgumentError(
                    f"the vector has {sorted(v)}, the matrix {sorted(self._shapes)}: give one tensor for each"
                )
            return self._times(v)
        total = self.shape[0]
        if not isinstance(v, Tensor) or v.ndim not in (1, 2) or v.shape[0] != total:
            got = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ArgumentError(
                f"the matrix is {[total, total]}: multiply a dict, [{total}] or [{total}, K], not {got}"
            )
        columns = v if v.ndim == 2 else v.unsqueeze(1)
        parts = columns.mT.split([prod(shape) for shape in self._shapes.values()], 1)
        named = {n: t.reshape(len(t), *s) for (n, s), t in zip(self._shapes.items(), parts, strict=True)}
        found = torch.cat([t.reshape(len(t), prod(self._shapes[n])) for n, t in self._times(named).items()], 1).mT
        return found if v.ndim == 2 else found.squeeze(1)

    def _times(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, f in self._factors.items():
            own = list(f.arrangement.named(name))
            try:
                products = _multiply_at_owner(f, v[name] if len(own) == 1 else tuple(v[n] for n in own))
            except ArgumentError as error:
                raise ArgumentError(f"'{name}': {error}") from None
            found |= zip(own, products if len(own) > 1 else (products,), strict=True)
        return {name: found[name] for name in self._shapes}

    def everywhere(self) -> Blocks:
        """The same matrix, whole on all ranks: owners send eigendecompositions. All ranks have to call this."""
        new: dict[str, Any] = dict(self._given)
        for name, f in self._factors.items():
            if f.owner is not None:
                new[name] = Eigenbasis(map(f.owner.send, self._basis(name)[0]), f.arrangement)
        return Blocks(new)

    def solve(self, v: Vector, damping: float = 0.0, pi: bool = False) -> Vector:
        """(self + damping I)^-1 v; with `pi` damped per factor, see `damped`."""
        return self.inverse(damping, pi) @ v

    def damped(self, damping: float, pi: bool = False) -> Blocks:
        """self + damping I, as eigenvectors and eigenvalues.

        Args:
            damping: a number d >= 0.
            pi: damp the factors instead, (B + sqrt(d)/pi I) (x) (A + pi sqrt(d) I), where
                pi^2 = (tr A / dim A) / (tr B / dim B) (Martens & Grosse 2015, section 6.3); a block without A becomes
                B + d I.

        Raises:
            ArgumentError: for a damping that is negative or no number, for factors that are not finite, or for `pi` with an
                eigenbasis, which has no two factors.
        """
        check_not_negative("damping", damping)
        return self._map_eigenvalues(lambda name, values: self._damped(name, values, damping, pi))

    def inverse(self, damping: float = 0.0, pi: bool = False) -> Blocks:
        """(self + damping I)^-1, as `Blocks`; see `damped`.

        Raises:
            ArgumentError: as `damped`, and if the matrix is singular.
        """
        return self.damped(damping, pi)._map_eigenvalues(
            lambda name, values: _inverted(f"the block of '{name}'", values)
        )

    def sqrt(self) -> Blocks:
        """The symmetric square root."""
        return self._map_eigenvalues(lambda name, values: values.sqrt())

    def logdet(self, damping: float = 0.0, pi: bool = False) -> Tensor:
        """log det(self + damping I), 0-dim; minus infinity where it is singular."""
        damped = self._require_here("logdet").damped(damping, pi)
        return torch.stack([f[-1].log().sum() for f in damped._factors.values()]).sum()

    def trace(self) -> Tensor:
        """The sum of its eigenvalues, 0-dim."""
        return torch.stack([self._trace(f) for f in self._require_here("trace")._factors.values()]).sum()

    def diag(self) -> dict[str, Tensor]:
        """Parameter name -> the diagonal, [*P]."""
        found: dict[str, Tensor] = {}
        for name, f in self._require_here("diag")._factors.items():
            own, diagonal = f.arrangement.named(name), _diagonal(f)
            found |= zip(own, diagonal if len(own) > 1 else (diagonal,), strict=True)
        return {name: found[name] for name in self._shapes}

    def quadratic(self, v: Vector) -> Tensor:
        """v^T self v: 0-dim, or one value per vector."""
        w = self @ v
        if isinstance(v, Tensor):
            return (v * w).sum(0)
        terms = ((t * w[n], self._shapes[n]) for n, t in v.items())
        return sum(t.reshape(*t.shape[: t.ndim - len(shape)], prod(shape)).sum(-1) for t, shape in terms)

    def sample(self, count: int = 1, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draws from N(0, self), [count, *P] by name; `inverse(damping).sample()` draws from the Laplace posterior."""
        where = generator.device if generator is not None else self.device
        noise: dict[str, Tensor] = {}
        for name, f in self._factors.items():
            for own, shape in f.arrangement.named(name).items():
                drawn = torch.randn(count, *shape, dtype=f[0].dtype, device=where, generator=generator)
                noise[own] = drawn.to(_device_of(f))
        return self.sqrt() @ noise

    def scaled(self, factor: float) -> Blocks:
        """The matrix times a number that is not negative."""
        check_not_negative("factor", factor)
        return self._map_eigenvalues(lambda name, values: values * factor)

    def basis(self) -> Blocks:
        """The same matrix as eigenvectors and eigenvalues: to be kept, or as the `start` of others."""
        return self._map_eigenvalues(lambda name, values: values)

    def dense(self) -> Tensor:
        """The whole matrix, [D, D]."""
        self._require_here("dense")
        found = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        places = dict(zip(
            self._shapes, torch.arange(self.shape[0]).split([prod(s) for s in self._shapes.values()]), strict=True
        ))  # fmt: skip
        for name, f in self._factors.items():
            at = torch.cat([places[n] for n in f.arrangement.named(name)]).to(self.device)
            found[at.unsqueeze(1), at] = dense(f)
        return found

    def _require_here(self, asked: str) -> Blocks:
        """This matrix, if all of its blocks are on this rank.

        Raises:
            ArgumentError: if they are not.
        """
        away = [(name, f.owner.rank) for name, f in self._factors.items() if f.owner is not None]
        if away:
            raise ArgumentError(
                f"{asked} of blocks that one rank has each ('{away[0][0]}': rank {away[0][1]}): everywhere() first, on all ranks"
            )
        return self

    def __repr__(self) -> str:
        return f"Blocks({', '.join(self._shapes)}: {self.shape[0]} x {self.shape[1]})"

    def _basis(self, name: str) -> tuple[Eigenbasis, list[Tensor]]:
        """(the eigenbasis of a block, the eigenvalues of each of its factors; an `Eigenbasis` has none)."""
        if name not in self._bases:
            f, of = self._factors[name], f"the block of '{name}'"
            if isinstance(f, Eigenbasis):
                _check_finite(of, f)
                self._bases[name] = eigenbasis(f), []
            else:
                start: Any = self._start[name] if self._start is not None else None
                known = eigenbasis(start) if isinstance(start, Kronecker) else start
                self._bases[name] = _decomposed(f, known, self._steps, of)
        return self._bases[name]

    def _damped(self, name: str, values: Tensor, damping: float, pi: bool) -> Tensor:
        """The damped eigenvalues of a block."""
        if not pi or len(self._factors[name]) == 1:
            return values + damping
        if isinstance(self._factors[name], Eigenbasis):
            raise ArgumentError(f"pi=True of '{name}', an eigenbasis, which has no two factors to damp: drop it")
        b, a = self._basis(name)[1]
        ratio = (a.mean() / b.mean()).sqrt()
        ratio = torch.where((ratio > 0) & ratio.isfinite(), ratio, torch.ones_like(ratio))
        root = damping**0.5
        return _product([b + root / ratio, a + root * ratio])

    def _map_eigenvalues(self, fn: Callable[[str, Tensor], Tensor]) -> Blocks:
        """The matrix with the same eigenvectors, and the eigenvalues `fn(name, eigenvalues)`."""
        bases = {name: self._basis(name)[0] for name in self._factors}
        new = {name: Eigenbasis([*b[:-1], fn(name, b[-1])], b.arrangement, b.owner) for name, b in bases.items()}
        return Blocks({name: new.get(name, given) for name, given in self._given.items()})

    @staticmethod
    def _trace(f: Kronecker | Eigenbasis) -> Tensor:
        if isinstance(f, Eigenbasis):
            return f[-1].sum()
        traces = [t.sum() if t.ndim == 1 else t.trace() for t in f]
        return traces[0] if len(traces) == 1 else traces[0] * traces[1]


def linear_operator(matrix: Any) -> Any:
    """A `scipy.sparse.linalg.LinearOperator` of a matrix with `@`, `T`, `shape`, `dtype`, `device` (needs scipy).

    Raises:
        ArgumentError: for bfloat16, which scipy does not have.
    """
    import numpy as np
    from scipy.sparse.linalg import LinearOperator

    if matrix.dtype == torch.bfloat16:
        raise ArgumentError("scipy has no bfloat16: make the matrix of a model in float32")
    like = torch.empty(0, dtype=matrix.dtype)

    def times(m: Any) -> Callable[[Any], Any]:
        # of a copy, as scipy may pass arrays that are reversed or read-only, which tensors cannot share
        return lambda x: (m @ torch.from_numpy(np.array(x)).to(matrix.device, matrix.dtype)).cpu().numpy()

    forward, back = times(matrix), times(matrix.T)
    return LinearOperator(
        matrix.shape, matvec=lambda x: forward(x.reshape(-1)), rmatvec=lambda x: back(x.reshape(-1)), matmat=forward,
        rmatmat=back, dtype=like.numpy().dtype,
    )  # fmt: skip


def _device_of(factors: Kronecker | Eigenbasis) -> torch.device:
    return factors[0].device if factors.owner is None else factors.owner.device


def _multiply_at_owner(factors: Kronecker | Eigenbasis, vectors: Vectors) -> Vectors:
    """The block times vectors; its owner computes this for all ranks."""
    owner = factors.owner
    if owner is None:
        return matmul(factors, vectors)
    given = vectors if owner.here else pytree.tree_map(lambda t: t.to("meta"), vectors)
    return pytree.tree_map(owner.send, matmul(factors, given))


def _inverted(of: str, values: Tensor) -> Tensor:
    if not values.is_meta and not bool((values > 0).all()):
        raise ArgumentError(f"{of} is singular: pass damping=")
    return 1 / values


def _diagonal(factors: Kronecker | Eigenbasis) -> Vectors:
    if isinstance(factors, Eigenbasis):
        q_b, q_a = factors[0], factors[1] if len(factors) == 3 else factors[0].new_ones(1)
        values = factors[-1].reshape(factors.arrangement.rows, factors.arrangement.columns)
        inside = _left(q_b.square(), values)
        return factors.arrangement.vector(inside * q_a.square() if q_a.ndim == 1 else inside @ q_a.square().mT)
    b, a = _both(factors)
    b, a = (f if f.ndim == 1 else f.diagonal() for f in (b, a))
    return factors.arrangement.vector(b.unsqueeze(1) * a)
