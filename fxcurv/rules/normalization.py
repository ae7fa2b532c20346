"""Normalisations. Batch norm in eval mode is an affine map; others have rules, are rewritten or use the fallback."""

from __future__ import annotations

from math import prod

import torch

from fxcurv.contractions.factors import Explicit, Factor
from fxcurv.ir import placement
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Shard, samples_first
from fxcurv.rules.base import AGAIN, SUMS, Refused, Rule, register, rewrite
from fxcurv.rules.call import Call

aten = torch.ops.aten


def _no_cotangents(call: Call, g):
    """Zero cotangents [V, *statistic] of the statistics beside y, because no differentiable op reads these."""
    return [o.new_zeros(g.shape[0], *o.shape) for o in call.y[1:]]


@rewrite(aten.native_batch_norm.default)
def _native_batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    if not training:
        return aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, var, momentum, eps)
    if mean is not None or var is not None:
        raise Refused(
            "writes its running statistics, which nothing in its signature says. Way out: torch.nn.functional.batch_norm, or a "
            "BatchNorm module"
        )
    return aten._native_batch_norm_legit.no_stats(x, weight, bias, True, momentum, eps)


@register(aten._native_batch_norm_legit_no_training.default)
class BatchNormEval(Rule):
    """y = (x - mean) / sqrt(var + eps) w + b with constant statistics: affine in x, channels in dimension 1."""

    name = "normalization"

    def linear(self, active):
        return not {0, 1} <= set(active)

    def mixed_axes(self, args):
        return 0

    def place(self, sites, args, shape, n):
        x, *others = sites
        if any(s and s.place != REPLICATE for s in others):
            return MIXED
        if x.place == PARTIAL and any(s and s.active for s in others):
            return MIXED
        return MIXED if isinstance(x.place, Shard) and x.place.dim == 1 else x.place

    @staticmethod
    def _channels(t, ndim):
        return t.reshape(-1, *[1] * (ndim - 2))

    def transpose(self, call: Call, wrt, g):
        x, weight, _, _, var, _, eps = call.args
        if tuple(wrt) != (0,):
            return super().transpose(call, wrt, (g[0], *_no_cotangents(call, g[0])))
        scale = torch.rsqrt(var + eps)
        scale = scale if weight is None else scale * weight
        return [g[0] * self._channels(scale, x.ndim)]

    def factors(self, call: Call, position: int, g) -> Factor:
        x, _, _, mean, var, _, eps = call.args
        g = g[0]
        if position == 1:
            g = g * ((x - self._channels(mean, x.ndim)) * self._channels(torch.rsqrt(var + eps), x.ndim))
        t = samples_first(g, call.place, lead=1)
        return Explicit(t.sum([2, *range(4, t.ndim)]))


@register(aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit.no_stats)
class BatchNormTraining(Rule):
    """y = xhat w + b, xhat normalised over all axes but the channels: samples interact."""

    name = "normalization"

    def place(self, sites, args, shape, n):
        return REPLICATE if all(s is None or s.place == REPLICATE for s in sites) else MIXED

    def formula(self, op, args):
        x, weight, bias, *running, _, _, eps = args
        mean, var = _statistics(x)
        rstd = torch.rsqrt(var + eps)
        return _scale_and_shift((x - mean) * rstd, weight, bias), mean.flatten(), rstd.flatten(), *running


@rewrite(aten.batch_norm.default)
def _batch_norm(x, weight, bias, mean, var, training, momentum, eps, cudnn=True):
    return aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, var, momentum, eps)[0]


def _statistics(x):
    """(mean, variance) of every channel."""
    dims = [d for d in range(x.ndim) if d != 1]
    mean = x.mean(dims, keepdim=True)
    return mean, (x - mean).square().mean(dims, keepdim=True)


