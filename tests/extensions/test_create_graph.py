"""Every quantity differentiated again, against finite differences, and nothing leaks."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from cases import CASES

import fxcurv
from fxcurv.errors import ExtensionError
from fxcurv.extensions import BatchDiagGGNExact, BatchGrad, BatchL2Grad, DiagGGNExact, DiagGGNMC, SqrtGGNExact, Variance

EXTENSIONS = [BatchGrad(), BatchL2Grad(), Variance(), DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact(), DiagGGNMC(2)]
NAMES = [
    "mlp_gelu",
    "cnn_two_layers",
    "layer_called_twice",
    "transformer_encoder",
    "lstm",
    "layer_norm",
    "ce_maps_soft",
]


def total(result):
    """A scalar of all quantities, the same mixture at every call."""
    generator = torch.Generator().manual_seed(0)
    fields = [getattr(result, e.savefield) for e in EXTENSIONS]
    values = [v for field in [result.grad, *fields] for v in field.values()]
    return sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in values)


@pytest.mark.parametrize("name", NAMES)
def test_differentiated_again(name):
    model, loss, x, y = CASES[name].build()
    compiled = fxcurv.compile(model, loss, EXTENSIONS)
    params = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(1)
    direction = [torch.randn_like(p) for p in params]
    result = compiled(x, y, seed=0, create_graph=True)
    gradient = torch.autograd.grad(total(result), params)
    slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))

    def at(step):
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p += step * d
        value = total(compiled(x, y, seed=0))
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p -= step * d
        return value

    h = 1e-5
    finite = (at(h) - at(-h)) / (2 * h)
    torch.testing.assert_close(slope, finite, rtol=1e-5, atol=1e-7)


def test_with_respect_to_inputs():
    model, loss, x, y = CASES["mlp_gelu"].build()
    x = x.requires_grad_()
    compiled = fxcurv.compile(model, loss, [BatchL2Grad()])
    norms = sum(compiled(x, y, create_graph=True).batch_l2.values())
    (ours,) = torch.autograd.grad(norms.sum(), x)
    value = torch.autograd.grad(loss(model(x), y), list(model.parameters()), create_graph=True)
    assert value[0].requires_grad
    samples = []
    for k in range(len(x)):  # the loss is a mean
        grads = torch.autograd.grad(
            loss(model(x[k : k + 1]), y[k : k + 1]) / len(x), list(model.parameters()), create_graph=True
        )
        samples.append(sum(g.square().sum() for g in grads))
    (expected,) = torch.autograd.grad(sum(samples), x)
    torch.testing.assert_close(ours, expected)


def test_without_create_graph_nothing_carries_grad():
    model, loss, x, y = CASES["mlp_gelu"].build()
    compiled = fxcurv.compile(model, loss, [BatchGrad()])
    result = compiled(x, y)
    assert not result.loss.requires_grad and not any(v.requires_grad for v in result.grad_batch.values())


def test_root_of_a_general_loss_is_refused():
    model, loss, x, y = CASES["loss_poisson"].build()
    compiled = fxcurv.compile(model, loss, [SqrtGGNExact()])
    with pytest.raises(ExtensionError, match="create_graph"):
        compiled(x, y, create_graph=True)


def test_nothing_leaks():
    model, loss, x, y = CASES["mlp_gelu"].build()
    compiled = fxcurv.compile(model, loss, [BatchGrad()])
    gc.collect()
    gc.disable()
    try:
        seen = []
        for _ in range(50):
            result = compiled(x, y, create_graph=True).attach()
            seen.append(weakref.ref(result.loss))
            for p in model.parameters():
                p.grad = None
                del p.grad_batch
            del result
        assert not any(ref() is not None for ref in seen)
    finally:
        gc.enable()
