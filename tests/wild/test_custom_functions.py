"""Custom autograd functions compute by their own backward, however `apply` is reached, or are refused by name.

The oracle is plain autograd, which runs the functions themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from against_oracle import compare, compare_quantities
from oracle import Oracle
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import fxcurv
from fxcurv.errors import CustomFunctionError, MixedSamplesError
from fxcurv.extensions import (
    GGNMP,
    HMP,
    KFAC,
    BatchDiagGGNExact,
    BatchGrad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
)

N, SEED = 5, 3
FIRST = [BatchGrad(), SumGradSquared()]
GGN = [DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact(), GGNMP()]
HESSIAN = [DiagHessian(), HMP()]


# ---- functions ------------------------------


class Round(Function):
    """Straight-through, with a switch that is no tensor, and gradients off by hand."""

    @staticmethod
    def forward(ctx, x, steps):
        with torch.no_grad():
            return torch.round(x * steps) / steps

    @staticmethod
    def backward(ctx, g):
        return g, None


class Sign(Function):
    """Straight-through inside of [-1, 1]: a mask of its input is kept."""

    @staticmethod
    def forward(ctx, x):
        ctx.inside = x.abs() <= 1
        return torch.sign(x)

    @staticmethod
    def backward(ctx, g):
        return torch.where(ctx.inside, g, torch.zeros_like(g))


class Reverse(Function):
    """Gradient reversal: its forward returns a view of its input."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g.neg() * ctx.scale, None


class Exp(Function):
    """`setup_context`; keeps its output."""

    @staticmethod
    def forward(x):
        return torch.exp(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y


class Swish(Function):
    """Keeps its input; writes in place to values of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        y = x.clone()
        return y.mul_(torch.sigmoid(x))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        out = g * s
        return out.mul_(1 + x * (1 - s))


class Affine(Function):
    """As in PyTorch's documentation: parameters are arguments, and what is not needed is not computed."""

    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.save_for_backward(x, weight, bias)
        out = x.mm(weight.t())
        if bias is not None:
            out += bias.unsqueeze(0).expand_as(out)
        return out

    @staticmethod
    def backward(ctx, g):
        x, weight, bias = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = g.mm(weight)
        if ctx.needs_input_grad[1]:
            of_weight = g.t().mm(x)
        if bias is not None and ctx.needs_input_grad[2]:
            of_bias = g.sum(0)
        return of_x, of_weight, of_bias


class MeanGrad(Function):
    """A parameter's gradient that is divided by the batch size that the backward sees."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g * weight, (g * x).mean(0)


class Split(Function):
    """Several outputs: numbers, a mask of them that carries no gradient, indices, and a plain number."""

    @staticmethod
    def forward(ctx, x):
        top, index = x.max(-1, keepdim=True)
        mask = (x == top).to(x.dtype)
        ctx.mark_non_differentiable(mask, index)
        ctx.save_for_backward(mask)
        return x * mask, x.sum(-1, keepdim=True), mask, index, 2.0

    @staticmethod
    def backward(ctx, g, of_sum, *rest):
        (mask,) = ctx.saved_tensors
        return g * mask + of_sum


class Sparsemax(Function):
    """Sorts and cumulates along its classes; `once_differentiable`."""

    @staticmethod
    def forward(ctx, z):
        ordered, _ = z.sort(-1, descending=True)
        ranks = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
        above = 1 + ranks * ordered > ordered.cumsum(-1)
        k = above.sum(-1, keepdim=True)
        tau = ((ordered * above).sum(-1, keepdim=True) - 1) / k
        y = (z - tau).clamp(min=0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        support = (y > 0).to(g.dtype)
        v = (g * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        return support * (g - v)


class SparsemaxInPlace(Sparsemax):
    """Shifts its input in place, as TabNet's does: nothing else reads it."""

    @staticmethod
    def forward(ctx, x):
        x -= x.amax(-1, keepdim=True)
        return Sparsemax.forward(ctx, x)


class Clip(Function):
    """The identity, whose backward clips every entry."""

    @staticmethod
    def forward(ctx, x, most):
        ctx.most = most
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-ctx.most, ctx.most), None


