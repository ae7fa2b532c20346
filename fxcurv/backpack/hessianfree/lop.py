"""Products with a transposed Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcurv.backpack.hessianfree.rop import Tensors


def L_op(ys: Tensors, xs: Tensors, ws: Tensors, retain_graph: bool = True, detach: bool = True) -> tuple[Tensor, ...]:  # noqa: N802
    """J^T w for the Jacobian J of `ys` in `xs`.

    Args:
        ys: a tensor or several, computed from `xs`.
        xs: a tensor or several.
        ws: one of the shape of each of `ys`.
        retain_graph: keep the graph from `xs` to `ys`.
        detach: return tensors without a graph.

    Returns:
        a tensor of the shape of each of `xs`.
    """
    found = torch.autograd.grad(
        ys, xs, ws, retain_graph=retain_graph, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return tuple(t.detach() for t in found) if detach else found


def transposed_jacobian_vector_product(
    f: Tensors, x: Tensors, v: Tensors, retain_graph: bool = True, detach: bool = True
) -> tuple[Tensor, ...]:
    """J^T v for the Jacobian J of `f` in `x`; see `L_op`."""
    return L_op(f, x, v, retain_graph, detach)
