"""A call like the last one takes the short way, with the same numbers; whatever has changed since, the long one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
from fxcurv.extensions import BatchGrad, BatchL2Grad, DiagGGNMC


class Scaled(nn.Module):
    """Reads a parameter, a buffer, a number, a training flag; returns its input beside the prediction."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("shift", torch.randn(4))
        self.scale = 2.0

    def forward(self, x):
        f = self.linear(x) * self.scale + self.shift
        return (f if self.training else f.tanh()), x


class Weighted(nn.Module):
    """A loss with a buffer, on targets that come flat."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.rand(4))

    def forward(self, out, y):
        return F.cross_entropy(out[0], y, weight=self.weight)


def made():
    torch.manual_seed(0)
    model, loss = Scaled().double(), Weighted().double()
    return model, loss, torch.randn(5, 3, dtype=torch.float64), torch.randint(4, (5,))


def same(result, model, loss, x, y):
    """Against plain autograd, sample by sample."""
    names, params = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    torch.testing.assert_close(result.loss, loss(model(x), y).detach(), rtol=1e-12, atol=1e-12)
    whole = loss.weight[y].sum()
    for n in range(len(x)):
        each = loss(model(x[n : n + 1]), y[n : n + 1]) * loss.weight[y[n]] / whole
        for name, g in zip(names, torch.autograd.grad(each, params), strict=True):
            torch.testing.assert_close(result.batch_l2[name][n], g.square().sum(), rtol=1e-12, atol=1e-12)


def repeated(model, loss, x, y, *extensions):
    """A compiled object that takes the short way for arguments like these."""
    compiled = fxcurv.compile(model, loss, extensions or [BatchL2Grad()], check=None)
    compiled(x, y, seed=0), compiled(x, y, seed=0)
    assert compiled._again
    return compiled


def replaced(model, loss):
    model.linear = nn.Linear(3, 4).double()


def replaced_weight(model, loss):
    model.linear.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))


def written(model, loss):
    with torch.no_grad():
        model.linear.weight.mul_(3)
        model.shift.add_(1)
        loss.weight.add_(1)


def other_data(model, loss):
    model.linear.weight.data = torch.randn(4, 3, dtype=torch.float64)


def hooked(model, loss):
    model.linear.register_forward_hook(lambda m, args, out: 2 * out)


def hooked_before(model, loss):
    model.register_forward_pre_hook(lambda m, args: (args[0] + 1,))


CHANGES = {
    "nothing": lambda model, loss: None,
    "values": written,
    "data": other_data,
    "a module": replaced,
    "a parameter": replaced_weight,
    "a buffer": lambda model, loss: setattr(model, "shift", torch.randn(4, dtype=torch.float64)),
    "the loss's buffer": lambda model, loss: setattr(loss, "weight", torch.rand(4, dtype=torch.float64)),
    "a number": lambda model, loss: setattr(model, "scale", 0.5),
    "eval mode": lambda model, loss: model.eval(),
    "a frozen parameter": lambda model, loss: model.linear.bias.requires_grad_(False),
    "a hook": hooked,
    "a hook before": hooked_before,
}


QUICK = ("nothing", "values", "a parameter", "a number", "eval mode")


@pytest.mark.parametrize("change", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CHANGES])
def test_what_changed_between_calls(change):
    model, loss, x, y = made()
    compiled = repeated(model, loss, x, y)
    (short,) = compiled._again
    CHANGES[change](model, loss)
    assert (short.call(x, (y,), None, None) is not None) == (change in ("nothing", "values", "data"))
    result = compiled(x, y)
    same(result, model, loss, x, y)


def test_other_arguments():
    """Other values, sizes and structures, and modes; what the long way says of a call that fails."""
    model, loss, x, y = made()
    compiled = repeated(model, loss, x, y)
    same(compiled(x + 1, y), model, loss, x + 1, y)
    same(compiled(x[:3], y[:3]), model, loss, x[:3], y[:3])
    for inputs in [(x,), {"x": x}, x, [x]]:
        same(compiled(inputs, y.flip(0)), model, loss, x, y.flip(0))
    compiled(x, y), compiled(x, y)
    with pytest.raises(fxcurv.errors.ArgumentError, match="Way out"):
        compiled(x, torch.full_like(y, 7))
    with torch.inference_mode():
        result = compiled(x, y)
    assert not result.loss.is_inference()
    same(result, model, loss, x, y)


def test_kinds_that_take_turns():
    """Training and evaluation: each is recognised, and none takes the other's numbers."""
    model, loss, x, y = made()
    compiled = repeated(model, loss, x, y)
    model.eval()
    compiled(x, y), compiled(x, y)
    assert len(compiled._again) == 2
    for training in (True, False, True):
        model.train(training)
        assert sum(again.call(x, (y,), None, None) is not None for again in compiled._again) == 1
        same(compiled(x, y), model, loss, x, y)


@pytest.mark.slow
def test_autocast():
    model, loss, x, y = made()
    model, loss, x = model.float(), loss.float(), x.float()
    compiled = repeated(model, loss, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x, y).output[0].dtype == (model(x)[0].dtype)


def test_results_have_memory_of_their_own():
    """What a call returns lies neither in its arguments nor, while it is held, in another call's results; and it draws anew."""
    model, loss, x, y = made()
    compiled = repeated(model, loss, x, y, BatchGrad(), DiagGGNMC(mc_samples=2))
    result = compiled(x, y, seed=0)
    assert result.output[1].untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    kept = {name: g.clone() for name, g in result.grad_batch.items()}
    compiled(2 * x, y, seed=0)
    same_values = [torch.equal(result.grad_batch[name], g) for name, g in kept.items()]
    assert all(same_values)
    # A seed draws what it drew; without one, the default generator does.
    draws = [compiled(x, y, seed=s).diag_ggn_mc["linear.weight"] for s in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
    torch.manual_seed(5)
    first = compiled(x, y).diag_ggn_mc["linear.weight"]
    second = compiled(x, y).diag_ggn_mc["linear.weight"]
    torch.manual_seed(5)
    assert torch.equal(compiled(x, y).diag_ggn_mc["linear.weight"], first) and not torch.equal(first, second)


def test_only_plain_calls():
    """Dropout draws anew; what counts up in Python, buffers that training writes, and flattened targets."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 30), nn.Dropout(0.5)), torch.randn(4, 3), torch.randint(30, (4,))
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchL2Grad()])
    losses = {float(compiled(x, y).loss) for _ in range(4)}
    assert compiled._again and len(losses) == 4

    tokens = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5)).double()
    words = torch.randint(5, (4, 6))
    flat = fxcurv.compile(tokens, lambda f, t: F.cross_entropy(f.flatten(0, 1), t), [BatchL2Grad()])
    calls = [flat(words, words.flatten()).batch_l2["1.weight"] for _ in range(3)]
    assert flat._again and torch.equal(calls[0], calls[2])

    norm = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    trained = fxcurv.compile(norm, nn.MSELoss(), [])
    for _ in range(3):
        trained(x, torch.randn(4, 4))
    assert not trained._again and int(norm[1].num_batches_tracked) == 3
