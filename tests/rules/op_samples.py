"""Calls of single aten ops for tests of rules: what PyTorch's `OpInfo` samples come down to, and some by hand.

A call is (op, args): canonical positional arguments, defaults filled in, tensors in float64. Nothing here imports the
compiler.
"""

from __future__ import annotations

import functools
import itertools
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Sample = tuple[Any, tuple]
MOST = 1000
"""Elements of an argument."""

# OpInfo's name of an op where it is not the op's own.
ALIASES = {
    "log_sigmoid": "logsigmoid", "_softmax": "softmax", "_safe_softmax": "softmax", "_log_softmax": "log_softmax",
    "convolution": "conv2d", "_native_batch_norm_legit_no_training": "batch_norm", "cross_entropy_loss": "cross_entropy",
    "native_dropout": "dropout", "max_pool2d_with_indices": "max_pool2d", "max_pool3d_with_indices": "max_pool3d",
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d", "_adaptive_avg_pool3d": "adaptive_avg_pool3d", "_unsafe_view": "view",
    "_to_copy": "to", "alias": "alias_copy", "_cdist_forward": "cdist",
}  # fmt: skip


def _one_image(x, weight, *rest):
    return x.ndim < weight.ndim


# Calls that no rule has to serve: what is refused by name, and one image, which a rewrite gives a batch.
OUTSIDE: dict[str, Callable[..., bool]] = {
    "embedding": lambda weight, index, padding, by_frequency, sparse: by_frequency or sparse,
    **{f"conv{d}d": _one_image for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _one_image for d in (1, 2, 3)},
}


