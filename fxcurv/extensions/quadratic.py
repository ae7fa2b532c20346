"""Quadratic forms of individual gradients in a Kronecker-factored matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.contractions.factors import Dense
from fxcurv.errors import ExtensionError
from fxcurv.extensions.base import Combine, Param
from fxcurv.extensions.columns import FACTORS, WHOLE, dense, record
from fxcurv.extensions.pairs import PerSample
from fxcurv.ir.emit import constant
from fxcurv.kronecker import Arrangement, Blocks, Joint, Within, eigenbasis
from fxcurv.quantity import GRADIENT


class Metric:
    """A `Blocks` as an argument of an extension; an object is equal only to itself."""

    def __init__(self, of: Blocks):
        self.of = of

    def __repr__(self) -> str:
        """Show values, so that the state of a pass over data recognises an equal matrix."""
        known = self.of.factors
        return f"Metric({', '.join(f'{n} {float(eigenbasis(f)[-1].double().norm()):.17g}' for n, f in known.items())})"


@dataclass(frozen=True)
class Quadratic(PerSample):
    """g_n^T M g_n of the individual gradients of one parameter and its block of M, [N]; by token [N, T].

    If M is the damped inverse of a curvature matrix, this is the influence of a sample on itself. `total=True` gives
    the form of whole gradients, as `result.<savefield>_total`.

    Args:
        metric: a `fxcurv.kronecker.Blocks` with a block for every parameter of the quantity (see `params=`), such as
            `Blocks(result.ekfac).inverse(damping)`. Blocks of weight and bias together need `total=True`.
    """

    metric: Any = None
    savefield = "quadratic"
    combine = (Combine("rows", 2),)

    def check(self) -> None:
        if isinstance(self.metric, Blocks):
            object.__setattr__(self, "metric", Metric(self.metric))
        if not isinstance(self.metric, Metric):
            raise ExtensionError(f"Quadratic({type(self.metric).__name__}): pass a fxcurv.kronecker.Blocks")

    def extract_all(self, params: list[Param]) -> tuple[dict[str, Any], dict[str, fx.Node]]:
        names = {p.name for p in params}
        there = [p for p in params if p.name in self.metric.of]
        missing = names - {p.name for p in there}
        for p in there:
            block = self.metric.of[p.name]
            missing |= set([block.weight] if isinstance(block, Within) else block.arrangement.named(p.name)) - names
        if missing:
            raise ExtensionError(
                f"Quadratic: {sorted(missing)} are not both among the blocks and the parameters: pass blocks for them, or params="
            )
        blocks = [p for p in there if not isinstance(self.metric.of[p.name], Within)]
        if len(blocks) < len(there) and not self.total:
            raise ExtensionError(
                "Quadratic of blocks of weight and bias together has no value for each: pass total=True"
            )
        return super().extract_all(blocks)

    def extract(self, param: Param) -> fx.Node:
        basis = eigenbasis(self.metric.of[param.name])
        val = param.node.meta["val"]
        with param.program.graph.inserting_before(param.program.output):
            parts = [constant(param.program, t.to(val.device, val.dtype).contiguous()) for t in basis]
        if isinstance(basis.arrangement, Joint):
            record(param, WHOLE)
            bias = Param(param.program, basis.arrangement.bias_name, self)
            rows = [p.contract(power=1, reduce="v") for p in (param, bias)]
            return param.emit(_of_rows, rows, parts, basis.arrangement)
        found = dense(param, GRADIENT) if param.positions is None else None
        if found is not None and _in_order(found, basis.arrangement) and found.g.meta["val"].shape[2] == 1:
            record(param, FACTORS)
            return param.emit(_of_factors, found, parts)
        record(param, WHOLE)
        return param.emit(_of_rows, param.contract(power=1, reduce="v"), parts, basis.arrangement)


def _in_order(f: Dense, arrangement: Arrangement) -> bool:
    """Whether the products have the rows and columns of the block's matrix, in the same order."""
    rows = (*arrangement.outputs, *arrangement.inputs) == tuple(range(len(arrangement.sizes)))
    both = (f.g.meta["val"].shape[4], f.a.meta["val"].shape[3]) == (arrangement.rows, arrangement.columns)
    return rows and both and f.arrange.order == tuple(range(len(f.arrange.order)))


# traced ------------------------------------------------------------------------------------------------------------


def _of_factors(f: Dense, parts: list[Tensor]) -> Tensor:
    a, g = f.a.squeeze(2).squeeze(1), f.g.squeeze(3).squeeze(2)[0]
    q_b, q_a, values = parts
    a, g = (t @ q if q.ndim == 2 else t * q for t, q in ((a, q_a), (g, q_b)))
    return torch.einsum("no,oi,ni->n", g.square(), values, a.square())


def _of_rows(p: Any, parts: list[Tensor], arrangement: Arrangement | Joint) -> Tensor:
    m = arrangement.matrix(p)
    q_b, q_a, values = parts[0], parts[1] if len(parts) == 3 else parts[0].new_ones(1), parts[-1]
    m = q_b.mT @ m if q_b.ndim == 2 else q_b.unsqueeze(-1) * m
    m = m @ q_a if q_a.ndim == 2 else m * q_a
    return (m.square() * values.reshape(arrangement.rows, arrangement.columns)).sum((-2, -1))
