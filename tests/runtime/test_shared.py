"""Equal models share programs, and nothing of another model gets into a result."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
from fxcurv import passes
from fxcurv.errors import SelfCheckError
from fxcurv.extensions import BatchGrad, BatchL2Grad, DiagGGNExact
from fxcurv.rules.pointwise import Pointwise
from fxcurv.runtime import shared


@pytest.fixture(autouse=True)
def alone():
    shared.forget()
    yield
    shared.forget()


class Net(nn.Module):
    """Reads a float, a tensor that is no buffer, and a buffer."""

    def __init__(self, seed, scale=2.0, act=torch.tanh):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.register_buffer("mean", torch.randn(3, dtype=torch.float64))
        self.shift, self.scale, self.act = torch.randn(4, dtype=torch.float64), scale, act

    def forward(self, x):
        return self.b(self.act(self.a(x - self.mean) * self.scale + self.shift))


GRADIENTS = (BatchGrad(),)
X, Y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])


def compiled(model, loss=None, extensions=GRADIENTS, **options):
    made = fxcurv.compile(model, loss or nn.CrossEntropyLoss(), list(extensions), **options)
    return made, made(X, Y)


def graph(made):
    return made.lower(X, Y).graph_module


def check(model, result):
    losses = F.cross_entropy(model(X), Y, reduction="none") / len(X)
    torch.testing.assert_close(result.output, model(X))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for n, each in enumerate(losses):
        grads = torch.autograd.grad(each, [model.get_parameter(name) for name in names], retain_graph=True)
        for name, g in zip(names, grads, strict=True):
            torch.testing.assert_close(result.grad_batch[name][n], g)


def test_an_equal_model_has_its_own_numbers():
    """Its parameters, buffers, tensors that it just holds, and the state that it is compared with."""
    first, second = Net(0), Net(1)
    (one, a), (two, b) = compiled(first), compiled(second)
    assert graph(one) is graph(two)
    check(first, a), check(second, b)
    ready = two._programs.named.program_0
    assert ready.verified and "equal those of plain PyTorch" in ready.note  # it was compared with its own model
    check(second, two(X, Y)), check(second, two(X, Y))  # the short way
    second.shift = torch.zeros(4, dtype=torch.float64)
    second.mean.zero_()
    check(second, two(X, Y))
    second.scale = 3.0  # a program of its own
    check(second, two(X, Y))
    check(first, one(X, Y))
    assert len(two.recompiles) == 1 and one.recompiles == []


def test_the_first_model_may_be_gone():
    model = Net(0)
    made = compiled(model)
    gone = weakref.ref(model)
    del model, made
    gc.collect()
    assert gone() is None
    second = Net(1)
    check(second, compiled(second)[1])
    assert len(shared._FINISHED) == 1


def test_results_keep_their_memory_apart():
    """Large results take the memory of earlier ones of the same model only."""
    wide = [nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 2)) for _ in range(2)]
    x = torch.randn(40, 64)
    y = torch.randint(2, (40,))
    made = [fxcurv.compile(m, nn.CrossEntropyLoss(), [BatchGrad()]) for m in wide]
    first = made[0](x, y)
    kept = first.grad_batch["0.weight"].clone()
    for _ in range(3):
        second = made[1](x, y)
    assert made[0].lower(x, y).graph_module is made[1].lower(x, y).graph_module
    assert first.grad_batch["0.weight"].equal(kept) and not second.grad_batch["0.weight"].equal(kept)


def key(model, loss=None, extensions=GRADIENTS, **options):
    """What a program of this model would be found by."""
    made = fxcurv.compile(model, loss or nn.CrossEntropyLoss(), list(extensions), **options)
    request = made._programs.request(made._subject, X, (Y,), made._subject.autocast())
    return shared.graph_key(made._programs.captured(request), request.mode)


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def first():
    return key(Net(0))


def test_what_is_equal_is_found(first):
    assert first is not None and first == key(Net(1))


@pytest.mark.parametrize("other", [
    lambda: key(Net(1, scale=2.5)),
    lambda: key(Net(1, act=torch.sin)),
    lambda: key(Net(1), nn.CrossEntropyLoss(label_smoothing=0.1)),
    slow(lambda: key(Net(1), nn.CrossEntropyLoss(reduction="sum"))),
    lambda: key(Net(1), extensions=(BatchGrad(), BatchL2Grad())),
    slow(lambda: key(Net(1), extensions=(BatchGrad(savefield="mine"),))),
    slow(lambda: key(Net(1), check=None)),
    slow(lambda: key(Net(1), params=["a.weight"])),
    lambda: key(tied(Net(1))),
    lambda: key(frozen(Net(1))),
    slow(lambda: key(nn.Sequential(Net(1)))),
], ids=["float", "function", "loss", "sum", "extensions", "field", "options", "params", "tied", "frozen", "names"])  # fmt: skip
def test_what_differs_is_not_shared(other, first):
    assert first != other() is not None


def tied(model):
    model.b.bias = model.a.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    return model


def frozen(model):
    model.a.weight.requires_grad_(False)
    return model


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x):
        return Doubled.apply(self.layer(x))


def test_what_is_not_known_to_be_compared_is_not_shared():
    """A function with a backward of its own, a user's rule; each still is right."""
    assert key(Custom()) is None
    assert key(Net(0), rules={torch.ops.aten.tanh.default: Pointwise(d1=lambda x, y: 1 - y * y)}) is None
    (_, a), (_, b) = compiled(Custom()), compiled(Custom())
    assert not a.grad["layer.weight"].equal(b.grad["layer.weight"])


class Tenfold(BatchL2Grad):
    """A user's extension, which reads a global."""

    def extract(self, param):
        return param.emit(lambda v: FACTOR["value"] * v, super().extract(param))


FACTOR = {"value": 10.0}


def test_extensions_of_users_are_not_shared(monkeypatch):
    found = []
    for factor in (10.0, 20.0):
        monkeypatch.setitem(FACTOR, "value", factor)
        result = fxcurv.compile(Net(0), F.cross_entropy, [Tenfold(), BatchL2Grad(savefield="plain")], check=None)(X, Y)
        found.append(result.batch_l2["a.weight"] / result.plain["a.weight"])
    torch.testing.assert_close(found, [torch.full_like(found[0], 10.0), torch.full_like(found[1], 20.0)])


def test_the_state_of_pytorch_counts(first):
    torch.use_deterministic_algorithms(True)
    try:
        assert key(Net(0)) != first
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_pass_that_was_added_counts(first):
    def idle(program):
        return program

    passes.ANALYSIS.append(idle)
    try:
        assert key(Net(0)) != first
    finally:
        passes.ANALYSIS.remove(idle)


def test_a_shared_program_is_checked_with_its_own_model(monkeypatch):
    """Were a key to miss something, the check of the first call would say so."""
    compiled(Net(0, scale=2.0), extensions=[DiagGGNExact()])
    (finished,) = shared._FINISHED.values()
    monkeypatch.setattr("fxcurv.runtime.programs.find", lambda key: finished)
    with pytest.raises(SelfCheckError):
        compiled(Net(1, scale=5.0), extensions=[DiagGGNExact()])
