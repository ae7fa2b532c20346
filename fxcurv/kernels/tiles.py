"""Shared by the Triton kernels: launch configurations, precision, and a tile of a matrix product.

Sums are accumulated in float32, or in float64 for float64. float32 factors enter the tensor cores as tf32 if
`torch.backends.cuda.matmul.fp32_precision` is "tf32", and are multiplied in full precision ("ieee") otherwise.
No kernel adds atomically: programs that share a sum write parts, which are added afterwards in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def config(rows: int, cols: int, inner: int, warps: int, stages: int) -> triton.Config:
    """A tile [rows, cols] of the result, `inner` terms of its sum at a time."""
    return triton.Config({"ROWS": rows, "COLS": cols, "INNER": inner}, num_warps=warps, num_stages=stages)


# The first is used if nothing can be timed.
CONFIGS = [
    config(64, 64, 32, 4, 3),
    config(64, 64, 16, 4, 3),
    config(64, 64, 32, 8, 2),
    config(32, 64, 32, 4, 3),
    config(64, 32, 32, 4, 3),
    config(128, 64, 32, 8, 3),
    config(64, 128, 32, 8, 3),
    config(128, 128, 16, 8, 3),
    config(128, 128, 32, 8, 3),
    config(128, 128, 64, 8, 3),
]
# For kernels that hold more than a tile and its factors: the first is small, so that registers suffice for every dtype.
TWO_TILES = [config(32, 32, 16, 8, 2), *CONFIGS]
SQUARE = [config(32, 32, 16, 4, 1), *(c for c in CONFIGS if c.kwargs["ROWS"] == c.kwargs["COLS"])]
LEAST = 32  # the least side of a tile


def tuned(
    key: Sequence[str],
    rows: str = "",
    cols: str = "",
    zero: Sequence[str] = (),
    configs: Sequence[triton.Config] = CONFIGS,
) -> Callable:
    """Decorator: time the kernel with each of `configs` at the first call with new values of the arguments `key`.

    Args:
        key: names of arguments.
        rows: the argument whose size is cut into tiles of ROWS, so that much larger tiles are left out; "" keeps all.
        cols: likewise for COLS.
        zero: results with elements that a configuration may leave unwritten; they are zeroed before each is tried.
        configs: the candidates.
    """
    timed = torch.cuda.is_available() and not triton.knobs.runtime.interpret

    def fitting(configs: list[triton.Config], args: dict[str, Any], **meta: Any) -> list[triton.Config]:
        sides = [(side, name) for side, name in (("ROWS", rows), ("COLS", cols)) if name]
        limits = [(side, triton.next_power_of_2(args[name])) for side, name in sides]
        return [c for c in configs if all(c.kwargs[side] <= max(limit, 2 * LEAST) for side, limit in limits)]

    def decorate(fn: Callable) -> Any:
        return triton.autotune(
            list(configs if timed else configs[:1]),
            key=list(key),
            reset_to_zero=list(zero) or None,
            prune_configs_by={"early_config_prune": fitting},
        )(triton.jit(fn))

    return decorate


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot` for factors of this dtype."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def launch(kernel: Any, grid: Callable, like: Tensor, *args: Any) -> None:
    """Run `kernel` on the device of `like`, at the precision for its dtype."""
    with torch.cuda.device_of(like):
        kernel[grid](*args, PRECISION=precision(like.dtype))


def tiles(rows: int, cols: int, tile_rows: int, tile_cols: int) -> int:
    """The number of tiles of a matrix."""
    return triton.cdiv(rows, tile_rows) * triton.cdiv(cols, tile_cols)


def splits(n: int, programs: int, device: torch.device) -> tuple[int, int]:
    """(number of parts, samples in each) of a sum over n samples, so that parts * `programs` keep the device busy."""
    busy = 4 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1)
    each = triton.cdiv(n, max(1, min(n, busy // programs)))
    return triton.cdiv(n, each), each


@triton.jit
def product(
    x, y, m, n, k_end, m_end, n_end, stride_xm, stride_xk, stride_yk, stride_yn,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile of sum_k x[m, k] y[k, n] at the rows m [ROWS] and columns n [COLS]; zero beyond the ends."""
    tile = tl.zeros((ROWS, COLS), ACC)
    for start in range(0, k_end, INNER):
        k = start + tl.arange(0, INNER)
        left = tl.load(
            x + m[:, None] * stride_xm + k[None, :] * stride_xk, (m[:, None] < m_end) & (k[None, :] < k_end), 0.0
        )
        right = tl.load(
            y + k[:, None] * stride_yk + n[None, :] * stride_yn, (k[:, None] < k_end) & (n[None, :] < n_end), 0.0
        )
        tile = tl.dot(left, right, tile, input_precision=PRECISION, out_dtype=ACC)
    return tile
