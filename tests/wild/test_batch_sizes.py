"""One sample, and another number of samples, after the first batch with the same object, under the probe.

The diagonals are alone with individual gradients here; with all quantities extensions/test_quantities.py does it of every case.
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from compiled import close
from fewer import fewer
from oracle import Oracle

import fxcurv
from fxcurv.extensions import BatchDiagGGNExact, BatchGrad, DiagGGNExact

QUICK = {"mlp_relu", "batch_second", "ce_maps_ignore_weights", "output_tuple"}
# and those whose samples are elsewhere than in the first dimension
NAMES = [
    n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES if n in QUICK or CASES[n].batch_dim
]


@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")
@pytest.mark.parametrize("name", NAMES)
def test_other_batch_sizes(name):
    case = CASES[name]
    model, loss, inputs, targets = case.build()
    extensions = [BatchGrad(), *([] if "nonconvex" in case.tags else [DiagGGNExact(), BatchDiagGGNExact()])]
    compiled = fxcurv.compile(model, loss, extensions, batch_dim=case.batch_dim, check="probe", debug=True)
    for n, x, y in [("all", inputs, targets), *fewer(name, inputs, targets)]:
        result = compiled(x) if targets is None else compiled(x, y)
        oracle = Oracle(model, loss, x, y, **case.oracle)
        torch.testing.assert_close(result.loss, oracle.loss(), equal_nan=True)
        for field in ("grad", *(e.savefield for e in extensions)):
            close(getattr(result, field), getattr(oracle, field)(), f"{field} at {n} samples")
