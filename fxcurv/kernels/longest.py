"""longest: lengths as they are, where the longest one is as long as the padded batch.

Shapes: lengths [N] -> [N]. What `pad_packed_sequence` returns is as long as the longest sequence; a program has one size.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("fxcurv::longest", mutates_args=())
def longest(lengths: Tensor, size: int) -> Tensor:
    """`lengths` [N], checked at every call: the longest is `size`.

    Raises:
        RuntimeError: where it is not.
    """
    most = int(lengths.max())
    if most != size:
        raise RuntimeError(
            f"the longest sequence of this batch has {most} steps, and the padded batch {size}, which pad_packed_sequence would "
            f"cut off: pass it total_length={size}, or cut the batch to its longest sequence"
        )
    return lengths.clone()


@longest.register_fake
def _(lengths, size):
    return torch.empty_like(lengths)