def _batch_norm_in_sums(x, weight, bias, running_mean, running_var, training, momentum, eps):
    mean, var = _statistics(x)
    rstd = torch.rsqrt(var + eps)
    count = x.numel() // x.shape[1]
    new = mean.flatten().detach(), var.flatten().detach() * (count / (count - 1))
    running = [old * (1 - momentum) + momentum * t for old, t in zip((running_mean, running_var), new, strict=True)]
    return _scale_and_shift((x - mean) * rstd, weight, bias), mean.flatten(), rstd.flatten(), *running


def _batch_norm_in_sums_without_running(x, weight, bias, training, momentum, eps):
    mean, var = _statistics(x)
    rstd = torch.rsqrt(var + eps)
    return _scale_and_shift((x - mean) * rstd, weight, bias), mean.flatten(), rstd.flatten()


SUMS[aten._native_batch_norm_legit_functional.default] = _batch_norm_in_sums
SUMS[aten._native_batch_norm_legit.no_stats] = _batch_norm_in_sums_without_running


@register(aten.layer_norm.default)
class LayerNorm(Rule):
    """y = xhat w + b, xhat normalised over the last axes."""

    name = "normalization"

    def place(self, sites, args, shape, n):
        x, *others = sites
        if x.place == PARTIAL or any(s and s.place != REPLICATE for s in others):
            return MIXED
        normalised = len(shape) - len(args[1])
        return MIXED if isinstance(x.place, Shard) and x.place.dim >= normalised else x.place

    def formula(self, op, args):
        x, _, weight, bias, *_ = args
        y = self._normalise(args)[1]
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    @staticmethod
    def _normalise(args):
        x, shape, _, _, eps = args[:5]
        dims = list(range(x.ndim - len(shape), x.ndim))
        centred = x - x.mean(dims, keepdim=True)
        rstd = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
        return dims, centred * rstd, rstd

    def _normalised_input(self, call: Call):
        """xhat of a call."""
        return self._normalise(call.args)[1]

    def transpose(self, call: Call, wrt, g):
        if tuple(wrt) != (self._flat_position(call, 0),):
            return super().transpose(call, wrt, g)
        weight = call.args[2]
        dims, xhat, rstd = self._normalise(call.args)
        gw = g if weight is None else g * weight
        dims = [d + 1 for d in dims]
        return [rstd * (gw - gw.mean(dims, keepdim=True) - xhat * (gw * xhat).mean(dims, keepdim=True))]

    @staticmethod
    def _flat_position(call, argument):
        """The flattened position of an argument; argument 1, the shape, takes several."""
        return argument if argument == 0 else argument + len(call.args[1]) - 1

    def factors(self, call: Call, position: int, g) -> Factor:
        keep = len(call.args[1])
        t = g * self._normalised_input(call) if position == self._flat_position(call, 2) else g
        t = samples_first(t, call.place, lead=1)
        shared = list(range(2, t.ndim - keep))
        return Explicit(t.sum(shared) if shared else t)


class StatisticsBeside(LayerNorm):
    """Layer norm with outputs (y, mean, rstd); no differentiable op reads the statistics."""

    def formula(self, op, args):
        dims, _, rstd = self._normalise(args)
        return super().formula(op, args), args[0].mean(dims, keepdim=True), rstd

    def transpose(self, call: Call, wrt, g):
        if tuple(wrt) == (self._flat_position(call, 0),):
            return super().transpose(call, wrt, g[0])
        return Rule.transpose(self, call, wrt, (g[0], *_no_cotangents(call, g[0])))

    def factors(self, call: Call, position: int, g) -> Factor:
        return super().factors(call, position, g[0])


