"""Predicted seconds from operation and byte counts and the constants of a machine, two of which can be measured."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """What the cost model knows of a device; only ratios between candidates matter.

    Attributes:
        flops: floating-point operations per second of a library's matrix product, in float32.
        bandwidth: bytes per second, read and written, of a streaming pass.
        fresh: bytes per second of the first touch of pages that the allocator maps afresh.
        dispatch: seconds that one op takes however small it is.
    """

    flops: float
    bandwidth: float
    fresh: float
    dispatch: float


# Two x86 cores.
CPU = Machine(flops=120e9, bandwidth=20e9, fresh=4.5e9, dispatch=5e-6)
# NVIDIA H100 SXM, by its data sheet: 67 TFLOP/s in float32 (no tensor cores), 3.35 TB/s. PyTorch's allocator keeps
# pages, so none are fresh. Launching an op takes the host as long as dispatching one on a CPU.
H100 = Machine(flops=67e12, bandwidth=3.35e12, fresh=math.inf, dispatch=5e-6)
DEFAULTS = {"cpu": CPU, "cuda": H100}

_calibrated: dict[str, Machine] = {}


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, bytes moved, bytes newly allocated, and kernel launches of one candidate."""

    flops: float
    bytes: float
    fresh: float = 0.0
    calls: int = 1

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.bytes + other.bytes, self.fresh + other.fresh, self.calls + other.calls
        )

    def seconds(self, machine: Machine) -> float:
        """Predicted time on `machine`."""
        moved = self.bytes / machine.bandwidth + self.fresh / machine.fresh
        return self.flops / machine.flops + moved + machine.dispatch * self.calls


def machine(device: torch.device) -> Machine:
    """The constants that `select` uses on this device: what `calibrate` set for its kind, else the defaults."""
    return _calibrated.get(device.type) or DEFAULTS.get(device.type, CPU)


def calibrate(device: str = "cpu", constants: Machine | None = None) -> Machine:
    """Let later compilations in this process choose by these constants; programs that exist stay as they are.

    Without a call, compilations choose by `DEFAULTS`, so choices are the same at every run and on every machine.

    Args:
        device: "cpu" or "cuda".
        constants: default: `measured(device)`. `calibrate("cpu", fxcurv.cost.CPU)` undoes it.

    Returns:
        the constants now in use.

    Raises:
        ValueError: for another kind of device.
    """
    if device not in DEFAULTS:
        raise ValueError(f"device={device!r}: the cost model knows {', '.join(DEFAULTS)}")
    _calibrated[device] = constants or measured(device)
    return _calibrated[device]


def measured(device: str = "cpu") -> Machine:
    """The defaults, with FLOP/s and bytes/s measured here on a matrix product and a copy, once per process.

    Measures with the number of threads that PyTorch has at the first call; takes about 0.1 s.
    """
    return _measured(device)


@functools.cache
def _measured(device: str) -> Machine:
    side, size = (512, 64 << 20) if device == "cpu" else (4096, 256 << 20)
    a, source = torch.ones(side, side, device=device), torch.zeros(size // 4, device=device)
    product, target = torch.empty_like(a), torch.empty_like(source)
    with torch.no_grad():
        flops = 2 * side**3 / _fastest(lambda: torch.mm(a, a, out=product), device)
        bandwidth = 2 * size / _fastest(lambda: target.copy_(source), device)
    return dataclasses.replace(DEFAULTS[device], flops=flops, bandwidth=bandwidth)


def _fastest(call: Callable[[], object], device: str, calls: int = 4) -> float:
    """Seconds of the fastest of a few calls, which was disturbed least; the first one warms up."""
    seconds = []
    for _ in range(1 + calls):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
