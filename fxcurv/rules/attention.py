"""Attention: as products and a softmax, whose rules give derivatives of any order, or as a fused kernel."""

from __future__ import annotations

import math
from math import prod

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from fxcurv.ir.placement import MIXED, REPLICATE, Shard
from fxcurv.rules.base import Rule, register, rewrite
from fxcurv.rules.call import Call

aten = torch.ops.aten


def mathematics(q, k, v, mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """softmax(q k^T scale + mask) v; q [..., T, D], k and v [..., S, D]."""
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
    # a query that may attend to nothing gets zeros, as in PyTorch's kernels
    p = torch.softmax(scores, -1) if mask is None or is_causal else aten._safe_softmax.default(scores, -1)
    if dropout_p > 0:
        p = aten.native_dropout.default(p, dropout_p, True)[0]
    return p @ v


rewrite(aten.scaled_dot_product_attention.default)(mathematics)


@register(aten.scaled_dot_product_attention.default)
class Attention(Rule):
    """Attention before `fuse`; `Mixed` also if a parameter enters beside samples: its products are placed instead."""

    name = "attention"

    def linear(self, active):
        return tuple(active) == (2,)

    def place(self, sites, args, shape, n):
        inputs, rest = sites[:3], [s for s in sites[3:] if s]
        if any(s.active and not isinstance(s.place, Shard) and s.place != REPLICATE for s in (*inputs, *rest)):
            return MIXED
        sharded = [s for s in inputs if isinstance(s.place, Shard)]
        decisive = {s.place for s in ([s for s in sharded if s.active] or sharded)}
        if not decisive:
            return REPLICATE if all(s.place == REPLICATE for s in rest) else MIXED
        place, *others = decisive
        free = any(s.active and s.place == REPLICATE for s in (*inputs, *rest))
        # positions attend to each other, and several query heads may share a key head
        apart = place.dim < len(shape) - 2 and all(s.shape[place.dim] == shape[place.dim] for s in sharded)
        return MIXED if free or others or not apart else place


@register(aten._scaled_dot_product_flash_attention_for_cpu.default)
class FlashOnCPU(Attention):
    """(y, log-sum-exp, which nothing differentiable reads); q [B, H, T, D], k and v [B, H', S, D]."""

    def formula(self, op, args):
        q, k, v, dropout, causal, mask, scale = args
        y = mathematics(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return y, q.new_zeros(q.shape[:3])

    def transpose(self, call: Call, wrt, g):
        """Columns join the batch dimension; the inputs are not copied if one of the two has size one."""
        q, k, v, dropout, causal, mask, scale = call.args
        columns = g[0].shape[0]

        def rows(t):
            return t.expand(columns, *t.shape).flatten(0, 1)

        per_sample = mask is not None and mask.ndim == 4 and not (isinstance(mask.shape[0], int) and mask.shape[0] == 1)
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            g[0].flatten(0, 1), rows(q), rows(k), rows(v), *map(rows, call.y), dropout, causal,
            attn_mask=rows(mask) if per_sample else mask, scale=scale,
        )  # fmt: skip
        return [found[i].unflatten(0, (columns, -1)) for i in wrt]


def _product_flops(q, k, v, number: tuple[int, int]) -> int:
    """FLOPs of number[0] products [T, D] by [D, S], and of number[1] with the features of `v` in place of D."""
    return 2 * prod(q[:3]) * k[2] * (number[0] * q[3] + number[1] * v[3])


if aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:  # counted as PyTorch counts the CUDA kernels

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
    def _forward_flops(q, k, v, *args, out_shape=None, **kwargs) -> int:
        return _product_flops(q, k, v, (1, 1))

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
    def _backward_flops(g, q, k, v, *args, out_shape=None, **kwargs) -> int:
        return _product_flops(q, k, v, (3, 2))