class Recorder(TorchDispatchMode):
    """Keeps the calls of one op."""

    def __init__(self, op):
        super().__init__()
        self.op, self.calls = op, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.op:
            self.calls.append(canonical(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def canonical(op, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple:
    """All arguments in the order of the schema."""
    rest = op._schema.arguments[len(args) :]
    return (*args, *[kwargs.get(a.name, a.default_value) for a in rest])


def run(op, args: Sequence[Any], fn: Callable | None = None) -> Any:
    """`op` (or `fn` in its place) on canonical arguments."""
    arguments = op._schema.arguments
    positional = [v for a, v in zip(arguments, args, strict=True) if not a.kwarg_only]
    keywords = {a.name: v for a, v in zip(arguments, args, strict=True) if a.kwarg_only}
    return (fn or op)(*positional, **keywords)


def _recorded(op, fn, leaves: list[Any], spec) -> list[tuple]:
    """The calls of `op` when `fn` runs: composite ops are seen by a trace before dispatch, the others by a mode."""
    if not op._can_decompose():
        with Recorder(op) as recorder, torch.no_grad():
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            fn(*args, **kwargs)
        return recorder.calls
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def flat(*tensors):
        new = list(leaves)
        for i, t in zip(where, tensors, strict=True):
            new[i] = t
        args, kwargs = pytree.tree_unflatten(new, spec)
        return pytree.tree_leaves(fn(*args, **kwargs))

    given = [leaves[i] for i in where]
    graph = make_fx(flat, pre_dispatch=True)(*given).graph
    values = dict(zip([n for n in graph.nodes if n.op == "placeholder"], given, strict=True))
    calls = []
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.target is op and all(n in values for n in inputs):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            calls.append(canonical(op, args, kwargs))
    return calls


@functools.cache
def _database() -> dict[str, list]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    found = defaultdict(list)
    for info in op_db:
        found[info.name.split(".")[-1]].append(info)
    return found


def _of_database(op, limit: int) -> list[Sample]:
    name = op._schema.name.removeprefix("aten::")
    out, seen = [], set()
    for info in _database().get(ALIASES.get(name, name), []):
        if info.name.startswith(("masked", "sparse", "_refs")) or torch.float64 not in info.dtypes:
            continue
        # drawn one by one: some OpInfos have hundreds of samples
        drawn = info.sample_inputs("cpu", torch.float64, requires_grad=False)
        for sample in itertools.islice(drawn, 4 * limit):
            leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
            leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            for args in _recorded(op, info.op, leaves, spec):
                key = shapes(args)
                if key not in seen and len(out) < limit:
                    seen.add(key)
                    out.append((op, args))
    return out


def shapes(args: tuple) -> str:
    return str(pytree.tree_map(lambda a: tuple(a.shape) if isinstance(a, Tensor) else a, args))


def t(*shape: int) -> Tensor:
    """A random tensor."""
    return torch.randn(*shape, dtype=torch.float64)


def by_hand() -> dict[Any, list[tuple]]:
    """Op -> arguments without trailing defaults, where OpInfo has none or too few."""
    mean, var = t(4), t(4).abs() + 0.5
    soft = t(5, 3, 2).softmax(1)
    index = torch.tensor([0, 2, -100, 1, 1])
    hidden = t(3, 4).masked_fill(torch.tensor([True, False, True])[:, None], -torch.inf)
    flags = [True, 2, 0.0, False, False, True]
    lstm = [t(12, 3), t(12, 3), t(12), t(12), t(12, 3), t(12, 3), t(12), t(12)]
    out = {
        aten.add.Scalar: [(t(3, 4), 2.5, 3), (t(3, 4), 1)],
        aten.sub.Scalar: [(t(3, 4), 2.5, 3), (t(3, 4), 1)],
        aten.rsub.Scalar: [(t(3, 4), 2.5, 3), (t(3, 4), 1)],
        aten.mul.Scalar: [(t(3, 4), 2.5)],
        aten.index_add.default: [
            (t(3, 4), 0, torch.tensor([2, 0, 2, 1, 2]), t(5, 4), 1), (t(2, 3), -1, torch.tensor([1, 1]), t(2, 2), 2.5),
        ],
        aten.fake_quantize_per_tensor_affine_cachemask.default: [(t(3, 4), 0.25, 3, 0, 9), (t(30, 4), 0.1, 3, 0, 9)],
        aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default: [
            (t(3, 4), torch.tensor(0.25), torch.tensor(3, dtype=torch.int32), torch.tensor([on]), 0, 9) for on in (0, 1)
        ],
        aten.fake_quantize_per_channel_affine_cachemask.default: [
            (t(3, 4), torch.tensor([0.25, 0.1, 0.125]), torch.tensor(zero, dtype=kind), 0, 0, 9)
            for zero, kind in (([3, 1, 4], torch.int32), ([3.2, 1.0, 3.7], torch.float32))
        ],
        aten.div.Scalar: [(t(3, 4), 2.5)],
        aten.pow.Tensor_Scalar: [(t(3, 4), p) for p in (0, 1, 2, 3, -1)] + [(t(3, 4).abs() + 0.1, p) for p in (0.5, 2.5)],
        aten.masked_fill.Scalar: [(t(3, 4), t(3, 4) > 0, 2.0), (t(3, 1), t(3, 4) > 0, 2.0), (t(4), t(3, 4) > 0, 2.0)],
        aten.masked_fill.Tensor: [(t(3, 4), t(3, 4) > 0, t(1)[0]), (t(4), t(3, 1) > 0, t(1)[0])],
        aten.native_dropout.default: [(t(3, 4), p, True) for p in (0.0, 0.3, 1.0)],
        aten._softmax.default: [(t(3, 4, 2), d, False) for d in (0, 1, -1)],
        aten._log_softmax.default: [(t(3, 4, 2), d, False) for d in (0, 1, -1)],
        aten._safe_softmax.default: [(t(3, 4), -1), (hidden, -1)],
        aten._native_batch_norm_legit_no_training.default: [
            (t(3, 4, *extra), w, b, mean, var, 0.1, 1e-5)
            for extra in ((), (2,), (2, 3))
            for w, b in ((t(4), t(4)), (None, None))
        ],
        aten._native_batch_norm_legit_functional.default: [
            (t(3, 4, *extra), w, b, mean, var, True, 0.1, 1e-5)
            for extra in ((), (2,), (2, 3))
            for w, b in ((t(4), t(4)), (None, None))
        ],
        aten.layer_norm.default: [(t(3, 2, 4), [4], t(4), t(4)), (t(3, 2, 4), [2, 4], t(2, 4), None), (t(4), [4])],
        aten.native_layer_norm.default: [
            (t(3, 2, 4), [4], t(4), t(4), 1e-5), (t(3, 2, 4), [2, 4], t(2, 4), None, 1e-5), (t(3, 4), [4], None, None, 1e-5),
        ],
        aten._scaled_dot_product_flash_attention_for_cpu.default: [
            (t(3, 2, 3, 4), t(3, 2, 5, 4), t(3, 2, 5, 4)),
            (t(2, 4, 3, 2), t(2, 2, 3, 2), t(2, 2, 3, 2), 0.0, True, None, 0.3),
            (t(3, 2, 2, 4), t(3, 2, 2, 4), t(3, 2, 2, 4), 0.0, False, t(3, 1, 2, 2)),
            (t(2, 2, 3, 4), t(2, 2, 3, 4), t(2, 2, 3, 4), 0.0, False, hidden[:, :3]),
        ],
        aten.convolution.default: [
            (t(3, 2, 5), t(4, 2, 3), t(4), [2], [1], [1], False, [0], 1),
            (t(3, 2, 6, 5), t(4, 1, 3, 2), None, [2, 1], [1, 0], [1, 2], False, [0, 0], 2),
            (t(3, 2, 4, 3, 3), t(2, 2, 2, 2, 2), t(2), [1, 1, 2], [0, 1, 0], [1, 1, 1], False, [0, 0, 0], 1),
            (t(3, 2, 5), t(2, 4, 3), t(4), [2], [1], [1], True, [1], 1),
            (t(3, 4, 3, 3), t(4, 2, 3, 2), t(4), [2, 1], [1, 0], [1, 2], True, [1, 0], 2),
            (t(2, 2, 3, 2, 2), t(2, 1, 2, 2, 2), None, [1, 2, 1], [0, 0, 0], [1, 1, 1], True, [0, 1, 0], 1),
        ],
        aten.cross_entropy_loss.default: [
            (t(5, 3), index, None, 1, -100, 0.0), (t(5, 3), index, t(3).abs(), 2, -100, 0.1),
            (t(5, 3), index, t(3).abs(), 0, -100, 0.0), (t(5, 3, 2), soft, None, 1, -100, 0.2), (t(3), torch.tensor(1)),
        ],
        aten._unsafe_view.default: [(t(3, 4), [2, 6])],
        aten.squeeze.dims: [(t(3, 1, 2, 1), [1, 3]), (t(3, 1, 2), [0, -2])],
        aten.squeeze.dim: [(t(3, 1, 2), 1), (t(3, 1, 2), 0)],
        aten.alias.default: [(t(3, 4),)],
        aten._to_copy.default: [(t(3, 4),)],
        aten.to.dtype: [(t(3, 4), torch.float32)],
        aten.to.dtype_layout: [(t(3, 4), torch.float32, torch.strided, torch.device("cpu"))],
        aten.to.device: [(t(3, 4), torch.device("cpu"), torch.float64)],
        aten.lift_fresh_copy.default: [(t(3, 4),)],
        aten.expand.default: [(t(3, 4), [2, 3, 4]), (t(1, 4), [3, 4]), (t(4), [3, -1]), (t(3, 1), [3, 5])],
        aten.slice.Tensor: [(t(6, 4), 0, 1, 5, 2), (t(6, 4), -1, -3, None, 1), (t(3), 0, None, 100, 1)],
        aten.split.sizes: [(t(6, 4), [2, 3, 1], 0), (t(6, 4), [1, 3], -1)],
        aten.contiguous.default: [(t(3, 4).t(),)],
        aten.copy.default: [(t(3, 4), t(3, 4)), (t(3, 4), t(4)), (t(3, 4).float(), t(3, 1))],
        aten.constant_pad_nd.default: [(t(3, 4), [1, 2]), (t(3, 4), [-1, 2, 1, 0], 1.5), (t(3, 4, 5), [0, -2])],
        aten.cat.default: [([t(3, 2), t(3, 1)], 1), ([t(3, 2), t(1, 2)], 0), ([t(2, 2, 1), t(2, 2, 3)], -1)],
        aten.sum.dim_IntList: [(t(3, 4, 2), d, k) for d in ([0], [1, -1], []) for k in (False, True)],
        aten.mean.dim: [(t(3, 4, 2), d, k) for d in ([0], [1, -1]) for k in (False, True)],
        aten.max_pool2d_with_indices.default: [(t(3, 2, 5, 6), [3, 2], [2, 1], [1, 0], [1, 2]), (t(2, 5, 5), [2, 2])],
        aten.max_pool3d_with_indices.default: [(t(2, 2, 4, 4, 5), [2, 2, 3], [2, 1, 1], [1, 0, 1])],
        aten.lstm.input: [(t(4, 2, 3), [t(2, 4, 3), t(2, 4, 3)], lstm, *flags)],
        aten.gru.input: [(t(4, 2, 3), t(1, 4, 3), [t(9, 3), t(9, 3), t(9), t(9)], True, 1, 0.0, False, False, True)],
        aten.conv1d.padding: [(t(2, 3, 7), t(2, 3, 4), t(2), [1], "same", [1]), (t(2, 3, 7), t(2, 3, 4), None, [2], "valid")],
        aten.grid_sampler.default: [
            *((t(2, 2, 4, 5), t(2, 3, 2, 2) * 0.6, how, beyond, False) for how in (0, 1, 2) for beyond in (0, 1, 2)),
            (t(2, 2, 3, 4), t(2, 3, 2, 2) * 0.6, 0, 0, True), (t(1, 2, 3, 4, 3), t(1, 2, 2, 3, 3) * 0.6, 0, 0, False),
        ],
        aten.conv2d.padding: [(t(2, 2, 5, 6), t(2, 1, 2, 3), t(2), [1, 1], "same", [1, 2], 2)],
        aten.conv3d.padding: [(t(2, 2, 4, 3, 4), t(2, 2, 2, 3, 2), None, [1, 1, 1], "same")],
        aten._weight_norm_interface.default: [(t(3, 4), t(3, 1), 0), (t(2, 3, 4), t(1, 1, 4), 2)],
        aten.rms_norm.default: [(t(3, 4), [4], t(4)), (t(3, 2, 4), [2, 4], None, 0.1)],
        aten.scaled_dot_product_attention.default: [
            (t(2, 2, 3, 4), t(2, 2, 5, 4), t(2, 2, 5, 3)),
            (t(2, 2, 3, 4), t(2, 2, 3, 4), t(2, 2, 3, 4), None, 0.0, True),
            (t(2, 4, 3, 4), t(2, 2, 5, 4), t(2, 2, 5, 4), t(3, 5), 0.0, False, 0.3, True),
            (t(2, 2, 3, 4), t(2, 2, 5, 4), t(2, 2, 5, 4), t(2, 1, 3, 5) > -1),
        ],
        aten.slice_scatter.default: [
            (t(3, 4), t(3, 2), 1, 2, 2**63 - 1, 1), (t(3, 4), t(3, 4)), (t(3, 4), t(3, 2), -1, None, None, 2),
            (t(3, 4), t(3, 2), 1, -3, -1, 1), (t(4, 3), t(1, 3), 0, 3, 100, 2),
        ],
        aten.select_scatter.default: [(t(3, 4), t(3), 1, 2), (t(3, 4), t(3), -1, -1), (t(3, 4, 2), t(4, 2), 0, -2)],
        aten.as_strided.default: [(t(3, 4), [3, 2], [4, 1]), (t(4, 3).t(), [2, 2], [2, 3], 1), (t(3, 4), [3, 3], [1, 1])],
        aten.as_strided_scatter.default: [(t(3, 4), t(3, 2), [3, 2], [4, 1]), (t(3, 4), t(2), [2], [5], 1)],
        aten.index_put.default: [
            (t(3, 4), [None, torch.tensor([2, 0])], t(3, 2)), (t(3, 4), [torch.tensor([1, 2]), torch.tensor([0, 3])], t(1)),
            (t(3, 4), [torch.tensor([1, 1])], t(2, 4), True),
        ],
        aten.index_fill.int_Scalar: [(t(3, 4), 1, torch.tensor([0, 2]), 1.5)],
        aten.index_fill.int_Tensor: [(t(3, 4), 1, torch.tensor([0, 2]), t(1)[0])],
        aten.fill.Tensor: [(t(3, 4), t(1)[0])],
        aten.linalg_matrix_exp.default: [(t(3, 3),), (t(2, 3, 3),)],
        aten.unflatten.int: [(t(3, 6), 1, [2, 3]), (t(3, 6), -1, [-1, 2])],
    }  # fmt: skip
    one, several = 3 * torch.eye(3, dtype=torch.float64) + t(3, 3), 3 * torch.eye(3, dtype=torch.float64) + t(2, 3, 3)
    for op in (aten.linalg_solve.default, aten.linalg_solve_ex.default):
        out[op] = [(one, t(3)), (several, t(2, 3)), (one, t(2, 3, 4)), (several, t(3, 1)), (several, t(2, 4, 3), False)]
    steps = [t(3, 3), t(3, 3), t(3), t(3)] * 2
    for op in (aten.rnn_tanh.input, aten.rnn_relu.input):
        out[op] = [(t(4, 2, 3), t(4, 2, 3)[:2], steps, True, 2, 0.0, False, False, False)]
    return out


@functools.cache
def samples(op, limit: int = 8) -> list[Sample]:
    """Calls of `op`: by hand and up to `limit` of different shapes from the database, none of them empty or large."""
    random.seed(0)  # OpInfo draws sizes with it
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        hand = [(op, canonical(op, args, {})) for args in by_hand().get(op, [])]
        found = hand + _of_database(op, limit)
    outside = OUTSIDE.get(op._schema.name.removeprefix("aten::"), lambda *args: False)
    return [(op, a) for op, a in found if all(0 < x.numel() <= MOST for x in tensors(a).values()) and not outside(*a)]


def tensors(args: Any) -> dict[int, Tensor]:
    """Position among the flattened arguments -> tensor."""
    return {i: leaf for i, leaf in enumerate(pytree.tree_leaves(args)) if isinstance(leaf, Tensor)}


def with_leaves(args: tuple, new: dict[int, Any]) -> tuple:
    """`args` with some of its flattened leaves replaced."""
    leaves, spec = pytree.tree_flatten(args)
    return pytree.tree_unflatten([new.get(i, leaf) for i, leaf in enumerate(leaves)], spec)


def floats(out: Any) -> list[Tensor]:
    """The floating-point tensors of an op's result."""
    return [o for o in pytree.tree_leaves(out) if isinstance(o, Tensor) and o.is_floating_point()]


def draws(op, args: tuple) -> bool:
    """Whether the call is random, so that no two of them are equal."""
    return op is aten.scaled_dot_product_attention.default and args[4] > 0 or op is aten.rrelu.default and args[3]


def differentiable(op, args: tuple) -> list[int]:
    """The positions that autograd has a derivative for."""
    return [i for i, x in tensors(args).items() if x.is_floating_point() and _alone(op, args, i)]


def _alone(op, args: tuple, i: int) -> bool:
    x = tensors(args)[i].clone().requires_grad_()
    try:
        out = [o.sum() for o in floats(run(op, with_leaves(args, {i: x}))) if o.requires_grad]
        return bool(out) and torch.autograd.grad(out, [x], allow_unused=True)[0] is not None
    except RuntimeError:
        return False


def vjp(op, args: tuple, wrt: Sequence[int], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Plain autograd: the cotangents of the arguments `wrt` from those of the floating-point outputs."""
    copies = {i: tensors(args)[i].clone().requires_grad_() for i in wrt}
    out = floats(run(op, with_leaves(args, copies)))
    pairs = [(o, g) for o, g in zip(out, cotangents, strict=True) if o.requires_grad]
    outs, gs = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outs, list(copies.values()), gs))


def splits(size: int) -> Iterator[tuple[int, int, int]]:
    """(outer, n, inner) with product `size` and n > 1."""
    for outer, n in itertools.product(range(1, size + 1), range(2, size + 1)):
        if size % (outer * n) == 0:
            yield outer, n, size // (outer * n)
