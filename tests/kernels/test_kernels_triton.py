"""The Triton kernels against the references: on a GPU where there is one, and in Triton's interpreter, in a process of its own.

Without a GPU they are compiled as well, for two architectures, and the machine code's use of resources is read.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import numpy
import pytest
import torch
from covering import covering
from kernel_samples import KERNELS, LAYOUTS, SMALL, TILED, TUNED_WITH, arguments, check

triton = pytest.importorskip("triton", reason="Triton is not installed: it exists for Linux")
tiles = importlib.import_module("fxcurv.kernels.tiles")

OLD = triton.__version__.startswith("3.6")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs a GPU or TRITON_INTERPRET=1")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
# whose Triton kernel is in another op's file
BESIDE = {"syrk_conv": "syrk"}
# bytes of shared memory that a block may have
SHARED = {80: 163 << 10, 90: 227 << 10}
# each of the small cases in one layout; the slow tests have them in double and half precision too
IN_TURN = [(*case, LAYOUTS[1 + k % 3]) for k, case in enumerate(SMALL)]


def kernel(name):
    """The function that launches the op's kernels, on tensors of any device."""
    return getattr(importlib.import_module(f"fxcurv.kernels.{BESIDE.get(name, name)}_triton"), name)


def tuned(name):
    """The kernels of an op that choose among configurations."""
    values = vars(importlib.import_module(f"fxcurv.kernels.{name}_triton")).values()
    return [value for value in values if isinstance(value, triton.runtime.Autotuner)]


@pytest.fixture
def one_configuration(monkeypatch):
    """The default one: timing the others for every case would take minutes."""
    for each in (each for name in KERNELS for each in tuned(name)):
        monkeypatch.setattr(each, "configs", each.configs[:1])


@compiles
@pytest.mark.skipif(
    OLD and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0", reason="Triton 3.6 interprets before NumPy 2.4"
)
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(which):
    """The tests of values below, where Triton was imported as an interpreter; products of bfloat16 are beyond it."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", __file__, "-k", "test_values", "-m", which]
    command += ["-W", "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"] if OLD else []
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


@runs
@pytest.mark.usefixtures("one_configuration")
@pytest.mark.parametrize(
    ("name", "sizes", "dtype"),
    [
        *((*case, torch.float64) for case in TILED),
        *(pytest.param(*case, torch.float64, marks=pytest.mark.slow) for case in SMALL),
        *(pytest.param(*case, torch.float16, marks=pytest.mark.slow) for case in SMALL + TILED),
    ],
    ids=str,
)
def test_values(name, sizes, dtype):
    check(name, kernel(name), arguments(name, sizes, dtype, device=DEVICE))


@runs
@pytest.mark.usefixtures("one_configuration")
@pytest.mark.parametrize(("name", "sizes", "layout"), IN_TURN, ids=str)
def test_values_in_other_layouts(name, sizes, layout):
    check(name, kernel(name), arguments(name, sizes, torch.float32, layout, DEVICE))


@runs
@pytest.mark.slow
@pytest.mark.usefixtures("one_configuration")
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize(("name", "sizes"), TILED, ids=str)
def test_values_in_all_layouts(name, sizes, layout):
    check(name, kernel(name), arguments(name, sizes, torch.float32, layout, DEVICE))


@runs
@pytest.mark.slow
@pytest.mark.parametrize("k", range(len(tiles.SQUARE)))
@pytest.mark.parametrize("name", KERNELS)
def test_values_of_all_configurations(name, k, monkeypatch):
    sizes = KERNELS[name].tiled[k % len(KERNELS[name].tiled)]
    for each in tuned(name):
        monkeypatch.setattr(each, "configs", [tiles.SQUARE[k]])
    check(name, kernel(name), arguments(name, sizes, torch.float32, device=DEVICE))


@pytest.mark.parametrize("name", KERNELS)
def test_no_configuration_is_much_larger_than_the_matrix(name):
    for each in tuned(name):
        fit = each.early_config_prune(tiles.SQUARE, {"S": 10, "O": 10, "I": 10})
        assert fit and all(max(config.kwargs["ROWS"], config.kwargs["COLS"]) <= 64 for config in fit)
        assert each.early_config_prune(tiles.SQUARE, {"S": 100, "O": 100, "I": 100}) == tiles.SQUARE


needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("name", KERNELS)
def test_tuned_on_a_gpu(name):
    args = arguments(name, KERNELS[name].tiled[0], torch.float32, device=DEVICE)
    for _ in range(2):  # the first call times the configurations
        check(name, getattr(torch.ops.fxcurv, name), args)


@needs_gpu
@pytest.mark.usefixtures("one_configuration")
@pytest.mark.parametrize(("name", "sizes"), SMALL + TILED, ids=str)
def test_on_a_gpu(name, sizes, monkeypatch):
    """The op itself on CUDA tensors; bfloat16; and tf32, which keeps ten bits."""
    op = getattr(torch.ops.fxcurv, name)
    check(name, op, arguments(name, sizes, torch.float32, device=DEVICE))
    check(name, op, arguments(name, sizes, torch.bfloat16, device=DEVICE))
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    check(name, op, arguments(name, sizes, torch.float32, device=DEVICE), 2**-10)


class Absent:
    """In place of Triton's driver: a device of compute capability `capability` on which nothing runs."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # kernels are cached by it

    def get_current_stream(self, device):
        return 0


def compiled(name, args, capability, monkeypatch):
    """The kernels that a launch compiles, at the default configuration."""
    made = []
    run = triton.JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        made.append(run(self, *args, warmup=True, **kwargs))

    monkeypatch.setattr(triton.runtime.driver, "_active", Absent(capability))
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    kernel(name)(*args)
    return made


def resources(made, folder):
    """Registers, and bytes of stack and local memory, of a compiled kernel; spilled registers live on the stack."""
    (folder / "kernel.cubin").write_bytes(made.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(folder / "kernel.cubin")]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {key: int(value) for key, _, value in (w.partition(":") for w in words) if key in ("REG", "STACK", "LOCAL")}


def check_resources(name, sizes, dtype, capability, monkeypatch, folder):
    made = compiled(name, arguments(name, sizes, dtype), capability, monkeypatch)
    assert made
    for each in made:
        used = resources(each, folder)
        if triton.__version__.startswith(TUNED_WITH):
            assert used["STACK"] == used["LOCAL"] == 0, f"{each.metadata.name} spills: {used}"
        assert each.metadata.shared <= SHARED[capability]


without_gpu = pytest.mark.skipif(DEVICE != "cpu", reason="with a GPU, a launch times configurations")


@compiles
@without_gpu
@pytest.mark.parametrize(("dtype", "capability"), [(torch.float32, 80), (torch.bfloat16, 90)], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_resources(name, dtype, capability, monkeypatch, tmp_path):
    check_resources(name, KERNELS[name].tiled[0], dtype, capability, monkeypatch, tmp_path)


@compiles
@without_gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype", "capability"),
    covering(TILED, [torch.float64, torch.float32, torch.float16, torch.bfloat16], [80, 90]),
    ids=str,
)
def test_resources_of_all(case, dtype, capability, monkeypatch, tmp_path):
    check_resources(*case, dtype, capability, monkeypatch, tmp_path)
