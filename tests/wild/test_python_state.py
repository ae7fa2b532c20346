"""What Python holds counts at the value that it has at the call: against plain autograd, before and after a change."""

from __future__ import annotations

import array
import collections
import copy
import ctypes
import dataclasses
import functools
import os
import sysconfig
import types
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxcurv
from fxcurv.errors import ArgumentError, CaptureError
from fxcurv.extensions import BatchGrad
from fxcurv.front.python_state import holds_state

FACTOR = 2.0
TABLE = torch.tensor([1.0, 2.0], dtype=torch.float64)
NAMES = SimpleNamespace(factor=2.0)


@pytest.fixture(autouse=True)
def in_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    variables = dict(os.environ)
    kept = [(c, dict(vars(c))) for c in (Spelled, OfType, with_attribute)]
    NAMES_HELD.factor, Registry.table["a"], nn.functional.of_state = 2.0, 2.0, 2.0
    yield
    for owner, members in kept:
        for name in ("z", "double", "k"):
            if name in members:
                setattr(owner, name, members[name])
    del nn.functional.of_state
    torch.set_default_dtype(before)
    os.environ.clear()
    os.environ.update(variables)


@dataclasses.dataclass
class Config:
    factor: float = 2.0
    unread: int = 0

    def doubled(self) -> float:
        return 2 * self.factor


@dataclasses.dataclass(slots=True)
class Slotted:
    factor: float = 2.0


class Sampler:
    """A plain object whose methods read it."""

    def __init__(self) -> None:
        self.factor, self.unread = 2.0, 0

    @property
    def again(self) -> float:
        return self.factor

    def scale(self, x: Tensor) -> Tensor:
        return x * self.again


def squares(f: Tensor, y: Tensor) -> Tensor:
    return ((f - y) ** 2).sum()


def times_config(x: Tensor, config: Any) -> Tensor:
    return x * config.factor


CONTEXT: ContextVar[float] = ContextVar("factor", default=2.0)
CELL = {"factor": 2.0}


def with_inner(held: dict[str, float]) -> Callable[[Any, Tensor], Tensor]:
    """A function that makes one, which alone reads what is held and is gone when the model has run."""

    def run(module: Any, h: Tensor) -> Tensor:
        def scaled(t: Tensor) -> Tensor:
            return t * held["factor"]

        return scaled(h)

    return run


class Net(nn.Module):
    """A linear layer, and what `run` does with its value and this module."""

    shared = 2.0

    def __init__(self, run: Callable[[Net, Tensor], Tensor], **held: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.run = run
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.linear(x))


def batch(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3), torch.randn(n, 2)


def agrees(compiled: Any, x: Tensor, y: Tensor) -> None:
    """Loss, gradient and individual gradients are those of a loop of plain autograd."""
    result = compiled(x, y)
    model, loss = compiled.model, compiled.loss
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    value = loss(model(x), y)
    torch.testing.assert_close(result.loss, value.detach())
    grads = torch.autograd.grad(value, list(params.values()))
    for name, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(result.grad[name], grad)
    for k in range(len(x)):
        grads = torch.autograd.grad(loss(model(x[k : k + 1]), y[k : k + 1]), list(params.values()))
        for name, grad in zip(params, grads, strict=True):
            torch.testing.assert_close(result.grad_batch[name][k], grad)


def attribute(name: str, value: Any) -> Callable[[Net], None]:
    return lambda model: setattr(model, name, value)


def of_class(name: str, value: Any) -> Callable[[Net], None]:
    return lambda model: setattr(Spelled, name, value)


def inner(name: str, key: str | int, value: Any) -> Callable[[Net], None]:
    """A change of an attribute, or an item, of what the module holds."""

    def change(model: Net) -> None:
        held = getattr(model, name)
        if hasattr(held, "__setitem__"):
            held[key] = value
        else:
            setattr(held, key, value)

    return change


