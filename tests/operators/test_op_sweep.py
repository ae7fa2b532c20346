"""PyTorch's operator database against the oracle (see `op_sweep.py`): some ops, and those that are given indices by samples.

All ops, with second derivatives too, are in `test_op_options.py`.
"""

from __future__ import annotations

import pytest
import torch
from case_tools import Net, param
from op_sweep import database, name_of, outcomes
from torch import nn

import fxcurv
from fxcurv.errors import MixedSamplesError
from fxcurv.extensions import BatchGrad

FINE = {"right", "mixed", "refused", "random", "constant", "sparse", "not finite", "no number"}
# served by a rule, by the fallback, by a decomposition; indices into samples; outputs of different shapes; constants
SOME = [
    "_upsample_bilinear2d_aa", "addmm", "bmm", "cat", "cdist", "cholesky", "cumsum", "diagonal_scatter", "gather",
    "index_put", "linalg.cholesky", "linalg.det", "linalg.svd", "logsumexp", "lu_unpack", "nextafter",
    "nn.functional.cosine_embedding_loss", "nn.functional.group_norm", "nn.functional.pad (circular)",
    "nn.functional.prelu", "prod", "scatter_add", "select_scatter", "sgn", "sort", "var (unbiased)",
]  # fmt: skip
# no dimension is apart, and it is the index that has the samples
LOOKUPS = [
    "nn.functional.cross_entropy", "nn.functional.linear_cross_entropy", "nn.functional.linear_cross_entropy (chunked)",
    "nn.functional.linear_cross_entropy (chunked_none)", "nn.functional.multi_margin_loss",
    "nn.functional.multilabel_margin_loss", "index_fill", "index_copy", "index_select", "index_add", "index_reduce (mean)",
    "index_reduce (prod)", "index_reduce (amin)", "index_reduce (amax)", "take", "_segment_reduce (lengths)",
    "_segment_reduce (offsets)",
]  # fmt: skip
INFOS = {name_of(info): info for info in database()}


def check(name):
    found = outcomes(INFOS[name], 1)
    for o in found:
        assert o.kind in FINE, o
        # an error of fxcurv's own names op and line
        assert o.kind != "refused" or "op " in o.message or "torch.export" in o.message or "the loss" in o.message, o
        assert not o.gradient.startswith(("wrong", "failed")), o
    return {o.kind for o in found}


@pytest.mark.parametrize("name", SOME)
def test_op(name):
    assert "right" in check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKUPS)
def test_lookup(name):
    check(name)


def refused(run, error, match, **kwargs):
    torch.manual_seed(0)
    x = torch.randn(4, 2, 5, 6)
    net = Net(run, w=param(1, 1, 6))
    with torch.no_grad():
        y = torch.randn_like(net(x))
    with pytest.raises(error, match=match):
        fxcurv.compile(net, nn.MSELoss(), [BatchGrad()], **kwargs)(x, y)


def test_a_size_that_is_the_probes_batch():
    """Resizing to 3 is the identity on the probe's batch of 3, and mixes samples on any other."""
    aten = torch.ops.aten

    def run(m, x):
        return aten._upsample_bilinear2d_aa(x * m.w, [3, 6], False)

    refused(run, MixedSamplesError, "mixes samples", batch_dim=2)
