"""What the placeholders of a program are bound to at a call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.errors import ArgumentError
from fxcurv.front.arguments import Arguments, described
from fxcurv.front.requests import Subject, tensors_in
from fxcurv.ir.program import Program


def bind(
    program: Program,
    subject: Subject,
    arguments: Arguments,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    values: Mapping[str, Tensor] | None = None,
    part: tuple[int, int] | None = None,
) -> list[Any]:
    """What the placeholders are bound to, without memory for results.

    Args:
        values: in place of the parameters, by name.
        part: (number of samples on all ranks, number of the first one here).
    """
    total, first = part or (arguments.batch_size, 0)
    params = {**dict(subject.named_parameters()), **(values or {})}
    buffers = dict(subject.model.named_buffers(remove_duplicate=False))
    of_loss = dict(tensors_in(subject.loss)) if isinstance(subject.loss, nn.Module) else {}
    targets = arguments.split_targets()
    python, modules, device = program.python, subject.modules(), subject.device()
    constants = {**program.constants, **python.tensors(modules)}
    flat: list[Any] = []
    for bound in program.inputs[: len(program.inputs) - len(program.buffers)]:
        if bound.kind == "param":
            flat.append(params[bound.name])
        elif bound.kind == "buffer":
            flat.append(buffers[bound.name])
        elif bound.kind == "constant":
            flat.append(of_loss.get(bound.name.removeprefix("loss."), constants[bound.name]))
        elif bound.kind == "number":
            flat.append(python.number(bound.index, modules, device))
        elif bound.kind == "samples":
            flat.append(total)
        elif bound.kind == "first":
            flat.append(torch.tensor(first, device=device))
        elif bound.kind == "seed":
            flat.append(seed_tensor(seed, generator, device))
        else:
            flat.append((arguments.inputs if bound.kind == "input" else targets)[bound.index])
    return flat


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


def cuda_devices(values: Iterable[Any]) -> list[int]:
    """The indices of the GPUs that tensors are on."""
    return sorted({t.device.index or 0 for t in values if isinstance(t, Tensor) and t.is_cuda})
