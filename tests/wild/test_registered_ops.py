"""Ops of other libraries compute by the derivative that was registered for them, or are refused by name.

The oracle is plain autograd, which runs the same ops.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_oracle import compare, compare_quantities
from oracle import Oracle
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import CustomFunctionError, UnsupportedOpError
from fxcurv.extensions import (
    GGNMP,
    HMP,
    KFAC,
    BatchGrad,
    ClippedGrad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
)

LIBRARY = torch.library.Library("fxcurv_elsewhere", "FRAGMENT")
FIRST = [BatchGrad(), SumGradSquared()]
GGN = [DiagGGNExact(), SqrtGGNExact(), GGNMP()]
ONCE = [*FIRST, *GGN]
WITHOUT_PRODUCTS = [*FIRST, DiagGGNExact(), SqrtGGNExact()]
TWICE = [*ONCE, DiagHessian(), HMP()]

strength = 1.0


def op(name: str, backward=None, setup=None, fake=None):
    """Decorator: a `custom_op` with a derivative of its own."""

    def add(fn):
        made = torch.library.custom_op(f"fxcurv_elsewhere::{name}", mutates_args=())(fn)
        made.register_fake(fake or (lambda x, *args, **kwargs: torch.empty_like(x)))
        if backward is not None:
            made.register_autograd(backward, setup_context=setup)
        return made

    return add


def keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*[t for t in inputs if isinstance(t, Tensor)])


def keep_output(ctx, inputs, output):
    ctx.save_for_backward(output)


def _gated_back(ctx, g):
    x, w = ctx.saved_tensors
    gate = torch.sigmoid(w)
    return g * gate * (1 - x.tanh() ** 2), (g * x.tanh() * gate * (1 - gate)).sum(0)


@op("gated", _gated_back, keep_inputs, lambda x, w: torch.empty_like(x))
def gated(x: Tensor, w: Tensor) -> Tensor:
    return x.tanh() * torch.sigmoid(w)


@op(
    "soft",
    lambda ctx, g: (ctx.saved_tensors[0] * g).sub(ctx.saved_tensors[0] * (ctx.saved_tensors[0] * g).sum(-1, True)),
    keep_output,
)
def soft(x: Tensor) -> Tensor:
    return x.softmax(-1)


def _keep_scale(ctx, inputs, keyword_only_inputs, output):
    ctx.scale = keyword_only_inputs["scale"]
    ctx.save_for_backward(inputs[0])
    ctx.asked = ctx.needs_input_grad


def _scaled_back(ctx, g):
    assert ctx.asked == (True, False)
    return g * ctx.scale * ctx.saved_tensors[0].cos(), None


@op("scaled", _scaled_back, _keep_scale)
def scaled(x: Tensor, power: int = 1, *, scale: float = 2.0) -> Tensor:
    return x.sin() * scale


def _halves_fake(x, sizes):
    return [x.new_empty(x.shape[0], s) for s in sizes]


@op("halves", lambda ctx, gs: (torch.cat(gs, 1) * 3, None), None, _halves_fake)
def halves(x: Tensor, sizes: list[int]) -> list[Tensor]:
    return [t.clone() * 3 for t in x.split(sizes, 1)]


def _joined_back(ctx, g):
    return list(g.split([t.shape[1] for t in ctx.saved_tensors], 1)), None


@op("joined", _joined_back, lambda ctx, inputs, output: ctx.save_for_backward(*inputs[0]),
    lambda xs, bias: xs[0].new_empty(xs[0].shape[0], sum(x.shape[1] for x in xs)))  # fmt: skip
def joined(xs: list[Tensor], bias: Tensor | None) -> Tensor:
    return torch.cat(xs, 1)


def _largest_back(ctx, g, _):
    (at,) = ctx.saved_tensors
    return g.new_zeros(at.shape[0], ctx.width).scatter(1, at.unsqueeze(1), g.unsqueeze(1))


def _keep_places(ctx, inputs, output):
    ctx.width = inputs[0].shape[1]
    ctx.save_for_backward(output[1])


@op(
    "largest",
    _largest_back,
    _keep_places,
    lambda x: (x.new_empty(x.shape[0]), x.new_empty(x.shape[0], dtype=torch.long)),
)
def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    values, at = x.max(1)
    return values.clone(), at.clone()


@op("cube_back")
def cube_back(x: Tensor, g: Tensor) -> Tensor:
    return 3 * x**2 * g


@op("cube", lambda ctx, g: cube_back(ctx.saved_tensors[0], g), keep_inputs)
def cube(x: Tensor) -> Tensor:
    return x**3


@op("chosen_back")
def chosen_back(g: Tensor, at: Tensor) -> Tensor:
    return g.index_select(1, at)


def _keep_order(ctx, inputs, output):
    ctx.save_for_backward(inputs[1].argsort())


@op("chosen", lambda ctx, g: (chosen_back(g, ctx.saved_tensors[0]), None), _keep_order)
def chosen(x: Tensor, at: Tensor) -> Tensor:
    return x.index_select(1, at)


@op("kept", lambda ctx, g: g * ctx.saved_tensors[0], lambda ctx, inputs, output: ctx.save_for_backward(inputs[0].cos()))
def kept(x: Tensor) -> Tensor:
    return x.sin()


@op("reversed", lambda ctx, g: -strength * g)
def reversal(x: Tensor) -> Tensor:
    return x.clone()


@op("constant")
def constant(x: Tensor) -> Tensor:
    return x.round()


LIBRARY.define("by_name(Tensor x) -> Tensor")
LIBRARY.impl("by_name", lambda x: x.exp(), "CPU")
torch.library.register_fake("fxcurv_elsewhere::by_name", torch.empty_like, lib=LIBRARY)
torch.library.register_autograd(
    "fxcurv_elsewhere::by_name", lambda ctx, g: g * ctx.saved_tensors[0], setup_context=keep_output, lib=LIBRARY
)
LIBRARY.define("without(Tensor x) -> Tensor")
LIBRARY.impl("without", lambda x: x.exp(), "CPU")
torch.library.register_fake("fxcurv_elsewhere::without", torch.empty_like, lib=LIBRARY)
elsewhere = torch.ops.fxcurv_elsewhere


class Derivative(nn.Module):
    """The model takes the op's derivative itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last, self.scale = nn.Linear(3, 4), nn.Linear(4, 3), nn.Parameter(torch.rand(4))
        self.double()

    def forward(self, x):
        h = self.first(x)
        (g,) = torch.autograd.grad(gated(h, self.scale).sum(), h, create_graph=True)
        return self.last(g)


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last, self.scale = nn.Linear(3, 4), nn.Linear(4, 3), nn.Parameter(torch.rand(4))
        self.middle = middle
        self.double()

    def forward(self, x):
        return self.last(self.middle(self, self.first(x)))


