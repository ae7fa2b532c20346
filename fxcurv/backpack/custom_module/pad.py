"""Padding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


class Pad(nn.Module):
    """`torch.nn.functional.pad` with these arguments."""

    def __init__(self, pad: Sequence[int], mode: str = "constant", value: float = 0.0):
        super().__init__()
        self.pad, self.mode, self.value = pad, mode, value

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        # other modes take no value, not even the default
        value = {"value": self.value} if self.mode == "constant" else {}
        return functional.pad(input, list(self.pad), self.mode, **value)
