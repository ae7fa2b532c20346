"""check="probe": rules that lie about placements are found on the values of the first call, truthful ones pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net, mlp
from cases import CASES
from claims import OP, Claims, centre
from compiled import compiled_case
from torch import nn

import fxcurv
from fxcurv.errors import ArgumentError, MixedSamplesError
from fxcurv.extensions import BatchGrad, DiagGGNExact, DiagHessian, SumGradSquared
from fxcurv.ir.placement import Shard
from fxcurv.passes import ANALYSIS
from fxcurv.rules.base import RULES
from fxcurv.runtime.probe import Probe

aten = torch.ops.aten


def lying(op, claim, run):
    model = Net(run, first=nn.Linear(4, 3), last=nn.Linear(3, 3))
    return fxcurv.compile(
        model, nn.CrossEntropyLoss(), [BatchGrad(), SumGradSquared()], rules={op: Claims(claim)}, check="probe"
    )


LIES = {
    "custom op": (OP, Shard(0), lambda m, x: m.last(centre(m.first(x)))),
    "running sum": (aten.cumsum.default, Shard(0), lambda m, x: m.last(m.first(x).cumsum(0))),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_are_found(name):
    op, claim, run = LIES[name]
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.raises(MixedSamplesError) as caught:
        lying(op, claim, run)(x, y)
    for words in ("op ", __file__, "m.first(x)", "BatchGrad, SumGradSquared", "sample", "rules=", "Way out"):
        assert words in str(caught.value)


def test_without_the_probe_a_rule_is_believed():
    """Without a rule, the op is placed by redrawing values."""
    op, _, run = LIES["custom op"]
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    model = Net(run, first=nn.Linear(4, 3), last=nn.Linear(3, 3))
    fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad()], rules={op: Claims(Shard(0))}, check=None)(x, y)
    with pytest.raises(MixedSamplesError, match="mixes samples, so BatchGrad"):
        fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad()], check="probe")(x, y)


def test_the_truth_passes():
    """As it does in wild/test_batch_sizes.py, of more cases."""
    compiled, arguments, oracle = compiled_case(CASES["ce_ignore_weights_smoothing"], [BatchGrad()], check="probe")
    result = compiled(*arguments)
    for param, value in oracle.grad_batch().items():
        torch.testing.assert_close(result.grad_batch[param], value)


def test_constants_may_be_reduced_over_the_batch():
    """Inputs that the model standardises depend on no parameter: individual gradients exist."""
    model = Net(lambda m, x: m.net((x - x.mean(0)) / x.std(0)), net=mlp())
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    result = fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad()], check="probe")(x, y)
    torch.testing.assert_close(result.grad_batch["net.0.weight"].sum(0), result.grad["net.0.weight"])


def test_the_random_state_and_the_buffers_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    losses = []
    for check in (None, "probe"):
        torch.manual_seed(3)
        losses.append(fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad()], check=check)(x, y).loss)
    assert losses[0] == losses[1]


def test_what_needs_no_independence_is_not_probed():
    """The whole batch as one sample, and the gradient alone."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    for extensions in ([], [DiagGGNExact(), DiagHessian()]):
        fxcurv.compile(model, F.cross_entropy, extensions, check="probe")(x, y)


def test_one_sample_has_nothing_to_mix_with():
    op, claim, run = LIES["custom op"]
    assert op not in RULES
    lying(op, claim, run)(torch.randn(1, 4), torch.zeros(1, dtype=torch.long))


def test_other_checks_are_unknown():
    with pytest.raises(ArgumentError, match="check='all'"):
        fxcurv.compile(mlp(), F.cross_entropy, check="all")


@pytest.mark.parametrize("n", [2, 3, 6])
def test_every_pair_that_meets_is_found(n):
    """One sample reads one other's value: whichever two they are."""
    net = Net(lambda m, x, rows: m.last(m.first(x)[rows]), first=nn.Linear(4, 3), last=nn.Linear(3, 3))
    compiled = fxcurv.compile(
        net,
        F.cross_entropy,
        [BatchGrad()],
        rules={aten.index.Tensor: Claims(Shard(0))},
        check="probe",
        batch_dim=(0, None),
    )
    x, y, params = torch.randn(n, 4), torch.randint(3, (n,)), dict(net.named_parameters())
    program = compiled.lower((x, torch.arange(n)), y, after=ANALYSIS[-1].__name__).program
    probe = Probe(program)
    for to, of in [(a, b) for a in range(n) for b in range(n)]:
        rows = torch.arange(n)
        rows[to] = of
        given = {"input": (x, rows), "target": (y,)}
        flat = [
            params[i.name] if i.kind == "param" else given[i.kind][i.index] for i in program.inputs if i.kind != "seed"
        ]
        if to == of:
            probe.run(flat, n)
            continue
        with pytest.raises(MixedSamplesError, match=r"index(?s:.*)exchanging samples? .* moves sample " + str(to)):
            probe.run(flat, n)
