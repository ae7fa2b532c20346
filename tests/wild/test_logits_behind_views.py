"""log_softmax, a view, NLL; sigmoid, a view, BCE: f is the logits, as without the view."""

from __future__ import annotations

import pytest
import torch
from against_oracle import close
from case_tools import Net
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.extensions import BatchGrad, DiagGGNExact, DiagHessian

LOG, NLL, BCE = torch.log_softmax, nn.NLLLoss(), nn.BCELoss()
CE, BCE_LOGITS = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()
CLASSES = torch.tensor([0, 2, 1])
SEQUENCE = torch.tensor([[0, 2], [1, 1], [2, 0]])
BINARY = torch.rand(3, 6, dtype=torch.float64)


def nll_of_rows(f, y):
    return NLL(f.reshape(-1, 3), y.flatten())


def ce_of_rows(f, y):
    return CE(f.reshape(-1, 3), y.flatten())


def shifted(loss):
    return lambda f, y: loss(f[:, 1:].transpose(1, 2), y[:, 1:])


# name -> (the model's end, the loss), the same of the logits, targets
TWINS = {
    "transposed in the model": (
        lambda z: LOG(z.view(-1, 2, 3), -1).transpose(1, 2), NLL, lambda z: z.view(-1, 2, 3).transpose(1, 2), CE, SEQUENCE
    ),
    "squeezed": (lambda z: LOG(z[:, None, :3], 2).squeeze(1), NLL, lambda z: z[:, :3], CE, CLASSES),
    "rows in the loss": (lambda z: LOG(z.view(-1, 2, 3), 2), nll_of_rows, lambda z: z.view(-1, 2, 3), ce_of_rows, SEQUENCE),
    "a slice in the loss": (
        lambda z: LOG(z.view(-1, 2, 3), 2), shifted(NLL), lambda z: z.view(-1, 2, 3), shifted(CE), SEQUENCE
    ),
    "binary, flattened": (
        lambda z: torch.sigmoid(z.view(-1, 2, 3)).flatten(1), BCE, lambda z: z, BCE_LOGITS, BINARY
    ),
    "binary, squeezed": (
        lambda z: torch.sigmoid(z[:, :1]).squeeze(-1), BCE, lambda z: z[:, 0], BCE_LOGITS, BINARY[:, 0]
    ),
}  # fmt: skip
QUICK = ("transposed in the model", "rows in the loss", "binary, squeezed")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TWINS]
)
def test_f_is_the_logits(name):
    end, loss, twin_end, twin_loss, y = TWINS[name]
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    model, twin = Net(lambda m, x: end(m.l(x)), l=layer), Net(lambda m, x: twin_end(m.l(x)), l=layer)
    found = fxcurv.compile(model, loss, [BatchGrad(), DiagGGNExact(), DiagHessian()])(x, y)
    torch.testing.assert_close(found.output, model(x).detach())
    true = Oracle(twin, twin_loss, x, y)
    close(found.grad_batch, true.grad_batch(), "grad_batch")
    close(found.diag_ggn_exact, true.diag_ggn_exact(), "diag_ggn_exact")
    close(found.diag_h, true.diag_h(), "diag_h")


def test_a_view_that_takes_classes_apart_is_none_of_the_loss():
    """Entries of one softmax in several rows: the loss is no cross-entropy, and is computed as it stands."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    model = Net(lambda m, x: LOG(m.l(x), 1).view(-1, 2, 3), l=layer)
    found = fxcurv.compile(model, nll_of_rows, [DiagHessian()])(x, SEQUENCE)
    true = Oracle(model, nll_of_rows, x, SEQUENCE)
    close(found.grad, true.grad(), "grad")
    close(found.diag_h, true.diag_h(), "diag_h")
