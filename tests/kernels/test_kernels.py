"""The custom ops on a CPU against their references, and as operators: schema, fake, count of operations."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from covering import covering
from kernel_samples import KERNELS, LAYOUTS, SMALL, TILED, arguments, check
from torch.utils.flop_counter import FlopCounterMode

from fxcurv.kernels import blocks as cpu


def op(name):
    return getattr(torch.ops.fxcurv, name).default


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "sizes"), SMALL + TILED, ids=str)
def test_values(name, sizes, dtype):
    check(name, op(name), arguments(name, sizes, dtype))


@pytest.mark.parametrize(("case", "layout", "block"), covering(SMALL, LAYOUTS, [1, 7, 100, 5000]), ids=str)
def test_values_in_several_blocks(case, layout, block, monkeypatch):
    name, sizes = case
    monkeypatch.setattr(cpu, "BLOCK", block)
    check(name, op(name), arguments(name, sizes, layout=layout))


@pytest.mark.parametrize("layout", ["contiguous", "reversed"])
@pytest.mark.parametrize("name", KERNELS)
def test_as_operators(name, layout):
    """Schema, fake and no autograd formula: what `torch.library` can check of an op."""
    args = arguments(name, KERNELS[name].sizes[1], layout=layout)
    torch.library.opcheck(op(name), args, test_utils=("test_schema", "test_faketensor"))


# Operations at sizes of the table, counted by hand: two for each term of each sum of products.
FLOPS = {
    ("outer_norm", (2, 3, 5, 7, 3)): 2 * (2 * 3 * 5) * (7 * 3),  # by the products
    ("outer_norm", (2, 2, 30, 100, 90)): 2 * (30 * 30) * (2 * 90 + 2 * 2 * 100),  # by pairs of positions, in one block
    ("outer_square_sum", (2, 3, 5, 7, 3, True, False)): 2 * (2 * 3 * 5) * (7 * 3),
    # 5 positions of 6 taps for each of 3 outputs
    ("outer_square_sum_conv", (2, 3, 2, 3, (7,), (3,), (2,), (2,), (1,), 1, True, False)): 2 * (2 * 3) * 3 * 5 * 6,
    # 5 x 2 positions, 2 of the 4 channels and 6 taps for each of 6 outputs
    ("outer_square_sum_conv", (2, 3, 4, 6, (5, 4), (3, 2), (1, 2), (1, 0), (1, 1), 2, True, True)): 2 * 6 * 6 * 10 * 12,
}


@pytest.mark.parametrize(("name", "sizes"), FLOPS, ids=str)
def test_flops(name, sizes):
    args = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments(name, sizes)]
    with FlopCounterMode(display=False) as counter:
        op(name)(*args)
    assert counter.get_total_flops() == FLOPS[name, sizes]


def test_triton_is_not_imported():
    """Nor needed, before a CUDA tensor comes."""
    script = "import sys; sys.modules['triton'] = None; import torch, fxcurv; from fxcurv.kernels import outer_norm"
    script += "; assert outer_norm.outer_norm(torch.ones(1, 2, 3), torch.ones(1, 1, 2, 3)).item() == 36"
    subprocess.run([sys.executable, "-c", script], check=True)
