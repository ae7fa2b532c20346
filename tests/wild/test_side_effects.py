"""Side effects of a forward pass: hooks that change values are part of the model; what hands tensors to Python is refused."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import fxcurv
from fxcurv.errors import CaptureError
from fxcurv.extensions import BatchGrad

SEED = 5


def mlp() -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data():
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(5, 3, dtype=torch.float64, generator=generator), torch.randint(0, 3, (5,), generator=generator)


def right(compiled, model) -> None:
    x, y = data()
    result, oracle = compiled(x, y), Oracle(model, F.cross_entropy, x, y)
    for found, wanted in ((result.grad, oracle.grad()), (result.grad_batch, oracle.grad_batch())):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def doubled(module, args, output):
    return output * 2


def shifted(module, args):
    return (args[0] + 0.5,)


def test_hooks_come_and_go():
    """A hook that changes values counts from the call after it was registered to the one after it was removed."""
    model = mlp()
    compiled = fxcurv.compile(model, F.cross_entropy, [BatchGrad()])
    right(compiled, model)
    handle = model[1].register_forward_hook(doubled)
    right(compiled, model)
    other = model[2].register_forward_pre_hook(shifted)
    right(compiled, model)
    handle.remove()
    other.remove()
    right(compiled, model)
    assert len(compiled.recompiles) == 2
    assert all("hooks" in reason for reason in compiled.recompiles)


def test_global_hooks():
    """Those of all modules count too."""
    model = mlp()
    compiled = fxcurv.compile(model, F.cross_entropy, [BatchGrad()])
    right(compiled, model)
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: o * 1.5 if isinstance(m, nn.Tanh) else None)
    try:
        right(compiled, model)
    finally:
        handle.remove()
    right(compiled, model)


class Keeps(nn.Module):
    """Keeps an activation as an attribute, in a list or in a dict of its own."""

    def __init__(self, how: str):
        super().__init__()
        torch.manual_seed(SEED)
        self.body, self.how, self.seen, self.known = nn.Linear(3, 3).double(), how, [], {"last": None}
        self.nested = {"all": []}

    def forward(self, x):
        h = self.body(x)
        if self.how == "attribute":
            self.h = h
        elif self.how == "list":
            self.seen.append(h)
        elif self.how == "dict":
            self.known["last"] = (h, 1)
        elif self.how == "nested":
            self.nested["all"].append(h)
        elif self.how == "global":
            SEEN.append(h)
        return h.tanh()


SEEN: list = []


def no_fake(value) -> bool:
    """Whether no tensor of a capture is left."""
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, list | tuple) or not isinstance(value, torch.Tensor | nn.Module | str | int | float | None):
        return all(no_fake(v) for v in value)
    return not isinstance(value, FakeTensor)


@pytest.mark.parametrize("how", ["attribute", "list", "dict", "nested", "global"])
def test_a_forward_that_keeps_tensors(how):
    (x, y), model = data(), Keeps(how)
    with pytest.raises(CaptureError) as caught:
        fxcurv.compile(nn.Sequential(model), F.cross_entropy, [])(x, y)
    for words in ("module '0' (Keeps)", "side effect", "Way out", "result.output"):
        assert words in str(caught.value)
    assert (
        not hasattr(model, "h") and model.seen == [] and model.known == {"last": None} and model.nested == {"all": []}
    )
    assert SEEN == []
    assert no_fake(vars(model)["_buffers"])


def halved(module, given, got):
    return tuple(g if g is None else g / 2 for g in given)


def test_backward_hooks():
    (x, y), model = data(), mlp()
    handle = model[1].register_full_backward_hook(halved)
    compiled = fxcurv.compile(model, F.cross_entropy, [BatchGrad()])
    with pytest.raises(CaptureError, match=r"module '1' \(Tanh\).*'halved'"):
        compiled(x, y)
    handle.remove()
    right(compiled, model)
    model[1].register_full_backward_hook(halved)
    with pytest.raises(CaptureError, match="halved"):
        compiled(x, y)


def test_a_hook_on_a_parameter():
    (x, y), model = data(), mlp()
    model[0].weight.register_hook(torch.neg)
    with pytest.raises(CaptureError, match="parameter 'weight' of module '0'"):
        fxcurv.compile(model, F.cross_entropy, [])(x, y)


def test_a_hook_on_a_parameter_that_comes_later():
    (x, y), model = data(), mlp()
    compiled = fxcurv.compile(model, F.cross_entropy, [BatchGrad()], check=None)
    for _ in range(3):  # one of these calls may go a short way
        right(compiled, model)
    handle = model[0].weight.register_hook(torch.neg)
    with pytest.raises(CaptureError, match="parameter 'weight' of module '0'"):
        compiled(x, y)
    handle.remove()
    right(compiled, model)
    model[0].weight.register_hook(torch.neg)
    with pytest.raises(CaptureError, match="parameter 'weight' of module '0'"):
        compiled(x, y)


def test_a_hook_on_an_activation():
    class Hooked(nn.Linear):
        def forward(self, x):
            h = super().forward(x)
            h.register_hook(lambda g: g * 0.5)
            return h

    x, y = data()
    with pytest.raises(CaptureError, match="register_hook"):
        fxcurv.compile(Hooked(3, 3).double(), F.cross_entropy, [])(x, y)


def test_the_function_behind_a_partial_is_named():
    (x, y), model = data(), mlp()
    model[1].register_full_backward_hook(functools.partial(halved))
    with pytest.raises(CaptureError, match="backward hook 'halved'"):
        fxcurv.compile(model, F.cross_entropy, [])(x, y)


class Frozen(dict):
    """A configuration that no one may write to, as libraries have them."""

    def clear(self):
        raise TypeError("frozen")

    update = __setitem__ = pop = clear


def test_containers_that_refuse_to_be_written_to():
    model = mlp()
    model.config = Frozen(width=3, inner=Frozen(depth=2))
    right(fxcurv.compile(model, F.cross_entropy, [BatchGrad()]), model)
    assert model.config == {"width": 3, "inner": {"depth": 2}}
