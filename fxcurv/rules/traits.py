"""What ops are: a table per property, which passes ask in place of naming ops.

These are facts of an op's forward; a rule that a user passes for the op changes none. What an op's derivative is like
(linear, elementwise, in order, ...) its rule says (`Rule`). A claim is about canonical arguments and the first output.
`tests/rules/test_traits.py` tries every entry on random values.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxcurv.ir.graph import canonical_args
from fxcurv.ir.private import decomposes, schema_of

aten = torch.ops.aten


# ---- by PyTorch's tags ------------------------------


def pointwise(op: Any) -> bool:
    """Whether the op is elementwise, by its tag: so it is for ops without a rule too."""
    return torch.Tag.pointwise in getattr(op, "tags", ())


def random(op: Any) -> bool:
    """Whether the op draws numbers: a second call gives others."""
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())


def takes_sizes(op: Any) -> bool:
    """Whether the op takes sizes, which may be those of the batch; also one that has no schema."""
    schema = schema_of(op)
    return schema is None or "SymInt" in str(schema)


# ---- layers ------------------------------

# (argument that is a weight, the output's axis of features): one entry of the weight moves one index of that axis
WEIGHTS: dict[Any, tuple[int, int]] = {
    aten.linear.default: (1, -1), aten.convolution.default: (1, 1), aten.mm.default: (1, -1), aten.embedding.default: (0, -1),
}  # fmt: skip

# (argument that is added to the output, the output's axis that it lies along)
BIASES: dict[Any, tuple[int, int]] = {
    aten.linear.default: (2, -1),
    aten.convolution.default: (2, 1),
    aten.layer_norm.default: (3, -1),
    aten.native_layer_norm.default: (3, -1),
    aten._native_batch_norm_legit_no_training.default: (2, 1),
}

# x z, or x z + b: linear in each of their first arguments (x, z), and b, the third, is added
PRODUCTS = {
    aten.linear.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.convolution.default,
}  # fmt: skip

# products of matrices (x, z), rows of x by columns of z, on their last two axes; True: rows of x by rows of z
MATRIX_PRODUCTS = {aten.linear.default: True, aten.mm.default: False, aten.bmm.default: False}


class Convolution(NamedTuple):
    """Arguments of a convolution. Which kernel runs it depends on the layout of what it reads."""

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
    """The arguments of a convolution, in any number of dimensions."""
    return Convolution(*canonical_args(node)) if node.target is aten.convolution.default else None


# ---- sums and zeros ------------------------------


def plain_sum(node: fx.Node) -> bool:
    """Whether a node is x + z, neither of them scaled."""
    return node.target is aten.add.Tensor and canonical_args(node)[2] == 1


# Zeros, whatever they read.
ZEROS = {aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default}

# Zeros for zeros in their first argument.
KEEP_ZERO = {
    aten.unsqueeze.default, aten.squeeze.dim, aten.view.default, aten.reshape.default, aten.expand.default,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.neg.default, aten.sum.dim_IntList,
}  # fmt: skip

# Zeros where any of their arguments is zero; the others are finite.
ZERO_FACTOR = {aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.mul.Scalar}


def makes_zeros(node: fx.Node) -> bool:
    """Whether a node is zero whatever it reads."""
    return node.target in ZEROS or (node.target is aten.full.default and node.args[1] == 0)


# Ones, whatever they read; and ones for ones in their first argument, in any dtype that has them.
ONES = {aten.ones_like.default, aten.ones.default, aten.new_ones.default}
KEEP_ONES = {
    aten.abs.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.sign.default,
    aten._to_copy.default, aten.clone.default,
}  # fmt: skip

# Sums over the axes in their second argument.
SUMS = {aten.sum.dim_IntList}

# What they get as their first argument [..., C, h, w] they put, each at some position, into [..., C, H, W].
SCATTERS = {aten.max_pool2d_with_indices_backward.default, torch.ops.fxcurv.max_pool_columns.default}


# ---- memory ------------------------------


# They give back their argument's memory, and their schemas do not say so.
UNSAID_VIEWS = {aten._unsafe_view.default}


def borrows(node: fx.Node, lenders: set[fx.Node]) -> bool:
    """Whether a value may lie in the memory of one of `lenders`, by the schemas of the ops between them."""
    if node in lenders:
        return True
    if node.op != "call_function" or _has_own_memory(node.target):
        return False
    return any(borrows(n, lenders) for n in node.all_input_nodes)


def _has_own_memory(op: Any) -> bool:
    """Whether an op never returns an argument or a view: a composite one without an annotation may."""
    schema = schema_of(op)
    if schema is None or op in UNSAID_VIEWS or any(r.alias_info is not None for r in schema.returns):
        return False
    return op in PRODUCTS or not decomposes(op)


# Elementwise in all tensors, or adding to the first: the same, written over the first argument.
IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor, aten.sub.Tensor: aten.sub_.Tensor, aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor, aten.pow.Tensor_Scalar: aten.pow_.Scalar,
    aten.index_add.default: aten.index_add_.default,
}  # fmt: skip


def of_one(op: Any, x: Any = None, dims: Any = None, *more: Any, **dtype: Any) -> bool:
    """Whether a call is a sum over axes of size one: `x` without them."""
    sums = op is aten.sum.dim_IntList and not more and not dtype and bool(dims)
    return sums and x.is_floating_point() and all(x.shape[d] == 1 for d in dims)


# Of these, the ones that add to their first argument, and do nothing else to it.
ADDING = {aten.add.Tensor, aten.sub.Tensor, aten.index_add.default}


def _mm(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if total is None else total.addmm_(a, b)


def _bmm(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b) if total is None else total.baddbmm_(a, b)


# The same, added to a total, where there is one.
ADDED = {aten.mm.default: _mm, aten.bmm.default: _bmm}

# ---- what is saved ------------------------------

# These cost little more than their memory traffic, and give the same result again. Pointwise ops and views do too; they are
# recognised by tag and schema. Matrix products, convolutions, sorts and decompositions do not.
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

# Their derivative is zero wherever there is one, or is asked not to be: what they return is a constant.
CUTS = {
    aten.detach.default, aten.sign.default, aten.floor.default, aten.ceil.default, aten.round.default, aten.trunc.default,
    aten.fill.Scalar, aten.zero.default,
}  # fmt: skip

# These read nothing but the shape.
OF_SHAPE = {
    aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
    aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default,
}  # fmt: skip
CUTS |= OF_SHAPE

# What is drawn has no derivative, neither where only the shape is read nor where the parameters of a distribution are.
CUTS |= {
    aten.rand_like.default, aten.randn_like.default, aten.randint_like.default, aten.randint_like.low_dtype,
    aten.bernoulli.default, aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor,
    aten.normal_functional.default, aten.poisson.default, aten.binomial.default, aten.uniform.default,
    aten.exponential.default, aten.cauchy.default, aten.log_normal.default, aten.geometric.default,
}  # fmt: skip

# ---- numbers ------------------------------

# The value of a tensor of one entry, as a number.
ITEMS = {aten.item.default, aten._local_scalar_dense.default}

# What a tensor that is written out, `torch.tensor(3)`, goes through.
LITERALS = {aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.lift.default}

# ---- memory ------------------------------

# Besides ops whose rule is elementwise: of images with channels last they make images with channels last.
KEEP = {
    aten.max_pool2d_with_indices.default, aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default,
    aten._native_batch_norm_legit_no_training.default, aten.constant_pad_nd.default, aten.cat.default, aten._to_copy.default,
}  # fmt: skip

# Elementwise, but what they make is contiguous whatever they read (of log_sigmoid the fake op says otherwise).
CONTIGUOUS = {aten.log_sigmoid.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor}

# Views of all that they are given: they share its memory from the first element on, and its dtype.
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

# The same, but for a copy where strides allow no view.
REARRANGED = VIEWS | {aten.reshape.default}

_REFERS_TO_SIZES = (aten.view.default, aten.reshape.default)
_REFERS_TO_AN_AXIS = (aten.unsqueeze.default, aten.squeeze.dim)


def on_rows(node: fx.Node, rows: int) -> list[Any] | None:
    """The arguments with which a view of the axes behind the first does the same to `rows` entries of the first axis.

    None for any other op. The caller knows that the first axis keeps its size.
    """
    if node.target in _REFERS_TO_SIZES:
        _, sizes = node.args
        return [[rows, *sizes[1:]]]  # type: ignore[misc]
    if node.target not in _REFERS_TO_AN_AXIS:
        return None
    (source, axis), ndim = node.args, node.meta["val"].ndim
    return None if axis in (0, -ndim, -source.meta["val"].ndim) else [axis]  # type: ignore[union-attr]


class Slice(NamedTuple):
    """Arguments of x[..., start:end:step]; an end of None or beyond the axis is the axis' own."""

    x: Any
    dim: int
    start: Any
    end: Any
    step: int

    @property
    def everything(self) -> bool:
        """Whether all of the axis is taken, as in x[:, None]."""
        return self.start in (None, 0) and self.step == 1 and (self.end is None or self.end == 2**63 - 1)


