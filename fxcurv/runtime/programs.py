"""Find or make the program for a kind of input."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fxcurv.errors import ArgumentError, UnsupportedOpError
from fxcurv.front.arguments import Arguments
from fxcurv.ir.program import Program
from fxcurv.ir.specialise import specialise

log = logging.getLogger("fxcurv")

Emitted = TypeVar("Emitted")


class Autocast(NamedTuple):
    """The state of `torch.autocast`; no dtype when it is off."""

    device_type: str
    dtype: torch.dtype | None


def tensors_in(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """(name, tensor) of a module's parameters and buffers."""
    yield from module.named_parameters()
    yield from module.named_buffers(remove_duplicate=False)


def at_numbers_if_need_be(
    emit: Callable[[Program], Emitted], program: Program, again: Callable[[], Program], n: int
) -> Emitted:
    """`emit(program)`, or where an op is traced at sizes that are numbers only, of what `again` makes, at `n` samples."""
    try:
        return emit(program)
    except UnsupportedOpError:
        if not program.batch.symbols:
            raise
    return emit(specialise(again(), n))


def single_sample(program: Program) -> Program:
    """The program of a doubled batch for one sample."""
    try:
        return specialise(program, 1)
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        raise ArgumentError(
            f"the model cannot run on a batch of one: {error}. Way out, for batch norm in training mode: "
            "more samples, or eval()"
        ) from error


def doubled(arguments: Arguments) -> Arguments:
    """A batch of one sample twice: export would fix a batch size of 1."""

    def twice(tensors, dims):
        return [t if d is None else torch.cat([t, t], d) for t, d in zip(tensors, dims, strict=True)]

    inputs = twice(arguments.inputs, arguments.batch_dims)
    targets = twice(arguments.targets, arguments.target_dims())
    return dataclasses.replace(arguments, inputs=inputs, targets=targets)