class ClipNorm(Function):
    """The identity, whose backward clips the norm of the whole batch's gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g * (0.01 / g.norm()).clamp(max=1)


class CrossEntropy(Function):
    """A fused loss: its forward computes the gradient already."""

    @staticmethod
    def forward(ctx, z, target):
        p = torch.softmax(z, -1)
        ctx.save_for_backward((p - F.one_hot(target, z.shape[-1])) / len(z))
        return F.nll_loss(torch.log(p), target)

    @staticmethod
    def backward(ctx, g):
        (of_z,) = ctx.saved_tensors
        return g * of_z, None


class CrossEntropyTwice(CrossEntropy):
    """The same, with a backward that can be differentiated again: it keeps its input."""

    @staticmethod
    def forward(ctx, z, target):
        ctx.save_for_backward(z, target)
        return F.cross_entropy(z, target)

    @staticmethod
    def backward(ctx, g):
        z, target = ctx.saved_tensors
        return g * (torch.softmax(z, -1) - F.one_hot(target, z.shape[-1])) / len(z), None


class Centre(Function):
    """Its forward mixes samples."""

    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, g):
        return g


class RoundedCentre(Centre):
    """Its forward mixes samples behind an op that has no derivative; apply, backward are inherited."""

    @staticmethod
    def forward(ctx, x):
        return x - torch.round(x).mean(0)


class MixedBackward(Function):
    """Its backward alone mixes samples."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(0)


class Neighbours(Function):
    """Messages between samples, by indices."""

    @staticmethod
    def forward(ctx, x, source, target):
        ctx.save_for_backward(source, target)
        return x.index_add(0, target, x[source])

    @staticmethod
    def backward(ctx, g):
        source, target = ctx.saved_tensors
        return g.index_add(0, source, g[target]), None, None


class WithGrad(Function):
    """Computes its backward by autograd, as home-made checkpointing does."""

    @staticmethod
    def forward(ctx, x, fn):
        ctx.fn = fn
        ctx.save_for_backward(x)
        return fn(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.fn(x)
        return torch.autograd.grad(y, x, g)[0], None


# ---- models ------------------------------


class Net(nn.Module):
    """Two linear layers with `middle(self, h)` between."""

    def __init__(self, middle: Callable, width: int = 4):
        super().__init__()
        torch.manual_seed(SEED)
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 3)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.middle = middle
        self.double()

    def forward(self, x):
        return self.last(self.middle(self, self.first(x)))


class Kept(nn.Module):
    """Keeps a bound `apply`, as PyTorch's documentation writes it, in a module of its own."""

    def __init__(self, function):
        super().__init__()
        self.function = function.apply

    def forward(self, x):
        return self.function(x, 4)


def nested() -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(
        nn.Linear(3, 4), nn.Sequential(Kept(Round), nn.Tanh()), nn.Linear(4, 4), Kept(Round), nn.Linear(4, 3)
    ).double()


def made_inside(net, h):
    """A function that is made in forward, as surrogate gradients are."""

    class Surrogate(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x > 0).to(x.dtype)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g / (1 + (math.pi * x) ** 2)

    return Surrogate.apply(h) * h


bound = Round.apply


def parts(net, h):
    a, b, mask, index, number = Split.apply(h)
    return torch.tanh(a) * number + b * mask.cos() + index


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(N, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (N,), generator=generator)


TWICE = [*FIRST, *GGN, *HESSIAN]
ONCE = [*FIRST, *GGN]

