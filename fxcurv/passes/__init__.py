"""The pipeline, in order. Each pass is `Program -> Program`, one file."""

from __future__ import annotations

import time
from collections.abc import Callable

from fxcurv.ir import lengths
from fxcurv.ir.program import Program
from fxcurv.ir.state import Options
from fxcurv.passes.average import average
from fxcurv.passes.channels_last import channels_last
from fxcurv.passes.chunks import chunks
from fxcurv.passes.counts import counts
from fxcurv.passes.distribute import distribute
from fxcurv.passes.ends import ends
from fxcurv.passes.extract import extract
from fxcurv.passes.finish import finish
from fxcurv.passes.fuse import fuse
from fxcurv.passes.gathers import gathers
from fxcurv.passes.independence import independence
from fxcurv.passes.last_word import last_word
from fxcurv.passes.normalize import normalize
from fxcurv.passes.objective import objective
from fxcurv.passes.placements import placements
from fxcurv.passes.pool_first import pool_first
from fxcurv.passes.products import products
from fxcurv.passes.propagate import propagate
from fxcurv.passes.recycle import recycle
from fxcurv.passes.schedule import schedule
from fxcurv.passes.select import select
from fxcurv.passes.shorten import shorten
from fxcurv.passes.simplify import simplify
from fxcurv.passes.slice_first import slice_first
from fxcurv.passes.sum_first import sum_first
from fxcurv.passes.tokens import tokens
from fxcurv.passes.verify import verify
from fxcurv.passes.whole_batch import whole_batch

ANALYSIS = [
    *(normalize, pool_first, slice_first, channels_last, independence, fuse, ends, whole_batch, objective, tokens),
]
PIPELINE = [
    *(propagate, average, products, extract, placements, simplify, select, simplify, sum_first, shorten),
    *(schedule, finish, recycle),
]


_FOR_RANKS = {placements: [counts, simplify, placements, distribute], schedule: [chunks, schedule, gathers, last_word]}
SPREAD = [p for step in PIPELINE for p in _FOR_RANKS.get(step, [step])]
"""For a batch whose parts are on several ranks; equal values are merged first, so that each travels once."""


def pipeline(options: Options) -> list:
    """The passes that turn an analysed program into an emitted one."""
    return SPREAD if options.ranks else PIPELINE


def run(
    program: Program, passes: list, debug: bool = False, tell: Callable[[str], None] = lambda stage: None
) -> Program:
    """Run `passes`, verifying the program after each under `debug`; call `tell` with the name of each that begins."""
    for step in passes:
        name = step.__name__
        tell(name)
        start = time.perf_counter()
        with lengths.at(program.batch.sizes):
            program = step(program)
        program.timings[name] = program.timings.get(name, 0.0) + time.perf_counter() - start
        if debug:
            verify(program, name)
    return program


def until(program: Program, stage: str) -> Program:
    """Run the whole pipeline on a captured program up to the first pass called `stage`."""
    steps = [*ANALYSIS, *pipeline(program.options)]
    names = [step.__name__ for step in steps]
    return run(program, steps[: names.index(stage) + 1])
