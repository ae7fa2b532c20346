"""A batch without samples: output and gradient are the plain model's, and fields are zeros without rows, as of `compile`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxcurv.backpack import custom, ledger
from fxcurv.backpack.context import current, disable
from fxcurv.backpack.losses import tensors_of
from fxcurv.backpack.parts import ModelParts
from fxcurv.errors import ArgumentError
from fxcurv.front.arguments import Arguments
from fxcurv.front.requests import Autocast
from fxcurv.ir.program import Program


@dataclass(eq=False)
class _Pass:
    """What `ledger.write` reads of a pass."""

    template: Program


def run_plain(
    parts: ModelParts, plain: Callable, args: tuple, kwargs: dict, arguments: Arguments, mode: Autocast
) -> Any:
    """The output of the model as it is, whose backward pass puts the context's fields on the parameters."""
    with disable():
        output = plain(*args, **kwargs)
    ends = [t for t in tensors_of(output) if t.requires_grad]
    if ends:
        ends[0].register_hook(lambda _: _write(parts, parts.model, arguments, mode))
    return output


def _write(parts: ModelParts, model: nn.Module, arguments: Arguments, mode: Autocast) -> None:
    """Put the fields on the parameters.

    Raises:
        ArgumentError: for products; for hooks and module extensions, as modules have no inputs and outputs.
    """
    context = current()
    if context.extension_hook is not None or custom.customs(context):
        raise ArgumentError(
            "the batch is empty, and extension_hook= and extensions of modules look at modules' inputs and outputs: skip it"
        )
    if not context.extensions:
        return
    program, fields = parts.without_samples(context.extensions, arguments, mode)
    ledger.write(_Pass(program), model, dict(model.named_parameters()), fields, context)
