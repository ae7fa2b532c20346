"""The pipeline, in order. Each pass is `Program -> Program`, one file."""

from __future__ import annotations

import time
from collections.abc import Callable

from fxcurv.passes.codegen import codegen
from fxcurv.passes.ends import ends
from fxcurv.passes.extract import extract
from fxcurv.passes.independence import independence
from fxcurv.passes.layout import layout
from fxcurv.passes.normalize import normalize
from fxcurv.passes.objective import objective
from fxcurv.passes.positions import positions
from fxcurv.passes.presum import presum
from fxcurv.passes.propagate import propagate
from fxcurv.passes.recycle import recycle
from fxcurv.passes.reorder import reorder
from fxcurv.passes.schedule import schedule
from fxcurv.passes.select import select
from fxcurv.passes.simplify import simplify
from fxcurv.passes.verify import verify
from fxcurv.passes.whole import whole
from fxcurv.program import Program
from fxcurv.progress import silent

ANALYSIS = [normalize, reorder, layout, independence, ends, whole, objective, positions]
PIPELINE = [propagate, extract, simplify, select, simplify, presum, schedule, codegen, recycle]


def run(program: Program, passes: list, debug: bool = False, tell: Callable[[str], None] = silent) -> Program:
    """Run `passes`, with verification between them under `debug`; `tell` hears which one begins."""
    for step in passes:
        name = step.__name__
        tell(name)
        start = time.perf_counter()
        program = step(program)
        program.timings[name] = program.timings.get(name, 0.0) + time.perf_counter() - start
        if debug:
            verify(program, name)
    return program
