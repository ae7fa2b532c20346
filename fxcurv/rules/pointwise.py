"""Elementwise ops: activations by their derivative, arithmetic with broadcasting, dropout by its mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxcurv.contractions.factors import Explicit, Factor, is_one
from fxcurv.ir import placement
from fxcurv.ir.lengths import said
from fxcurv.ir.placement import Shard, samples_first
from fxcurv.rules.base import AGAIN, Rule, register, rewrite
from fxcurv.rules.call import Call

aten = torch.ops.aten


class Pointwise(Rule):
    """y = f(x, *constants) elementwise.

    Args:
        d1: the derivative f'(x) as `d1(x, y, *constants)`; booleans count as 0 and 1.
        d2: the second derivative likewise, or None where d1 is piecewise constant (`piecewise_linear`).
    """

    name = "pointwise"
    elementwise = True

    def __init__(self, d1: Callable, d2: Callable | None = None, piecewise_linear: bool = False):
        self.d1, self.d2, self.piecewise_linear = d1, d2, piecewise_linear

    def place(self, sites, args, shape, n):
        return placement.pointwise([s for s in sites if s], len(shape), linear=False)

    def transpose(self, call: Call, wrt, g):
        x, *rest = call.args
        if tuple(wrt) != (0,):
            return super().transpose(call, wrt, g)
        return [self.pull(g, x, call.y, *rest)]

    def pull(self, g: Tensor, x: Tensor, y: Tensor, *constants) -> Tensor:
        """The cotangent [V, *x] from that of the output."""
        return g * numbers(self.d1(x, y, *constants), g.dtype)


class Relu(Pointwise):
    """ReLU, whose transpose is one op of PyTorch's without a mask."""

    def pull(self, g, x, y):
        return aten.threshold_backward.default(g, y.expand_as(g), 0)


class Smooth(Pointwise):
    """A smooth op with a backward op of PyTorch's, `backward(g, x, y, *constants)`.

    For one column, `backward` is the transpose; for several, it gives the slope that multiplies them.
    """

    def __init__(self, backward: Callable, d1: Callable, d2: Callable | None = None):
        super().__init__(d1, d2)
        self.backward = backward

    def pull(self, g, x, y, *constants):
        if is_one(g.shape[0]):
            return self.backward(g, x.unsqueeze(0), y.unsqueeze(0), *constants)
        return g * self.backward(torch.ones_like(x), x, y, *constants)


