"""Losses that are reduced by hand: what PyTorch's losses give per sample, and what a user makes of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxcurv
from fxcurv.extensions import BatchGrad, DiagGGNExact

N = 6
KEPT = torch.tensor([True, False, True, True, False, True])
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
SIGNS = torch.tensor([1.0, -1, 1, 1, -1, -1]).double()

LOSSES = {
    "cross_entropy_masked": (lambda f, y, k: F.cross_entropy(f, y, reduction="none")[k].mean(), (LABELS, KEPT)),
    "nll_masked": (lambda f, y, k: F.nll_loss(F.log_softmax(f, 1), y, reduction="none")[k].mean(), (LABELS, KEPT)),
    "cross_entropy_viewed": (lambda f, y: F.cross_entropy(f, y, reduction="none").view(-1, 1).sum(1).mean(), (LABELS,)),
    "cross_entropy_flat": (lambda f, y: F.cross_entropy(f, y, reduction="none").flatten().mean(), (LABELS,)),
    "margin_ranking": (lambda f, y: F.margin_ranking_loss(f[:, 0], f[:, 1], y, margin=0.5), (SIGNS,)),
    "margin_ranking_each": (
        lambda f, y: F.margin_ranking_loss(f[:, 0], f[:, 1], y, 0.5, reduction="none").mean(),
        (SIGNS,),
    ),
    "hinge_embedding": (lambda f, y: F.hinge_embedding_loss(f[:, 0], y, reduction="sum"), (SIGNS,)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_reduced_by_hand(name):
    loss, targets = LOSSES[name]
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(N, 4).double()
    asked = [BatchGrad()] if "hinge" in name or "margin" in name else [BatchGrad(), DiagGGNExact()]
    compiled = fxcurv.compile(model, loss, asked)
    result = compiled(x, *targets)
    output = model(x)
    (wanted,) = torch.autograd.grad(loss(output, *targets), [model.weight], retain_graph=True)
    torch.testing.assert_close(result.grad["weight"], wanted)
    (slope,) = torch.autograd.grad(loss(output, *targets), [output])
    torch.testing.assert_close(result.grad_batch["weight"], slope.unsqueeze(2) * x.unsqueeze(1))
    if len(asked) > 1:
        curvature = torch.autograd.functional.hessian(lambda f: loss(f, *targets), output.detach())
        own = torch.stack([curvature[n, :, n].diagonal() for n in range(N)])
        torch.testing.assert_close(result.diag_ggn_exact["weight"], own.T @ x.square())