MODELS: dict[str, tuple[Callable[[], nn.Module], list]] = {
    "straight-through": (lambda: Net(lambda net, h: Round.apply(h, 4).tanh()), TWICE),
    "bound by a module": (nested, TWICE),
    "bound by a global": (lambda: Net(lambda net, h: bound(torch.tanh(h), 8)), TWICE),
    "mask of the input": (lambda: Net(lambda net, h: Sign.apply(h) * h.tanh()), TWICE),
    "reversal": (lambda: Net(lambda net, h: torch.tanh(h) + Reverse.apply(h, 0.3).sigmoid()), TWICE),
    "keeps its output": (lambda: Net(lambda net, h: Exp.apply(h * 0.5)), TWICE),
    "keeps its input": (lambda: Net(lambda net, h: Swish.apply(h)), TWICE),
    "parameters": (lambda: Net(lambda net, h: Affine.apply(h.tanh(), net.last.weight * 0.5, net.scale[:3])[:, [0, 1, 2, 0]]),
                   TWICE),
    "no bias": (lambda: Net(lambda net, h: Affine.apply(h.tanh(), net.first.weight.mm(net.first.weight.t()))), TWICE),
    "parameter alone": (lambda: Net(lambda net, h: h.tanh() * Exp.apply(net.scale)), TWICE),
    "several outputs": (lambda: Net(parts), TWICE),
    "once differentiable": (lambda: Net(lambda net, h: Sparsemax.apply(h) + h), ONCE),
    "writes to its input": (lambda: Net(lambda net, h: SparsemaxInPlace.apply(h * 2.0) + h), ONCE),
    "autograd in backward": (lambda: Net(lambda net, h: WithGrad.apply(h, torch.tanh)), ONCE),
    "made in forward": (lambda: Net(made_inside), TWICE),
    "twice": (lambda: Net(lambda net, h: Exp.apply(Exp.apply(h * 0.2) - Swish.apply(h))), TWICE),
    "merged axes": (lambda: Net(lambda net, h: Swish.apply(h.reshape(-1, 2)).reshape(-1, 4)), TWICE),
}  # fmt: skip
QUICK = ("bound by a module", "parameters", "several outputs")


def check(model: nn.Module, loss: Callable, extensions: list, kind: str | None = "ce") -> fxcurv.Result:
    x, y = data()
    result = fxcurv.compile(model, loss, extensions)(x, y)
    oracle = Oracle(model, loss, x, y, kind=kind)
    torch.testing.assert_close(result.loss, oracle.loss())
    compare_quantities(result, oracle, extensions, SEED)
    return result


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_quantities(name):
    """All of them, by the function's own backward and, where it has one, by that backward's derivative."""
    make, extensions = MODELS[name]
    check(make(), F.cross_entropy, extensions)


# ---- losses ------------------------------


def test_fused_loss():
    """A custom function that is the whole loss: first order by its backward, the rest by that backward's derivative."""
    check(Net(lambda net, h: h.tanh()), CrossEntropyTwice.apply, [*FIRST, DiagGGNExact(), *HESSIAN])


def test_fused_loss_that_keeps_its_gradient():
    """Its first order is right; PyTorch does not know its second derivative, and takes it for zero."""
    check(Net(lambda net, h: Round.apply(h, 4)), CrossEntropy.apply, FIRST)
    x, y = data()
    for extension in (DiagGGNExact(), DiagHessian(), GGNMP()):
        with pytest.raises(CustomFunctionError, match="'CrossEntropy' keeps values of its forward"):
            fxcurv.compile(Net(lambda net, h: h.tanh()), CrossEntropy.apply, [extension])(x, y)


# ---- backwards that are not linear ------------------------------


def clipping(most: float) -> Net:
    return Net(lambda net, h: Clip.apply(h, most).tanh() * Reverse.apply(h, 1.0) * net.scale)


def summed(f, y):
    return F.cross_entropy(f, y, reduction="sum") / N


def test_clipping_in_backward():
    """The gradient, and what is made of individual gradients: entry by entry, a clip keeps samples apart."""
    (x, y), model = data(), clipping(0.01)
    result = fxcurv.compile(model, summed, [BatchGrad(), ClippedGrad(0.1)])(x, y)
    params = list(model.parameters())
    total = torch.autograd.grad(summed(model(x), y), params)
    compare(result.grad, dict(zip(result.grad, total, strict=True)))
    each = [torch.autograd.grad(summed(model(x[k : k + 1]), y[k : k + 1]), params) for k in range(N)]
    compare(result.grad_batch, dict(zip(result.grad, map(torch.stack, zip(*each, strict=True)), strict=True)))


@pytest.mark.parametrize("extension", [DiagGGNExact(), DiagGGNMC(), DiagHessian(), HMP(), GGNMP(), KFAC()], ids=str)
def test_clipping_has_no_columns(extension):
    x, y = data()
    with pytest.raises(CustomFunctionError) as caught:
        fxcurv.compile(clipping(1e4), F.cross_entropy, [extension])(x, y)
    for words in ("'Clip'", "not linear", type(extension).__name__, __file__, "Way out"):
        assert words in str(caught.value)


