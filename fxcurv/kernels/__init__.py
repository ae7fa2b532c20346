"""Custom ops, a file each with reference, CPU implementation, fake and FLOPs. Importing the package registers them."""

from fxcurv.kernels import (
    embedding_square_sum,
    longest,
    max_pool_columns,
    outer_batch_conv,
    outer_gram,
    outer_moments,
    outer_norm,
    outer_square_sum,
    outer_square_sum_conv,
    projections,
    syrk,
    syrk_conv,
)

__all__ = [
    "embedding_square_sum",
    "longest",
    "max_pool_columns",
    "outer_batch_conv",
    "outer_gram",
    "outer_moments",
    "outer_norm",
    "outer_square_sum",
    "outer_square_sum_conv",
    "projections",
    "syrk",
    "syrk_conv",
]
