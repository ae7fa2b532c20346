"""Rows moved about by indices that are functions of the batch size: copies, experts in turn, sorted dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from against_oracle import close
from case_tools import Net
from oracle import Oracle
from situations import Situation, classes, numbers, parametrized
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import MixedSamplesError
from fxcurv.extensions import BatchGrad, DiagGGNExact

COPIES, EXPERTS = 2, 2


def copied(m: Any, x: Tensor) -> Tensor:
    """Every row twice, and the copies of each added up again."""
    rows = torch.arange(x.shape[0]).repeat_interleave(COPIES)
    h = torch.tanh(m.body(x)).index_select(0, rows)
    h = (h * m.scale(h).sigmoid()).sin()
    return m.head(torch.zeros(x.shape[0], 4, dtype=h.dtype).index_add(0, rows, h))


def copied_by_brackets(m: Any, x: Tensor) -> Tensor:
    rows = torch.arange(x.shape[0]).repeat(COPIES)
    h = torch.tanh(m.body(x))[rows] * m.scale.weight.sum()
    return m.head(h.unflatten(0, (COPIES, -1)).sin().sum(0))


def dispatched(m: Any, x: Tensor) -> Tensor:
    """Each of a row's two copies to an expert of its own: sorted by expert, computed together, and sorted back."""
    n = x.shape[0]
    expert = torch.arange(n * EXPERTS) % EXPERTS
    order = expert.argsort(stable=True)
    h = torch.tanh(m.body(x))[order // EXPERTS]
    h = torch.cat([one(part) for one, part in zip(m.experts, (h[:n], h[n:]), strict=True)])
    return m.head(h[order.argsort()].view(n, EXPERTS, 4).prod(1))


def chunked(m: Any, x: Tensor) -> Tensor:
    """The copies one after the other, without an index."""
    h = torch.tanh(m.body(x)).repeat(EXPERTS, 1)
    h = torch.cat([torch.sin(one(part)) for one, part in zip(m.experts, h.chunk(EXPERTS), strict=True)])
    first, second = h.split(x.shape[0])
    return m.head(first * second)


def parts() -> dict[str, nn.Module]:
    return {"body": nn.Linear(3, 4), "scale": nn.Linear(4, 4), "head": nn.Linear(4, 2)}


def experts() -> dict[str, nn.Module]:
    return {
        "body": nn.Linear(3, 4),
        "experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
        "head": nn.Linear(4, 2),
    }


def row(forward: Any, held: Any, quick: bool = False, asks: str = "first ggn hessian products") -> Situation:
    return Situation(
        "", lambda: Net(forward, **held()), nn.CrossEntropyLoss(), numbers(3), classes(of=2), asks, quick=quick,
        options={"debug": True},
    )  # fmt: skip


SITUATIONS = {
    "copied": row(copied, parts, asks="first ggn", quick=True),
    "copied, second order": row(copied, parts),
    "copied by brackets": row(copied_by_brackets, parts),
    "sorted dispatch": row(dispatched, experts),
    "chunks": row(chunked, experts),
}


@pytest.mark.parametrize("name", parametrized(SITUATIONS))
def test_equals_the_oracle(name: str) -> None:
    SITUATIONS[name].check((4, 5, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", SITUATIONS)
def test_of_one_sample_first(name: str) -> None:
    SITUATIONS[name].check((1,))


def compiled_for(forward: Any, held: Any = experts) -> tuple[nn.Module, fxcurv.Compiled]:
    torch.manual_seed(0)
    model = Net(forward, **held()).double()
    return model, fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad()])


def batch(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3).double(), torch.randint(2, (n,))


def test_one_program_for_all_batch_sizes() -> None:
    model, compiled = compiled_for(dispatched)
    for n in (4, 3, 9, 2):
        x, y = batch(n)
        close(compiled(x, y).grad_batch, Oracle(model, nn.CrossEntropyLoss(), x, y).grad_batch(), "grad_batch")
    assert not compiled.recompiles


def shifted(m: Any, x: Tensor) -> Tensor:
    """Samples keep apart in batches of up to five, and in no larger one."""
    n = x.shape[0]
    return m.head(torch.tanh(m.body(x))[(torch.arange(n) + n // 6) % n])


def test_an_index_that_mixes_at_another_size_is_refused_there() -> None:
    model, compiled = compiled_for(shifted, parts)
    for n in (4, 5):
        x, y = batch(n)
        close(compiled(x, y).grad_batch, Oracle(model, nn.CrossEntropyLoss(), x, y).grad_batch(), "grad_batch")
    assert not compiled.recompiles
    with pytest.raises(MixedSamplesError, match=r"\[\(torch.arange\(n\) \+ n // 6\) % n\]"):
        compiled(*batch(7))


@pytest.mark.slow
def test_what_asks_for_no_sample_needs_none() -> None:
    """The gradient and the diagonal of the whole batch exist where an index mixes."""
    model, _ = compiled_for(shifted, parts)
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagGGNExact()])
    x, y = batch(7)
    true = Oracle(model, nn.CrossEntropyLoss(), x, y)
    close(compiled(x, y).grad, true.grad(), "grad")


@pytest.mark.parametrize(
    "moved", [lambda h, n: h.flip(0), lambda h, n: h[torch.arange(n) - 1], lambda h, n: torch.cat([h[1:], h[:1]])]
)
@pytest.mark.slow
def test_samples_that_change_places_are_refused(moved: Any) -> None:
    with pytest.raises(MixedSamplesError):
        compiled_for(lambda m, x: m.head(moved(m.body(x), x.shape[0])), parts)[1](*batch(4))


@pytest.mark.slow
def test_inside_torch_compile() -> None:
    """A size for which nothing has looked at the index is looked at."""
    _, compiled = compiled_for(copied, parts)
    step = torch.compile(lambda x, y: compiled(x, y).grad_batch, backend="eager", fullgraph=True)
    for n in (4, 5, 6):
        x, y = batch(n)
        close(step(x, y), compiled(x, y).grad_batch, "grad_batch")
    _, compiled = compiled_for(shifted, parts)
    step = torch.compile(lambda x, y: compiled(x, y).grad_batch, backend="eager", fullgraph=True)
    for n in (3, 4, 5):
        step(*batch(n))
    with pytest.raises(Exception, match="mixes samples"):
        step(*batch(7))