CHANGES: dict[str, tuple[Callable[[], Net], Callable[[Net], Any]]] = {
    "a float": (lambda: Net(lambda m, h: h * m.scale, scale=2.0), attribute("scale", 3.0)),
    "an int where a float was": (lambda: Net(lambda m, h: h * m.scale, scale=2.0), attribute("scale", 3)),
    "a tensor where a float was": (lambda: Net(lambda m, h: h * m.scale, scale=2.0), attribute("scale", torch.ones(2))),
    "a branch": (lambda: Net(lambda m, h: h.tanh() if m.on else h, on=True), attribute("on", False)),
    "a string": (lambda: Net(lambda m, h: getattr(torch, m.act)(h), act="tanh"), attribute("act", "sin")),
    "None": (lambda: Net(lambda m, h: h if m.act is None else m.act(h), act=None), attribute("act", torch.tanh)),
    "a function": (lambda: Net(lambda m, h: m.act(h), act=torch.sin), attribute("act", torch.cos)),
    "a lambda": (lambda: Net(lambda m, h: m.act(h), act=lambda h: 2 * h), attribute("act", lambda h: 3 * h)),
    "a dtype": (
        lambda: Net(lambda m, h: h * torch.tensor(0.1, dtype=m.kind).to(h), kind=torch.float64),
        attribute("kind", torch.float32),
    ),
    "a list": (
        lambda: Net(lambda m, h: h * m.parts[0] + sum(m.parts), parts=[1.0, 2.0]),
        lambda m: m.parts.append(3.0),
    ),
    "a dict": (lambda: Net(lambda m, h: h * m.parts["kl"], parts={"kl": 2.0}), inner("parts", "kl", 3.0)),
    "a deque": (lambda: Net(lambda m, h: h * m.parts[0], parts=collections.deque([2.0])), inner("parts", 0, 3.0)),
    "a chain of dicts": (
        lambda: Net(lambda m, h: h * m.parts["kl"], parts=collections.ChainMap({"kl": 2.0})),
        inner("parts", "kl", 3.0),
    ),
    "an array": (lambda: Net(lambda m, h: h * m.parts[0], parts=array.array("d", [2.0])), inner("parts", 0, 3.0)),
    "a context": (lambda: Net(lambda m, h: h * CONTEXT.get()), lambda m: CONTEXT.set(3.0)),
    "the environment": (
        lambda: Net(lambda m, h: h * 2 if os.environ.get("TEST_OF_STATE") else h),
        lambda m: os.environ.update(TEST_OF_STATE="1"),
    ),
    "an inner function's cell": (lambda: Net(with_inner(CELL)), lambda m: CELL.update(factor=3.0)),
    "the default dtype": (
        lambda: Net(lambda m, h: h + torch.tensor(0.1).double()),
        lambda m: torch.set_default_dtype(torch.float32),
    ),
    "a tuple": (lambda: Net(lambda m, h: h * m.parts[1], parts=(1, 2.0)), attribute("parts", (1, 3.0))),
    "a class's attribute": (lambda: Net(lambda m, h: h * m.shared), attribute("shared", 3.0)),
    "an attribute that was absent": (lambda: Net(lambda m, h: h * getattr(m, "late", 1.0)), attribute("late", 3.0)),
    "a config": (lambda: Net(lambda m, h: h * m.config.factor, config=Config()), inner("config", "factor", 3.0)),
    "another config": (
        lambda: Net(lambda m, h: h * m.config.factor, config=Config()),
        attribute("config", Config(3.0)),
    ),
    "a config that is passed on": (
        lambda: Net(lambda m, h: times_config(h, m.config), config=Config()),
        inner("config", "factor", 3.0),
    ),
    "a config's method": (
        lambda: Net(lambda m, h: h * m.config.doubled(), config=Config()),
        inner("config", "factor", 3.0),
    ),
    "a config with slots": (
        lambda: Net(lambda m, h: h * m.config.factor, config=Slotted()),
        inner("config", "factor", 3.0),
    ),
    "a property of an object": (
        lambda: Net(lambda m, h: m.held.scale(h), held=Sampler()),
        inner("held", "factor", 3.0),
    ),
    "a mask replaced": (
        lambda: Net(lambda m, h: h * m.mask, mask=torch.ones(2)),
        attribute("mask", torch.tensor([0.0, 3.0], dtype=torch.float64)),
    ),
    "a mask of another shape": (
        lambda: Net(lambda m, h: h * m.mask, mask=torch.ones(2)),
        attribute("mask", torch.ones(()) * 3),
    ),
    "a mask in place": (lambda: Net(lambda m, h: h * m.mask, mask=torch.ones(2)), lambda m: m.mask.mul_(3)),
    "a mask in a list": (
        lambda: Net(lambda m, h: h * m.held[0], held=[torch.ones(2)]),
        lambda m: m.held.__setitem__(0, torch.zeros(2) + 3),
    ),
    "a number of a tensor": (lambda: Net(lambda m, h: h * m.t.item(), t=torch.tensor(2.0)), lambda m: m.t.mul_(3)),
    "a submodule": (lambda: Net(lambda m, h: m.act(h), act=nn.LeakyReLU(0.1)), attribute("act", nn.LeakyReLU(0.3))),
    "a submodule's slope": (
        lambda: Net(lambda m, h: m.act(h), act=nn.LeakyReLU(0.1)),
        inner("act", "negative_slope", 0.5),
    ),
    "a submodule removed": (
        lambda: Net(lambda m, h: m.act(h) if m.act is not None else h, act=nn.Tanh()),
        attribute("act", None),
    ),
    "a norm's eps": (lambda: Net(lambda m, h: m.norm(h), norm=nn.LayerNorm(2)), inner("norm", "eps", 0.5)),
    "a class's method": (
        lambda: Patched(lambda m, h: m.half(h)),
        lambda m: setattr(Patched, "half", lambda self, h: h / 3),
    ),
    "a method of the module": (lambda: Net(lambda m, h: h), lambda m: setattr(m, "forward", lambda x: 3 * m.linear(x))),
    "a list of a tensor": (
        lambda: Net(lambda m, h: h * m.t.tolist()[1], t=torch.tensor([1.0, 2.0])),
        lambda m: m.t.mul_(3),
    ),
    "a list of a tensor that is an index": (
        lambda: Net(lambda m, h: h[:, m.t.tolist()], t=torch.tensor([0, 1])),
        attribute("t", torch.tensor([1, 0])),
    ),
    "a list of a tensor's data": (
        lambda: Net(lambda m, h: h * sum(m.held[0].tolist()), held=[torch.tensor([1.0, 2.0])]),
        lambda m: m.held[0].data.mul_(3),
    ),
    "type(self)": (lambda: Spelled(lambda m, h: h * type(m).z), of_class("z", 3.0)),
    "type(self) by getattr": (lambda: Spelled(lambda m, h: h * getattr(type(m), "z")), of_class("z", 3.0)),  # noqa: B009
    "self.__class__": (lambda: Spelled(lambda m, h: h * m.__class__.z), of_class("z", 3.0)),
    "a class method": (lambda: Spelled(lambda m, h: h * m.k()), of_class("z", 3.0)),
    "super()": (lambda: Below(lambda m, h: h * m.double()), of_class("double", lambda self: 3.0)),
    "an object's type": (lambda: Net(lambda m, h: h * m.held.k(), held=OfType()), lambda m: setattr(OfType, "z", 3.0)),
    "vars": (lambda: Net(lambda m, h: h * vars(m)["scale"], scale=2.0), attribute("scale", 3.0)),
    "__dict__": (lambda: Net(lambda m, h: h * m.__dict__.get("scale", 1.0), scale=2.0), attribute("scale", 3.0)),
    "__dict__ without it": (lambda: Net(lambda m, h: h * m.__dict__.get("scale", 1.0)), attribute("scale", 3.0)),
    "all of __dict__": (lambda: Net(lambda m, h: h * 2 if "on" in m.__dict__ else h), attribute("on", True)),
    "a function's attribute": (
        lambda: Net(lambda m, h: with_attribute(h)),
        lambda m: setattr(with_attribute, "k", 3.0),
    ),
    "a weak reference": (
        lambda: Net(lambda m, h: h * m.weak().factor, weak=weakref.ref(NAMES_HELD)),
        lambda m: setattr(NAMES_HELD, "factor", 3.0),
    ),
    "a weak proxy": (
        lambda: Net(lambda m, h: h * m.weak.factor, weak=weakref.proxy(NAMES_HELD)),
        lambda m: setattr(NAMES_HELD, "factor", 3.0),
    ),
    "a registry": (lambda: Net(lambda m, h: h * Registry["a"]), lambda m: Registry.table.update(a=3.0)),
    "bytes": (lambda: Net(lambda m, h: h * m.parts[0], parts=bytearray([2])), inner("parts", 0, 3)),
    "a number in C": (lambda: Net(lambda m, h: h * m.c.value, c=ctypes.c_double(2.0)), inner("c", "value", 3.0)),
    "a slice": (lambda: Net(lambda m, h: h[:, m.part] + h, part=slice(0, 1)), attribute("part", slice(1, 2))),
    "an attribute of PyTorch's module": (
        lambda: Net(lambda m, h: h * nn.functional.of_state),
        lambda m: setattr(nn.functional, "of_state", 3.0),
    ),
    "a parametrization": (lambda: parametrized(), lambda m: setattr(m.linear.parametrizations.weight[0], "scale", 3.0)),
}


