"""Every check of an argument that no other test reaches: the error's class, and that it says what was given and what to give.

Few of them compile anything: an argument is refused before that.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxcurv
import fxcurv.backpack
from fxcurv.errors import ArgumentError, ExtensionError, InternalError
from fxcurv.extensions import (
    GGNMP,
    KFAC,
    BatchGrad,
    ClippedGrad,
    DiagGGNMC,
    Dots,
    EighGGN,
    GramGGN,
    Projected,
    SumGradSquared,
)
from fxcurv.passes.verify import verify
from fxcurv.rules import REWRITES


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


X, Y = torch.zeros(6, 4), torch.zeros(6, dtype=torch.long)


def call(*args: Any, extensions: Any = (), options: Any = None, **kwargs: Any) -> Callable[[], Any]:
    return lambda: fxcurv.compile(model(), nn.CrossEntropyLoss(), extensions, **(options or {}))(*args, **kwargs)


def ask(*extensions: Any, **options: Any) -> Callable[[], Any]:
    return lambda: fxcurv.compile(model(), nn.CrossEntropyLoss(), extensions, **options)


def stacks(*sizes: int) -> dict[str, torch.Tensor]:
    return {f"{2 * k}.bias": torch.zeros(e, (5, 3)[k]) for k, e in enumerate(sizes)}


def unhashable() -> Any:
    class Odd:
        __slots__ = ()
        __hash__ = None  # type: ignore[assignment]

    return Odd()


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "sample=": (ask(sample="row"), ArgumentError, "sample='row': use 'sequence' or 'token'"),
    "check= of the drop-in": (lambda: fxcurv.backpack.backpack(check="always"), ArgumentError, "pass 'first' or None"),
    "extend": (lambda: fxcurv.backpack.extend(torch.tanh), ArgumentError, "extend takes an nn.Module, not a "),
    "out= of a stack": (
        call(X, Y, params=stacks(2), out=fxcurv.Result({}, (), None)), ArgumentError, "out= with stacks in params="
    ),
    "stacks of several lengths": (call(X, Y, params=stacks(2, 3)), ArgumentError, "pass stacks of one length"),
    "an empty stack": (call(X, Y, params=stacks(0)), ArgumentError, "at least 1"),
    "products of a stack": (call(X, Y, params=stacks(2), extensions=[GGNMP()]), ArgumentError, "GGNMP with stacks in params="),
    "batch_dim of another name": (call({"input": X}, Y, options={"batch_dim": {"x": 0}}), ArgumentError, "batch_dim names ['x']"),
    "batch_dim by name": (call(X, Y, options={"batch_dim": {"x": 0}}), ArgumentError, "batch_dim names ['x']"),
    "batch_dim of too many": (call(X, Y, options={"batch_dim": (0, 1)}), ArgumentError, "batch_dim has 2 entries for 1 inputs"),
    "a number as input": (call(torch.zeros(()), Y), ArgumentError, "an input has no dimensions"),
    "complex input": (call(X.to(torch.complex64), Y), ArgumentError, "complex tensors are not supported"),
    "an input that no tensor is": (call((X, unhashable()), Y), ArgumentError, "the inputs hold a Odd: pass tensors"),
    "dynamic_shapes of another name": (
        call({"input": X}, Y, options={"dynamic_shapes": {"x": {1}}}), ArgumentError, "dynamic_shapes names ['x']"
    ),
    "seed and generator": (
        call(X, Y, extensions=[DiagGGNMC()], seed=1, generator=torch.Generator()), ArgumentError, "seed= and generator= were both"
    ),
    "KFAC of another fisher": (lambda: ask(KFAC(fisher="exact"))(), ExtensionError, "KFAC(fisher='exact'): use one of "),
    "draws": (lambda: ask(DiagGGNMC(mc_samples=0))(), ExtensionError, "DiagGGNMC(mc_samples=0): use a positive integer"),
    "draws of KFAC": (lambda: ask(KFAC(mc_samples=-1))(), ExtensionError, "KFAC(mc_samples=-1): use a positive integer"),
    "draws of a Gram matrix": (lambda: ask(GramGGN(mc_samples=1.5))(), ExtensionError, "use a positive integer, or None"),
    "top": (lambda: ask(EighGGN(top=0))(), ExtensionError, "EighGGN(top=0): use a positive integer"),
    "over": (lambda: ask(ClippedGrad(1.0, over="layer"))(), ExtensionError, "use 'all' or 'param'"),
    "max_norm": (lambda: ask(ClippedGrad(-1.0))(), ExtensionError, "ClippedGrad(max_norm=-1.0): use a positive number"),
    "dim": (lambda: ask(Projected(dim=0))(), ExtensionError, "Projected(dim=0): use a positive integer"),
    "seed of a projection": (lambda: ask(Projected(dim=2, seed=0.5))(), ExtensionError, "Projected(seed=0.5): use an integer"),
    "no name": (lambda: ask(BatchGrad(savefield="a b"))(), ExtensionError, "which is no name"),
    "a tensor's name": (lambda: ask(BatchGrad(savefield="shape"))(), ExtensionError, "which every tensor has"),
    "one name twice": (
        lambda: ask(BatchGrad(savefield="g"), SumGradSquared(savefield="g"))(), ExtensionError, "both save to 'g'"
    ),
    "lazy": (
        lambda: fxcurv.compile(nn.LazyLinear(2), nn.MSELoss()), ArgumentError, "is not initialised: run the model once"
    ),
    "a rule twice": (
        lambda: fxcurv.register(torch.ops.aten.tanh.default, rule=None)(object()), ValueError, "has a rule already: pass compile("
    ),
    "a rewrite twice": (
        lambda: fxcurv.rewrite(next(iter(REWRITES)))(torch.abs),
        ValueError, "has a rewrite already",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str) -> None:
    run, kind, words = CASES[name]
    with pytest.raises(kind, match=re.escape(words)):
        run()


def test_of_a_result_and_its_products() -> None:
    """What is refused after one call."""
    compiled = fxcurv.compile(model(), nn.CrossEntropyLoss(), [GGNMP(), DiagGGNMC()])
    result = compiled(X, Y)
    block, operator = result.ggnmp["2.bias"], result.ggn
    vectors = {name: torch.zeros_like(p) for name, p in compiled.model.named_parameters()}
    with pytest.raises(ArgumentError, match=r"'2.bias' is torch.float32 on cpu, the vectors are torch.float64 on cpu"):
        block(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ArgumentError, match=r"the vectors of '2.bias' are a list: pass a tensor"):
        block([0.0] * 3)
    with pytest.raises(ArgumentError, match=r"'2.bias' is \[3\], its vector \[1, 3\]"):
        operator @ {**vectors, "2.bias": torch.zeros(1, 3)}
    with pytest.raises(ValueError, match=r"draw writes .svg files, not graph.png"):
        compiled.lower(X, Y).draw("graph.png")
    with pytest.raises(ArgumentError, match=r"a copied result knows no model: pass one, result.attach\(model\)"):
        copy.deepcopy(result).attach()


def test_vectors_of_dots() -> None:
    wrong = {name: torch.zeros(2, *p.shape[1:]) for name, p in model().named_parameters()}
    with pytest.raises(ExtensionError, match=r"Dots: the vectors of '0.weight' are \[2, 4\]: pass \[Q, 5, 4\]"):
        fxcurv.compile(model(), nn.CrossEntropyLoss(), [Dots(wrong)])(X, Y)


def test_a_malformed_program() -> None:
    """What `debug=True` finds between passes."""

    def program() -> Any:
        compiled = fxcurv.compile(model(), nn.CrossEntropyLoss(), [SumGradSquared()])
        return compiled.lower(X, Y, after="extract").program

    found = program()
    node = next(n for n in found.graph.nodes if n.op == "call_function" and n.users)
    kept = node.meta.pop("val")
    with pytest.raises(InternalError, match="after here: .* has no value"):
        verify(found, "here")
    node.meta["val"] = torch.zeros(2)
    with pytest.raises(InternalError, match="after here: .* holds a real tensor"):
        verify(found, "here")
    node.meta["val"] = kept
    removed = found.results["sum_grad_squared"].pop("0.bias")
    with pytest.raises(InternalError, match="sum_grad_squared covers .*, not every parameter"):
        verify(found, "here")
    found.results["sum_grad_squared"]["0.bias"] = removed
    verify(found, "here")
    with found.graph.inserting_after(node):
        write = found.graph.call_function(torch.ops.aten.add_.Scalar, (node, 1.0))
    write.meta["val"] = kept
    with pytest.raises(InternalError, match="mutates its input"):
        verify(found, "here")
