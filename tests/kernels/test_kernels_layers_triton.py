"""The Triton kernels for one kind of layer, as `test_kernels_triton` does it for the products.

On a GPU where there is one, in Triton's interpreter in a process of its own, and compiled for two architectures.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
from kernel_samples import TUNED_WITH
from test_kernels_layers import CONVOLUTIONS, LAYOUTS, USUAL, cases, check, convolution, laid_out, reference, t, table
from torch.utils import _pytree as pytree

triton = pytest.importorskip("triton", reason="Triton is not installed: it exists for Linux")

import triton.language as tl  # noqa: E402
from test_kernels_triton import BESIDE, DEVICE, SHARED, compiled, compiles, resources, runs, without_gpu  # noqa: E402

from fxcurv.kernels.syrk_triton import row_and_column  # noqa: E402

# Odd sizes within a tile, and some of more than one tile in each direction.
SMALL = {
    "syrk": [lambda: [t(1, 1)], lambda: [t(5, 3)], lambda: [t(70, 33)], lambda: [t(35, 1100)], lambda: [t(3, 0)]],
    "syrk_conv": [*(lambda name=name: convolution(name) for name in CONVOLUTIONS)],
    "embedding_square_sum": [
        lambda: table(1, 1, 1, 1, 1, padding=-1),
        lambda: table(2, 3, 5, 4, 3, padding=0),
        lambda: table(5, 2, 9, 131, 4, padding=-1, weighted=False),
        lambda: table(9, 3, 0, 2, 4, padding=-1),
    ],
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def kernel(name):
    """The function that launches the op's kernels, on tensors of any device; for `syrk` past its choice of a library's."""
    module = importlib.import_module(f"fxcurv.kernels.{BESIDE.get(name, name)}_triton")
    return module.products if name == "syrk" else getattr(module, name)


def on_device(args, layout="contiguous"):
    return pytree.tree_map_only(torch.Tensor, lambda x: laid_out(x, layout).to(DEVICE), args)


@compiles
def test_in_the_interpreter():
    """The tests below, where Triton was imported as an interpreter."""
    if triton.__version__.startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6, which PyTorch 2.11 comes with, does not run with NumPy 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-n0", __file__, "-k", "test_value"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


@runs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)  # the interpreter cannot multiply bfloat16
@pytest.mark.parametrize(("name", "case"), cases(SMALL))
def test_values(name, case, dtype):
    check(kernel(name), reference(name), on_device(SMALL[name][case]()), dtype)


@runs
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize(("name", "case"), cases(SMALL))
def test_values_in_other_layouts(name, case, layout):
    check(kernel(name), reference(name), on_device(SMALL[name][case](), layout), torch.float32)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [SMALL, USUAL], ids=["small", "usual"])
def test_on_a_gpu(sizes, dtype):
    """The ops themselves on CUDA tensors."""
    for name, case in cases(sizes):
        check(getattr(torch.ops.fxcurv, name), reference(name), on_device(sizes[name][case]()), dtype)


@triton.jit
def places(rows, columns, tiles):
    """Where each of the triangle's tiles is."""
    tile = tl.program_id(0)
    row, column = row_and_column(tile, tiles)
    tl.store(rows + tile, row)
    tl.store(columns + tile, column)


@runs
@pytest.mark.parametrize("tiles", range(1, 9))
def test_values_of_row_and_column(tiles):
    """Tiles of the lower triangle, each once."""
    rows, columns = (torch.full((tiles * (tiles + 1) // 2,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2))
    places[(len(rows),)](rows, columns, tiles)
    found = zip(rows.tolist(), columns.tolist(), strict=True)
    assert sorted(found) == [(row, column) for row in range(tiles) for column in range(row + 1)]


COMPILED = [case for case in cases(USUAL) if case[0] != "syrk"]  # its kernel is syrk_conv's


def check_resources(name, case, dtype, capability, monkeypatch, folder):
    args = pytree.tree_map_only(
        torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, USUAL[name][case]()
    )
    made = compiled(name, args, capability, monkeypatch)
    assert made
    for each in made:
        used = resources(each, folder)
        assert used["REG"] <= 255
        if triton.__version__.startswith(TUNED_WITH):
            assert used["STACK"] == used["LOCAL"] == 0, f"{each.metadata.name} spills: {used}"
        assert each.metadata.shared <= SHARED[capability]


@compiles
@without_gpu
@pytest.mark.parametrize(("dtype", "capability"), [(torch.float32, 80), (torch.bfloat16, 90)], ids=str)
@pytest.mark.parametrize(("name", "case"), COMPILED)
def test_resources(name, case, dtype, capability, monkeypatch, tmp_path):
    check_resources(name, case, dtype, capability, monkeypatch, tmp_path)


@compiles
@without_gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.float32, 90), (torch.bfloat16, 80), (torch.float64, 90)], ids=str
)
@pytest.mark.parametrize(("name", "case"), COMPILED)
def test_resources_of_the_others(name, case, dtype, capability, monkeypatch, tmp_path):
    check_resources(name, case, dtype, capability, monkeypatch, tmp_path)
