"""Kronecker factors from one averaged matrix per activation (Botev, Ritter & Barber 2017).

M <- (1/N) sum_n J_n^T M J_n, op by op from M = sum_n H_n at the model's output down to every layer. There, B is M (linear
layers on vectors), its sums over pairs of positions (a convolution without groups), or its sum over equal positions
(anything else with shared positions, which has the inputs' factor of "expand"); A is that of `KFAC`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcurv.contractions.sizes import dims
from fxcurv.cost import Cost
from fxcurv.errors import ExtensionError
from fxcurv.extensions.base import Param
from fxcurv.extensions.factored import Factored, dtype_of, embedded, input_factor
from fxcurv.extensions.layers import Embed, Layer, LayerUse, NoLayer, is_weight, read
from fxcurv.ir.graph import canonical_args
from fxcurv.ir.origin import locate
from fxcurv.ir.placement import Shard, places_of
from fxcurv.ir.precision import widely
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Decision, is_active
from fxcurv.kronecker import Kronecker
from fxcurv.quantity import GRADIENT, Averaged
from fxcurv.rules.traits import WEIGHTS
from fxcurv.walks.averaged.chain import Matrix
from fxcurv.walks.averaged.mathematics import of_features


@dataclass(frozen=True)
class KFRA(Factored):
    """Kronecker factors from the batch-averaged Gauss-Newton of every layer's output.

    `Kronecker` [B, A] for a weight, [B] for a bias; B: [out, out], A: [in, in], or [in] for an embedding. Defined for
    models that are a chain of activations, each parameter used once.
    """

    savefield = "kfra"
    by_op = True  # it averages over samples after every op
    requires = Averaged()

    def extract(self, param: Param) -> Kronecker:
        found = param.program.walked.averaged[tuple(param.program.names_of(self))]
        readers = _readers(param, found)
        if not readers:
            return self._unreached(param)
        layer, use = self._single(param, readers)
        place, channel = use.at or (use.use.op.meta["place"], WEIGHTS[use.use.op.target][1])
        m = found[use.use.op]
        sharing = "convolution" if layer.single_convolution else "expand"
        at = None if channel is None else channel % len(m.shape)
        b = m.node if m.summed else param.emit(of_features, m.node, m.shape, at, sharing == "convolution")
        factors = [param.emit(_placed, b, use.rows, dtype_of(param))]
        if not layer.bias:
            factors.append(param.emit(widely, input_factor, [(use.use.factor, use.columns)], sharing, dtype_of(param)))
        _record(param, layer, m.node)
        return Kronecker(factors, layer.arrangement)

    def _single(self, param: Param, readers: list[fx.Node]) -> tuple[Layer, LayerUse]:
        """The layer of a parameter, and its only use."""
        uses = [u for u in param.program.walked.uses[param.name] if GRADIENT in u.groups]
        try:
            if len(readers) > 1:
                raise NoLayer(f"it is used {len(readers)} times, where the recursion knows no cross terms")
            if [u.op for u in uses] != readers:
                raise NoLayer("it reaches its op through others that do not only move its elements")
            layer = read(tuple(param.node.meta["val"].shape), uses, param.program.rules)
            (use,) = layer.uses
            if use.at is None and not is_weight(use.use):
                raise NoLayer("its op's features are not those of a linear layer, a convolution or an embedding")
            return layer, use
        except NoLayer as why:
            raise ExtensionError(
                f"KFRA: parameter '{param.name}' has no factors: {why}.\nIt is used by {locate(readers[-1])}\n"
                "Way out: KFLR() or KFAC(), or KFRA(params=...) without it."
            ) from why


def _readers(param: Param, found: dict[fx.Node, Matrix]) -> list[fx.Node]:
    """The ops on the chain that read a parameter, once for every argument that is the parameter."""
    places: dict[tuple[fx.Node, int], None] = {}
    seen, stack = {param.node}, [param.node]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in found:
                leaves = pytree.tree_leaves(canonical_args(user))
                places.update({(user, i): None for i, leaf in enumerate(leaves) if leaf is node})
            elif user.op == "call_function" and is_active(user) and not _per_sample(user) and user not in seen:
                seen.add(user)
                stack.append(user)
    return [op for op, _ in places]


def _per_sample(node: fx.Node) -> bool:
    return any(isinstance(p, Shard) for p in places_of(node.meta.get("place")))


def _record(param: Param, layer: Layer, m: fx.Node) -> None:
    """Enter the computation into the report, though there was nothing to choose."""
    size = m.meta["val"].shape[0]
    d = dims(pytree.tree_map(lambda n: n.meta["val"] if isinstance(n, fx.Node) else n, layer.uses[0].use.factor))
    inputs = 0 if layer.bias else 2 * d.n * d.s * d.i**2
    cost = Cost(inputs, d.item * (size**2 + (0 if layer.bias else d.unfold + d.i**2)), 0, 3)
    param.program.decisions.append(
        Decision(
            param.name, param.label, layer.uses[0].use.rule, f"averaged matrix [{size}, {size}]", int(cost.flops),
            int(cost.bytes), cost.seconds(param.program.machine), savefield=param.origin()["savefield"], stage="extract",
        )
    )  # fmt: skip


def _placed(b: Tensor, rows: Embed | None, dtype: torch.dtype) -> Tensor:
    return embedded(embedded(b.to(dtype), rows, 0), rows, 1)
