"""Multiplication by a number."""

from __future__ import annotations

from torch import Tensor, nn


class ScaleModule(nn.Module):
    """`weight * input`.

    Raises:
        ValueError: if `weight` is no float.
    """

    def __init__(self, weight: float = 1.0):
        super().__init__()
        if not isinstance(weight, float):
            raise ValueError(f"ScaleModule({weight!r}): the weight is a float")
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.weight * input
