"""Indexing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Slicing(nn.Module):
    """`input[slice_info]`: an integer, a slice, or a tuple of them."""

    def __init__(self, slice_info: Any):
        super().__init__()
        self.slice_info = slice_info

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return input[self.slice_info]
