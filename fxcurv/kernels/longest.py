"""longest: the identity on lengths, which checks that the longest one equals the size of the padded batch.

Shapes: lengths [N] -> [N]. `pad_packed_sequence` returns as many steps as the longest sequence; a program has one size.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("fxcurv::longest", mutates_args=())
def longest(lengths: Tensor, size: int) -> Tensor:
    """`lengths` [N], after a check at every call that the longest is `size`.

    Raises:
        RuntimeError: if it is not.
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
