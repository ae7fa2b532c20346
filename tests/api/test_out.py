"""`out=`: a call writes large results where an earlier result has them, and says so where it cannot."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxcurv
from fxcurv.errors import ArgumentError
from fxcurv.extensions import BatchDiagGGNExact, BatchGrad, BatchL2Grad, DiagGGNExact, SqrtGGNExact
from fxcurv.passes.recycle import WORTHWHILE
from fxcurv.runtime.memory import Storage

WIDTH = 96
N = 2 * WORTHWHILE // (8 * WIDTH * WIDTH)  # the first layer's individual gradients take 2 MiB in float64


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)).double()


@functools.cache
def compiled_mlp(*extensions: Any, **options: Any) -> fxcurv.api.Compiled:
    """One for all tests that ask for the same, which no call changes."""
    return fxcurv.compile(mlp(), nn.CrossEntropyLoss(), extensions or [BatchGrad()], **options)


def batch(n: int = N, seed: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(n, WIDTH, dtype=torch.float64), torch.randint(3, (n,))


def individual_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of the mean loss, by autograd sample by sample."""
    params = dict(model.named_parameters())
    each = [
        torch.autograd.grad(nn.functional.cross_entropy(model(a[None]), b[None]) / len(x), list(params.values()))
        for a, b in zip(x, y, strict=True)
    ]
    return {name: torch.stack(rows) for name, rows in zip(params, zip(*each, strict=True), strict=True)}


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


def addresses(result: fxcurv.api.Result, field: str) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in getattr(result, field).items()}


FIELDS = {"grad_batch": BatchGrad(), "sqrt_ggn_exact": SqrtGGNExact(), "diag_ggn_exact_batch": BatchDiagGGNExact()}


@pytest.mark.parametrize("field", FIELDS)
def test_the_same_storage_while_it_is_held(field: str) -> None:
    compiled = compiled_mlp(FIELDS[field])
    first = compiled(*batch())
    held = dict(getattr(first, field))
    expected = compiled(*batch(seed=2))
    second = compiled(*batch(seed=2), out=first)
    assert addresses(second, field)["0.weight"] == held["0.weight"].data_ptr() != addresses(expected, field)["0.weight"]
    for name, value in getattr(expected, field).items():
        torch.testing.assert_close(getattr(second, field)[name], value, rtol=0, atol=0)
    torch.testing.assert_close(held["0.weight"], getattr(second, field)["0.weight"], rtol=0, atol=0)
    if field == "grad_batch":
        close(second.grad_batch, individual_gradients(compiled.model, *batch(seed=2)))


def test_without_out_a_held_result_stays() -> None:
    compiled = compiled_mlp()
    first = compiled(*batch())
    before = {name: value.clone() for name, value in first.grad_batch.items()}
    second = compiled(*batch(seed=2))
    assert addresses(first, "grad_batch")["0.weight"] != addresses(second, "grad_batch")["0.weight"]
    close(first.grad_batch, before)


def test_small_fields_of_the_earlier_result_stay() -> None:
    compiled = compiled_mlp(BatchGrad(), BatchL2Grad())
    first = compiled(*batch())
    kept = {field: {n: v.clone() for n, v in getattr(first, field).items()} for field in ("grad", "batch_l2")}
    loss = first.loss.clone()
    compiled(*batch(seed=2), out=first)
    close(first.grad, kept["grad"])
    close(first.batch_l2, kept["batch_l2"])
    assert first.loss == loss


