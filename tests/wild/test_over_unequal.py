"""Batches that are unlike: empty ones, ones in which nothing counts, samples along another dimension, resumed passes."""

import pytest
import torch
from torch import nn

import fxcurv
from fxcurv.errors import ArgumentError
from fxcurv.extensions import BatchGrad, Variance


def data(n=10):
    torch.manual_seed(0)
    return nn.Linear(4, 3).double(), torch.randn(n, 4).double(), torch.randint(3, (n,))


def plain(model, x, y):
    """(the gradient, the variance of individual gradients) of a mean cross-entropy, by a loop."""
    losses = [nn.functional.cross_entropy(model(a[None]), b[None]) for a, b in zip(x, y, strict=True)]
    own = torch.stack([torch.autograd.grad(loss, [model.weight])[0] for loss in losses]) / len(x)
    return own.sum(0), own.var(0, unbiased=False)


def test_running_averages_of_batches_that_count():
    model, x, y = data()
    nothing = (x[:2], torch.full((2,), -100))
    batches = [(x[:4], y[:4]), (x[:0], y[:0]), nothing, (x[4:8], y[4:8]), (x[8:], y[8:])]
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [Variance()])
    found = fxcurv.over(compiled, batches, decay=0.5, progress=False)
    each = [plain(model, *batches[k]) for k in (0, 3, 4)]
    weights = torch.tensor([0.25, 0.5, 1]).double() / 1.75
    for k, field in enumerate(("grad", "variance")):
        wanted = sum(w * values[k] for w, values in zip(weights, each, strict=True))
        torch.testing.assert_close(found[Variance()]["weight"] if k else getattr(found, field)["weight"], wanted)
    losses = torch.stack([nn.functional.cross_entropy(model(batches[k][0]), batches[k][1]) for k in (0, 3, 4)])
    torch.testing.assert_close(found.loss, (weights * losses).sum().detach())


class Across(nn.Module):
    """Features [3, N] to [N, 2]: a batch of two samples is as long as an output."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, features):
        return self.linear(features.T)


@pytest.mark.parametrize("cuts", [(0, 2, 6), (0, 4, 6), (0, 2, 4, 6), (0, 1, 6)])
def test_samples_along_another_dimension(cuts):
    torch.manual_seed(0)
    model, x, y = Across().double(), torch.randn(3, 6).double(), torch.randn(6, 2).double()
    compiled = fxcurv.compile(model, nn.MSELoss(), [BatchGrad()], batch_dim=1)
    loader = [(x[:, a:b], y[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]  # slices, whose strides are those of x
    found = fxcurv.over(compiled, loader, progress=False)
    for n in range(6):
        alone = nn.functional.mse_loss(model(x[:, n : n + 1]), y[n : n + 1]) / 6
        (wanted,) = torch.autograd.grad(alone, [model.linear.weight])
        torch.testing.assert_close(found.grad_batch["linear.weight"][n], wanted)


@pytest.mark.parametrize("other", [{}, {"decay": 0.25}, {"decay": 0.5, "reduction": "sum"}])
def test_a_pass_goes_on_as_it_began(other):
    model, x, y = data()
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [])
    first = fxcurv.Totals(compiled, decay=0.5)
    first.run([(x[:4], y[:4])], progress=False)
    with pytest.raises(ArgumentError, match="decay=0.5"):
        fxcurv.Totals(compiled, **other).load_state_dict(first.state_dict())
