"""Cases with fewer samples than they have: of their inputs and targets the first ones, wherever the samples lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cases import CASES
from oracle import tensors
from torch import Tensor
from torch.utils._pytree import tree_map_only

# the batch size is a number in the model
OF_ITS_SIZE = {"parameters_per_sample", "merged_sequence_first", "merged_batch_first"}


def fewer(name: str, inputs: Any, targets: Any) -> Iterator[tuple[int, Any, Any]]:
    """(how many, inputs, targets) of one sample and of two, where there are more and the model takes them."""
    batch_dim = CASES[name].batch_dim
    total, dims = samples(inputs, batch_dim)
    for n in (1, 2):
        if n < total and name not in OF_ITS_SIZE:
            yield n, of_inputs(inputs, batch_dim, n), of_targets(targets, total, n, dims)


def first(value, d, n):
    """The first `n` samples of inputs: all tensors in `value` have them in dimension `d`."""
    return value if d is None else tree_map_only(Tensor, lambda t: t.narrow(d, 0, n), value)


def of_inputs(inputs, batch_dim, n):
    if isinstance(inputs, Mapping):
        dims = batch_dim if isinstance(batch_dim, Mapping) else dict.fromkeys(inputs, batch_dim)
        return {name: first(value, dims.get(name, 0), n) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        dims = batch_dim if isinstance(batch_dim, tuple | list) else [batch_dim] * len(inputs)
        return type(inputs)(first(value, d, n) for value, d in zip(inputs, dims, strict=True))
    return first(inputs, batch_dim, n)


def of_targets(targets, total, n, dims):
    """Targets have their samples where their size is that of the batch, or a multiple where positions are flattened."""

    def cut(t: Tensor) -> Tensor:
        order = [d for d in dict.fromkeys([*dims, *range(t.ndim)]) if d < t.ndim]
        for d in order:
            if t.shape[d] == total:
                return t.narrow(d, 0, n)
        for d in order:
            if t.shape[d] % total == 0:
                return (t.unflatten(d, (total, -1)).narrow(d, 0, n) if 0 in dims else
                        t.unflatten(d, (-1, total)).narrow(d + 1, 0, n)).flatten(d, d + 1)  # fmt: skip
        return t

    return tree_map_only(Tensor, cut, targets)


def samples(inputs, batch_dim):
    """(how many there are, the dimensions in which inputs have them)."""
    every = (
        list(inputs.values())
        if isinstance(inputs, Mapping)
        else inputs
        if isinstance(inputs, tuple | list)
        else [inputs]
    )
    if isinstance(batch_dim, Mapping):
        dims = [batch_dim.get(name, 0) for name in inputs]
    else:
        dims = list(batch_dim) if isinstance(batch_dim, tuple | list) else [batch_dim] * len(every)
    pairs = [(value, d) for value, d in zip(every, dims, strict=True) if d is not None]
    return next(tensors(pairs[0][0])).shape[pairs[0][1]], [d for _, d in pairs]
