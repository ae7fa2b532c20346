"""One entry of a tuple."""

from __future__ import annotations

from typing import Any

from torch import nn


class ReduceTuple(nn.Module):
    """`input[index]` of a tuple (the first output of a recurrent layer, say)."""

    def __init__(self, index: int = 0):
        super().__init__()
        self.index = index

    def forward(self, input: tuple) -> Any:  # noqa: A002
        return input[self.index]