def sliced(node: fx.Node) -> Slice | None:
    """The arguments of a slice."""
    return Slice(*canonical_args(node)) if node.target is aten.slice.Tensor else None


# ---- along axes ------------------------------

# Lines along the axis of their second argument, which is a number, do not meet: each gives values of its own.
ALONG_AXIS = {
    aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.log_softmax.int, aten._log_softmax.default,
    aten.logsumexp.default, aten.logcumsumexp.default, aten.cumprod.default, aten.prod.dim_int,
}  # fmt: skip

# Nor do slices over the last axes, as many as their second argument has numbers.
ALONG_LAST_AXES = {aten.layer_norm.default}

# ---- clamps and maxima ------------------------------

# x between these bounds: monotone, and flat wherever different values become one
CLAMPS: dict[Any, tuple[float, float]] = {aten.relu.default: (0, math.inf), aten.relu6.default: (0, 6)}


def bounds(node: fx.Node) -> tuple[float, float] | None:
    """(low, high) of an op that clamps its first argument."""
    if node.target is aten.hardtanh.default:
        _, low, high = canonical_args(node)
        return low, high
    return CLAMPS.get(node.target)


# The maxima of windows over the last two axes; also where each was found.
MAX_POOL = aten.max_pool2d_with_indices.default


def window(node: fx.Node) -> list[Any] | None:
    """[kernel, stride, padding, dilation, ceil_mode] of the op `MAX_POOL`."""
    return list(canonical_args(node)[1:]) if node.target is MAX_POOL else None


