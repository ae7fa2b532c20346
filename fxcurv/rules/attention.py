"""Attention in its mathematics: products and a softmax, whose own rules do the rest (any order of derivative)."""

from __future__ import annotations

import math

import torch

from fxcurv.rules.base import rewrite

aten = torch.ops.aten


@rewrite(aten.scaled_dot_product_attention.default)
def _attention(q, k, v, mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = (q * scale) @ k.transpose(-2, -1)
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask, scores, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    # a query that may attend to nothing gets zeros, as PyTorch's kernels give
    p = torch.softmax(scores, -1) if mask is None or is_causal else aten._safe_softmax.default(scores, -1)
    if dropout_p > 0:
        p = aten.native_dropout.default(p, dropout_p, True)[0]
    return p @ v
