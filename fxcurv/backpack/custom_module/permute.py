"""Permutations of axes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Permute(nn.Module):
    """Permutes the axes; the first one stays.

    Args:
        dims: the order, as arguments or one sequence; with `init_transpose`, the two axes that change places.

    Raises:
        ValueError: if the first axis would move.
    """

    def __init__(self, *dims: Any, init_transpose: bool = False):
        super().__init__()
        self.dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
        self.init_transpose = init_transpose
        moves = 0 in self.dims if init_transpose else self.dims[0] != 0
        if moves:
            raise ValueError(f"Permute{self.dims}: axis 0 is the samples' and stays")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return input.transpose(*self.dims) if self.init_transpose else input.permute(self.dims)
