"""Products with a Jacobian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Tensor | Sequence[Tensor]


def R_op(ys: Tensors, xs: Tensors, vs: Tensors, retain_graph: bool = True, detach: bool = True) -> tuple[Tensor, ...]:  # noqa: N802
    """J v for the Jacobian J of `ys` in `xs`: the derivative of the transposed product, which is linear in its vector.

    Args:
        ys: a tensor or several, computed from `xs`.
        xs: a tensor or several.
        vs: one of the shape of each of `xs`.
        retain_graph: keep the graph from `xs` to `ys`.
        detach: return tensors without a graph.

    Returns:
        a tensor of the shape of each of `ys`.
    """
    several = isinstance(ys, tuple | list)
    zeros = [torch.zeros_like(y, requires_grad=True) for y in (ys if several else [ys])]
    transposed = torch.autograd.grad(
        ys, xs, zeros, retain_graph=retain_graph, create_graph=True, allow_unused=True, materialize_grads=True
    )
    found = torch.autograd.grad(
        transposed, zeros, vs, retain_graph=True, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return tuple(t.detach() for t in found) if detach else found


def jacobian_vector_product(
    f: Tensors, x: Tensors, v: Tensors, retain_graph: bool = True, detach: bool = True
) -> tuple[Tensor, ...]:
    """J v for the Jacobian J of `f` in `x`; see `R_op`."""
    return R_op(f, x, v, retain_graph, detach)
