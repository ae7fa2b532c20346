"""One sample, and another number of samples, as settings of every test model, after the first batch with the same object.

The diagonals are alone with individual gradients here, and no model's placements are doubted by check="probe".
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from cases import CASES
from oracle import Oracle, tensors
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fxcurv
from fxcurv.extensions import BatchDiagGGNExact, BatchGrad, DiagGGNExact

QUICK = {"mlp_relu", "batch_second", "ce_maps_ignore_weights", "output_tuple"}
# the batch size is a number in the model
OF_ITS_SIZE = {"parameters_per_sample", "merged_sequence_first", "merged_batch_first"}


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


@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_other_batch_sizes(name):
    case = CASES[name]
    model, loss, inputs, targets = case.build()
    total, dims = samples(inputs, case.batch_dim)
    extensions = [BatchGrad(), *([] if "nonconvex" in case.tags else [DiagGGNExact(), BatchDiagGGNExact()])]
    compiled = fxcurv.compile(model, loss, extensions, batch_dim=case.batch_dim, check="probe", debug=True)
    for n in dict.fromkeys([total, 1, *([2] if total > 2 else [])]):
        if n < total and name in OF_ITS_SIZE:
            continue
        x, y = of_inputs(inputs, case.batch_dim, n), of_targets(targets, total, n, dims)
        result = compiled(x) if targets is None else compiled(x, y)
        oracle = Oracle(model, loss, x, y, **case.oracle)
        torch.testing.assert_close(result.loss, oracle.loss(), equal_nan=True)
        for field in ("grad", *(e.savefield for e in extensions)):
            compare(getattr(result, field), getattr(oracle, field)(), f"{field} at {n} samples")


def compare(actual, expected, what):
    assert actual.keys() == expected.keys(), what
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, rtol=1e-7, atol=1e-10, equal_nan=True, msg=lambda m, key=key: f"{what} of {key}: {m}"
        )
