"""`params=` of a call: other values than the module's, in the same program, and stacks of them."""

import pytest
import torch
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.errors import ArgumentError
from fxcurv.extensions import HMP, BatchGrad, DiagGGNExact, DiagGGNMC, Variance


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 4)
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def case():
    torch.manual_seed(0)
    return Tied().double(), torch.randn(5, 3).double(), torch.randint(4, (5,))


def other(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}


def test_other_values_in_the_same_program():
    model, x, y = case()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad(), DiagGGNExact()])
    values = other(model)
    found, own = compiled(x, y, params=values), compiled(x, y)
    none = compiled(x[:0], y[:0], params={"b.bias": values["b.bias"]})
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert len(vars(compiled._programs.named)) == 1 and none.grad_batch["b.bias"].shape == (0, 3)
    oracle = Oracle(model, nn.CrossEntropyLoss(), x, y, kind="ce")
    torch.testing.assert_close(own.grad, oracle.grad())
    moved, _, _ = case()
    moved.load_state_dict(values, strict=False)
    oracle = Oracle(moved, nn.CrossEntropyLoss(), x, y, kind="ce")
    torch.testing.assert_close(found.loss, oracle.loss())
    for field in ("grad", "grad_batch", "diag_ggn_exact"):
        torch.testing.assert_close(getattr(found, field), getattr(oracle, field)())
    some = compiled(x, y, params={"c.weight": values["a.weight"]})  # a tied parameter, by its other name
    assert torch.equal(some.loss, compiled(x, y, params={"a.weight": values["a.weight"]}).loss)


def test_stacks_and_derivatives():
    model, x, y = case()
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [Variance(), DiagGGNMC()], check=None)
    values = [other(model, k) for k in range(3)]
    stacked = {n: torch.stack([v[n] for v in values]) for n in ("a.weight", "b.bias")}
    found = compiled(x, y, seed=4, params={**stacked, "b.weight": values[0]["b.weight"]})
    assert found.loss.shape == (3,) and found.output.shape == (3, 5, 4)
    for k, v in enumerate(values):
        one = compiled(x, y, seed=4, params={**{n: v[n] for n in stacked}, "b.weight": values[0]["b.weight"]})
        for field in ("grad", "variance", "diag_ggn_mc"):
            torch.testing.assert_close({n: t[k] for n, t in getattr(found, field).items()}, getattr(one, field))
    w = values[0]["b.weight"].requires_grad_()
    result = compiled(x, y, seed=4, params={"b.weight": w}, create_graph=True)
    (slope,) = torch.autograd.grad(result.loss, w)
    torch.testing.assert_close(slope, result.grad["b.weight"].detach())


@pytest.mark.parametrize("params, says", [
    ({"a.wieght": torch.zeros(4, 3)}, "no parameter: the model has a.weight"),
    ({"a.bias": torch.zeros(3).double()}, r"\[3\]: pass \[4\], or a stack \[E, 4\]"),
    ({"a.bias": torch.zeros(4)}, "torch.float32"),
    ({"a.bias": 1.0}, "is a float"),
    ([1], "params= is a list"),
    ({"a.bias": torch.zeros(2, 4).double(), "c.bias": torch.zeros(3, 4).double()}, "one length"),
    ({"a.weight": torch.zeros(4, 3).double(), "c.weight": torch.zeros(4, 3).double()}, "another name of the same"),
], ids=range(7))  # fmt: skip
def test_wrong_values_are_refused(params, says):
    model, x, y = case()
    with pytest.raises(ArgumentError, match=says):
        fxcurv.compile(model, nn.CrossEntropyLoss())(x, y, params=params)


@pytest.mark.slow
def test_products_are_of_one_model():
    model, x, y = case()
    with pytest.raises(ArgumentError, match="HMP with stacks"):
        fxcurv.compile(model, nn.CrossEntropyLoss(), [HMP()])(x, y, params={"a.bias": torch.zeros(2, 4).double()})


@pytest.mark.slow
def test_other_values_inside_a_compiled_step():
    model, x, y = case()
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [Variance()], check=None)
    step = torch.compile(
        lambda w: compiled(x, y, params={"b.weight": w}).variance["b.bias"], fullgraph=True, backend="eager"
    )
    for seed in (1, 2):
        w = other(model, seed)["b.weight"]
        torch.testing.assert_close(step(w), compiled(x, y, params={"b.weight": w}).variance["b.bias"])
