"""Optimizers on two ranks take the steps that one process takes on the batch of both."""

import pytest
import torch
from processes import on_ranks
from subjects import made, mesh_of, part

from fxcurv.optim import EKFAC, KFAC, NaturalGradientCG

KINDS = {
    "ekfac": lambda model, loss, **o: EKFAC(model, loss, joint=True, basis_interval=2, fisher="empirical", check=None, **o),
    "kfac": lambda model, loss, **o: KFAC(model, loss, joint=True, mc_samples=None, check=None, **o),
    "cg": lambda model, loss, **o: NaturalGradientCG(model, loss, iterations=40, tol=1e-12, adaptive=True, check=None, **o),
}


def steps(optimizer, model, x, y):
    for _ in range(3):
        optimizer.step((x, y), seed=3)
    return [p.detach() for p in model.parameters()]


def on_a_rank(rank, kind):
    model, loss, x, y = made("squares", 7)
    optimizer = KINDS[kind](model, loss, mesh=mesh_of(2))
    found = steps(optimizer, model, part(x, [5, 2], rank), part(y, [5, 2], rank))
    alone, loss, x, y = made("squares", 7)
    torch.testing.assert_close(found, steps(KINDS[kind](alone, loss), alone, x, y), rtol=1e-8, atol=1e-10)
    return float(optimizer.param_groups[0]["damping"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_take_the_steps_of_one(kind):
    a, b = on_ranks(2, on_a_rank, kind)
    assert a == b