class Spelled(Net):
    z = 2.0

    @classmethod
    def k(cls) -> float:
        return cls.z

    def double(self) -> float:
        return 2.0


class Below(Spelled):
    def double(self) -> float:
        return 2 * super().double()


class OfType:
    z = 2.0

    def k(self) -> float:
        return type(self).z


class Keyed(type):
    def __getitem__(cls, key: str) -> float:
        return cls.table[key]


class Registry(metaclass=Keyed):
    table = {"a": 2.0}


NAMES_HELD = Config()


def with_attribute(h: Tensor) -> Tensor:
    return h * with_attribute.k


with_attribute.k = 2.0


class Patched(Net):
    def half(self, h: Tensor) -> Tensor:
        return h / 2


class Times(nn.Module):
    scale = 2.0

    def forward(self, w: Tensor) -> Tensor:
        return w * self.scale


def parametrized() -> Net:
    model = Net(lambda m, h: h)
    parametrize.register_parametrization(model.linear, "weight", Times())
    return model


QUICK = {
    "a float",
    "a branch",
    "a list",
    "a config that is passed on",
    "a property of an object",
    "a mask replaced",
    "a submodule",
}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CHANGES])
def test_what_the_model_reads(name: str) -> None:
    make, change = CHANGES[name]
    compiled = fxcurv.compile(make(), squares, [BatchGrad()])
    x, y = batch()
    agrees(compiled, x, y)
    agrees(compiled, x, y)
    assert compiled.recompiles == []
    change(compiled.model)
    agrees(compiled, x, y)
    read_anew = ("a mask replaced", "a mask in place", "a mask in a list", "a number of a tensor")
    assert len(compiled.recompiles) == (name not in read_anew), compiled.recompiles


