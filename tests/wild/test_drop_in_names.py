"""Names of BackPACK's that code built on it imports."""

from __future__ import annotations

import torch
from torch import nn

from fxcurv.backpack import (
    L_op,
    R_op,
    backpack,
    extend,
    ggn_vector_product,
    hessian_vector_product,
    jacobian_vector_product,
    memory_cleanup,
    transposed_jacobian_vector_product,
)
from fxcurv.backpack.context import CTX
from fxcurv.backpack.extensions import BatchGrad, DiagGGNExact
from fxcurv.backpack.extensions.backprop_extension import BackpropExtension


def test_the_context_says_what_is_active():
    assert CTX.get_active_exts() == () and not CTX.is_extension_active(BatchGrad) and CTX.get_debug() is False
    with backpack(BatchGrad()):
        assert CTX.is_extension_active(DiagGGNExact, BatchGrad) and not CTX.is_extension_active(DiagGGNExact)
        assert all(isinstance(e, BackpropExtension) for e in CTX.get_active_exts())
    assert CTX.get_active_exts() == ()


def test_products_are_there():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
    out = model(x)
    loss, params = out.pow(3).sum(), list(model.parameters())
    v = [torch.randn_like(p) for p in params]
    (tangent,) = jacobian_vector_product(out, params, v)
    torch.testing.assert_close(tangent, x @ v[0].T + v[1])
    torch.testing.assert_close(R_op(out, params, v)[0], tangent)
    h = 6 * out.detach() * tangent
    for product in (hessian_vector_product(loss, params, v), ggn_vector_product(loss, out, model, v)):
        torch.testing.assert_close(product[0], h.T @ x)
        torch.testing.assert_close(product[1], h.sum(0))
    for back in (L_op(out, params, [h]), transposed_jacobian_vector_product(out, params, [h])):
        torch.testing.assert_close(back[0], h.T @ x)


def test_cleaning_up_leaves_a_model_as_it_is():
    model, lossfunc = extend(nn.Linear(3, 2)), extend(nn.MSELoss())
    loss = lossfunc(model(torch.randn(4, 3)), torch.randn(4, 2))
    memory_cleanup(model)
    with backpack(BatchGrad()):
        loss.backward()
    assert model.weight.grad_batch.shape == (4, 2, 3)
