"""The custom ops on a CPU against their references, and as operators: schema, fake, count of operations."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from kernel_samples import KERNELS, LAYOUTS, SMALL, TILED, arguments, check, laid_out
from torch.utils.flop_counter import FlopCounterMode

from fxcurv.kernels import blocks as cpu
from fxcurv.kernels import outer_batch


def op(name):
    return getattr(torch.ops.fxcurv, name).default


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "sizes"), SMALL + TILED, ids=str)
def test_values(name, sizes, dtype):
    check(name, op(name), arguments(name, sizes, dtype))


@pytest.mark.parametrize("block", [1, 7, 100, 5000])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "sizes"), SMALL, ids=str)
def test_values_in_several_blocks(name, sizes, layout, block, monkeypatch):
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
    ("outer_batch", (2, 3, 5, 7, 3)): 2 * (2 * 3 * 5) * (7 * 3),
    ("outer_clip_sum", (3, 5, 7, 3)): 2 * (3 * 5) * (7 * 3),
}


@pytest.mark.parametrize(("name", "sizes"), FLOPS, ids=str)
def test_flops(name, sizes):
    args = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments(name, sizes)]
    with FlopCounterMode(display=False) as counter:
        op(name)(*args)
    assert counter.get_total_flops() == FLOPS[name, sizes]


@pytest.mark.parametrize("sizes", KERNELS["outer_batch"].sizes, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_outer_batch_out(sizes, layout):
    """Into the caller's memory, whatever its strides; nothing beside it is written."""
    a, g = arguments("outer_batch", sizes)
    expected = outer_batch.reference(a, g)
    out = laid_out(torch.full_like(expected, torch.nan), layout)
    pointer, strides = out.data_ptr(), out.stride()
    assert torch.ops.fxcurv.outer_batch_out(a, g, out) is None
    torch.testing.assert_close(out, expected)
    assert (out.data_ptr(), out.stride()) == (pointer, strides)
    if layout == "steps" and out.numel():
        assert out._base.isnan().sum() == out._base.numel() - out.numel()


def test_outer_batch_out_refuses_other_memory():
    a, g = arguments("outer_batch", (2, 3, 5, 7, 3))
    for wrong in (g.new_empty(2, 3, 7, 4), g.new_empty(2, 3, 7, 3, dtype=torch.float32)):
        with pytest.raises(ValueError, match="out is"):
            torch.ops.fxcurv.outer_batch_out(a, g, wrong)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match="out is"):
        torch.ops.fxcurv.outer_batch_out(*(mode.from_tensor(t) for t in (a, g, wrong)))


def test_outer_batch_out_as_operator():
    a, g = arguments("outer_batch", (2, 3, 5, 7, 3))
    args = (a, g, g.new_empty(2, 3, 7, 3))
    torch.library.opcheck(torch.ops.fxcurv.outer_batch_out.default, args, test_utils=("test_schema", "test_faketensor"))


def test_triton_is_not_imported():
    """Nor needed, before a CUDA tensor comes."""
    script = "import sys; sys.modules['triton'] = None; import torch, fxcurv; from fxcurv.kernels import outer_norm"
    script += "; assert outer_norm.outer_norm(torch.ones(1, 2, 3), torch.ones(1, 1, 2, 3)).item() == 36"
    subprocess.run([sys.executable, "-c", script], check=True)
