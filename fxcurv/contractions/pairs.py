"""Sums of products of two P's, sum_i A_i B_i, as what contractions compute: weighted squares.

    A B = 1/4 (s A + B / s)^2 - 1/4 (s A - B / s)^2        for any s

The squares are as large as s^2 A^2 + B^2 / s^2, so their difference is as precise as the product only if s A and B / s
are of one size. Sizes are known where P is: there is an s for every column, sample and entry of the parameter, or for
all entries that share an entry of `g` (the weights of one output of a layer).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcurv.contractions.contract import Spec, combine
from fxcurv.contractions.factors import Conv, Explicit, Factor
from fxcurv.ir.placement import Shard


def squares_of(factors: list[Factor]) -> tuple[list[Factor], Tensor]:
    """(factors of the columns s A + B / s and s A - B / s, weights [2D, 1]) from factors whose columns are A and B.

    Several uses add up to one P, so they get one s: they are joined, as P itself if they are not of one kind.
    """
    factors = combine(Spec(2, "vn"), factors)
    factor = factors[0] if len(factors) == 1 else Explicit(sum(f.materialise() for f in factors))
    if isinstance(factor, Conv) and factor.place != Shard(0):
        factor = factor.dense()  # a sample is spread over several images
    a, b = factor.g.unflatten(0, (2, -1)).unbind(0)
    scale = (_size(factor, b) / _size(factor, a)).detach()
    a, b = a * scale, b / scale
    quarter = a.new_full((a.shape[0], 1), 0.25)
    return [factor.with_g(torch.cat([a + b, a - b]))], torch.cat([quarter, -quarter])


def _size(factor: Factor, g: Tensor) -> Tensor:
    """The root of P's size for columns `g`; the smallest number is added, so that the root of zero has a derivative."""
    return (factor.with_g(g).size() + torch.finfo(g.dtype).tiny).sqrt()
