"""Inner products of individual gradients: with each other, and with given vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.contractions.factors import Dense, Factor
from fxcurv.contractions.sizes import dims
from fxcurv.errors import ExtensionError
from fxcurv.extensions.base import Combine, Extension, Param
from fxcurv.ir.emit import constant
from fxcurv.ir.precision import HALF, widened
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Decision
from fxcurv.quantity import GRADIENT
from fxcurv.walks.uses import select_group


@dataclass(frozen=True)
class GramGrad(Extension):
    """The Gram matrix of the individual gradients of one parameter, <g_n, g_m>, [N, N].

    Of a matrix product with S positions it is sum_{s,t} <a_{n,s}, a_{m,t}> <b_{n,s}, b_{m,t}>, where that is cheaper than forming
    [N, *P]: the report says which. Summed over parameters it is that of the whole gradients, the empirical tangent kernel
    (Dangel et al. 2022, ViViT).
    """

    savefield = "gram_grad"
    sample_axis = 0

    def extract(self, param: Param) -> fx.Node:
        found = _dense(param)
        if found is not None:
            d = _sizes(found)
            if d.s**2 * (d.i + d.o) < d.i * d.o:
                _record(param, "Gram products of factors")
                return param.emit(_gram_of_factors, found)
        _record(param, "materialise")
        return param.emit(_gram, param.contract(power=1, reduce="v", precise=True))


class Vectors(Mapping):
    """Parameter name -> vectors [Q, *P]; equal to itself alone."""

    def __init__(self, of: Mapping[str, Tensor]):
        self._of = dict(of)

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name]

    def __iter__(self):
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __repr__(self) -> str:
        """By value, so that the state of a pass over data knows them again."""
        marks = [f"{name}{list(t.shape)} {float(t.double().norm()):.17g}" for name, t in self._of.items()]
        return f"Vectors({', '.join(marks)})"


@dataclass(frozen=True)
class Dots(Extension):
    """Inner products of the individual gradients with vectors, <g_n, v_q> of one parameter, [N, Q].

    [N, *P] is not formed for a matrix product without shared positions, nor for many samples by `fxcurv.over`, where these are
    influence scores of a data set. Sum over parameters for those of whole gradients.

    Args:
        vectors: parameter name -> [Q, *P], for every parameter that the quantity is of (`params=` says others). They are part of
            the program: for other vectors make another extension.
    """

    vectors: Any = None
    savefield = "dots"
    sample_axis = 0
    combine = (Combine("rows"),)

    def check(self) -> None:
        if not isinstance(self.vectors, Mapping) or not all(isinstance(v, Tensor) for v in self.vectors.values()):
            raise ExtensionError(f"Dots({type(self.vectors).__name__}): pass a dict from parameter names to tensors [Q, *P]")
        if not isinstance(self.vectors, Vectors):
            object.__setattr__(self, "vectors", Vectors(self.vectors))

    def extract(self, param: Param) -> fx.Node:
        shape, val = tuple(param.node.meta["val"].shape), param.node.meta["val"]
        if param.name not in self.vectors:
            raise ExtensionError(f"Dots: no vector for parameter '{param.name}': pass one, or Dots(params=...) without it")
        given = self.vectors[param.name]
        if tuple(given.shape[1:]) != shape or given.ndim != len(shape) + 1:
            wanted = f"[Q, {', '.join(map(str, shape))}]"
            raise ExtensionError(f"Dots: the vectors of '{param.name}' are {list(given.shape)}: pass {wanted}")
        with param.program.graph.inserting_before(param.program.output):
            vectors = constant(param.program, given.detach().to(val.device, val.dtype).contiguous())
        found = _dense(param)
        if found is not None and _sizes(found).s == 1:
            _record(param, "products with factors")
            return param.emit(_dots_of_factors, found, vectors)
        _record(param, "materialise")
        return param.emit(_dots, param.contract(power=1, reduce="v"), vectors)


def _dense(param: Param) -> Factor | None:
    """The factors of a parameter that is used once, as it is, in a matrix product."""
    uses = [u for u in param.program.walked.uses[param.name] if GRADIENT in u.groups]
    if param.positions is not None or len(uses) != 1 or uses[0].path or not isinstance(uses[0].factor, Dense):
        return None
    found = select_group(param.program, uses[0], GRADIENT, param.origin())
    if _sizes(found).k != 1:
        return None
    return param.emit(widened, found) if found.g.meta["val"].dtype in HALF else found


def _sizes(factor: Factor) -> Any:
    return dims(pytree.tree_map(lambda n: n.meta["val"] if isinstance(n, fx.Node) else n, factor))


def _record(param: Param, algorithm: str) -> None:
    """What is computed goes into the report."""
    field = param.origin()["savefield"]
    param.program.decisions.append(Decision(param.name, param.label, "", algorithm, 0, 0, 0.0, (), field, "extract"))


# traced ------------------------------------------------------------------------------------------------------------


def _gram(p: Tensor) -> Tensor:
    rows = p.reshape(p.shape[0], prod(p.shape[1:]))
    return rows @ rows.t()


def _gram_of_factors(f: Dense) -> Tensor:
    a, g = f.a.squeeze(2), f.g[0].squeeze(2)  # [N, S, I], [N, S, O]
    if a.shape[1] == 1:
        a, g = a.squeeze(1), g.squeeze(1)
        return (a @ a.t()) * (g @ g.t())
    return (torch.einsum("nsi,mti->nmst", a, a) * torch.einsum("nso,mto->nmst", g, g)).sum((2, 3))


def _dots(p: Tensor, vectors: Tensor) -> Tensor:
    size = prod(p.shape[1:])
    return p.reshape(p.shape[0], size) @ vectors.reshape(vectors.shape[0], size).t()


def _dots_of_factors(f: Dense, vectors: Tensor) -> Tensor:
    a, g = f.a.squeeze(2).squeeze(1), f.g[0].squeeze(2).squeeze(1)  # [N, I], [N, O]
    core = vectors.to(a.dtype).reshape(vectors.shape[0], *[f.arrange.sizes[d] for d in f.arrange.order])
    back = [f.arrange.order.index(d) for d in range(len(f.arrange.order))]
    core = core.permute(0, *(1 + d for d in back)).reshape(vectors.shape[0], g.shape[1], a.shape[1])
    return torch.einsum("qoi,ni,no->nq", core, a, g)