def closed(beta: float) -> tuple[Callable, Callable]:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        return beta * ((f - y) ** 2).sum()

    def change() -> None:
        nonlocal beta
        beta = 3.0

    return loss, change


def of_global(f: Tensor, y: Tensor) -> Tensor:
    return FACTOR * ((f - y) ** 2).sum()


def of_namespace(f: Tensor, y: Tensor) -> Tensor:
    return NAMES.factor * ((f - y) ** 2).sum()


def of_table(f: Tensor, y: Tensor) -> Tensor:
    return (TABLE * (f - y) ** 2).sum()


def with_default(f: Tensor, y: Tensor, beta: float = 2.0) -> Tensor:
    return beta * ((f - y) ** 2).sum()


def helped(f: Tensor, y: Tensor) -> Tensor:
    return with_default(f, y) * helper()


def helper() -> float:
    return FACTOR


class Weighted(nn.Module):
    """A loss that is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = 2.0

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return self.beta * ((f - y) ** 2).sum()


class Bound:
    """A loss that is a bound method."""

    beta = 2.0

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        return self.beta * ((f - y) ** 2).sum()


def _global(name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setitem(globals(), name, value)


def losses() -> dict[str, tuple[Callable, Callable[[pytest.MonkeyPatch], Any]]]:
    closure, change = closed(2.0)
    partial = functools.partial(with_default, beta=2.0)
    module, bound = Weighted(), Bound()
    box = {"beta": 2.0}
    return {
        "a closure": (closure, lambda _: change()),
        "a global": (of_global, _global("FACTOR", 3.0)),
        "a global of a function that it calls": (helped, _global("FACTOR", 3.0)),
        "a global function": (helped, _global("helper", lambda: 5.0)),
        "a global namespace": (of_namespace, lambda patch: patch.setattr(NAMES, "factor", 3.0)),
        "a global tensor": (of_table, _global("TABLE", torch.tensor([3.0, 5.0]))),
        "a default argument": (with_default, lambda patch: patch.setattr(with_default, "__defaults__", (3.0,))),
        "a partial": (partial, lambda _: partial.keywords.update(beta=3.0)),
        "a module": (module, lambda _: setattr(module, "beta", 3.0)),
        "a bound method": (bound.loss, lambda _: setattr(bound, "beta", 3.0)),
        "a lambda": (lambda f, y: box["beta"] * ((f - y) ** 2).sum(), lambda _: box.update(beta=3.0)),
    }


QUICK_LOSSES = {"a closure", "a global of a function that it calls", "a module", "a bound method"}


@pytest.mark.parametrize(
    "name", [n if n in QUICK_LOSSES else pytest.param(n, marks=pytest.mark.slow) for n in losses()]
)
def test_what_the_loss_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, change = losses()[name]
    compiled = fxcurv.compile(Net(lambda m, h: h), loss, [BatchGrad()])
    x, y = batch()
    agrees(compiled, x, y)
    agrees(compiled, x, y)
    assert compiled.recompiles == []
    change(monkeypatch)
    agrees(compiled, x, y)
    assert len(compiled.recompiles) == (name != "a global tensor")


def replace_weight(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def assign(layer: nn.Linear) -> None:
    layer.load_state_dict(nn.Linear(layer.in_features, layer.out_features).state_dict(), assign=True)


def replace_data(layer: nn.Linear) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


class Modal(nn.Module):
    """Computes something else in training."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.w if self.training else h + self.w


