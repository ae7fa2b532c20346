"""outer_square_sum_conv: sum_v w[v, n] (dL/dW of sample n and column v)^2 for a convolution, never unfolded as a whole.

Shapes: x [N, C, *in], g [V, N, O, *out], w [V, N] or None (ones), of either sign -> [O, C / groups, *kernel], or
[N, O, C / groups, *kernel] with `per_sample`; in float32 for inputs in half precision. One to three spatial dimensions.

The gradient is sum_s g[v, n, o, s] patch[n, s, i] over the output's positions s, where i runs over channels of the
group and the kernel: see `outer_square_sum`. On a CPU, patches of a few samples at a time share one block of memory.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.ir.precision import wide
from fxcurv.kernels import blocks as cpu
from fxcurv.kernels.patches import Patches, grouped
from fxcurv.kernels.register import INTO, on_cuda


def reference(
    x: Tensor, g: Tensor, w: Tensor | None, per_sample: bool,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """The definition: autograd's gradient of each sample and column."""
    weight = x.new_zeros(g.shape[2], x.shape[1] // groups, *kernel)
    out = x.new_zeros(len(x), *weight.shape)
    geometry = ([0], stride, padding, dilation, False, [0] * len(kernel), groups, [False, True, False])
    for v in range(len(g)):
        for n in range(len(x)):
            p = torch.ops.aten.convolution_backward(g[v, n : n + 1], x[n : n + 1], weight, *geometry)[1]
            out[n] += p.square() if w is None else w[v, n] * p.square()
    return out if per_sample else out.sum(0)


@torch.library.custom_op("fxcurv::outer_square_sum_conv", mutates_args=())
def outer_square_sum_conv(
    x: Tensor, g: Tensor, w: Tensor | None, per_sample: bool,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """See the module; the geometry is `torch.nn.functional.conv2d`'s, in as many dimensions as the kernel has."""
    return _blocks(x, g, w, per_sample, (kernel, stride, padding, dilation), groups)


def into(
    x: Tensor, g: Tensor, w: Tensor | None, per_sample: bool,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int, *, out: Tensor,
) -> Tensor:  # fmt: skip
    """The op on a CPU, written into memory of the caller's."""
    _blocks(x, g, w, per_sample, (kernel, stride, padding, dilation), groups, out)
    return out


INTO[torch.ops.fxcurv.outer_square_sum_conv.default] = into


def _blocks(x: Tensor, g: Tensor, w: Tensor | None, per_sample: bool, geometry: tuple, groups: int, out=None) -> Tensor:
    a = Patches(x, g.shape[3:], geometry, groups, in_order=per_sample)
    # with channels last, inputs are in another order than the weight's: the sums are permuted at the end
    total = cpu.square_sum(a, grouped(g, groups), a.i, w, per_sample, a.most, None if a.last else out)
    total = a.weight(total if per_sample else total.squeeze(0))
    return out.copy_(total) if a.last and out is not None else total


@outer_square_sum_conv.register_fake
def _(x, g, w, per_sample, kernel, stride, padding, dilation, groups):
    shape = (g.shape[2], x.shape[1] // groups, *kernel)
    return x.new_empty((x.shape[0], *shape) if per_sample else shape, dtype=wide(x.dtype))


@register_flop_formula(torch.ops.fxcurv.outer_square_sum_conv)
def _(x, g, w, per_sample, kernel, stride, padding, dilation, groups, *rest, out_shape=None, **kwargs):
    return 2 * prod(g) * (x[1] // groups) * prod(kernel)


on_cuda(outer_square_sum_conv, "outer_square_sum_conv")
