"""Products with the Gauss-Newton."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fxcurv.backpack.hessianfree.hvp import hessian_vector_product
from fxcurv.backpack.hessianfree.lop import L_op
from fxcurv.backpack.hessianfree.rop import R_op


def ggn_vector_product(loss: Tensor, output: Tensor, model: nn.Module, v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """J^T H J v, J the Jacobian of `output` in the trainable parameters of `model`, H the Hessian of `loss` in `output`.

    Args:
        loss: a scalar computed from `output`.
        output: the output of `model`.
        model: its trainable parameters count, in their order.
        v: one tensor for each of them.

    Returns:
        a tensor for each of them.
    """
    return ggn_vector_product_from_plist(loss, output, [p for p in model.parameters() if p.requires_grad], v)


def ggn_vector_product_from_plist(
    loss: Tensor, output: Tensor, plist: Sequence[Tensor], v: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """J^T H J v, J the Jacobian of `output` in the parameters `plist`, H the Hessian of `loss` in `output`.

    Args:
        loss: a scalar computed from `output`.
        output: computed from `plist`.
        plist: parameters.
        v: one tensor for each of them.

    Returns:
        a tensor for each of them.
    """
    along = R_op(output, plist, v)
    return L_op(output, plist, hessian_vector_product(loss, output, along))