def teacher() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), Modal()).eval()


# Changes of a module that the model holds in a list or tuple; whether its tensors are read anew, without a program more.
OUTSIDE: dict[str, tuple[Callable[[nn.Sequential], Any], bool]] = {
    "a parameter": (lambda t: replace_weight(t[0]), True),
    "a state assigned": (lambda t: assign(t[0]), True),
    "data": (lambda t: replace_data(t[0]), True),
    "a buffer": (lambda t: setattr(t[1], "running_mean", torch.ones(2)), True),
    "a mode": (lambda t: t[2].train(), False),
    "a part": (lambda t: t.__setitem__(0, nn.Linear(2, 2)), False),
    "a hook": (lambda t: t[0].register_forward_hook(lambda m, i, out: 2 * out), False),
}


@pytest.mark.parametrize("held", [list, tuple, "closure"])
@pytest.mark.parametrize("change", OUTSIDE)
def test_a_module_outside_of_the_model(change: str, held: Any) -> None:
    """One in a list, a tuple or a closure counts as it is at the call, as a part of the model does."""
    part = teacher()
    model = Net(lambda m, h: part(h)) if held == "closure" else Net(lambda m, h: m.held[0](h), held=held([part]))
    compiled = fxcurv.compile(model, squares, [BatchGrad()])
    x, y = batch()
    agrees(compiled, x, y)
    agrees(compiled, x, y)
    assert compiled.recompiles == []
    write, anew = OUTSIDE[change]
    write(part)
    agrees(compiled, x, y)
    assert len(compiled.recompiles) == (not anew), compiled.recompiles


def test_batch_norm_outside_of_the_model_does_not_train() -> None:
    part = teacher()
    compiled = fxcurv.compile(Net(lambda m, h: part(h)), squares)
    compiled(*batch())
    part.train()
    with pytest.raises(CaptureError, match="writes to a tensor that is no buffer of it"):
        compiled(*batch())


def test_a_parameter_that_is_tied_outside_of_the_model() -> None:
    model = Net(lambda m, h: h)
    part = nn.Linear(3, 2)
    part.weight = model.linear.weight
    compiled = fxcurv.compile(model, lambda f, y: squares(f, part(x)))
    x, y = batch()
    for _ in range(2):
        torch.testing.assert_close(compiled(x, y).loss, squares(model(x), part(x)).detach())
        replace_weight(part)


def scheduled() -> tuple[Net, torch.optim.Optimizer, Any]:
    model = Net(lambda m, h: h)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)