def parts(net, h):
    one, two = halves(h, [1, 3])
    return torch.cat([one.tanh(), two.sigmoid()], 1)


def picked(net, h):
    value, at = largest(h)
    return h.tanh() * value.unsqueeze(1) + at.unsqueeze(1) * net.scale


MODELS = {
    "activation and parameter": (lambda net, h: gated(h, net.scale), TWICE),
    "parameter alone": (lambda net, h: h.tanh() * soft(net.scale), TWICE),
    "keeps its output": (lambda net, h: soft(h), TWICE),
    "a number by keyword": (lambda net, h: scaled(h, scale=0.7), TWICE),
    "returns a list": (parts, TWICE),
    "takes a list": (lambda net, h: joined([h[:, :3].tanh(), h[:, 1:2]], None), TWICE),
    "integers too": (picked, TWICE),
    "a backward that is an op": (lambda net, h: cube(h.tanh()), WITHOUT_PRODUCTS),
    "a backward without a name": (lambda net, h: elsewhere.by_name(h.tanh()), ONCE),
    "merged axes": (lambda net, h: soft(h.reshape(-1, 2)).reshape(-1, 4), TWICE),
}
QUICK = ("activation and parameter", "returns a list", "a backward without a name")


def data(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, dtype=torch.float64, generator=generator), torch.randint(0, 3, (n,), generator=generator)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_quantities(name):
    middle, extensions = MODELS[name]
    model = Net(middle)
    compiled = fxcurv.compile(model, F.cross_entropy, extensions)
    for n in (5, 3, 1):
        x, y = data(n)
        result, oracle = compiled(x, y), Oracle(model, F.cross_entropy, x, y, kind="ce")
        compare_quantities(result, oracle, extensions, n)
    assert len(compiled.recompiles) <= 2


