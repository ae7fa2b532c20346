"""An eager call: seeds, ownership of results, and which op failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import ArgumentError
from fxcurv.front.arguments import Arguments, described
from fxcurv.ir.origin import locate
from fxcurv.ir.program import Program
from fxcurv.passes.recycle import functional


def cuda_devices(flat: list[Any]) -> list[int]:
    """The GPUs that arguments are on."""
    return sorted({t.device.index or 0 for t in flat if isinstance(t, Tensor) and t.is_cuda})


def owner(flat: list[Any]) -> Callable[[Any], Any]:
    """Gives a result memory of its own: a gradient may be just another parameter, which a step changes."""
    given = {t.untyped_storage().data_ptr() for t in flat if isinstance(t, Tensor)}

    def own(value: Any) -> Any:
        shared = isinstance(value, Tensor) and value.untyped_storage().data_ptr() in given
        return value.clone() if shared else value

    return own


def seed_tensor(seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """The seed of sampled columns as a 0-dim tensor on `device`."""
    if seed is not None and generator is not None:
        raise ArgumentError("seed= and generator= were both given: pass one")
    if isinstance(seed, Tensor):
        if seed.ndim or seed.is_floating_point() or seed.is_complex():
            raise ArgumentError(f"seed= is {described([seed])}: pass an int or a 0-dim integer tensor")
        return seed.to(device=device, dtype=torch.long)
    if seed is not None:
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ArgumentError(f"seed={seed!r}: pass an int of 64 bits or a 0-dim integer tensor")
        return torch.tensor(seed, dtype=torch.long, device=device)
    where = generator.device if generator is not None else "cpu"
    return torch.randint(0, 2**62, (), generator=generator, device=where).to(device)


class _Locate(fx.Interpreter):
    """Runs a graph and remembers the node that fails."""

    at: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.at = n
        return super().run_node(n)


def run_error(program: Program, arguments: Arguments, flat: list[Any], error: Exception) -> ArgumentError:
    """An op refused the values that it got, which tracing did not see: say which one."""
    where = ""
    finder = _Locate(functional(program))
    with contextlib.suppress(RuntimeError, IndexError):
        finder.run(*flat)
        finder.at = None
    if finder.at is not None:
        where = f"{locate(finder.at)}\n"
    return ArgumentError(
        f"{where}fails on the inputs, {described(arguments.inputs)}, and the targets, "
        f"{described(arguments.targets)}: {error}\n"
        "Way out: inputs and targets of the dtype, shape and range that the model and the loss expect (class "
        "indices: int64, below the number of classes)."
    )