OF_OPTIMIZERS: dict[str, Callable[[Net, Any, Any], Any]] = {
    "a group": lambda m, o, s: lambda f, y: o.param_groups[0]["lr"] * squares(f, y),
    "all groups": lambda m, o, s: lambda f, y: sum(group["lr"] for group in o.param_groups) * squares(f, y),
    "a schedule": lambda m, o, s: lambda f, y: s.get_last_lr()[0] * squares(f, y),
    "an epoch": lambda m, o, s: lambda f, y: (1 + s.last_epoch) * squares(f, y),
    "an attribute": lambda m, o, s: lambda f, y: m.optimizer.param_groups[0]["lr"] * squares(f, y),
    "an attribute's method": lambda m, o, s: lambda f, y: m.schedule.get_last_lr()[0] * squares(f, y),
}


@pytest.mark.parametrize("name", OF_OPTIMIZERS)
def test_what_an_optimizer_holds(name: str) -> None:
    """A step of the optimizer alone makes no other program."""
    model, optimizer, schedule = scheduled()
    model.optimizer, model.schedule = optimizer, schedule
    compiled = fxcurv.compile(model, OF_OPTIMIZERS[name](model, optimizer, schedule), [BatchGrad()])
    x, y = batch()
    agrees(compiled, x, y)
    compiled(x, y).attach()
    optimizer.step()
    agrees(compiled, x, y)
    assert compiled.recompiles == []
    schedule.step()
    agrees(compiled, x, y)
    assert len(compiled.recompiles) == 1


def test_the_reason_names_the_attribute() -> None:
    compiled = fxcurv.compile(nn.Sequential(nn.Linear(3, 2), nn.LeakyReLU(0.1)), squares)
    x, y = batch()
    compiled(x, y)
    compiled.model[1].negative_slope = 0.2
    compiled(x, y)
    assert compiled.recompiles == ["'negative_slope' of the model's '1' is 0.2 instead of 0.1"]
    assert "'negative_slope' of the model's '1' = 0.2" in str(compiled.explain(x, y))
    compiled.model[1].negative_slope = 0.1  # the first program serves again
    compiled(x, y)
    assert len(compiled.recompiles) == 1


def test_what_is_not_read_is_no_reason() -> None:
    model = Net(lambda m, h: h * m.config.factor, config=Config(), unread=0)
    compiled = fxcurv.compile(model, squares, [BatchGrad()])
    x, y = batch()
    for k in range(3):
        model.unread, model.config.unread = k, k
        agrees(compiled, x, y)
    assert compiled.recompiles == []


