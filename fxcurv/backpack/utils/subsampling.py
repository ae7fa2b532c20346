"""Some samples of a tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def subsample(tensor: Tensor, dim: int = 0, subsampling: Sequence[int] | None = None) -> Tensor:
    """The samples with these indices, along axis `dim`; all of them for None."""
    if subsampling is None:
        return tensor
    return tensor[(slice(None),) * dim + (list(subsampling),)]
