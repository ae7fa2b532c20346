"""PyTorch's operator database with all its options, and second derivatives, against plain autograd (see `op_options.py`).

By default a few samples of a few ops run, each with a reason to be here. With `-m slow` every op does, with samples that have
most of its options' values, and each kind of model. A compile takes a second, so all samples (about 10,000, of which 200 per op
are tried) take half a day on a processor of its own. To run as much as there is time for, to stop and to go on where it stopped:

    python tests/operators/op_options.py options.jsonl --minutes 60 # samples in rounds: first one of every op, then a second, …
    python tests/operators/op_options.py options.jsonl --only cdist --every # each model of every sample of one op in all settings

A line of `options.jsonl` is a sample; what is wrong is printed at the end. A crash or a hang is a line too, as every sample
runs in a process of its own op. Without `--every`, a sample is one model in one setting (float64 or float32, `check="first"` or
None), by turns.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from op_options import (
    FAMILIES,
    FAULTS,
    Reference,
    Tried,
    covered,
    fits,
    given,
    kinds,
    of_trial,
    options_of,
    outcomes,
    spread_order,
    trials,
)
from op_sweep import database, name_of

INFOS = {name_of(info): info for info in database()}
# ops that were wrong, or ended in an error of PyTorch's
QUICK = ("roll", "unsafe_chunk", "nn.functional.pad (circular)", "to_sparse")
WRONG = {"as_strided_scatter": "PyTorch's derivative is that of the entries that the op overwrites"}
# what each is here for: curvature by the fallback, by a rule, statistics beside the output, indices
SOME = [("atan2", 1), ("nn.functional.glu", 1), ("native_layer_norm", 1), ("nn.functional.embedding_bag", 1)]


@pytest.mark.parametrize("name, index", SOME)
def test_options(name, index):
    found = list(outcomes(options_of(INFOS[name])[index], index))
    assert found and not [o for o in found if o.kind in FAULTS], found


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in INFOS])
def test_every_op(name):
    """Each kind of model, the first one with second derivatives, by turns of samples; a refusal names the op or a line."""
    if name in WRONG:
        pytest.skip(WRONG[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PyTorch says of ops, and of the arguments that its database has
        several = options_of(INFOS[name])
        few = covered(several)
        count = max(kinds(several[few[0]]), len(few)) if few else 0
    for turn in range(count):
        draws = several[few[turn % len(few)]]
        for o in outcomes(draws, turn, families=["individual"] if turn else FAMILIES):
            assert o.kind not in FAULTS, (draws[0].shapes, o)
            assert o.kind != "refused" or any(word in o.message for word in ("op ", "torch.export", "the loss")), o


# ---- the sweep itself ------------------------------


def test_what_is_covered():
    """Each value of each option is in one of few samples, none of which is too large to be tried."""
    several = options_of(INFOS["masked.sum"])
    few = covered(several, most=100)
    assert len(few) == len(set(few)) < len(several)
    every = set().union(*(set(given(several[i][0])) for i in range(len(several)) if fits(several[i][0])))
    assert set().union(*(set(given(several[i][0])) for i in few)) == every


def test_any_beginning_is_spread():
    assert spread_order(5) == [0, 4, 2, 1, 3]
    assert all(sorted(spread_order(n)) == list(range(n)) for n in range(1, 70))


def test_a_wrong_number_is_seen():
    """A hundredth is far more than what is allowed, of every quantity and in both precisions."""
    tried = Tried(trials(options_of(INFOS["atan2"])[1], 1)[0])
    assert set(tried.expected) == {"grad", "grad_batch", "diag_ggn_exact", "diag_h", "hmp"}
    for field, value in tried.expected.items():
        for dtype in (torch.float32, torch.float64):
            off, allowed = tried.off(field, value, dtype)
            assert off <= allowed, (field, dtype)
            off, allowed = tried.off(field, value * 1.01, dtype)
            assert off > allowed, (field, dtype)


def test_the_references_agree():
    """Double autograd and central differences, on an op with curvature in two arguments."""
    (trial, *_) = trials(options_of(INFOS["atan2"])[1], 0)
    reference = Reference(trial)
    torch.testing.assert_close(reference.hessian(), reference.differences(), rtol=1e-5, atol=1e-7)
    assert next(of_trial(trial, [(torch.float64, "first")])).kind == "right"
