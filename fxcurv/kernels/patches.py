"""Patches: the inputs that a convolution multiplies by its weight at each position of the output."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fxcurv.ir.precision import wide
from fxcurv.kernels import blocks as cpu

# The most elements in a block of patches of several samples: 32 MiB in float32.
LARGEST = 1 << 23


def windows(
    x: Tensor,
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Patches of `x`, [B, C, *in] -> [B, C, *out, *kernel], as a view of `x` or of its padded copy."""
    if any(padding):
        x = torch.nn.functional.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
    for d, (k, s, di, o) in enumerate(zip(kernel, stride, dilation, out, strict=True)):
        # if the stride does not divide the size, no patch reads the last rows
        x = x.unfold(2 + d, (k - 1) * di + 1, s).narrow(2 + d, 0, o)[..., ::di]
    return x


def channels_last(x: Tensor) -> bool:
    """Whether images [B, C, H, W] have their channels last in memory; False for one channel, where layouts agree."""
    return x.ndim == 4 and x.shape[1] != 1 and x.stride(1) == 1


class Patches:
    """A convolution's patches, a few samples at a time, in one block of memory.

    A call with a slice of samples returns [N', K, S, I] in `wide(x.dtype)`, valid until the next call. I runs over
    (channel, *kernel) of a group, or over (*kernel, channel) if channels are last in memory, so that runs are copied.

    Args:
        x: [N, C, *in].
        out: the sizes of the convolution's output, whose positions are S.
        geometry: kernel, stride, padding, dilation.
        groups: K.
        in_order: whether I must have the weight's order.
    """

    def __init__(self, x: Tensor, out: Sequence[int], geometry: tuple, groups: int, in_order: bool):
        self.x, self.out, self.geometry, self.groups = x, tuple(out), geometry, groups
        self.kernel, self.channels = tuple(geometry[0]), x.shape[1] // groups
        self.s, self.i = prod(self.out), self.channels * prod(self.kernel)
        self.last = channels_last(x) and groups == 1 and not in_order
        each = max(1, groups * self.s * self.i)
        self.most = max(1, min(x.shape[0], max(cpu.BLOCK, min(cpu.FEWEST * each, LARGEST)) // each))
        self.scratch = x.new_empty(self.most * groups * self.s * self.i, dtype=wide(x.dtype))

    def __call__(self, samples: slice) -> Tensor:
        x, dims = self.x[samples], len(self.kernel)
        if channels_last(x) and not self.last:
            x = x.contiguous()  # a small copy, so that patches are then copied row by row
        view = windows(x, self.out, *self.geometry)
        outs, kernel = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
        view = view.permute(0, *outs, *kernel, 1) if self.last else view.permute(0, 1, *kernel, *outs)
        block = self.scratch[: view.numel()].view(view.shape).copy_(view)
        if self.last:
            return block.view(len(x), 1, self.s, self.i)
        return block.view(len(x), self.groups, self.i, self.s).mT

    def weight(self, t: Tensor) -> Tensor:
        """[*lead, K, O, I] -> [*lead, K O, C / K, *kernel], in the weight's order."""
        t = t.flatten(-3, -2)
        if self.last:
            t = t.unflatten(-1, (*self.kernel, self.channels))
            return t.movedim(-1, -1 - len(self.kernel)).contiguous()
        return t.unflatten(-1, (self.channels, *self.kernel))


def grouped(g: Tensor, groups: int) -> Tensor:
    """Cotangents of a convolution's output, [V, N, K O, *out] -> [V, N, K, S, O]."""
    return g.unflatten(2, (groups, -1)).flatten(4).mT
