"""Custom ops: a file each, with reference, CPU implementation and fake beside each other. Importing this registers them."""

from fxcurv.kernels import (
    max_pool_columns,
    outer_batch,
    outer_clip_sum,
    outer_norm,
    outer_square_sum,
    outer_square_sum_conv,
)

__all__ = [
    "max_pool_columns",
    "outer_batch",
    "outer_clip_sum",
    "outer_norm",
    "outer_square_sum",
    "outer_square_sum_conv",
]
