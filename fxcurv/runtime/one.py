"""Whether a program for any number of samples serves a single one too, which tracing does not promise.

`torch.export` takes a size of one for a number, so a symbolic size is two or more: a model that squeezes, or looks at
shapes, may do something else at one. So the program is run at one sample. Its results are compared with plain PyTorch,
as at its first call, and the shape of every value with the one that the graph has for it.
"""

from __future__ import annotations

from typing import Any

import torch

from fxcurv.errors import FxcurvError
from fxcurv.front.requests import Request
from fxcurv.runtime.bind import bind, cuda_devices
from fxcurv.runtime.lengths import Shaped, lengths_of


def serves_one(ready: Any, request: Request) -> bool:
    """Whether this program gives what plain PyTorch does for this one sample; noted on the program (`Program.served`)."""
    program = ready.program
    if 1 not in program.served:
        lengths = lengths_of(program, request.arguments)
        program.served[1] = (
            program.guards_hold(1, lengths) and ready.selfcheck is not None and _agrees_with_plain(ready, request)
        )
    return program.served[1]


def _agrees_with_plain(ready: Any, request: Request) -> bool:
    program = ready.program
    flat = bind(program, request.subject, request.arguments, 0, None)
    try:
        check = ready.selfcheck.begin(program, request, flat)
        with torch.no_grad(), torch.random.fork_rng(cuda_devices(flat)):
            values = Shaped(program, 1, lengths_of(program, request.arguments)).run(*flat)
        note = ready.selfcheck.note
        check.finish(values)
        ready.selfcheck.note = note  # the report is about the first call
    except (FxcurvError, RuntimeError, ValueError, IndexError):
        return False
    return True
