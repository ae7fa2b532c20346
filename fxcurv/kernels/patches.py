"""What a convolution multiplies at each position of its output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def windows(
    x: Tensor,
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Patches of `x` in any number of dimensions, as a view: [B, C, *spatial] -> [B, C, *out, *kernel]."""
    if any(padding):
        x = torch.nn.functional.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
    for d, (k, s, di, o) in enumerate(zip(kernel, stride, dilation, out, strict=True)):
        # a stride that does not divide leaves rows at the far end that no patch reads
        x = x.unfold(2 + d, (k - 1) * di + 1, s).narrow(2 + d, 0, o)[..., ::di]
    return x
