"""Individual gradients and quantities made of them.

Under `compile(sample="token")` the individual gradients are g_{n,t}, those of the loss at each position of the model's
output [N, T, C], through every position that it depends on. N then stands for two axes, [N, T].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import ExtensionError
from fxcurv.extensions.base import Combine, Extension, Param, Steps
from fxcurv.ir.emit import constant, samples


@dataclass(frozen=True)
class BatchGrad(Extension):
    """Individual gradients g_n, [N, *P], or those of the samples in `subsampling`, [S, *P].

    Args:
        subsampling: indices of samples, which may repeat and reorder; the scaling stays the full batch's.
    """

    subsampling: tuple[int, ...] | None = None
    savefield = "grad_batch"
    sample_axis = 0
    combine = (Combine("rows"),)

    def check(self) -> None:
        freeze_indices(self)

    def extract(self, param: Param) -> fx.Node:
        return param.contract(power=1, reduce="v", samples=self.subsampling)


@dataclass(frozen=True)
class BatchL2Grad(Extension):
    """Squared norms of the individual gradients, ||g_n||^2 of one parameter, [N]."""

    savefield = "batch_l2"
    sample_axis = 0
    combine = (Combine("rows", 2),)

    def extract(self, param: Param) -> fx.Node:
        return param.contract(power=2, reduce="vp")


@dataclass(frozen=True)
class SumGradSquared(Extension):
    """The uncentred second moment, sum_n g_n^2, [*P]."""

    savefield = "sum_grad_squared"
    combine = (Combine("sum", 2),)

    def extract(self, param: Param) -> fx.Node:
        return param.contract(power=2, reduce="vn")


@dataclass(frozen=True)
class Variance(Extension):
    """The population variance of the individual gradients, sum_n g_n^2 / N - (sum_n g_n / N)^2, [*P]."""

    savefield = "variance"

    def extract(self, param: Param) -> fx.Node:
        squares = param.contract(power=2, reduce="vn")
        mean = param.contract(power=1, reduce="vn", precise=True)
        return param.emit(_variance, squares, mean, samples(param.program), param.positions or 1)

    def gather(self) -> Steps:
        (moments,) = yield (GradMoments(params=self.params, savefield=self.field_of("moments")),)
        return {name: _variance(squares, total, n, 1) for name, (squares, total, n) in moments.items()}


def _variance(squares: Tensor, total: Tensor, samples: int, positions: int) -> Tensor:
    n = samples * positions
    mean = total / n
    return torch.addcmul(squares / n, mean, mean, value=-1)


@dataclass(frozen=True)
class GradMoments(Extension):
    """[sum_n g_n^2, sum_n g_n, N], of shapes [*P], [*P] and []: sums over batches that make a variance."""

    savefield = "grad_moments"
    combine = (Combine("sum", 2), Combine("sum", 1), Combine("sum", 0))

    def extract(self, param: Param) -> list[fx.Node]:
        squares = param.contract(power=2, reduce="vn")
        total = param.contract(power=1, reduce="vn", precise=True)
        return [squares, total, param.emit(_count, squares, samples(param.program), param.positions or 1)]


def _count(like: Tensor, samples: int, positions: int) -> Tensor:
    return like.new_ones(()) * (samples * positions)


class Bounds:
    """Bounds of norms that may change: a tensor, or numbers and tensors by parameter name. Equal to itself alone.

    Raises:
        ExtensionError: if one is not positive, or a tensor with dimensions.
    """

    def __init__(self, given: Any):
        self.by_name = isinstance(given, Mapping)
        self._given: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"": given}
        for name, bound in self._given.items():
            _check_bound(bound, name and f" of '{name}'")

    def __repr__(self) -> str:
        """By value, so that the state of a pass over data knows them again."""
        said = {name: float(bound) for name, bound in self._given.items()}
        return f"Bounds({said if self.by_name else said['']})"

    def of(self, param: Param) -> Any:
        """A number, or the node of a tensor.

        Raises:
            ExtensionError: if the parameter has none.
        """
        if self.by_name and param.name not in self._given:
            raise ExtensionError(f"ClippedGrad: no bound for parameter '{param.name}': pass one, or params= without it")
        bound = self._given[param.name if self.by_name else ""]
        if not isinstance(bound, Tensor):
            return float(bound)
        with param.program.graph.inserting_before(param.program.output):
            return constant(param.program, bound.detach().to(param.node.meta["val"].device))


def _check_bound(bound: Any, whose: str = "") -> None:
    if isinstance(bound, Tensor) and bound.ndim:
        raise ExtensionError(f"ClippedGrad(max_norm={list(bound.shape)}){whose}: a tensor is to have no dimensions")
    if not isinstance(bound, Tensor | int | float) or not bound > 0:
        raise ExtensionError(f"ClippedGrad(max_norm={bound!r}){whose}: use a positive number")


@dataclass(frozen=True)
class ClippedGrad(Extension):
    """The clipped gradient sum, sum_n min(1, max_norm / ||g_n||) g_n, [*P] (Abadi et al. 2016, Algorithm 1).

    The individual gradients are never stored: norms first, then a weighted sum from the same factors. Also sets
    `result.sample_norms`, the norms ||g_n|| over all parameters, [N].

    Args:
        max_norm: positive bound. A tensor without dimensions is read at every call, so that the bound may be changed in place
            (adaptive clipping); it is to lie on the model's device. A dict from parameter names to bounds (either kind), for
            `over="param"`: of every parameter that the quantity is of.
        over: "all" (the norm over all parameters) or "param" (of each parameter by itself).
    """

    max_norm: Any
    over: str = "all"
    savefield = "grad_clipped"
    combine = (Combine("sum", None),)
    extras = {"sample_norms": Combine("rows")}

    def check(self) -> None:
        if self.over not in ("all", "param"):
            raise ExtensionError(f"ClippedGrad(over={self.over!r}): use 'all' or 'param'")
        if isinstance(self.max_norm, Tensor | Mapping):
            object.__setattr__(self, "max_norm", Bounds(self.max_norm))
        if not isinstance(self.max_norm, Bounds):
            _check_bound(self.max_norm)
        elif self.max_norm.by_name and self.over == "all":
            raise ExtensionError("ClippedGrad: a bound for each parameter clips each by itself: pass over='param'")

    def extract_all(self, params: list[Param]):
        squared = {p.name: p.contract(power=2, reduce="vp") for p in params}
        norms = params[0].emit(_norm, list(squared.values()))
        out = {}
        for param in params:
            norm = norms if self.over == "all" else param.emit(_norm, [squared[param.name]])
            bound = self.max_norm.of(param) if isinstance(self.max_norm, Bounds) else float(self.max_norm)
            weights = param.emit(_clip, norm, bound)
            total = param.contract(power=1, reduce="vn", weights=weights, precise=True)
            dtype = param.node.meta["val"].dtype
            out[param.name] = total if total.meta["val"].dtype == dtype else param.emit(Tensor.to, total, dtype)
        return out, {"sample_norms": norms}


def _norm(squares: list[Tensor]) -> Tensor:
    return sum(squares[1:], squares[0]).sqrt()


def _clip(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    scale = torch.where(norm <= max_norm, torch.ones_like(norm), max_norm / norm)  # of a norm that is NaN, NaN
    return scale.unsqueeze(0)


def freeze_indices(extension: Any) -> None:
    """Make `subsampling` a hashable tuple of non-negative ints.

    Raises:
        ExtensionError: if it is empty or holds a negative index.
    """
    indices = extension.subsampling
    if indices is None:
        return
    indices = tuple(int(i) for i in indices)
    if not indices or min(indices) < 0:
        raise ExtensionError(
            f"{type(extension).__name__}(subsampling={list(indices)}): give indices of samples, from 0"
        )
    object.__setattr__(extension, "subsampling", indices)