def test_dropout() -> None:
    """p = 0 is the deterministic value."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train()
    compiled = fxcurv.compile(model, squares, [BatchGrad()])
    x, y = batch()
    compiled(x, y)
    model[1].p = 0.0
    agrees(compiled, x, y)
    for p in (1.0, 0.5, 0.25):
        model[1].p = p
        result = compiled(x, y)
    assert (result.output == 0).any() or len(compiled.recompiles) == 3
    model[1].p = 1.0
    assert (compiled(x, y).output == 0).all()
    assert len(compiled.recompiles) == 3


def test_a_schedule_becomes_an_input() -> None:
    """Two changes of one float, and any later one has a program."""
    model, loss = Net(lambda m, h: h * m.scale + (1 - m.scale), scale=1.0), Weighted()
    compiled = fxcurv.compile(model, loss, [BatchGrad()])
    x, y = batch()
    for k in range(6):
        model.scale = 1.0 + 0.3 * k
        agrees(compiled, x, y)
    assert len(compiled.recompiles) == 2
    for k in range(5):
        loss.beta = 0.1 * k
        model.scale = -0.5 * k
        agrees(compiled, x, y)
    assert len(compiled.recompiles) == 4
    assert "'scale' of the model (an input)" in str(compiled.explain(x, y))


def test_a_schedule_that_python_needs_has_a_program_for_each_value() -> None:
    model = Net(lambda m, h: h * m.scale if m.scale > 1.5 else h.tanh(), scale=1.0)
    compiled = fxcurv.compile(model, squares, [BatchGrad()])
    x, y = batch()
    for k in range(4):
        model.scale = 1.0 + 0.3 * k
        agrees(compiled, x, y)
    assert len(compiled.recompiles) == 3


@pytest.mark.parametrize("dtype", [torch.float32])
def test_a_schedule_promotes_as_a_float(dtype: torch.dtype) -> None:
    """Of values with and without dimensions."""

    def run(m: Net, h: Tensor) -> Tensor:
        return h * m.scale + h.sum() * 0 * m.scale + torch.ones(2, dtype=torch.int64) * m.scale

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return model.scale * ((f - y) ** 2).sum()

    model = Net(run, scale=0.1).to(dtype)
    torch.set_default_dtype(torch.float32)
    compiled = fxcurv.compile(model, loss)
    x, y = (t.to(dtype) for t in batch())
    for k in range(4):
        model.scale = 0.1 + 0.1 * k
        result, output = compiled(x, y), model(x)
        assert (result.output.dtype, result.loss.dtype) == (output.dtype, loss(output, y).dtype)
        torch.testing.assert_close(result.output, output.detach())
        torch.testing.assert_close(result.loss, loss(output, y).detach())
    assert len(compiled.recompiles) == 2


class Counting(nn.Module):
    """A model that changes its own state."""

    def __init__(self, warm: bool) -> None:
        super().__init__()
        self.linear, self.calls, self.warm = nn.Linear(3, 2), 0, warm

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * (self.calls if self.warm else 1)


def test_a_counter_counts() -> None:
    """One that influences nothing: no program more, and it counts as if the forward pass had run."""
    model = Counting(warm=False)
    compiled = fxcurv.compile(model, squares)
    for calls in (1, 2, 3):
        compiled(*batch())
        assert model.calls == calls
    assert compiled.recompiles == []


def test_a_counter_that_is_used_is_refused() -> None:
    with pytest.raises(CaptureError, match="reads 'calls' of the model and changes it"):
        fxcurv.compile(Counting(warm=True), squares)(*batch())


def test_a_dict_that_counts_is_refused() -> None:
    def run(m: Net, h: Tensor) -> Tensor:
        m.stats["calls"] += 1
        return h

    with pytest.raises(CaptureError, match="reads 'stats' of the model"):
        fxcurv.compile(Net(run, stats={"calls": 0}), squares)(*batch())


class OfCopies(nn.Module):
    """Makes objects in its forward pass, as models of transformers do: a part of its layers, a copy of its configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        config = copy.deepcopy(self.config)
        config.factor *= 1.5
        for layer in [*self.layers[:2], *self.layers[2:]]:
            x = layer(x).tanh()
        return config.doubled() * x


def test_what_the_forward_pass_makes_is_no_state() -> None:
    model = OfCopies()
    compiled = fxcurv.compile(model, squares, [BatchGrad()])
    x, y = torch.randn(4, 2), torch.randn(4, 2)
    for factor in (2.0, 2.0, 3.0):
        model.config.factor = factor
        result = compiled(x, y)
        wanted = torch.autograd.grad(squares(model(x), y), list(model.parameters()))
        torch.testing.assert_close(list(result.grad.values()), list(wanted))


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_a_cache_is_not() -> None:
    """What the forward pass would compute again is no state."""

    def run(m: Net, h: Tensor) -> Tensor:
        if m.positions is None:
            m.positions = torch.arange(2.0)
        return h * m.positions

    model = Net(run, positions=None)
    compiled = fxcurv.compile(model, squares)
    x, y = batch()
    first = compiled(x, y).loss
    torch.testing.assert_close(first, squares(model(x), y).detach())
    torch.testing.assert_close(compiled(x, y).loss, first)


def test_inside_torch_compile() -> None:
    """Attributes and globals are guarded, a tensor is read anew, a closure is refused by name."""
    model = Net(lambda m, h: h * m.scale * m.mask * FACTOR, scale=2.0, mask=torch.ones(2))
    compiled = fxcurv.compile(model, squares)
    step = torch.compile(lambda x, y: compiled(x, y).loss, backend="eager")
    x, y = batch()
    for scale, mask in ((2.0, 1.0), (3.0, 1.0), (3.0, 5.0), (4.0, 2.0)):
        model.scale = scale
        model.mask = torch.full((2,), mask)
        torch.testing.assert_close(step(x, y), squares(model(x), y).detach())
    assert len(compiled.recompiles) == 2
    closure = fxcurv.compile(model, closed(2.0)[0])
    with pytest.raises(Exception, match="'beta' in closed") as caught:
        torch.compile(lambda x, y: closure(x, y).loss, backend="eager")(x, y)
    assert isinstance(caught.value, ArgumentError) or "ArgumentError" in str(caught.value)