def zero_padding(node: fx.Node) -> list[int] | None:
    """The widths of zeros around the last axes, the last one first; negative ones crop."""
    if node.target is not aten.constant_pad_nd.default:
        return None
    _, widths, value = canonical_args(node)
    return widths if value == 0 else None


# ---- losses ------------------------------

# Losses without a rule of their own, by the name of the op that was captured.
_LOSSES = re.compile(r"aten\.(\w+_loss\w*|binary_cross_entropy\w*|kl_div)(\.|$)")


def named_loss(op: str) -> bool:
    """Whether PyTorch calls the op of this name a loss."""
    return _LOSSES.match(op) is not None


# ---- what is divided by the number of samples ------------------------------

MEANS = {aten.mean.default, aten.mean.dim}

# (loss, sum of weights): the mean is weighed
WEIGHED = {aten.nll_loss_forward.default, aten.nll_loss2d_forward.default}


def over_ranks(node: fx.Node) -> str:
    """What a node does between the ranks of a process group.

    "sum", "wait" for one, "gather" shards, "hold" some, sum and "scatter", wait for that and sum over "replicas", "reduce" to one
    rank (`ir.shards`), what each rank may "read", all ranks' "rows" (`ir.crossings`), or nothing, "".
    """
    ops = torch.ops._c10d_functional
    known = {ops.all_reduce.default: "sum", ops.wait_tensor.default: "wait"}
    return known.get(node.target, "") or getattr(node.target, "over_ranks", "")
