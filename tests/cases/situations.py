"""A situation that somebody met with a model of their own, in public: the model made small, and what it asks for.

Every situation is a row: its thread, a model, a loss, what draws a batch of n samples, and which families of quantities
the thread is about. All of them come from one `compile` and are compared with `Oracle`, in float64.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from against_oracle import close
from oracle import Oracle, plain_mathematics
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.extensions import GGNMP, HMP, KFLR, BatchDiagHessian, BatchGrad, DiagGGNExact, DiagHessian, Variance

ASKED = {
    "first": [BatchGrad(), Variance()],
    "ggn": [DiagGGNExact()],
    "hessian": [DiagHessian()],
    "products": [GGNMP(), HMP()],
    "hessian_batch": [BatchDiagHessian()],
    "kron": [KFLR(others="exact")],
    "grad": [],
}


@dataclass(frozen=True)
class Refused:
    """The error that is the right answer, as the documents say: its type, and words of its message beside the user's line."""

    error: type[FxcurvError]
    line: str
    says: tuple[str, ...] = ()


@dataclass(frozen=True)
class Situation:
    """One row. `x`, `y`: what draws inputs and targets of n samples.

    trains: whether training mode is another model; `modes` has both then.
    source: the thread; empty where a situation has no single one.
    """

    source: str
    model: Callable[[], nn.Module]
    loss: Callable[..., Tensor]
    x: Callable[[int], Any]
    y: Callable[[int], Any] | None
    asks: str = "first ggn hessian"
    trains: bool = False
    quick: bool = False
    refused: Refused | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    oracle: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.source and not re.fullmatch(r"[\w-]+/[\w-]+#\d+", self.source):
            raise ValueError(f"{self.source}: a thread is owner/repository#number")

    @property
    def modes(self) -> tuple[bool, ...]:
        """Training mode where the row is about it, and evaluation mode where nothing is refused."""
        return (True, False) if self.trains and self.refused is None else (self.trains,)

    def built(self, n: int, training: bool = False) -> tuple[nn.Module, Any, Any]:
        """(model, inputs, targets), equal at every call."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = self.model().train(training)
                torch.manual_seed(1)
                return model, self.x(n), None if self.y is None else self.y(n)
        finally:
            torch.set_default_dtype(default)

    def check(self, sizes: tuple[int, ...], training: bool = False) -> None:
        """Every quantity at every batch size, from one compiled object."""
        families = self.asks.split()
        model = self.built(2, training)[0]
        extensions = [e for name in families for e in ASKED[name]]
        compiled = fxcurv.compile(model, self.loss, extensions, **self.options)
        for n in sizes:
            _, x, y = self.built(n, training)
            args = (x,) if y is None else (x, y)
            before = {name: b.clone() for name, b in model.named_buffers()}
            torch.manual_seed(2)
            if self.refused is not None:
                _refuses(self.refused, model, lambda args=args: compiled(*args))
                continue
            found = compiled(*args)
            with plain_mathematics(), _again(model, before):
                true = Oracle(model, self.loss, x, y, **self.oracle)
                torch.testing.assert_close(found.loss, true.loss(), rtol=1e-9, atol=1e-10)
                close(found.grad, true.grad(), "grad")
                for family in families:
                    _COMPARED[family](found, true, n)


@contextlib.contextmanager
def _again(model: nn.Module, buffers: Mapping[str, Tensor]) -> Iterator[None]:
    """Every forward pass finds the buffers, and draws the numbers, that the compiled call has found and drawn."""

    def restore(*_: Any) -> None:
        torch.manual_seed(2)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if not torch.equal(buffer, buffers[name]):  # a product refuses what was written to since it was made
                    buffer.copy_(buffers[name])

    handle = model.register_forward_pre_hook(restore)
    try:
        yield
    finally:
        handle.remove()


def _refuses(refused: Refused, model: nn.Module, run: Callable[[], Any]) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FxcurvError) as caught:
        run()
    assert type(caught.value) is refused.error, caught.value
    for words in (refused.line, *refused.says):
        assert words in str(caught.value), caught.value
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def _first(found: Any, true: Oracle, n: int) -> None:
    close(found.grad_batch, true.grad_batch(), "grad_batch")
    close(found.variance, true.variance(), "variance")


def _ggn(found: Any, true: Oracle, n: int) -> None:
    close(found.diag_ggn_exact, true.diag_ggn_exact(), "diag_ggn_exact")


def _hessian(found: Any, true: Oracle, n: int) -> None:
    close(found.diag_h, true.diag_h(), "diag_h")


def _products(found: Any, true: Oracle, n: int) -> None:
    _check_products(found.ggnmp, true, true.ggn(), "ggnmp")
    _check_products(found.hmp, true, true.hessian(), "hmp")


def _check_products(found: Mapping[str, Callable], true: Oracle, blocks: Mapping[str, Tensor], what: str) -> None:
    for name, p in true.params.items():
        v = torch.linspace(-1, 1, 2 * p.numel(), dtype=torch.float64).reshape(2, *p.shape)
        expected = (v.flatten(1) @ blocks[name]).reshape(v.shape)
        close({name: found[name](v)}, {name: expected}, what)


def _kron(found: Any, true: Oracle, n: int) -> None:
    """With one sample and one position the Kronecker product is the exact block."""
    if n == 1:
        actual = {name: torch.kron(*f) if len(f) == 2 else f[0] for name, f in found.kflr.items()}
        close(actual, true.ggn(), "kflr")


def _hessian_batch(found: Any, true: Oracle, n: int) -> None:
    close(found.diag_h_batch, true.diag_h_batch(), "diag_h_batch")


_COMPARED: dict[str, Callable[[Any, Oracle, int], None]] = {
    "first": _first,
    "ggn": _ggn,
    "hessian": _hessian,
    "products": _products,
    "hessian_batch": _hessian_batch,
    "kron": _kron,
    "grad": lambda *_: None,
}


def parametrized(table: Mapping[str, Situation]) -> list[Any]:
    """The names of a table, all but the quick ones marked slow."""
    return [name if row.quick else pytest.param(name, marks=pytest.mark.slow) for name, row in table.items()]


# ---- what batches are drawn from ------------------------------


def numbers(*shape: int) -> Callable[[int], Tensor]:
    """Random numbers [n, *shape]."""
    return lambda n: torch.randn(n, *shape)


def classes(*shape: int, of: int = 3) -> Callable[[int], Tensor]:
    """Random indices [n, *shape]."""
    return lambda n: torch.randint(of, (n, *shape))


def shares(*shape: int) -> Callable[[int], Tensor]:
    """Random zeros and ones [n, *shape], as floats."""
    return lambda n: torch.randint(2, (n, *shape)).double()


def together(*draws: Callable[[int], Any]) -> Callable[[int], tuple]:
    """A tuple of inputs."""
    return lambda n: tuple(draw(n) for draw in draws)
