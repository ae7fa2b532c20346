"""Facts about ops that passes ask for, one table per property."""

from __future__ import annotations

import operator
from typing import Any

import torch

aten = torch.ops.aten


# the output's axis of features where it is read from the op alone (`layers.WEIGHTS` has the others)
FEATURES = {aten.mm.default: -1, aten.embedding.default: -1}

# argument that is added to the output, and the output's axis that it lies along
BIASES: dict[Any, tuple[int, int]] = {
    aten.linear.default: (2, -1),
    aten.convolution.default: (2, 1),
    aten.layer_norm.default: (3, -1),
    aten._native_batch_norm_legit_no_training.default: (2, 1),
}

# the output's axis of features, for ops whose second argument is a weight
WEIGHTS: dict[Any, int] = {aten.linear.default: -1, aten.convolution.default: 1}

# x z, or x z + b: their first three arguments are (x, z, b)
PRODUCTS = {
    aten.linear.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.convolution.default,
}  # fmt: skip

ZEROS = {aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default}

KEEP_ZERO = {
    aten.unsqueeze.default, aten.squeeze.dim, aten.view.default, aten.reshape.default, aten.expand.default,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.neg.default, aten.sum.dim_IntList,
}  # fmt: skip

ZERO_FACTOR = {aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.mul.Scalar}

# ---- what is saved ------------------------------

# Cheap beside the pointwise ops and views, which say so by their tags and schemas.
CHEAP = {
    aten.clone.default, aten._to_copy.default, aten.cat.default, aten.where.self, aten.gather.default,
    aten.scatter.value, aten.scatter.src, aten.scatter_add.default, aten.embedding.default, aten.index.Tensor,
    aten.constant_pad_nd.default, aten.slice_backward.default, aten.select_backward.default, aten.layer_norm.default,
    aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.amax.default, aten.amin.default,
    aten._softmax.default, aten._log_softmax.default, aten.softmax.int, aten.log_softmax.int, aten._safe_softmax.default,
    aten._softmax_backward_data.default, aten._log_softmax_backward_data.default, aten.reshape.default,
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default, aten.zeros.default,
    aten.ones.default, aten.full.default, aten.arange.default, aten.arange.start_step, aten.eye.default,
}  # fmt: skip

# Their derivative is zero or undefined: what they return is a constant.
CUTS = {
    aten.detach.default, aten.sign.default, aten.floor.default, aten.ceil.default, aten.round.default, aten.trunc.default,
    aten.fill.Scalar, aten.zero.default,
}  # fmt: skip

# These read nothing but the shape.
CUTS |= {aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}

# What is drawn has no derivative, neither where only the shape is read nor where the parameters of a distribution are.
CUTS |= {
    aten.rand_like.default, aten.randn_like.default, aten.randint_like.default, aten.randint_like.low_dtype,
    aten.bernoulli.default, aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor,
    aten.normal_functional.default, aten.poisson.default, aten.binomial.default, aten.uniform.default,
    aten.exponential.default, aten.cauchy.default, aten.log_normal.default, aten.geometric.default,
}  # fmt: skip

CUTS |= {aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}

CONVOLUTION = aten.convolution.default

# besides the elementwise ones of one argument: their outputs are laid out as what they read is
KEEP = {
    aten.max_pool2d_with_indices.default, aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default,
    aten._native_batch_norm_legit_no_training.default, aten.constant_pad_nd.default, aten.add.Tensor, aten.sub.Tensor,
    aten.mul.Tensor, aten.cat.default, aten._to_copy.default, operator.getitem,
}  # fmt: skip

# they leave the order of elements as it is
IN_ORDER = {
    aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.clone.default, aten.view.default,
    aten.reshape.default, aten.unsqueeze.default,
}  # fmt: skip

SCATTERS = {aten.max_pool2d_with_indices_backward.default, torch.ops.fxcurv.max_pool_columns.default}

# monotone, flat wherever not injective, and zero at zero
ACTIVATIONS = {aten.relu.default, aten.relu6.default, aten.hardtanh.default}

# None of them changes the first element or the dtype.
VIEWS = {
    aten.view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
}

# views of the axes behind the first one, if they leave its size
BEHIND = {aten.unsqueeze.default, aten.squeeze.dim, aten.view.default, aten.reshape.default}

ALONG_AXIS = {
    aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.log_softmax.int, aten._log_softmax.default,
    aten.logsumexp.default, aten.logcumsumexp.default, aten.cumprod.default, aten.prod.dim_int,
}  # fmt: skip
