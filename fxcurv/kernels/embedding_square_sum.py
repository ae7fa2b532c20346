"""embedding_square_sum: sum_{v,n} w[v, n] (sum over positions s with index[n, s] = r of g[v, n, s, :])^2 for every row r.

Shapes: index [N, S] of integers in 0 .. rows - 1, g [V, N, S, D], w [V, N] (real, signed) or None -> [rows, D]. Positions
with index `padding` do not count; a negative padding means none. Half precision is accumulated and returned in float32.

The gradient of a sample is never formed as a table: positions are sorted by (sample, index), and g is summed over
the positions of each pair.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.ir.precision import wide
from fxcurv.kernels import blocks as cpu
from fxcurv.kernels.register import on_cuda


def reference(index: Tensor, g: Tensor, w: Tensor | None, rows: int, padding: int) -> Tensor:
    """The definition, with a table of gradients per column and sample."""
    onehot = torch.nn.functional.one_hot(index.long(), rows).to(g.dtype) * (index != padding).unsqueeze(-1)
    p = torch.einsum("nsr,vnsd->vnrd", onehot, g).square()
    p = p if w is None else p * w[:, :, None, None]
    return p.sum((0, 1))


@torch.library.custom_op("fxcurv::embedding_square_sum", mutates_args=())
def embedding_square_sum(index: Tensor, g: Tensor, w: Tensor | None, rows: int, padding: int) -> Tensor:
    """Summed squares of the rows' gradients; see the module."""
    v, n, s, d = g.shape
    out = g.new_zeros(rows, d, dtype=wide(g.dtype))
    for (part,) in cpu.boxes((n,), max(1, cpu.BLOCK // max(1, s * d))):
        found, squares = _squares(index[part], g[:, part], None if w is None else w[:, part], rows, padding)
        out.index_add_(0, found, squares)
    return out


def _squares(index: Tensor, g: Tensor, w: Tensor | None, rows: int, padding: int) -> tuple[Tensor, Tensor]:
    """For every pair of sample and row that occurs: (the row [U], its squares summed over columns [U, D])."""
    n, s = index.shape
    pairs = (torch.arange(n, device=index.device).unsqueeze(1) * rows + index).flatten()
    kept = (index.flatten() != padding).nonzero().squeeze(1)
    sorted_pairs, order = pairs[kept].sort()
    pairs, counts = sorted_pairs.unique_consecutive(return_counts=True)
    total = g.new_zeros(len(pairs), g.shape[3], dtype=wide(g.dtype))
    if len(pairs):
        where, begins, sample = kept[order], counts.cumsum(0) - counts, pairs // rows
        for k, column in enumerate(g.to(total.dtype)):
            # embedding_bag sums rows of the column; a bag has the positions of one pair
            h = torch.embedding_bag(column.flatten(0, 1), where, begins, mode=0)[0]
            total.addcmul_(h, h if w is None else h * w[k, sample].to(h.dtype).unsqueeze(1))
    return pairs % rows, total


@embedding_square_sum.register_fake
def _(index, g, w, rows, padding):
    return g.new_empty(rows, g.shape[3], dtype=wide(g.dtype))


@register_flop_formula(torch.ops.fxcurv.embedding_square_sum)
def _(index, g, *rest, out_shape=None, **kwargs):
    # an addition per entry, a square and an addition per pair, with at most as many pairs as positions
    v, n, s, d = g
    return 3 * v * n * s * d


on_cuda(embedding_square_sum, "embedding_square_sum")
