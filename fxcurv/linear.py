"""Matrices of a data set that are never formed: Gauss-Newton, Hessian, Fisher, Jacobian, and the kernel J J^T.

Each is made from a compiled model and data: one batch (inputs, *targets), or a loader of batches, which every product
goes over once (`NTK` twice). It has the model's device and dtype. Vectors over parameters are dicts of tensors [*P] by
name, flat [D], or columns [D, K], in the order of `named_parameters()`; over outputs they are [R] or [R, K], R = N C,
sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxcurv.api import Compiled
from fxcurv.data.batches import Batches, check_apart, check_given, unpacked
from fxcurv.data.halves import Halves
from fxcurv.data.weights import Weights
from fxcurv.errors import ArgumentError, ExtensionError
from fxcurv.extensions import GGNMP, HMP, DiagGGNExact, DiagGGNMC, DiagHessian, Extension, SqrtGGNMC
from fxcurv.extensions.ggn import DiagEmpirical, JacobianNorms, SqrtEmpirical
from fxcurv.extensions.parameters import Choice, chosen, hashable
from fxcurv.ir.origin import locate
from fxcurv.ir.placement import Shard
from fxcurv.ir.program import Program
from fxcurv.kronecker import linear_operator
from fxcurv.over import over
from fxcurv.runtime.selfcheck import draws_numbers

__all__ = ["GGN", "NTK", "EmpiricalFisher", "Hessian", "Jacobian", "MCFisher"]


class Matrix:
    """Base of all matrices here.

    Args:
        compiled: from `fxcurv.compile`; its extensions do not matter. The model has no op that draws random numbers (eval
            mode, with dropout): every product would be of another matrix. Buffers are not updated.
        data: one batch, a tuple (inputs, *targets); or a loader of batches, as `fxcurv.over` takes them, which yields the
            same batches in the same order every time (`shuffle=False`). Batches are compared by checksums.
        params: the parameters that the matrix is over, as for `compile`.
        unpack: batch of a loader -> (inputs, *targets).
        reduction: see `fxcurv.over`.

    Attributes:
        shape, dtype, device: of the matrix.
        T: its transpose.

    Raises:
        ArgumentError: for an iterator, which can be gone over only once; for a loader without samples; for a model that
            draws random numbers; in products, for a loader that yields other batches than the first time.
        MixedSamplesError: where samples interact in the model: for a loader, and for matrices of rows (all but `GGN` and
            `Hessian`).
        LossError: for a loader, if the loss is no sum or mean over samples, as `fxcurv.over`.
    """

    def __init__(
        self, compiled: Compiled, data: Any, *, params: Choice = None, unpack: Callable[[Any], tuple] | None = None,
        reduction: Any = None,
    ):  # fmt: skip
        whose = f"fxcurv.linear.{type(self).__name__}"
        check_given(compiled, data, whose)
        compiled.alone(whose)
        self._single = isinstance(data, tuple)
        if not self._single and iter(data) is data:
            raise ArgumentError(
                "data is an iterator, which every product would begin anew: pass a list or a DataLoader"
            )
        among = compiled.covered()[0]
        self.params = hashable(params, ArgumentError, type(self).__name__)
        self.names = chosen(self.params, compiled.subject, ArgumentError, type(self).__name__, among)
        held = dict(compiled.subject.named_parameters())
        self._shapes = {name: tuple(held[name].shape) for name in self.names}
        self._like = held[self.names[0]].detach()
        self._compiled = compiled.asking((), update_buffers=False)
        self._source, self._reduction = data, reduction
        self._data = data if self._single else Batches(self._compiled, data, unpack, "data")
        self._given: Any = {"params": self.names}
        self._prepare()
        self._count()

    def _prepare(self) -> None:
        """Make what `_program` needs."""

    # ---- data ------------------------------

    def _batches(self) -> Iterator[tuple[Any, tuple]]:
        """(inputs, targets) of each batch; a loader's empty batches are left out."""
        if self._single:
            yield unpacked(self._compiled, self._data, tuple if self._compiled.loss is not None else None)
            return
        for inputs, *targets in self._data:
            yield inputs, tuple(targets)

    def _count(self) -> None:
        """Go over the data once, for the weights of batches and the number of samples."""
        plain = self._compiled
        weights = Weights(plain.model, plain.loss, self._reduction)
        found: list[float | None] = []
        self.samples = 0
        for inputs, targets in self._batches():
            self._check(self._program(inputs, targets))
            arguments = plain.arguments(inputs, *targets)
            self.samples += arguments.batch_size
            alone = self._single or plain.loss is None
            found.append(None if alone else weights.of(plain(inputs, *targets), inputs, targets, arguments, plain))
        if not found:
            raise ArgumentError("the loader yields no sample: pass one with at least one batch")
        total = None if self._single else weights.total(sum(z or 0.0 for z in found))
        self._factors = [1.0 if z is None else z if total is None else z / total for z in found]

    def _program(self, inputs: Any, targets: tuple) -> Program:
        """The program that products of this batch take."""
        raise NotImplementedError

    def _check(self, program: Program) -> None:
        """Refuse a model of which the matrix would be another one in every product, or for every batch."""
        drawn = next((n for n in program.graph.nodes if draws_numbers(n.target, n.args, n.kwargs)), None)
        if drawn is not None:
            raise ArgumentError(
                f"{locate(drawn)}\ndraws random numbers, so every product would be of another matrix. Way out: model.eval(), "
                "which turns dropout off."
            )
        if not self._single:
            check_apart(program)

    def _weighted(self) -> Iterator[tuple[float, Any, tuple]]:
        for factor, (inputs, targets) in zip(self._factors, self._batches(), strict=True):
            yield factor, inputs, targets

    def _diagonal(self, extension: Extension, seed: int = 0) -> dict[str, Tensor]:
        """The value of an extension over the data, by parameter name."""
        compiled = self._compiled.asking([extension])
        if self._single:
            inputs, targets = next(self._batches())
            return compiled(inputs, *targets, seed=seed)[extension]
        return over(compiled, self._data, unpack=tuple, reduction=self._reduction, seed=seed, progress=False)[extension]

    # ---- a matrix ------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self._like.device

    @property
    def size(self) -> int:
        """D, the number of entries of the parameters."""
        return sum(map(prod, self._shapes.values()))

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and columns, each D over parameters or R over outputs."""
        return self.size, self.size

    @property
    def T(self) -> Any:  # noqa: N802
        """Its transpose."""
        return self

    def adjoint(self) -> Any:
        """Its transpose, `.T`: the matrix is real."""
        return self.T

    def _times(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def __matmul__(self, v: Any) -> Any:
        """The product with a vector or with columns, in the form in which these are given.

        Raises:
            ArgumentError: for a vector of another structure.
        """
        if isinstance(v, Mapping):
            return self._times(self._named(v))
        return self._columnwise(v, self.shape[1], lambda x: self._flatten(self._times(self._unflatten(x))))

    def _columnwise(self, v: Any, size: int, fn: Callable[[Tensor], Tensor]) -> Tensor:
        if not isinstance(v, Tensor) or v.ndim not in (1, 2) or v.shape[0] != size:
            got = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ArgumentError(f"the matrix is {list(self.shape)}: multiply [{size}] or [{size}, K], not {got}")
        x = v.to(self.device, self.dtype)
        found = fn(x) if v.ndim == 1 else torch.stack([fn(column) for column in x.unbind(1)], 1) if v.shape[1] else None
        return x.new_zeros(self.shape[0], 0) if found is None else found

    def _named(self, v: Mapping) -> dict[str, Tensor]:
        if {n: tuple(t.shape) for n, t in v.items()} != self._shapes:
            raise ArgumentError(
                f"the vector has { ({n: list(t.shape) for n, t in v.items()}) }, the matrix {self._shapes}"
            )
        return {name: v[name] for name in self.names}

    def _unflatten(self, v: Tensor) -> dict[str, Tensor]:
        parts = v.split([prod(s) for s in self._shapes.values()])
        return {name: t.reshape(s) for (name, s), t in zip(self._shapes.items(), parts, strict=True)}

    def _flatten(self, v: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([v[name].flatten() for name in self.names])

    def diag(self) -> Tensor:
        """Its diagonal, [D]."""
        raise NotImplementedError

    def trace(self) -> Tensor:
        """The sum of the diagonal, 0-dim."""
        return self.diag().sum()

    def to_scipy(self):
        """The matrix as a `scipy.sparse.linalg.LinearOperator` (needs scipy)."""
        return linear_operator(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]})"


class _Product(Matrix):
    """A matrix whose product with a vector is an extension's, on each batch."""

    extension: Any
    field: str
    diagonal: Any

    def _prepare(self) -> None:
        self._products = self._compiled.asking([self.extension(**self._given)])

    def _program(self, inputs: Any, targets: tuple) -> Program:
        return self._products.lower(inputs, *targets).program

    def _times(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for factor, inputs, targets in self._weighted():
            found = getattr(self._products(inputs, *targets), self.field) @ v
            total = {n: t * factor + total[n] if total else t * factor for n, t in found.items()}
        return total

    def diag(self) -> Tensor:
        return self._flatten(self._diagonal(self.diagonal(**self._given)))


class GGN(_Product):
    """The generalised Gauss-Newton, [D, D]."""

    extension, field, diagonal = GGNMP, "ggn", DiagGGNExact


class Hessian(_Product):
    """The Hessian of the loss, including a regulariser, [D, D]."""

    extension, field, diagonal = HMP, "hessian", DiagHessian


class _OfRows(Matrix):
    """A matrix whose products are made of those with J and J^T of each batch."""

    def _prepare(self) -> None:
        self._halves: list[tuple[Any, Halves]] = []
        self._checked = self._compiled.loss is None
        self._outputs = 0

    def _program(self, inputs: Any, targets: tuple) -> Program:
        return self._halves_for(inputs, targets, self._compiled.arguments(inputs, *targets)).program

    def _check(self, program: Program) -> None:
        super()._check(program)
        if not all(isinstance(f.meta["place"], Shard) for f in program.heads):
            check_apart(program)

    def _parts(self) -> Iterator[tuple[float, Halves, list[Any]]]:
        for factor, inputs, targets in self._weighted():
            arguments = self._compiled.arguments(inputs, *targets)
            halves = self._halves_for(inputs, targets, arguments)
            flat = halves.flat(arguments)
            if not self._checked:
                halves.check(flat, self._compiled(inputs, *targets).grad)
                self._checked = True
            yield factor, halves, flat

    def _halves_for(self, inputs: Any, targets: tuple, arguments: Any) -> Halves:
        n = arguments.batch_size
        shapes = [(t.shape[1:], t.dtype) for t in (*arguments.inputs, *arguments.split_targets())], arguments.structure
        for known, halves in self._halves:
            if known == shapes and halves.serves(n):
                return halves
        self._halves.append((shapes, Halves(self._compiled, self.names, inputs, targets)))
        return self._halves[-1][1]

    @property
    def rows(self) -> int:
        """R, the number of outputs of all samples."""
        if not self._outputs:
            self._outputs = sum(halves.rows(halves.outputs(flat)[0]).numel() for _, halves, flat in self._parts())
        return self._outputs

    def _j(self, v: dict[str, Tensor]) -> Tensor:
        """J v, [R]."""
        return torch.cat(
            [halves.times(flat, [v[n] for n in halves.names]).flatten() for _, halves, flat in self._parts()]
        )

    def _jt(self, u: Tensor) -> Tensor:
        """J^T u, [D]."""
        total, start = torch.zeros(self.size, dtype=self.dtype, device=self.device), 0
        for _, halves, flat in self._parts():
            like = halves.rows([h.detach() for h in halves.outputs(flat)[0]])
            rows = u[start : start + like.numel()].reshape(like.shape)
            total += self._flatten(dict(zip(halves.names, halves.transposed(flat, rows), strict=True)))
            start += like.numel()
        return total


class Jacobian(_OfRows):
    """The derivative of the model's output, [R, D]; `.T` is its transpose."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.size

    @property
    def T(self) -> _Transposed:  # noqa: N802
        return _Transposed(self)

    def __matmul__(self, v: Any) -> Tensor:
        if isinstance(v, Mapping):
            return self._j(self._named(v))
        return self._columnwise(v, self.size, lambda x: self._j(self._unflatten(x)))

    def diag(self) -> Tensor:
        """Raises `ExtensionError`: the matrix is not square."""
        raise ExtensionError(
            "a Jacobian is not square, so it has no diagonal: use NTK(...).diag(), or the extension Jacobian"
        )


class _Transposed(Matrix):
    def __init__(self, of: Jacobian):
        self.of, self._like, self._shapes, self.names = of, of._like, of._shapes, of.names

    @property
    def shape(self) -> tuple[int, int]:
        return self.of.size, self.of.rows

    @property
    def T(self) -> Jacobian:  # noqa: N802
        return self.of

    def __matmul__(self, u: Any) -> Tensor:
        return self._columnwise(u, self.of.rows, self.of._jt)

    def diag(self) -> Tensor:
        return self.of.diag()


class NTK(_OfRows):
    """The Gram matrix of the outputs' derivatives, J J^T, [R, R]: the neural tangent kernel.

    Args:
        other: a second batch or loader, for the right side: J(data) J(other)^T, [R, R'].
    """

    def __init__(self, compiled: Compiled, data: Any, *, other: Any = None, **options: Any):
        super().__init__(compiled, data, **options)
        self._options = options
        self._right: _OfRows = self if other is None else _OfRows(compiled, other, **options)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self._right.rows

    @property
    def T(self) -> NTK:  # noqa: N802
        if self._right is self:
            return self
        return NTK(self._compiled, self._right._source, other=self._source, **self._options)

    def __matmul__(self, u: Any) -> Tensor:
        return self._columnwise(u, self._right.rows, lambda x: self._j(self._unflatten(self._right._jt(x))))

    def diag(self) -> Tensor:
        """[R], the squared norms of the outputs' derivatives.

        Raises:
            ArgumentError: with `other`.
        """
        if self._right is not self:
            raise ArgumentError("the kernel of two batches has no diagonal: NTK(...) of one of them has")
        norms = self._diagonal(JacobianNorms(**self._given))
        return torch.stack(list(norms.values())).sum(0).flatten()


class _Fisher(_OfRows):
    """J^T (sum_v s s^T) J."""

    root: Any
    seed = 0

    def _times(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        first = 0
        for factor, halves, flat in self._parts():
            s = halves.columns(flat, self.root, self.seed, first)
            jv = halves.times(flat, [v[n] for n in halves.names])
            weights = torch.einsum("vnc,nc->vn", s, jv) * factor
            rows = torch.einsum("vnc,vn->nc", s, weights)
            total += self._flatten(dict(zip(halves.names, halves.transposed(flat, rows), strict=True)))
            first += len(jv)
        return self._unflatten(total)


class EmpiricalFisher(_Fisher):
    """The empirical Fisher, sum_n g_n g_n^T / c, [D, D] (see `KFAC(fisher=)`).

    g_n are the individual gradients, and c is the factor of the log-likelihood in the loss.
    """

    root = SqrtEmpirical()

    def diag(self) -> Tensor:
        return self._flatten(self._diagonal(DiagEmpirical(**self._given)))


class MCFisher(_Fisher):
    """The Gauss-Newton, estimated with `mc_samples` columns per sample, the same in every product, [D, D].

    Args:
        mc_samples: the number of columns.
        seed: the seed of the columns, as for `fxcurv.over` and a call.
    """

    def __init__(self, compiled: Compiled, data: Any, *, mc_samples: int = 1, seed: int = 0, **options: Any):
        self.seed, self.root = seed, SqrtGGNMC(mc_samples)
        super().__init__(compiled, data, **options)

    def diag(self) -> Tensor:
        return self._flatten(self._diagonal(DiagGGNMC(self.root.mc_samples, **self._given), self.seed))
