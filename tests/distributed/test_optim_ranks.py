"""Optimizers on two ranks take the steps that one process takes on the batch of both."""

import pytest
import torch
from processes import on_ranks
from subjects import made, mesh_of, part
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fxcurv.optim import EKFAC, KFAC, NaturalGradientCG

KINDS = {
    "ekfac": lambda model, loss, **o: EKFAC(
        model, loss, joint=True, basis_interval=2, fisher="empirical", check=None, **o
    ),
    "kfac": lambda model, loss, **o: KFAC(model, loss, joint=True, mc_samples=None, check=None, **o),
    "cg": lambda model, loss, **o: NaturalGradientCG(
        model, loss, iterations=40, tol=1e-12, adaptive=True, check=None, **o
    ),
}


def steps(optimizer, model, x, y):
    for _ in range(3):
        optimizer.step((x, y), seed=3)
    return [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def on_a_rank(rank, want):
    """The dampings, in the end, with parameters that every rank has, and that are sharded."""
    found, mesh = [], mesh_of(2)
    for kind, make in KINDS.items():
        for sharded in (False, True) if kind == "cg" else (False,):  # shards of the others: test_checkpoints.py
            model, loss, x, y = made("squares", 7)
            if sharded:
                fully_shard(model, mesh=mesh)
            optimizer = make(model, loss, mesh=mesh)
            got = steps(optimizer, model, part(x, [5, 2], rank), part(y, [5, 2], rank))
            torch.testing.assert_close(got, want[kind], rtol=1e-8, atol=1e-10)
            found.append(float(optimizer.param_groups[0]["damping"]))
    return found


def alone(kind):
    model, loss, x, y = made("squares", 7)
    return steps(KINDS[kind](model, loss), model, x, y)


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one():
    a, b = on_ranks(2, on_a_rank, {kind: alone(kind) for kind in KINDS})
    assert a == b