@pytest.mark.parametrize(
    "middle, reason",
    [
        (
            lambda net, h: cube(h.tanh()),
            "op fxcurv_elsewhere.cube.default calls op fxcurv_elsewhere.cube_back.default in its",
        ),
        (
            lambda net, h: elsewhere.by_name(h),
            "by_name.default has a derivative that PyTorch knows by no name",
        ),
        (lambda net, h: kept(h), "kept.default keeps values of its forward that are neither inputs nor outputs"),
    ],
)
def test_no_second_derivative(middle, reason):
    """PyTorch would take zero for it, or raise."""
    with pytest.raises(CustomFunctionError) as caught:
        fxcurv.compile(Net(middle), F.cross_entropy, [DiagHessian()])(*data())
    assert (
        reason in str(caught.value) and "Way out" in str(caught.value) and "test_registered_ops.py" in str(caught.value)
    )


@pytest.mark.parametrize("middle", [lambda net, h: elsewhere.without(h), lambda net, h: constant(h)])
def test_without_a_derivative(middle):
    """Function transforms take zero for it."""
    with pytest.raises(UnsupportedOpError, match="its library registered no derivative for it"):
        fxcurv.compile(Net(middle), F.cross_entropy, [BatchGrad()])(*data())
    model, (x, y) = Net(lambda net, h: h * middle(net, h.detach())), data()
    compare(fxcurv.compile(model, F.cross_entropy)(x, y).grad, Oracle(model, F.cross_entropy, x, y).grad())


def test_a_kernel_of_another_library_gets_no_indices_that_are_made_up():
    """It may not check them; so what is behind it has a gradient, and nothing that needs to know more."""
    order = torch.tensor([2, 0, 3, 1])
    model, (x, y) = Net(lambda net, h: chosen(h, order).tanh()), data()
    compare(fxcurv.compile(model, F.cross_entropy)(x, y).grad, Oracle(model, F.cross_entropy, x, y).grad())
    with pytest.raises(
        CustomFunctionError, match="chosen_back.default, which reads integers: on made-up ones it is not tried"
    ):
        fxcurv.compile(model, F.cross_entropy, [DiagGGNExact()])(x, y)


def test_values_that_a_backward_reads_count_at_every_call(monkeypatch):
    model, (x, y) = Net(lambda net, h: reversal(h).tanh()), data()
    compiled = fxcurv.compile(model, F.cross_entropy, [BatchGrad()])
    for value in (1.0, 0.25):
        monkeypatch.setitem(globals(), "strength", value)
        compare(compiled(x, y).grad_batch, Oracle(model, F.cross_entropy, x, y).grad_batch())


def test_samples_that_meet_in_the_backward():
    """A backward that mixes samples has no individual gradients, though its forward keeps samples apart."""

    @op("mean_back", lambda ctx, g: g.mean(0, keepdim=True).expand_as(g))
    def mean_back(x: Tensor) -> Tensor:
        return x.clone()

    model, (x, y) = Net(lambda net, h: mean_back(h).tanh()), data()
    with pytest.raises(fxcurv.errors.MixedSamplesError, match="mean_back"):
        fxcurv.compile(model, F.cross_entropy, [BatchGrad()])(x, y)
    compare(fxcurv.compile(model, F.cross_entropy)(x, y).grad, Oracle(model, F.cross_entropy, x, y).grad())


def test_a_derivative_inside_of_the_model():
    model, (x, y) = Derivative(), data()
    result, oracle = fxcurv.compile(model, F.cross_entropy, FIRST)(x, y), Oracle(model, F.cross_entropy, x, y)
    compare(result.grad, oracle.grad())
    compare(result.grad_batch, oracle.grad_batch())


def test_create_graph():
    """The op stays in the program, with its derivative."""
    model, (x, y) = Net(lambda net, h: gated(h, net.scale)), data()
    result = fxcurv.compile(model, F.cross_entropy, [BatchGrad()])(x, y, create_graph=True)
    params = dict(model.named_parameters())
    found = torch.autograd.grad(sum(g.square().sum() for g in result.grad.values()), list(params.values()))
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(params.values()), create_graph=True)
    wanted = torch.autograd.grad(sum(g.square().sum() for g in grads), list(params.values()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_rule_of_the_user_comes_first():
    model, (x, y) = Net(lambda net, h: kept(h)), data()
    rule = fxcurv.Pointwise(d1=lambda x, y: x.cos(), d2=lambda x, y: -x.sin())
    asked = [DiagHessian(), KFAC(), ClippedGrad(0.1)]
    result = fxcurv.compile(model, F.cross_entropy, asked, rules={elsewhere.kept.default: rule})(x, y)
    compare(result.diag_h, Oracle(Net(lambda net, h: h.sin()), F.cross_entropy, x, y, kind="ce").diag_h())
