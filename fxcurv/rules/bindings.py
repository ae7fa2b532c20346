"""Ops by PyTorch's C bindings, which skip the layers of Python in `torch.ops`.

Those layers take one to three microseconds a call, half the time of a small op. Each function dispatches exactly the op
that it replaces, with the arguments of its schema (`tests/runtime/test_direct.py` records this). Other ops are called
through `torch.ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten

BINDINGS: dict[Any, Callable] = {
    aten.linear.default: F.linear, aten.mm.default: torch.mm, aten.bmm.default: torch.bmm, aten.bmm.out: torch.bmm,
    aten.convolution.default: torch.convolution, aten.embedding.default: torch.embedding,
    aten.add.Tensor: torch.add, aten.sub.Tensor: torch.sub, aten.mul.Tensor: torch.mul, aten.mul.out: torch.mul,
    aten.div.Tensor: torch.div, aten.addcmul.default: torch.addcmul, aten.pow.Tensor_Scalar: torch.pow,
    aten.sqrt.default: torch.sqrt, aten.rsqrt.default: torch.rsqrt, aten.exp.default: torch.exp, aten.log.default: torch.log,
    aten.abs.default: torch.abs, aten.neg.default: torch.neg, aten.reciprocal.default: torch.reciprocal,
    aten.relu.default: torch.relu, aten.tanh.default: torch.tanh, aten.sigmoid.default: torch.sigmoid,
    aten.clamp.default: torch.clamp, aten.where.self: torch.where,
    aten.ne.Scalar: torch.ne, aten.gt.Scalar: torch.gt, aten.lt.Tensor: torch.lt,
    aten.bitwise_and.Scalar: torch.bitwise_and, aten.bitwise_xor.Tensor: torch.bitwise_xor,
    aten.sum.default: torch.sum, aten.sum.dim_IntList: torch.sum, aten.cumsum.default: torch.cumsum,
    aten.linalg_vector_norm.default: torch.linalg.vector_norm, aten.searchsorted.Tensor: torch.searchsorted,
    aten.t.default: torch.t, aten.permute.default: torch.permute, aten.reshape.default: torch.reshape,
    aten.squeeze.dim: torch.squeeze, aten.squeeze.dims: torch.squeeze, aten.unsqueeze.default: torch.unsqueeze,
    aten.select.int: torch.select, aten.cat.default: torch.cat, aten.scatter.value: torch.scatter,
    aten.gather.default: torch.gather, aten.expand.default: Tensor.expand, aten.new_zeros.default: Tensor.new_zeros,
    aten.zeros_like.default: torch.zeros_like, aten.sym_size.int: Tensor.size,
}  # fmt: skip

# Ops that fill a tensor, from numbers alone (FACTORIES) or from an argument's shape (FILLED). `empty` is neither, since
# others write to its result.
FACTORIES = {
    aten.eye.default, aten.full.default, aten.scalar_tensor.default, aten.zeros.default, aten.ones.default, aten.arange.default,
}  # fmt: skip
FILLED = {aten.zeros_like.default, aten.ones_like.default, aten.new_zeros.default, aten.new_ones.default}


def of_no_value(node: fx.Node) -> bool:
    """Whether an op depends only on numbers, or on these and the shape of its first argument."""
    read = [*node.args[1:], *node.kwargs.values()]
    if any(isinstance(a, fx.Node) for part in read for a in (part if isinstance(part, list | tuple) else [part])):
        return False
    return node.target in FILLED or node.target in FACTORIES and not node.all_input_nodes