def numbers(slope: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers, converted once for all columns: products with booleans take several times longer."""
    return slope.to(dtype) if slope.dtype == torch.bool else slope


def _gelu_d1(x, y, approximate="none"):
    if approximate == "none":
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return cdf + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _gelu_d2(x, y, approximate="none"):
    if approximate == "none":
        return torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi)) * (2 - x * x)
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (x + a * x**3))
    u1, u2 = c * (1 + 3 * a * x * x), 6 * a * c * x
    return (1 - t * t) * (u1 + 0.5 * x * (u2 - 2 * t * u1 * u1))


def _elu_d1(x, y, alpha=1.0, scale=1.0, input_scale=1.0):
    return torch.where(x > 0, scale, scale * input_scale * alpha * torch.exp(x * input_scale))


def _elu_d2(x, y, alpha=1.0, scale=1.0, input_scale=1.0):
    return torch.where(x > 0, 0.0, scale * input_scale**2 * alpha * torch.exp(x * input_scale))


def _softplus_d1(x, y, beta=1, threshold=20):
    return torch.where(x * beta > threshold, 1.0, torch.sigmoid(x * beta))


def _softplus_d2(x, y, beta=1, threshold=20):
    s = torch.sigmoid(x * beta)
    return torch.where(x * beta > threshold, 0.0, beta * s * (1 - s))


def _silu_d1(x, y):
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _silu_d2(x, y):
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


# PyTorch's own derivative of hardsigmoid has it in single precision, for any dtype.
_SIXTH = torch.tensor(1 / 6, dtype=torch.float32).item()


def _hardswish_d1(x, y):
    return torch.where(x <= -3, 0.0, torch.where(x < 3, x / 3 + 0.5, 1.0))


def _mish_d1(x, y):
    t = torch.tanh(torch.nn.functional.softplus(x))
    return t + x * torch.sigmoid(x) * (1 - t * t)


def _pow_d2(x, y, p):
    return p * (p - 1) * x ** (p - 2) if p not in (1, 2) else torch.full_like(x, p * (p - 1))


# op: (first derivative, second derivative), functions of (x, y, *constants)
SMOOTH: dict[Callable, tuple[Callable, Callable | None]] = {
    aten.tanh.default: (lambda x, y: 1 - y * y, lambda x, y: -2 * y * (1 - y * y)),
    aten.sigmoid.default: (lambda x, y: y * (1 - y), lambda x, y: y * (1 - y) * (1 - 2 * y)),
    aten.exp.default: (lambda x, y: y, lambda x, y: y),
    aten.log.default: (lambda x, y: 1 / x, lambda x, y: -1 / (x * x)),
    aten.log1p.default: (lambda x, y: 1 / (1 + x), lambda x, y: -1 / (1 + x) ** 2),
    aten.sqrt.default: (lambda x, y: 0.5 / y, lambda x, y: -0.25 / (y * x)),
    aten.rsqrt.default: (lambda x, y: -0.5 * y / x, lambda x, y: 0.75 * y / (x * x)),
    aten.reciprocal.default: (lambda x, y: -y * y, lambda x, y: 2 * y * y * y),
    aten.sin.default: (lambda x, y: torch.cos(x), lambda x, y: -y),
    aten.cos.default: (lambda x, y: -torch.sin(x), lambda x, y: -y),
    aten.pow.Tensor_Scalar: (lambda x, y, p: p * x ** (p - 1), _pow_d2),
    aten.gelu.default: (_gelu_d1, _gelu_d2),
    aten.silu.default: (_silu_d1, _silu_d2),
    aten.elu.default: (_elu_d1, _elu_d2),
    aten.softplus.default: (_softplus_d1, _softplus_d2),
    aten.log_sigmoid.default: (lambda x, y: torch.sigmoid(-x), lambda x, y: -torch.sigmoid(x) * torch.sigmoid(-x)),
    aten.hardswish.default: (_hardswish_d1, lambda x, y: ((x > -3) & (x < 3)).to(x.dtype) / 3),
    aten.mish.default: (_mish_d1, None),
    aten.erf.default: (
        lambda x, y: 2 / math.sqrt(math.pi) * torch.exp(-x * x),
        lambda x, y: -4 / math.sqrt(math.pi) * x * torch.exp(-x * x),
    ),
}
BACKWARD: dict[Callable, Callable] = {
    aten.gelu.default: lambda g, x, y, approximate="none": aten.gelu_backward.default(g, x, approximate=approximate),
    aten.silu.default: lambda g, x, y: aten.silu_backward.default(g, x),
    aten.tanh.default: lambda g, x, y: aten.tanh_backward.default(g, y),
    aten.sigmoid.default: lambda g, x, y: aten.sigmoid_backward.default(g, y),
}
PIECEWISE_LINEAR: dict[Callable, Callable] = {
    aten.relu6.default: lambda x, y: (x > 0) & (x < 6),
    aten.leaky_relu.default: lambda x, y, slope=0.01: torch.where(x > 0, x.new_ones(()), slope),
    aten.hardtanh.default: lambda x, y, lo=-1, hi=1: (x > lo) & (x < hi),
    aten.hardsigmoid.default: lambda x, y: ((x > -3) & (x < 3)).to(x.dtype) * _SIXTH,
    aten.abs.default: lambda x, y: torch.sign(x),
    aten.threshold.default: lambda x, y, threshold, value: x > threshold,
}

register(aten.relu.default, rule=Relu(lambda x, y: y > 0, piecewise_linear=True))
for _op, (_d1, _d2) in SMOOTH.items():
    register(_op, rule=Smooth(BACKWARD[_op], _d1, _d2) if _op in BACKWARD else Pointwise(_d1, _d2))
AGAIN |= {op: Pointwise(*SMOOTH[op]) for op in BACKWARD}
for _op, _slope in PIECEWISE_LINEAR.items():
    register(_op, rule=Pointwise(_slope, piecewise_linear=True))


def unbroadcast(g: Tensor, shape: Sequence[int], lead: int = 1) -> Tensor:
    """The transpose of broadcasting from `shape` to the shape of `g` behind its `lead` leading axes."""
    extra = g.ndim - lead - len(shape)
    if extra:
        g = total(g, range(lead, lead + extra))
    ones = [lead + d for d, s in enumerate(shape) if isinstance(s, int) and s == 1 and not is_one(g.shape[lead + d])]
    return g.sum(ones, keepdim=True) if ones else g


def total(t: Tensor, axes: Sequence[int]) -> Tensor:
    """The sum over `axes`; axes of size one are dropped without a sum, which would copy."""
    ones = [d for d in axes if is_one(t.shape[d])]
    rest = [d for d in axes if d not in ones]
    t = t.sum(rest, keepdim=True) if rest else t
    return t.squeeze(list(axes))


class Arithmetic(Rule):
    """A broadcasting op of two arguments; subclasses give `pull`, the cotangent before unbroadcasting."""

    name = "arithmetic"
    elementwise = True

    def pull(self, call: Call, position: int, g: Tensor) -> Tensor:
        raise NotImplementedError

    def place(self, sites, args, shape, n):
        active = [i for i, s in enumerate(sites) if s and s.active]
        return placement.pointwise([s for s in sites if s], len(shape), self.linear(active))

    def transpose(self, call: Call, wrt, g):
        return [unbroadcast(self.pull(call, i, g), call.args[i].shape) for i in wrt]

    def factors(self, call: Call, position: int, g) -> Factor:
        x, place = call.args[position], call.place
        p = self.pull(call, position, g)
        along = place.dim + 1 - (p.ndim - x.ndim)
        if 0 <= along < x.ndim and not is_one(x.shape[along]):
            return Explicit(unbroadcast(_mask_own_slices(p, place), x.shape, lead=2))
        # the sample axis is split off before the sum over axes that the parameter was broadcast along
        return Explicit(unbroadcast(samples_first(p, place, lead=1), x.shape, lead=2))


def _mask_own_slices(p: Tensor, place: Shard) -> Tensor:
    """[V, *y] -> [V, N, *y], zero outside of the sample's slices, for a parameter that has a sample axis itself."""
    size = p.shape[place.dim + 1]
    n = size // said(place.outer * place.inner)
    owner = torch.arange(size, device=p.device).div(said(place.inner), rounding_mode="floor") % n
    mine = owner == torch.arange(n, device=p.device).unsqueeze(1)
    mine = mine.reshape(n, *[1] * place.dim, size, *[1] * (p.ndim - place.dim - 2))
    return torch.where(mine, p.unsqueeze(1), 0)


@register(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
class Add(Arithmetic):
    """y = x + alpha z, y = x - alpha z."""

    shifts = True

    def linear(self, active):
        return True

    def pull(self, call, position, g):
        if position == 0:
            return g
        sign = -1 if call.op == aten.sub.Tensor else 1
        scale = sign * call.args[2]
        return g if scale == 1 else g * scale


@register(aten.rsub.Scalar)
class RSub(Arithmetic):
    """y = alpha' - alpha x."""

    def linear(self, active):
        return True

    def pull(self, call, position, g):
        return g * -call.args[2]


@register(aten.mul.Tensor, aten.mul.Scalar)
class Mul(Arithmetic):
    """y = x z."""

    def linear(self, active):
        return len(active) == 1

    def pull(self, call, position, g):
        return g * call.args[1 - position]


@register(aten.div.Tensor, aten.div.Scalar)
class Div(Arithmetic):
    """y = x / z."""

    def linear(self, active):
        return tuple(active) == (0,)

    def pull(self, call, position, g):
        x, z = call.args[:2]
        return g / z if position == 0 else -g * call.y / z


@register(aten.neg.default)
class Neg(Arithmetic):
    """y = -x."""

    def linear(self, active):
        return True

    def pull(self, call, position, g):
        return -g


@register(aten.where.self)
class Where(Arithmetic):
    """y = x where c, else z."""

    def linear(self, active):
        return True

    def pull(self, call, position, g):
        c = call.args[0]
        return torch.where(c, g, 0) if position == 1 else torch.where(c, 0, g)


@register(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
class MaskedFill(Arithmetic):
    """y = a constant where the mask is set, else x."""

    def linear(self, active):
        return True

    def pull(self, call, position, g):
        return torch.where(call.args[1], 0, g) if position == 0 else torch.where(call.args[1], g, 0)


@register(aten.native_dropout.default)
class Dropout(Rule):
    """y = x mask / (1 - p), with the mask that the forward pass drew."""

    name = "dropout"
    elementwise = True

    def linear(self, active):
        return True

    def place(self, sites, args, shape, n):
        return (
            sites[0].place if isinstance(sites[0].place, Shard) else placement.pointwise([sites[0]], len(shape), True)
        )

    def transpose(self, call: Call, wrt, g):
        _, p, _ = call.args
        mask = call.y[1]
        return [g[0] * mask * (0.0 if p >= 1 else 1 / (1 - p))]


@rewrite(aten.prelu.default)
def _prelu(x, weight):
    shape = [1, -1] + [1] * (x.ndim - 2) if x.ndim > 1 else [-1] * x.ndim
    return torch.where(x > 0, x, x * weight.view(shape))


@rewrite(aten.rrelu.default)
def _rrelu(x, lower=1 / 8, upper=1 / 3, training=False, generator=None):
    """y = x times slopes, drawn once for all derivatives; they are one where x is positive."""
    if not training:
        return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)
    x0 = x.detach()
    return x * aten.rrelu_with_noise_functional.default(x0, torch.empty_like(x0), lower, upper, True)[1]
