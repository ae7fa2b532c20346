"""softmax_root: columns of a root of the softmax cross-entropy's Hessian, and the columns times a weight.

With p = softmax(logits[n]), q = sqrt(p): sum_v s_v s_v^T = scale[n]^2 (diag p - p p^T) for

    s_v = scale[n] q_v (e_v - r),   r = p                           v = 0 .. C - 1,
                                    r = (p + q_0 e_0) / (1 + q_0)   v = 1 .. C - 1, with `few`:

diag p - p p^T = Q (I - q q^T) Q, Q = diag q, has rank C - 1; the reflection that takes e_0 to -q has columns
u_v = e_v - q_v (q + e_0) / (1 + q_0) that complete q to an orthonormal basis, and s_v = scale Q u_v, v > 0.

So s_v W = scale q_v (W_v - r W): one matrix product, r W, and a correction of rows of W, without any s_v.

Shapes: logits [N, C], scale [N], weight [C, I] or None -> [V, N, I], or [V, N, C] without a weight. V = C, or C - 1
with `few` and C > 1. The result has the dtype that logits and weight promote to, half precision is computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.ir.precision import wide
from fxcurv.kernels import blocks as cpu
from fxcurv.kernels.register import on_cuda


def reference(logits: Tensor, scale: Tensor, weight: Tensor | None, few: bool) -> Tensor:
    """The definition: Q times the columns of I - q q^T, or times those of a reflection, column by column."""
    q = (0.5 * logits.log_softmax(1)).exp()
    eye = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
    if few and q.shape[1] > 1:
        w = q + eye[0]
        u = eye - w.unsqueeze(2) * w.unsqueeze(1) / (1 + q[:, 0])[:, None, None]
        u = u[:, :, 1:]
    else:
        u = eye - q.unsqueeze(2) * q.unsqueeze(1)
    s = torch.einsum("n,nc,ncv->vnc", scale, q, u)
    return s if weight is None else s @ weight


def parts(logits: Tensor, scale: Tensor, few: bool) -> tuple[Tensor, Tensor, int]:
    """(scale q_v [V, N], r [N, C], the first v), in float32 for half precision."""
    # half of the logarithm: a probability that underflows still has a root
    q = (0.5 * logits.to(wide(logits.dtype)).log_softmax(1)).exp()
    r, first = q.square(), 0
    if few and q.shape[1] > 1:
        q0 = q[:, :1]
        r[:, :1] += q0
        r, first = r / (1 + q0), 1
    return (q * scale.to(q.dtype).unsqueeze(1))[:, first:].t(), r, first


@torch.library.custom_op("fxcurv::softmax_root", mutates_args=())
def softmax_root(logits: Tensor, scale: Tensor, weight: Tensor | None, few: bool) -> Tensor:
    """Columns of the root, or their products with a weight; the module says more."""
    heights, r, first = parts(logits, scale, few)
    dtype = result_dtype(logits, weight)
    if weight is None:
        out = torch.mul(heights.unsqueeze(2), -r, out=r.new_empty(len(heights), *r.shape))
        out.diagonal(first, 0, 2).add_(heights.t())
        return out.to(dtype)
    weight = weight.to(wide(dtype))
    mean, rows = r.to(weight.dtype) @ weight, weight[first:]
    heights = heights.to(weight.dtype).unsqueeze(2)
    out = weight.new_empty(len(rows), *mean.shape)
    for (part,) in cpu.boxes((len(rows),), max(1, cpu.BLOCK // max(1, mean.numel()))):
        torch.sub(rows[part].unsqueeze(1), mean, out=out[part]).mul_(heights[part])
    return out.to(dtype)


def result_dtype(logits: Tensor, weight: Tensor | None) -> torch.dtype:
    """Of the columns."""
    return logits.dtype if weight is None else torch.promote_types(logits.dtype, weight.dtype)


@softmax_root.register_fake
def _(logits, scale, weight, few):
    n, c = logits.shape
    v = c - 1 if few and c > 1 else c
    return logits.new_empty(v, n, c if weight is None else weight.shape[1], dtype=result_dtype(logits, weight))


@register_flop_formula(torch.ops.fxcurv.softmax_root)
def _(logits, scale, weight, few, *rest, out_shape=None, **kwargs):
    n, c = logits
    v, i = c - 1 if few and c > 1 else c, c if weight is None else weight[1]
    return 2 * v * n * i + (0 if weight is None else 2 * n * c * i)


on_cuda(softmax_root, "softmax_root")