@register(aten.native_layer_norm.default)
class NativeLayerNorm(StatisticsBeside):
    """Layer norm whose transpose is PyTorch's kernel, which reads the statistics."""

    def transpose(self, call: Call, wrt, g):
        if tuple(wrt) != (self._flat_position(call, 0),):
            return super().transpose(call, wrt, g)
        x, shape, weight, bias, _ = call.args
        g, statistics = g[0], call.y[1:]
        if g.shape[0] == 1:
            rows = g.squeeze(0), x, shape, *statistics
        else:  # the kernel reads the statistics as contiguous, whatever their strides
            rows = g, x.expand_as(g), shape, *(t.expand(g.shape[0], *t.shape).contiguous() for t in statistics)
        gx = aten.native_layer_norm_backward.default(*rows, weight, bias, [True, False, False])[0]
        return [gx.unsqueeze(0) if g.shape[0] == 1 else gx]

    def _normalised_input(self, call: Call):
        _, mean, rstd = call.y
        return ((call.args[0] - mean) * rstd).to(call.args[0].dtype)


AGAIN[aten.native_layer_norm.default] = StatisticsBeside()


@rewrite(aten.group_norm.default)
def _group_norm(x, groups, weight=None, bias=None, eps=1e-5, cudnn=True):
    grouped = x.reshape(x.shape[0], groups, prod(x.shape[1:]) // groups)  # -1 is not defined for an empty batch
    y = aten.layer_norm.default(grouped, [grouped.shape[2]], None, None, eps).reshape(x.shape)
    return _scale_and_shift(y, weight, bias)


@rewrite(aten.instance_norm.default)
def _instance_norm(x, weight, bias, mean, var, use_input_stats, momentum, eps, cudnn):
    if not use_input_stats:
        return _batch_norm(x, weight, bias, mean, var, False, momentum, eps, cudnn)
    return _group_norm(x, x.shape[1], weight, bias, eps)


def _scale_and_shift(y, weight, bias):
    shape = [1, -1] + [1] * (y.ndim - 2)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


@rewrite(aten.rms_norm.default)
def _rms_norm(x, shape, weight=None, eps=None):
    dims = list(range(x.ndim - len(shape), x.ndim))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)
    return y if weight is None else y * weight


@register(aten.logcumsumexp.default)
class LogCumSumExp(Rule):
    """y_i = log sum_{j <= i} exp(x_j) along one axis.

    PyTorch's backward takes logarithms of the cotangent: a tangent, its transpose at zero, would be NaN or zero.
    """

    name = "log-cumulative sum of exponentials"

    def formula(self, op, args):
        x, dim = args
        if not x.ndim:
            return x.clone()
        rows = x.movedim(dim, -1)
        later = torch.ones(rows.shape[-1], rows.shape[-1], dtype=torch.bool, device=x.device).triu(1)
        return rows.unsqueeze(-2).masked_fill(later, -torch.inf).logsumexp(-1).movedim(-1, dim)


class Softmax(Rule):
    """softmax or log_softmax along one axis."""

    name = "softmax"

    def __init__(self, log: bool):
        self.log = log

    def place(self, sites, args, shape, n):
        x = sites[0]
        if isinstance(x.place, Shard) and x.place.dim == args[1] % max(1, len(shape)):
            return MIXED
        return placement.pointwise([x], len(shape), linear=False)

    def transpose(self, call: Call, wrt, g):
        x, dim = call.args[:2]
        if not x.ndim:
            return [torch.zeros_like(g)]
        dim, y = dim % x.ndim + 1, call.y.to(g.dtype)
        backward = aten._log_softmax_backward_data if self.log else aten._softmax_backward_data
        return [backward.default(g, y.expand_as(g), dim, g.dtype).to(x.dtype)]


for _log, _ops in {
    False: (aten._softmax.default, aten.softmax.int, aten._safe_softmax.default),
    True: (aten._log_softmax.default, aten.log_softmax.int),
}.items():
    register(*_ops, rule=Softmax(_log))


@rewrite(aten._weight_norm_interface.default)
def _weight_norm(v, g, dim=0):
    """Rewritten because the op's own second derivative is wrong (PyTorch 2.13)."""
    norm = v.square().sum([d for d in range(v.ndim) if d != dim % v.ndim], keepdim=True).sqrt()
    return v * (g / norm), norm
