"""Several threads at once: first calls of one compiled object, of several, of other kinds, and repeated calls meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.extensions import GGNMP, BatchGrad, DiagGGNExact, SumGradSquared

N = 6


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the calls return, each in a thread of its own, begun at once; the first error, if there is one."""
    start, found = threading.Barrier(len(calls)), [None] * len(calls)

    def run(k: int) -> None:
        start.wait()
        try:
            found[k] = calls[k]()
        except Exception as error:
            found[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value in found:
        if isinstance(value, Exception):
            raise value
    return found


class Reversed(torch.autograd.Function):
    """Its backward is not its forward's."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return -0.5 * g


class Scaled(nn.Module):
    """Reads a number, and a custom function's backward."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(4, 5), nn.Linear(5, 3), scale

    def forward(self, x):
        return self.last(Reversed.apply(self.scale * torch.tanh(self.first(x))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(seed: int, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, dtype=torch.float64, generator=g), torch.randint(3, (n,), generator=g)


def plain_gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))


def holds(result: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """The gradient is autograd's, individual gradients and the diagonal are the oracle's."""
    for (name, _), want in zip(model.named_parameters(), plain_gradients(model, x, y), strict=True):
        torch.testing.assert_close(result.grad[name], want)
    oracle = Oracle(model, nn.CrossEntropyLoss(), x, y)
    for field, want in (("grad_batch", oracle.grad_batch()), ("diag_ggn_exact", oracle.diag_ggn_exact())):
        for name in want:
            torch.testing.assert_close(getattr(result, field)[name], want[name])


def test_the_first_calls_of_one_compiled_object():
    torch.manual_seed(0)
    model = mlp()
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad(), DiagGGNExact()])
    batches = [data(k) for k in range(4)]
    for result, (x, y) in zip(together([lambda b=b: compiled(*b) for b in batches]), batches, strict=True):
        holds(result, model, x, y)
    assert not compiled.recompiles  # the others waited for the program


def test_the_first_calls_of_several_compiled_objects():
    torch.manual_seed(1)
    models = [mlp(), mlp(), nn.Sequential(nn.Linear(4, 3)).double()]
    objects = [fxcurv.compile(m, nn.CrossEntropyLoss(), [BatchGrad(), DiagGGNExact()]) for m in models]
    x, y = data(0)
    for result, model in zip(together([lambda c=c: c(x, y) for c in objects]), models, strict=True):
        holds(result, model, x, y)


def test_a_first_call_beside_repeated_calls_of_the_same_model():
    torch.manual_seed(2)
    model = Scaled(2.0).double()
    known = fxcurv.compile(model, nn.CrossEntropyLoss(), [SumGradSquared()])
    new = fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad()])
    x, y = data(1)
    want = known(x, y).sum_grad_squared["first.weight"]
    done = threading.Event()

    def first() -> Any:
        try:
            return [new(*data(2)), new(*data(3, 4))]
        finally:
            done.set()

    def again() -> int:
        count = 0
        while not done.is_set() or not count:
            torch.testing.assert_close(known(x, y).sum_grad_squared["first.weight"], want)
            count += 1
        return count

    results, _ = together([first, again])
    assert not known.recompiles
    for result, (x, y) in zip(results, (data(2), data(3, 4)), strict=True):
        for (name, _), gradient in zip(model.named_parameters(), plain_gradients(model, x, y), strict=True):
            torch.testing.assert_close(result.grad_batch[name].sum(0), gradient)
    model.scale = 3.0  # what other threads read did not become state of this program, and this one's own still is
    new(*data(2))
    assert new.recompiles


def test_repeated_calls_do_not_share_the_memory_of_results():
    torch.manual_seed(3)
    model = nn.Linear(64, 128, dtype=torch.float64)  # individual gradients of 1 MiB, which come back to the pool
    compiled = fxcurv.compile(model, lambda f, y: F.cross_entropy(f, y), [BatchGrad()])
    xs = [torch.randn(32, 64, dtype=torch.float64) for _ in range(4)]
    y = torch.arange(32) % 128
    compiled(xs[0], y), compiled(xs[0], y)
    wants = [individual(model, x, y) for x in xs]

    def run(k: int) -> None:
        for _ in range(30):
            torch.testing.assert_close(compiled(xs[k], y).grad_batch["weight"], wants[k])

    together([lambda k=k: run(k) for k in range(4)])


def individual(model: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """∂L/∂W per sample: (softmax - onehot) xᵀ / N."""
    with torch.no_grad():
        g = (model(x).softmax(1) - F.one_hot(y, 128)) / len(x)
        return g[:, :, None] * x[:, None, :]


def test_products_and_lowered_programs():
    torch.manual_seed(4)
    model = mlp()
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [GGNMP()])
    x, y = data(5)
    vectors = torch.eye(20, dtype=torch.float64).reshape(20, 5, 4)
    calls = [
        lambda: compiled(x, y).ggnmp["0.weight"](vectors),
        lambda: str(compiled.explain(x, y)),
        lambda: compiled.lower(x, y),
    ]
    found = together([*calls, calls[0]])
    want = Oracle(model, nn.CrossEntropyLoss(), x, y).diag_ggn_exact()["0.weight"].flatten()
    for product in (found[0], found[3]):
        torch.testing.assert_close(product.reshape(20, 20).diagonal(), want)


def test_outputs_false_in_threads():
    torch.manual_seed(5)
    model = mlp()
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagGGNExact()], outputs=False)
    batches = [data(k, 8) for k in range(3)]
    for result, (x, y) in zip(together([lambda b=b: compiled(*b) for b in batches]), batches, strict=True):
        want = Oracle(model, nn.CrossEntropyLoss(), x, y).diag_ggn_exact()
        for name in want:
            torch.testing.assert_close(result.diag_ggn_exact[name], want[name])