def test_an_epoch_with_a_smaller_last_batch() -> None:
    compiled = compiled_mlp()
    result, places, programs = None, set(), len(compiled.recompiles)
    for seed, n in enumerate([N, N, N // 2 + 1, N, 2]):
        x, y = batch(n, seed)
        result = compiled(x, y, out=result)
        places.add(addresses(result, "grad_batch")["0.weight"])
        close(result.grad_batch, individual_gradients(compiled.model, x, y))
    assert len(places) == 1 and len(compiled.recompiles) == programs


def test_one_sample_in_the_memory_of_more() -> None:
    compiled = compiled_mlp()
    result = compiled(*batch(1), out=compiled(*batch()))
    close(result.grad_batch, individual_gradients(compiled.model, *batch(1)))


def test_two_results_take_turns() -> None:
    """Memory goes where it is asked to go, not where the last call wrote."""
    compiled = compiled_mlp()
    one, other = compiled(*batch(seed=1)), compiled(*batch(seed=2))
    at = addresses(one, "grad_batch")["0.weight"], addresses(other, "grad_batch")["0.weight"]
    one = compiled(*batch(seed=3), out=one)
    other = compiled(*batch(seed=4), out=other)
    assert (addresses(one, "grad_batch")["0.weight"], addresses(other, "grad_batch")["0.weight"]) == at
    close(one.grad_batch, individual_gradients(compiled.model, *batch(seed=3)))
    close(other.grad_batch, individual_gradients(compiled.model, *batch(seed=4)))


def test_nothing_large_is_allocated() -> None:
    compiled = compiled_mlp()
    first = compiled(*batch())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        second = compiled(*batch(seed=2), out=first)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < second.grad_batch["0.weight"].nbytes // 2


# ---- refusals ------------------------------


def refused(words: str, compiled: fxcurv.api.Compiled, out: Any, x: Tensor, y: Tensor, **options: Any) -> None:
    with pytest.raises(ArgumentError, match=words):
        compiled(x, y, out=out, **options)


def test_what_is_no_result() -> None:
    refused("out= is a dict: pass a result", compiled_mlp(), {}, *batch())


def test_another_program() -> None:
    compiled, other = compiled_mlp(), compiled_mlp(BatchDiagGGNExact())
    refused("out= is a result of another program", other, compiled(*batch()), *batch())


def test_a_larger_batch() -> None:
    compiled = compiled_mlp()
    first = compiled(*batch())
    have = first.grad_batch["0.weight"].untyped_storage().nbytes() // 8  # an earlier batch may have been larger
    n = have // WIDTH**2 + 1
    words = rf"grad_batch\['0.weight'\].*for {have} numbers, and a batch of {n} needs {n * WIDTH**2}"
    refused(words, compiled, first, *batch(n))
    close(first.grad_batch, individual_gradients(compiled.model, *batch()))
    second = compiled(*batch(seed=2), out=first)  # it may still be written to
    assert addresses(second, "grad_batch")["0.weight"] == addresses(first, "grad_batch")["0.weight"]


def test_a_field_that_was_replaced() -> None:
    compiled = compiled_mlp()
    first = compiled(*batch())
    first.grad_batch["0.weight"] = first.grad_batch["0.weight"].clone()
    refused(r"grad_batch\['0.weight'\] of the result has been replaced", compiled, first, *batch())
    second = compiled(*batch())
    del second.grad_batch["0.weight"]
    refused(r"grad_batch\['0.weight'\] of the result has been replaced", compiled, second, *batch())


def test_an_input_that_lies_there() -> None:
    compiled = compiled_mlp()
    first = compiled(*batch())
    x = first.grad_batch["0.weight"].flatten()[: N * WIDTH].view(N, WIDTH)
    refused(r"lies in the memory of grad_batch\['0.weight'\]: clone it", compiled, first, x, batch()[1])


@pytest.mark.parametrize(
    "made",
    [copy.deepcopy, lambda result: pytree.tree_map(torch.clone, result)],
    ids=["copied", "mapped"],
)
def test_copies(made: Any) -> None:
    compiled = compiled_mlp()
    refused("without memory of its own", compiled, made(compiled(*batch())), *batch())


def test_a_result_serves_once() -> None:
    compiled = compiled_mlp()
    first = compiled(*batch())
    compiled(*batch(), out=first)
    refused("one that was out= before", compiled, first, *batch())


def test_create_graph_and_backends() -> None:
    compiled = compiled_mlp()
    first = compiled(*batch())
    refused("out= with create_graph=True", compiled, first, *batch(), create_graph=True)
    refused("without memory of its own", compiled, compiled(*batch(), create_graph=True), *batch())
    other = compiled_mlp(backend="aot_eager")
    refused("out= with backend='aot_eager'", other, first, *batch())


def test_inside_a_compiled_step() -> None:
    compiled = compiled_mlp()
    first = compiled(*batch())
    step = torch.compile(lambda x, y: compiled(x, y, out=first).loss, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="out= inside torch.compile"):
        step(*batch())


# ---- where no memory is read ------------------------------


def test_a_backend_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("memory that the compiled graph does not write to")

    monkeypatch.setattr(Storage, "_view", never)
    compiled = compiled_mlp(DiagGGNExact(), BatchGrad(), backend="aot_eager")
    assert compiled.lower(*batch()).buffers
    close(compiled(*batch()).grad_batch, individual_gradients(compiled.model, *batch()))


def test_checks_compute_no_results() -> None:
    """The conditions on values are computed without what a call writes to memory, and without the memory."""

    class Cubes(nn.Module):
        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return ((f - 10) ** 3).mean() * -1

    compiled = fxcurv.compile(mlp(), Cubes(), [DiagGGNExact(), BatchGrad()])
    x, y = batch()
    program = compiled.lower(x, y)
    nodes = list(program.check_module.graph.nodes)
    assert program.buffers and all(not n.name.startswith("memory") for n in nodes)
    assert all("out" not in n.kwargs for n in nodes)
    close(compiled(x, y).grad, individual_sum(compiled, x, y))


def individual_sum(compiled: fxcurv.api.Compiled, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    params = dict(compiled.model.named_parameters())
    return dict(
        zip(params, torch.autograd.grad(compiled.loss(compiled.model(x), y), list(params.values())), strict=True)
    )