NUMBERS = [2.0, 3.0]


def halved(h):
    return h / 2


def tripled(h, factor=3.0):
    return h * factor


@pytest.mark.parametrize("change", ["table", "function", "default"])
def test_inside_torch_compile_old_state_is_noticed(monkeypatch, change) -> None:
    """What Dynamo does not guard: members of a list, functions, default arguments. The step refuses, then compiles anew."""
    monkeypatch.setitem(globals(), "NUMBERS", [2.0, 3.0])
    monkeypatch.setattr(tripled, "__defaults__", (3.0,))
    model = Net(lambda m, h: tripled(halved(h)) * sum(NUMBERS))
    compiled = fxcurv.compile(model, squares)
    step = torch.compile(lambda x, y: compiled(x, y).loss, backend="eager")
    x, y = batch()
    torch.testing.assert_close(step(x, y), squares(model(x), y).detach())
    if change == "table":
        NUMBERS[1] = 5.0
    elif change == "function":
        monkeypatch.setitem(globals(), "halved", lambda h: h / 4)
    else:
        tripled.__defaults__ = (4.0,)
    with pytest.raises(ArgumentError, match="which its guards do not see"):
        step(x, y)
    torch.testing.assert_close(step(x, y), squares(model(x), y).detach())


@pytest.mark.parametrize(
    ("path", "watched"),
    [
        ("/opt/venv/lib/python3.11/site-packages/sympy/core/symbol.py", False),
        ("/home/me/.local/lib/python3.11/site-packages/mpmath/ctx_mp.py", False),
        ("/usr/lib/python3/dist-packages/typing_extensions.py", False),
        (r"C:\Python311\Lib\site-packages\sympy\core\symbol.py", False),
        (f"{sysconfig.get_path('stdlib')}/collections/__init__.py", False),
        (f"{sysconfig.get_path('stdlib')}/site-packages/transformers/modeling_utils.py", True),
        ("/opt/venv/lib/python3.11/site-packages/numpy_models/model.py", True),
        ("/home/me/numpy/train.py", True),
    ],
)
def test_libraries_are_known_in_every_folder_of_packages(path, watched):
    """An environment that takes PyTorch from the system's packages, or the user's, is as good as one that has its own."""
    assert holds_state(path) is watched


class Computed:
    """Makes its attributes when they are read."""

    def __init__(self) -> None:
        self.known = {"factor": 2.0, "name": "a"}

    def __getattr__(self, name: str) -> Any:
        if name == "known":
            raise AttributeError(name)
        return self.known[name]


COMPUTED = Computed()


def test_attributes_that_getattr_makes():
    """They are read, not changed: their values are asked for at every call."""
    x, y = batch()
    model = nn.Linear(x.shape[1], y.shape[1])
    compiled = fxcurv.compile(model, lambda f, t: COMPUTED.factor * (f - t).square().sum(), [])
    for k, factor in enumerate((2.0, 2.0, 3.0, 3.0)):
        COMPUTED.known["factor"] = factor
        wanted = factor * (model(x) - y).square().sum()
        torch.testing.assert_close(compiled(x, y).loss, wanted.detach())
        assert len(compiled.recompiles) == (k > 1)


class Wrapper(nn.Module):
    """Has what the module in it has, as adapters' wrappers do; takes its scale from there."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(self.inner, name)

    def forward(self, x):
        return self.inner(x) * self.settings.scale * getattr(self, "factor", 1.0)


def test_an_attribute_of_the_wrapped_module():
    """It is no attribute that appears in the pass, and its values count at every call; so does one that appears later."""
    torch.manual_seed(0)
    inner = nn.Linear(3, 2)
    inner.settings = types.SimpleNamespace(scale=2.0)
    model, (x, y) = Wrapper(inner), (torch.randn(4, 3), torch.randn(4, 2))
    compiled = fxcurv.compile(model, nn.MSELoss(), [])
    for change in (lambda: None, lambda: setattr(inner.settings, "scale", 3.0), lambda: setattr(inner, "factor", 0.5)):
        change()
        torch.testing.assert_close(compiled(x, y).loss, nn.MSELoss()(model(x), y).detach())
