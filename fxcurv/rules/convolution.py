"""Convolutions and transposed convolutions in 1, 2 and 3 dimensions."""

from __future__ import annotations

import torch

from fxcurv.contractions.factors import Conv, Explicit, Factor
from fxcurv.ir.placement import MIXED, REPLICATE, Shard, samples_first
from fxcurv.kernels.patches import channels_last
from fxcurv.rules.base import Rule, register, rewrite
from fxcurv.rules.call import Call
from fxcurv.rules.pointwise import total

aten = torch.ops.aten


@register(aten.convolution.default)
class Convolution(Rule):
    """y = x * w + b, with samples in the batch dimension."""

    name = "convolution"

    def linear(self, active):
        return not {0, 1} <= set(active)

    def place(self, sites, args, shape, n):
        x = sites[0]
        if any(s and s.place != REPLICATE for s in sites[1:]):
            return MIXED
        if isinstance(x.place, Shard):
            return x.place if x.place.dim == 0 else MIXED
        return x.place if x.place == REPLICATE else MIXED

    def transpose(self, call: Call, wrt, g):
        x, weight, _, *conv = call.args
        v, b = g.shape[:2]
        out = {}
        if 0 in wrt:
            like = x.new_empty(()).expand(v * b, *x.shape[1:])
            mask = [True, False, False]
            if channels_last(x):  # `like` has no layout, so that of the weight determines the result's
                weight = weight.contiguous(memory_format=torch.channels_last)
            gx = aten.convolution_backward.default(g.flatten(0, 1), like, weight, None, *conv, mask)[0]
            out[0] = gx.unflatten(0, (v, b))
        if 1 in wrt:
            out[1] = torch.stack([self._weight_gradient(x, weight, conv, g[k]) for k in range(v)])
        if 2 in wrt:
            out[2] = g.sum([1, *range(3, g.ndim)])
        return [out[i] for i in wrt]

    @staticmethod
    def _weight_gradient(x, weight, conv, g):
        return aten.convolution_backward.default(g, x, weight, None, *conv, [False, True, False])[1]

    def factors(self, call: Call, position: int, g) -> Factor:
        x, weight, _, stride, padding, dilation, transposed, extra, groups = call.args
        if position == 2:
            return Explicit(total(samples_first(g, call.place, lead=1), [2, *range(4, g.ndim + 1)]))
        dims = weight.ndim - 2
        return Conv(  # type: ignore[call-arg]
            x, g, call.places[0], tuple(weight.shape[2:]), *(_per_dim(a, dims) for a in (stride, padding, dilation)),
            groups, transposed, tuple(extra), tuple(weight.shape),
        )  # fmt: skip


def _per_dim(value, dims):
    return tuple(value) if len(value) == dims else tuple(value) * dims


def _rewrite_conv(dims: int):
    def conv(x, weight, bias=None, stride=(1,), padding=(0,), dilation=(1,), groups=1):
        stride, padding, dilation = (list(_per_dim(a, dims)) for a in (stride, padding, dilation))
        return aten.convolution.default(x, weight, bias, stride, padding, dilation, False, [0] * dims, groups)

    def same(x, weight, bias=None, stride=(1,), padding="valid", dilation=(1,), groups=1):
        dilation = _per_dim(dilation, dims)
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(t % 2 for t in total):
            x = aten.constant_pad_nd.default(x, [p for t in reversed(total) for p in (0, t % 2)], 0)
        return conv(x, weight, bias, stride, [t // 2 for t in total], dilation, groups)

    def transposed(x, weight, bias=None, stride=(1,), padding=(0,), output_padding=(0,), groups=1, dilation=(1,)):
        stride, padding, extra, dilation = (
            list(_per_dim(a, dims)) for a in (stride, padding, output_padding, dilation)
        )
        return aten.convolution.default(x, weight, bias, stride, padding, dilation, True, extra, groups)

    return conv, same, transposed


def _allow_unbatched(dims: int, convolve):
    """`convolve` that also takes one image without a batch dimension."""

    def either(x, *args, **kwargs):
        if x.ndim == dims + 2:
            return convolve(x, *args, **kwargs)
        return convolve(x.unsqueeze(0), *args, **kwargs).squeeze(0)

    return either


for _d in (1, 2, 3):
    _conv, _same, _transposed = (_allow_unbatched(_d, f) for f in _rewrite_conv(_d))
    _packet, _back = getattr(aten, f"conv{_d}d"), getattr(aten, f"conv_transpose{_d}d")
    rewrite(_packet.default)(_conv)
    rewrite(_packet.padding)(_same)
    rewrite(_back.input if _d > 1 else _back.default)(_transposed)
