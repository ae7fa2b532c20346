"""Random projections of individual gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from fxcurv.contractions.factors import Dense, Gather
from fxcurv.errors import ExtensionError
from fxcurv.extensions.base import Param
from fxcurv.extensions.columns import WHOLE, dense, lookups, record
from fxcurv.extensions.pairs import PerSample
from fxcurv.ir.emit import declare
from fxcurv.ir.placement import Shard
from fxcurv.kernels.projections import outer_project, project, rows_project
from fxcurv.quantity import GRADIENT


@dataclass(frozen=True)
class Projected(PerSample):
    """The individual gradients of one parameter times a random matrix, g_n R, [N, dim]; by token [N, T, dim].

    The entries of R, [P, dim], are independent, +1 or -1 over sqrt(dim) with equal chance, so that inner products keep
    their means (Achlioptas 2003; Park et al. 2023, TRAK). An entry is a function of `seed`, the parameter's name, and
    its place in R: it does not depend on batches, devices and other parameters. R is made a few rows at a time; [N, *P]
    is not formed for matrix products and for tables. The sum over parameters is the projection of the whole gradient
    (`total=True`).

    Args:
        dim: number of columns.
        seed: the seed of the matrix, which does not depend on that of a call.
    """

    dim: int = 512
    seed: int = 0
    savefield = "projected"

    def check(self) -> None:
        if not isinstance(self.dim, int) or self.dim < 1:
            raise ExtensionError(f"Projected(dim={self.dim!r}): use a positive integer")
        if not isinstance(self.seed, int):
            raise ExtensionError(f"Projected(seed={self.seed!r}): use an integer")

    def of(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Project vectors by the same matrix: parameter name -> [K, *P] gives [K, dim].

        Axis 0 counts the vectors; pass a single one as `v.unsqueeze(0)`. Autograd follows it.
        """
        return {
            name: project(v.reshape(len(v), prod(v.shape[1:])), self.dim, self.key(name)) for name, v in vectors.items()
        }

    def key(self, name: str) -> int:
        """The number from which the signs of a parameter are made."""
        digest = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def extract(self, param: Param) -> fx.Node:
        if param.program.options.create_graph:
            raise ExtensionError(
                "Projected with create_graph=True has no derivative. Way out: BatchGrad, and Projected(...).of(result.grad_batch)"
            )
        at = (self.dim, self.key(param.name))
        found = dense(param, GRADIENT) if param.positions is None else None
        rows = lookups(param, GRADIENT) if param.positions is None else None
        if found is not None:
            record(param, "blocks of P by random signs")
            sizes, order = list(found.arrange.sizes), list(found.arrange.order)
            a, g = param.emit(_parts, found)
            return self._rows(param.emit(outer_project, a, g, sizes, order, *at), [a, g])
        if rows is not None:
            record(param, "looked up rows by random signs")
            g = param.emit(_one_column, rows)
            return self._rows(param.emit(rows_project, rows.index, g, rows.padding, *at), [rows.index, g])
        record(param, WHOLE)
        p = param.contract(power=1, reduce="v")
        dims = len(param.node.meta["val"].shape)
        a, g = param.emit(_as_outputs, p, dims)
        size = prod(param.node.meta["val"].shape)
        value = self._rows(param.emit(outer_project, a, g, [size], [0], *at), [a, g])
        return param.emit(_unflattened, value, p, dims)

    def _rows(self, value: fx.Node, given: list[fx.Node]) -> fx.Node:
        declare(value, Shard(0), given)
        return value


# traced ------------------------------------------------------------------------------------------------------------


def _parts(f: Dense) -> tuple[Tensor, Tensor]:
    return f.a.squeeze(2), f.g.squeeze(3)[0]


def _one_column(f: Gather) -> Tensor:
    return f.g[0]


def _as_outputs(p: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Materialised rows [*lead, *P] as products with one, a [N, 1, 1] and g [N, 1, P]."""
    rows = p.reshape(prod(p.shape[: p.ndim - dims]), 1, prod(p.shape[p.ndim - dims :]))
    return torch.ones_like(rows[..., :1]), rows


def _unflattened(value: Tensor, p: Tensor, dims: int) -> Tensor:
    return value.reshape(*p.shape[: p.ndim - dims], value.shape[1])
