"""Properties of ops, a table for each: passes look a property up instead of naming ops.

They are facts about an op's forward, which a user's rule for the op does not change. Properties of its derivative
(linear, elementwise, in order, ...) are in its rule (`Rule`). A property refers to canonical arguments and the first
output. `tests/rules/test_traits.py` tries every entry on random values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxcurv.ir.graph import canonical_args
from fxcurv.ir.private import decomposes, schema_of

aten = torch.ops.aten


# ---- by PyTorch's tags ------------------------------


# Elementwise ops on integers, whose tags do not say so.
UNTAGGED = {aten.__and__.Tensor, aten.__and__.Scalar, aten.__or__.Tensor, aten.__or__.Scalar}


def pointwise(op: Any) -> bool:
    """Whether the op is elementwise by its tag, which ops without a rule have too."""
    return torch.Tag.pointwise in getattr(op, "tags", ()) or op in UNTAGGED


def random(op: Any) -> bool:
    """Whether the op draws random numbers, so that a second call gives others."""
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())


def takes_sizes(op: Any) -> bool:
    """Whether the op takes sizes, which may depend on the batch size; True for an op without a schema."""
    schema = schema_of(op)
    return schema is None or "SymInt" in str(schema)


# ---- layers ------------------------------

# (argument that is a weight, the output's feature axis): an entry of the weight affects one index of that axis only
WEIGHTS: dict[Any, tuple[int, int]] = {
    aten.linear.default: (1, -1), aten.convolution.default: (1, 1), aten.mm.default: (1, -1), aten.embedding.default: (0, -1),
}  # fmt: skip

# (argument that is a bias, the output's axis along which it is added)
BIASES: dict[Any, tuple[int, int]] = {
    aten.linear.default: (2, -1),
    aten.convolution.default: (2, 1),
    aten.layer_norm.default: (3, -1),
    aten.native_layer_norm.default: (3, -1),
    aten._native_batch_norm_legit_no_training.default: (2, 1),
}

# Products x z or x z + b of arguments (x, z, b): linear in x and in z
PRODUCTS = {
    aten.linear.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.convolution.default,
}  # fmt: skip

# Matrix products (x, z) over the last two axes. False: rows of x times columns of z; True: rows of x times rows of z
MATRIX_PRODUCTS = {aten.linear.default: True, aten.mm.default: False, aten.bmm.default: False}


class Convolution(NamedTuple):
    """Arguments of a convolution."""

    x: Any
    weight: Any
    bias: Any
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def convolution(node: fx.Node) -> Convolution | None:
    """The arguments of a convolution in any number of dimensions; None for any other op."""
    return Convolution(*canonical_args(node)) if node.target is aten.convolution.default else None


# ---- sums and zeros ------------------------------


def plain_sum(node: fx.Node) -> bool:
    """Whether a node is x + z, without a scale."""
    return node.target is aten.add.Tensor and canonical_args(node)[2] == 1


# Where several values are equal, the derivative of one output does not exist, and that of the others does. A cotangent of zero
# would give NaN; none does not. Other ops get zeros, as PyTorch's formulas of some drop what they have no first cotangent for.
APART = {aten._linalg_svd.default, aten._linalg_eigh.default}

# The output is zero for all inputs.
ZEROS = {aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default}

# The output is zero if the first argument is.
KEEP_ZERO = {
    aten.unsqueeze.default, aten.squeeze.dim, aten.view.default, aten.reshape.default, aten.expand.default,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.neg.default, aten.sum.dim_IntList,
}  # fmt: skip

# The output is zero if one argument is and the others are finite.
ZERO_FACTOR = {aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.mul.Scalar}


def makes_zeros(node: fx.Node) -> bool:
    """Whether a node is zero for all inputs."""
    return node.target in ZEROS or (node.target is aten.full.default and node.args[1] == 0)


# The output is one for all inputs; the output is one if the first argument is, in every dtype that the op takes.
ONES = {aten.ones_like.default, aten.ones.default, aten.new_ones.default}
KEEP_ONES = {
    aten.abs.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.sign.default,
    aten._to_copy.default, aten.clone.default,
}  # fmt: skip

# Sums over the axes that the second argument lists.
SUMS = {aten.sum.dim_IntList}

# They put each entry of their first argument [..., C, h, w] at some position of [..., C, H, W].
SCATTERS = {aten.max_pool2d_with_indices_backward.default, torch.ops.fxcurv.max_pool_columns.default}


# ---- memory ------------------------------


# They return their argument's memory, without an annotation in their schemas.
UNSAID_VIEWS = {aten._unsafe_view.default}


def borrows(node: fx.Node, lenders: set[fx.Node]) -> bool:
    """Whether a value may share memory with one of `lenders`, by the schemas of the ops between them."""
    if node in lenders:
        return True
    if node.op != "call_function" or _has_own_memory(node.target):
        return False
    return any(borrows(n, lenders) for n in node.all_input_nodes)


def _has_own_memory(op: Any) -> bool:
    """Whether an op never returns an argument or a view of one; a composite op may, even without an annotation."""
    schema = schema_of(op)
    if schema is None or op in UNSAID_VIEWS or any(r.alias_info is not None for r in schema.returns):
        return False
    return op in PRODUCTS or not decomposes(op)


# op -> the same op written over its first argument. These are elementwise in all tensors, or add to the first.
IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor, aten.sub.Tensor: aten.sub_.Tensor, aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor, aten.pow.Tensor_Scalar: aten.pow_.Scalar,
    aten.index_add.default: aten.index_add_.default,
}  # fmt: skip


# The values of the argument, in memory of their own and perhaps in another layout.
COPIES = {aten.clone.default}


def of_one(op: Any, x: Any = None, dims: Any = None, *more: Any, **dtype: Any) -> bool:
    """Whether a call is a sum over axes of size one: `x` without them."""
    sums = op is aten.sum.dim_IntList and not more and not dtype and bool(dims)
    return sums and x.is_floating_point() and all(x.shape[d] == 1 for d in dims)


# Those of IN_PLACE that only add to their first argument.
ADDING = {aten.add.Tensor, aten.sub.Tensor, aten.index_add.default}


def _mm(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if total is None else total.addmm_(a, b)


def _bmm(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b) if total is None else total.baddbmm_(a, b)


# op -> function(total, a, b) that adds the op's output to `total` in place, or returns it if `total` is None.
ADDED = {aten.mm.default: _mm, aten.bmm.default: _bmm}

# ---- cheap to compute again ------------------------------

# Ops that cost little more than their memory traffic and are deterministic. Pointwise ops and views, recognised by tag
# and schema, are cheap too. Matrix products, convolutions, sorts and decompositions are not.
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

# ---- no derivative ------------------------------

# Their output counts as a constant: its derivative is zero wherever it exists, or is cut off (`detach`).
CUTS = {
    aten.detach.default, aten.sign.default, aten.floor.default, aten.ceil.default, aten.round.default, aten.trunc.default,
    aten.fill.Scalar, aten.zero.default,
}  # fmt: skip

# They read only the shape of their argument.
OF_SHAPE = {
    aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
    aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default,
}  # fmt: skip
CUTS |= OF_SHAPE

# Their second argument shows only a shape or a dtype.
LIKE_OTHER = {
    aten.expand_as.default, aten.view_as.default, aten.reshape_as.default, aten.type_as.default, aten.to.other,
}  # fmt: skip

# Random numbers have no derivative, neither in an argument that gives their shape nor in one that parametrises them.
CUTS |= {
    aten.rand_like.default, aten.randn_like.default, aten.randint_like.default, aten.randint_like.low_dtype,
    aten.bernoulli.default, aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor,
    aten.normal_functional.default, aten.poisson.default, aten.binomial.default, aten.uniform.default,
    aten.exponential.default, aten.cauchy.default, aten.log_normal.default, aten.geometric.default,
}  # fmt: skip

# The outputs that are new values of state, which PyTorch differentiates in nothing.
STATE = {aten._native_batch_norm_legit_functional.default: (3, 4)}

# ---- numbers ------------------------------

# They return the value of a tensor with one entry as a number.
ITEMS = {aten.item.default, aten._local_scalar_dense.default}

# Capture wraps a literal tensor, such as `torch.tensor(3)`, in one of these.
LITERALS = {aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.lift.default}

# ---- layout ------------------------------

# They keep images in channels last, as ops with an elementwise rule do.
KEEP = {
    aten.max_pool2d_with_indices.default, aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default,
    aten._native_batch_norm_legit_no_training.default, aten.constant_pad_nd.default, aten.cat.default, aten._to_copy.default,
}  # fmt: skip

# Elementwise, but their output is always contiguous (for log_sigmoid, the fake op claims another layout).
CONTIGUOUS = {aten.log_sigmoid.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor}

# Views of all entries of their argument: same memory from the first element on, same dtype.
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

# Views, or copies where the strides allow no view.
REARRANGED = VIEWS | {aten.reshape.default}

_REFERS_TO_SIZES = (aten.view.default, aten.reshape.default)
_REFERS_TO_AN_AXIS = (aten.unsqueeze.default, aten.squeeze.dim)


def on_rows(node: fx.Node, rows: int) -> list[Any] | None:
    """The arguments with which a view that leaves the first axis alone applies to `rows` entries of that axis.

    None for any other op. The caller has to know that the first axis keeps its size.
    """
    if node.target in _REFERS_TO_SIZES:
        _, sizes = node.args
        return [[rows, *sizes[1:]]]  # type: ignore[misc]
    if node.target not in _REFERS_TO_AN_AXIS:
        return None
    (source, axis), ndim = node.args, node.meta["val"].ndim
    return None if axis in (0, -ndim, -source.meta["val"].ndim) else [axis]  # type: ignore[union-attr]


class Slice(NamedTuple):
    """Arguments of x[..., start:end:step]; an end of None or beyond the axis is the end of the axis."""

    x: Any
    dim: int
    start: Any
    end: Any
    step: int

    @property
    def everything(self) -> bool:
        """Whether the slice takes the whole axis."""
        return self.start in (None, 0) and self.step == 1 and (self.end is None or self.end == 2**63 - 1)


def sliced(node: fx.Node) -> Slice | None:
    """The arguments of a slice; None for any other op."""
    return Slice(*canonical_args(node)) if node.target is aten.slice.Tensor else None


# ---- along axes ------------------------------

# They act on each line along one axis, their second argument, by itself.
ALONG_AXIS = {
    aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.log_softmax.int, aten._log_softmax.default,
    aten.logsumexp.default, aten.logcumsumexp.default, aten.cumprod.default, aten.prod.dim_int,
}  # fmt: skip

# They act on each slice over the last axes, as many as the second argument lists, by itself.
ALONG_LAST_AXES = {aten.layer_norm.default}

# ---- clamps and maxima ------------------------------

# They clamp x to (low, high): monotone, and constant wherever two inputs have the same output
CLAMPS: dict[Any, tuple[float, float]] = {aten.relu.default: (0, math.inf), aten.relu6.default: (0, 6)}


def bounds(node: fx.Node) -> tuple[float, float] | None:
    """(low, high) of an op that clamps its first argument; None for any other op."""
    if node.target is aten.hardtanh.default:
        _, low, high = canonical_args(node)
        return low, high
    return CLAMPS.get(node.target)


# The maxima of windows over the last two axes, and the index of each.
MAX_POOL = aten.max_pool2d_with_indices.default


def window(node: fx.Node) -> list[Any] | None:
    """[kernel, stride, padding, dilation, ceil_mode] of `MAX_POOL`; None for any other op."""
    return list(canonical_args(node)[1:]) if node.target is MAX_POOL else None


def zero_padding(node: fx.Node) -> list[int] | None:
    """The widths of zero padding, the last axis first, negative ones crop; None for any other op."""
    if node.target is not aten.constant_pad_nd.default:
        return None
    _, widths, value = canonical_args(node)
    return widths if value == 0 else None


# Their results are entries of their argument, which their derivatives find again by comparing.
EXTREMES = {
    aten.amax.default, aten.amin.default, aten.aminmax.default, aten.max.default, aten.min.default, aten.median.default,
    aten.nanmedian.default,
}  # fmt: skip
_NORMS = {aten.linalg_vector_norm.default, aten.norm.Scalar, aten.norm.ScalarOpt_dim}


def extreme(op: Any, args: Sequence[Any]) -> bool:
    """Whether a call gives entries of its argument, or their sizes, which its derivative finds again by comparing."""
    return op in EXTREMES or op in _NORMS and len(args) > 1 and args[1] in (math.inf, -math.inf)


# Their results are found by repeated squaring: rounding grows with the argument, and is that of the largest entry.
BY_SQUARING = {aten.linalg_matrix_exp.default}


def rounding(op: Any, args: Sequence[Any], y: Tensor) -> Tensor:
    """How far rounding may move each entry of a result `y`, in units of its dtype."""
    if op in BY_SQUARING and y.numel():
        return y.abs().amax() * args[0].abs().sum(-1).amax()
    return y


# ---- losses ------------------------------

# Names of losses as they are captured, for losses without a rule of their own.
_LOSSES = re.compile(r"aten\.(\w+_loss\w*|binary_cross_entropy\w*|kl_div)(\.|$)")


def named_loss(op: str) -> bool:
    """Whether PyTorch calls the op of this name a loss."""
    return _LOSSES.match(op) is not None


# ---- means ------------------------------

MEANS = {aten.mean.default, aten.mean.dim}

# Losses with outputs (loss, sum of weights), whose mean is weighted
WEIGHED = {aten.nll_loss_forward.default, aten.nll_loss2d_forward.default}


def over_ranks(node: fx.Node) -> str:
    """What a node does between the ranks of a process group, "" if nothing.

    "sum"; "wait" for it; "gather" shards; "hold" some of them; "scatter" a sum; wait for that and sum over "replicas";
    "reduce" to one rank (`ir.shards`); give what each rank may "read"; give the "rows" of all ranks (`ir.crossings`).
    """
    ops = torch.ops._c10d_functional
    known = {ops.all_reduce.default: "sum", ops.wait_tensor.default: "wait"}
    return known.get(node.target, "") or getattr(node.target, "over_ranks", "")
