"""Compares the drop-in's first numbers with plain PyTorch: once for every backward part, before quantities are written.

The plain model runs once more, and autograd takes the same cotangents down: output and gradient must equal those
of the emitted parts, and sums of individual quantities their totals. `runtime.selfcheck` runs the plain pass, which leaves
everything as it was. Models that draw random numbers are not checked, since a second pass would draw others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.backpack.losses import tensors_of
from fxcurv.front.arguments import Slot
from fxcurv.front.requests import Request, Subject
from fxcurv.ir.program import Program
from fxcurv.runtime.selfcheck import Check, Plain, SelfCheck


class _Pulled:
    """A loss whose gradient in the model's outputs is the cotangents that arrived there."""

    def __init__(self, gs: Sequence[Tensor | None]):
        self.where = [k for k, g in enumerate(gs) if g is not None]

    def __call__(self, output: Any, *gs: Tensor) -> Tensor:
        leaves = tensors_of(output)
        values = [(leaves[k] * g).sum() for k, g in zip(self.where, gs, strict=True)]
        return sum(values[1:], values[0])


class PassCheck(Check):
    """The check of one pass of an extended model.

    Args:
        template: the analysed program of the model alone.
        finished: the program of the backward part.
        request: for the model alone, with the inputs of the pass.
        flat: what the placeholders of `template` were bound to.
        gs: the cotangents that arrived at the output's leaves, one at least.
    """

    def __init__(
        self, template: Program, finished: Program, request: Request, flat: list[Any], gs: Sequence[Tensor | None]
    ):
        self.buffers = {what.name: t for what, t in zip(template.inputs, flat, strict=True) if what.kind == "buffer"}
        given = [g for g in gs if g is not None]
        arguments = replace(request.arguments, targets=given, target_template=tuple(map(Slot, range(len(given)))))
        request = replace(request, subject=Subject(request.subject.model, _Pulled(gs)), arguments=arguments)
        super().__init__(SelfCheck(template, exchanged=False), finished, request, flat)

    def run(self, *, rounded: int | None = None, watch: Callable[[nn.Module], Any] | None = None) -> Plain:
        """A plain pass from the buffers as they were before the checked pass, which has updated them since."""

        def begin(model: nn.Module) -> None:
            own = dict(model.named_buffers(remove_duplicate=False))
            for name, value in self.buffers.items():
                own[name].copy_(value)
            if watch is not None:
                watch(model)

        with torch.no_grad():
            plain = super().run(rounded=rounded, watch=begin)
        plain.buffers = {}
        return plain