def test_clipped_parameter():
    """The gradient of a parameter behind a clip is right; its parts per sample do not sum to it, so they are refused."""
    x, y = data()
    model = Net(lambda net, h: (h * Clip.apply(net.scale, 0.02)).tanh())
    result = fxcurv.compile(model, F.cross_entropy, [])(x, y)
    compare(result.grad, Oracle(model, F.cross_entropy, x, y).grad())
    with pytest.raises(CustomFunctionError, match="not linear"):
        fxcurv.compile(model, F.cross_entropy, [BatchGrad()])(x, y)


# ---- samples ------------------------------


def test_a_mean_over_the_batch_in_backward():
    """A parameter's gradient that its function divides by N is divided by the N of the batch, sample by sample too."""
    (x, y), model = data(), Net(lambda net, h: MeanGrad.apply(h, net.scale).tanh())
    result = fxcurv.compile(model, F.cross_entropy, FIRST)(x, y)
    oracle = Oracle(model, F.cross_entropy, x, y)
    compare(result.grad, oracle.grad())
    compare(result.grad_batch, oracle.grad_batch())


MIXING = {
    "forward": lambda net, h: Centre.apply(h).tanh(),
    "forward, rounded": lambda net, h: RoundedCentre.apply(h).tanh(),
    "backward": lambda net, h: MixedBackward.apply(h).tanh(),
    "backward, not linear": lambda net, h: ClipNorm.apply(h).tanh(),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing(name):
    """A function that mixes samples, in its forward or in its backward alone: found, and the gradient is right."""
    (x, y), model = data(), Net(MIXING[name])
    result = fxcurv.compile(model, F.cross_entropy, [])(x, y)
    compare(result.grad, Oracle(model, F.cross_entropy, x, y).grad())
    with pytest.raises(MixedSamplesError, match="BatchGrad"):
        fxcurv.compile(model, F.cross_entropy, [BatchGrad()])(x, y)


def test_messages_by_index():
    """Indices that connect samples, given to the function: refused, whatever the indices at the first call."""
    x, y = data()
    model = Net(lambda net, h: Neighbours.apply(h, torch.arange(N), torch.arange(N).roll(1)).tanh())
    compare(fxcurv.compile(model, F.cross_entropy, [])(x, y).grad, Oracle(model, F.cross_entropy, x, y).grad())
    with pytest.raises(MixedSamplesError, match="BatchGrad"):
        fxcurv.compile(model, F.cross_entropy, [BatchGrad()])(x, y)


def test_batch_sizes():
    """A batch size that the function leaves symbolic stays so; one program serves one sample, too."""
    x, y = data()
    model = Net(lambda net, h: Swish.apply(Round.apply(h, 4)))
    compiled = fxcurv.compile(model, F.cross_entropy, [BatchGrad()])
    for n in (5, 3, 4, 1):
        result = compiled(x[:n], y[:n])
        compare(result.grad_batch, Oracle(model, F.cross_entropy, x[:n], y[:n]).grad_batch())
    assert not compiled.recompiles


# ---- checkpointing ------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_transparent(reentrant):
    """Reentrant checkpointing is a memory trick: as if it were not there, for every quantity."""

    def part(net):
        return lambda t: Exp.apply(t.tanh()) * net.scale

    (x, y), extensions = data(), [BatchGrad(), DiagGGNExact(), DiagHessian()]
    model = Net(lambda net, h: checkpoint(part(net), h, use_reentrant=reentrant))
    result, plain = fxcurv.compile(model, F.cross_entropy, extensions)(x, y), Net(lambda net, h: part(net)(h))
    oracle = Oracle(plain, F.cross_entropy, x, y, kind="ce")
    for field in ("grad", *[e.savefield for e in extensions]):
        compare(getattr(result, field), getattr(oracle, field)())


# ---- what is refused ------------------------------


class Numpy(Reverse):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return torch.from_numpy(np.tanh(x.detach().numpy()))


class Branch(Reverse):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x * 2 if x.sum() > 0 else x


class BranchBack(Reverse):
    @staticmethod
    def backward(ctx, g):
        return (g * 2 if g.sum() > 0 else g), None


class Noise(Reverse):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x + torch.randn_like(x)


class InPlace(Reverse):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        ctx.mark_dirty(x)
        return x.mul_(2)


class Unmarked(Reverse):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        x.mul_(2)
        return x + 1


class Reads(Function):
    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return x * module.scale

    @staticmethod
    def backward(ctx, g):
        return g * ctx.module.scale, None


class NoBackward(Function):
    @staticmethod
    def forward(ctx, x, scale):
        return x * 2


REFUSED = {
    "numpy": (Numpy, "cannot be traced"),
    "branch": (Branch, "cannot be traced"),
    "branch in backward": (BranchBack, "cannot be traced"),
    "random": (Noise, "draws random numbers"),
    "dirty": (InPlace, "in place"),
    "no backward": (NoBackward, "cannot be traced"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    (x, y), (function, says) = data(), REFUSED[name]
    with pytest.raises(CustomFunctionError) as caught:
        fxcurv.compile(Net(lambda net, h: function.apply(h.tanh(), 0.5)), F.cross_entropy, [BatchGrad()])(x, y)
    for words in (f"{function.__name__}'", says, "Way out", __file__):
        assert words in str(caught.value)
    compare_restored(function)


@pytest.mark.parametrize("shared", [lambda h: h, lambda h: h.view(-1).view(h.shape)])
def test_a_write_that_others_may_see(shared):
    """The values that are read elsewhere, here or through a view, would be others."""

    def middle(net, h):
        h = h * 2.0
        return Unmarked.apply(shared(h), 0.5) + h

    with pytest.raises(CustomFunctionError, match="'Unmarked' writes to its input in place(.|\n)*Way out"):
        fxcurv.compile(Net(middle), F.cross_entropy, [BatchGrad()])(*data())


def compare_restored(function: type) -> None:
    """A capture, also one that fails, leaves the class as it was."""
    x = torch.ones(2, requires_grad=True)
    (g,) = torch.autograd.grad(Reverse.apply(x, 0.5).sum(), x)
    assert g.tolist() == [-0.5, -0.5] and "fxcurv" not in function.forward.__module__


def test_what_is_no_argument():
    """A tensor that the function reads past its arguments would be frozen, and have no gradient in PyTorch."""
    x, y = data()
    with pytest.raises(CustomFunctionError, match="'Reads'.*none of its arguments"):
        fxcurv.compile(Net(lambda net, h: Reads.apply(h, net)), F.cross_entropy, [])(x, y)


def test_create_graph():
    """Results would be differentiated through the forward's ops: refused."""
    x, y = data()
    compiled = fxcurv.compile(Net(lambda net, h: Exp.apply(h)), F.cross_entropy, [BatchGrad()])
    with pytest.raises(CustomFunctionError, match="create_graph"):
        compiled(x, y, create_graph=True)


def test_once_differentiable_has_no_hessian():
    x, y = data()
    for extension in (DiagHessian(), HMP()):
        with pytest.raises(CustomFunctionError, match="'WithGrad' has no second derivative"):
            fxcurv.compile(Net(lambda net, h: WithGrad.apply(h, torch.tanh)), F.cross_entropy, [extension])(x, y)


def test_gradient_inside_of_a_model():
    """A model that differentiates through the function itself."""
    x, y = data()

    def middle(net, h):
        return torch.autograd.grad(Exp.apply(h).sum(), h, create_graph=True)[0]

    model = Net(middle)
    result = fxcurv.compile(model, F.cross_entropy, [])(x, y)
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()), materialize_grads=True)
    for (name, _), g in zip(model.named_parameters(), found, strict=True):
        torch.testing.assert_close(result.grad[name], g)


# ---- what a backward pass reads ------------------------------

STRENGTH = 1.0


def strength():
    return 2 * STRENGTH


def reversal_of(closed):
    class Reversal(torch.autograd.Function):
        factor = 1.0

        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return -STRENGTH * strength() * closed["by"] * Reversal.factor * g

    return Reversal


def test_values_that_a_backward_pass_reads_count_at_every_call():
    global STRENGTH
    torch.manual_seed(0)
    closed = {"by": 1.0}
    reversal, layer = reversal_of(closed), nn.Linear(4, 2)

    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return reversal.apply(self.layer(x))

    model, x, y = Reversed(), torch.randn(3, 4), torch.arange(3) % 2
    compiled = fxcurv.compile(model, nn.functional.cross_entropy, [BatchGrad()])

    def check():
        (want,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), [layer.weight])
        torch.testing.assert_close(compiled(x, y).grad["layer.weight"], want)

    check(), check()
    STRENGTH = 3.0  # of the function, and of one that it calls
    check()
    closed["by"] = 0.5
    check()
    reversal.factor = 4.0
    check()
    STRENGTH = 1.0
    check()
