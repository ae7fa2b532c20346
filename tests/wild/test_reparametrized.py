"""Weights that PyTorch's pre-hooks compute: pruned ones, and the older weight and spectral norm.

The oracle is plain autograd on a copy; a call leaves the attribute that the hook sets as a plain pass would.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle
from torch import nn
from torch.nn.utils import prune

import fxcurv
from fxcurv.errors import ArgumentError
from fxcurv.extensions import BatchGrad, DiagGGNExact, DiagHessian


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def pruned(model):
    prune.random_unstructured(model[0], "weight", 0.4)
    prune.ln_structured(model[2], "weight", 1, n=2, dim=0)


def pruned_twice(model):
    prune.l1_unstructured(model[0], "weight", 0.3)
    prune.random_unstructured(model[0], "weight", 0.3)
    prune.l1_unstructured(model[0], "bias", 1)


def pruned_globally(model):
    prune.global_unstructured([(model[0], "weight"), (model[2], "weight")], prune.L1Unstructured, amount=0.5)


def weight_norm(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0])


def spectral_norm(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.spectral_norm(model[2])


def frozen_spectral_norm(model):
    spectral_norm(model)
    model.eval()


def data(n: int = 5):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, dtype=torch.float64, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def compare(found, wanted) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


def alike(model, change) -> nn.Module:
    """Another model with the same state; PyTorch copies none with an attribute of a graph."""
    other = net()
    change(other)
    other.load_state_dict(model.state_dict())
    return other


def state(model) -> dict[str, torch.Tensor]:
    """Parameters, buffers, and the weights that hooks compute."""
    found = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return found | {f"{k}.{name}": getattr(model[k], name).detach() for k in (0, 2) for name in ("weight", "bias")}


@pytest.mark.parametrize(
    "change", [pruned, pruned_twice, pruned_globally, weight_norm, spectral_norm, frozen_spectral_norm]
)
def test_steps(change):
    """Two steps of gradient descent leave the model where plain autograd leaves its copy."""
    model = net()
    change(model)
    plain = alike(model, change)
    extensions = [BatchGrad(), DiagGGNExact(), *([] if change is spectral_norm else [DiagHessian()])]
    compiled = fxcurv.compile(model, F.cross_entropy, extensions)
    for n in (5, 3):
        x, y = data(n)
        oracle = None if change is spectral_norm else Oracle(alike(plain, change), F.cross_entropy, x, y, kind="ce")
        plain.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        result = compiled(x, y)
        compare(result.grad, {name: p.grad for name, p in plain.named_parameters()})
        for field in [e.savefield for e in extensions] if oracle is not None else ():
            compare(getattr(result, field), getattr(oracle, field)())
        compare(state(model), state(plain))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= 0.5 * result.grad[name]
            for p in plain.parameters():
                p -= 0.5 * p.grad
    assert [*compiled.recompiles] == [*compiled.recompiles][:1]


def test_the_next_pruning_reads_the_weights_of_the_last_call():
    model, plain = net(), net()
    compiled = None
    for _ in range(2):
        for m in (model, plain):
            prune.l1_unstructured(m[0], "weight", 3)
        compiled = fxcurv.compile(model, F.cross_entropy)
        x, y = data()
        plain.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        result = compiled(x, y)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= 3.0 * result.grad[name]
            for p in plain.parameters():
                p -= 3.0 * p.grad
        compiled(x, y)
        plain(x)
    compare(state(model), state(plain))


def test_a_hook_that_is_removed():
    """The attribute is a parameter again, and another program's."""
    model, (x, y) = net(), data()
    pruned(model)
    compiled = fxcurv.compile(model, F.cross_entropy, [BatchGrad()])
    compiled(x, y)
    for k in (0, 2):
        prune.remove(model[k], "weight")
    compiled = fxcurv.compile(model, F.cross_entropy, [BatchGrad()])
    compare(compiled(x, y).grad_batch, Oracle(model, F.cross_entropy, x, y).grad_batch())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("part", [False, True])
def test_scripted_modules_are_refused(part):
    model = net()
    if part:
        model[0] = torch.jit.script(model[0])
    else:
        model = torch.jit.trace(model, data()[0])
    with pytest.raises(ArgumentError, match="is a torch.jit.ScriptModule, which no trace looks into: pass the module"):
        fxcurv.compile(model, F.cross_entropy)
