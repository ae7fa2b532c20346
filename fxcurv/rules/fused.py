"""Ops that may stay PyTorch's own pair of kernels, forward and backward, if only their transpose is needed.

If a second derivative or a tangent is needed, the op is replaced by its mathematics: a rewrite, or the formula of its
rule. A fusion is a function of the node, after placements are known. It returns the function of the op's arguments that
calls the kernels, or the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend

from fxcurv.contractions.sizes import size
from fxcurv.ir.graph import canonical_args
from fxcurv.ir.placement import MIXED, REPLICATE
from fxcurv.ir.program import is_active

aten = torch.ops.aten

FUSED: dict[Callable, Callable[[fx.Node], Callable | str]] = {}


def fused(op: Callable):
    """Decorator: register the function as the fusion of the op."""

    def add(fn):
        FUSED[op] = fn
        return fn

    return add


@fused(aten.layer_norm.default)
def _layer_norm(node: fx.Node) -> Callable | str:
    return _native_layer_norm


def _native_layer_norm(x, shape, weight=None, bias=None, eps=1e-5, cudnn=True):
    return aten.native_layer_norm.default(x, shape, weight, bias, eps)[0]


@fused(aten.scaled_dot_product_attention.default)
def _attention(node: fx.Node) -> Callable | str:
    q, k, v, mask, dropout, *_ = canonical_args(node)
    if dropout > 0:
        return "its dropout is one mask, for the gradient and all columns"
    if is_active(mask):
        return "its mask depends on parameters"
    if node.meta["place"] != REPLICATE and any(is_active(n) and n.meta["place"] == REPLICATE for n in (q, k, v)):
        return "parameters enter it beside samples"
    if node.meta["place"] == MIXED and all(n.meta["place"] != MIXED for n in (q, k, v)):
        return "its samples are not along its batch or its heads"
    if q.meta["val"].device.type != "cpu":
        return f"the kernels of '{q.meta['val'].device.type}' have no rule"
    if q.meta["val"].ndim != 4 or _chosen_backend(node) != SDPBackend.FLASH_ATTENTION.value:
        return "PyTorch has no kernel for these arguments"
    return _flash_on_cpu


def _chosen_backend(node: fx.Node) -> int:
    """PyTorch's backend for this call, asked with empty tensors, because fake ones would fix their symbolic sizes."""
    q, k, v, mask, dropout, causal, scale, gqa = canonical_args(node)
    inputs = [_empty_like(n.meta["val"]).requires_grad_() for n in (q, k, v)]
    mask = None if mask is None else _empty_like(mask.meta["val"])
    return aten._fused_sdp_choice.default(*inputs, mask, dropout, causal, scale=scale, enable_gqa=gqa)


def _empty_like(val: Tensor) -> Tensor:
    stride = [s.node.hint if isinstance(s, torch.SymInt) else s for s in val.stride()]
    return torch.empty_strided(size(val), stride, dtype=val.dtype, device=val.device)


def _flash_on_cpu(q, k, v, mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return aten._scaled_dot_product_flash_attention_for_cpu.default(
        q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale
    )[0]
