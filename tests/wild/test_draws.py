"""Ops that draw numbers, and recurrent layers in training mode: one draw for the value, the gradient and all columns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_oracle import close
from case_tools import Net
from torch import nn

import fxcurv
from fxcurv.extensions import BatchGrad, DiagGGNExact, DiagHessian


def ggn_and_gradients(model, x, y) -> tuple[torch.Tensor, dict, dict]:
    """(loss, GGN's diagonals, individual gradients) of mean cross-entropy from the Jacobian of one forward pass."""
    out = model(x)
    p = out.detach().softmax(1)
    diagonals, gradients = {}, {}
    for name, w in model.named_parameters():
        rows = [torch.autograd.grad(f, w, retain_graph=True)[0].flatten() for f in out.flatten()]
        j = torch.stack(rows).unflatten(0, out.shape)
        h = (torch.diag_embed(p) - p.unsqueeze(1) * p.unsqueeze(2)) / len(out)
        diagonals[name] = torch.einsum("nci,ncd,ndi->i", j, h, j).view_as(w)
        gradients[name] = torch.einsum("nci,nc->ni", j, (p - F.one_hot(y, out.shape[1])) / len(out)).view(-1, *w.shape)
    return F.cross_entropy(out, y).detach(), diagonals, gradients


def check(model: nn.Module, x, y, tol: float) -> None:
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagGGNExact(), BatchGrad()])
    compiled(x, y)
    for seed in range(2):
        torch.manual_seed(seed)
        found = compiled(x, y)
        torch.manual_seed(seed)
        loss, diagonals, gradients = ggn_and_gradients(model, x, y)
        torch.testing.assert_close(found.loss, loss)
        close(found.grad_batch, gradients, "grad_batch", tol)
        close(found.diag_ggn_exact, diagonals, "diag_ggn_exact", tol)


DRAWS = {
    "rrelu": lambda x: F.rrelu(x, training=True),
    "rrelu_in_place": lambda x: F.rrelu(x * 1, 0.1, 0.9, training=True, inplace=True),
    "rrelu_eval": F.rrelu,
    "rrelu_eval_in_place": lambda x: F.rrelu(x * 1, inplace=True),
    "dropout1d": lambda x: F.dropout1d(x.view(-1, 2, 2)).flatten(1),
    "dropout2d": lambda x: F.dropout2d(x.view(-1, 2, 2, 1)).flatten(1),
    "dropout3d": lambda x: F.dropout3d(x.view(-1, 2, 2, 1, 1)).flatten(1),
    "alpha_dropout": lambda x: F.alpha_dropout(x, training=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x.view(-1, 2, 2), training=True).flatten(1),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x, 0.7),
    "gumbel_softmax_hard": lambda x: F.gumbel_softmax(x, 0.7, hard=True),
}
QUICK = ("rrelu", "dropout2d", "gumbel_softmax_hard")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DRAWS]
)
def test_one_draw_for_all(name):
    torch.manual_seed(0)
    model = Net(lambda m, x: m.b(DRAWS[name](m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2)).double()
    check(model, torch.randn(3, 3, dtype=torch.float64), torch.tensor([0, 1, 1]), 1e-9)


def test_slopes_that_are_drawn_have_a_second_derivative_of_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.RReLU(), nn.Linear(4, 2)).double()
    x, y = torch.randn(3, 3, dtype=torch.float64), torch.tensor([0, 1, 1])
    found = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagGGNExact(), DiagHessian()])(x, y)
    close(found.diag_h, dict(found.diag_ggn_exact), "the Hessian of a piecewise linear model is its Gauss-Newton")


RECURRENT = [
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "dropout": 0.5, "bidirectional": True, "batch_first": True}),
    ("LSTM", {"proj_size": 2}),
    ("LSTM", {"bias": False, "bidirectional": True}),
    ("LSTM", {"num_layers": 2, "dropout": 0.5}),
    ("GRU", {"num_layers": 2, "dropout": 0.5, "bidirectional": True, "batch_first": True}),
    ("GRU", {}),
    ("RNN", {"num_layers": 2, "dropout": 0.5, "nonlinearity": "relu"}),
    ("RNN", {"bidirectional": True, "batch_first": True}),
]


@pytest.mark.parametrize(
    "kind, options", [p if k < 2 else pytest.param(*p, marks=pytest.mark.slow) for k, p in enumerate(RECURRENT)]
)
def test_recurrent_layers_in_single_precision(kind, options):
    """On a CPU, PyTorch's decomposition of an LSTM would keep oneDNN's layer."""
    torch.manual_seed(0)
    layer = getattr(nn, kind)(3, 3, **options)
    width = (options.get("proj_size") or 3) * (2 if options.get("bidirectional") else 1)
    first = options.get("batch_first", False)

    def forward(m, x):
        out, _ = m.layer(x if first else x.transpose(0, 1))
        return m.head(out.sum(1 if first else 0))

    model = Net(forward, layer=layer, head=nn.Linear(width, 2)).train()
    check(model, torch.randn(2, 2, 3), torch.tensor([0, 1]), 1e-5)
