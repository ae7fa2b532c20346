"""Products with a Hessian."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcurv.backpack.hessianfree.rop import R_op, Tensors


def hessian_vector_product(
    f: Tensor, params: Tensors, v: Tensors, grad_params: Sequence[Tensor] | None = None, detach: bool = True
) -> tuple[Tensor, ...]:
    """H v for the Hessian H of the scalar `f` in `params`.

    Args:
        f: a scalar computed from `params`.
        params: a tensor or several.
        v: one of the shape of each of `params`.
        grad_params: the gradient of `f`, if it is known (computed with `create_graph=True`).
        detach: return tensors without a graph.

    Returns:
        a tensor of the shape of each of `params`.
    """
    if grad_params is None:
        grad_params = torch.autograd.grad(f, params, create_graph=True, materialize_grads=True)
    return R_op(tuple(grad_params), params, v, detach=detach)
