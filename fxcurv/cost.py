"""Predicted seconds from operation and byte counts and two machine constants."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, bytes moved, bytes newly allocated, and kernel launches of one candidate."""

    flops: float
    bytes: float
    fresh: float = 0.0
    calls: int = 1

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.bytes + other.bytes, self.fresh + other.fresh, self.calls + other.calls
        )

    def seconds(self) -> float:
        """Time on a two-core x86 machine: only ratios between candidates matter.

        120 GFLOP/s is a library GEMM at these shapes, 20 GB/s a streaming pass, 4.5 GB/s the first touch of
        pages that the allocator maps afresh, and 5 microseconds the dispatch of one op.
        """
        return self.flops / 120e9 + self.bytes / 20e9 + self.fresh / 4.5e9 + 5e-6 * self.calls
