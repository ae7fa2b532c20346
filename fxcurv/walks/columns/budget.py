"""budget: how many columns the walk may carry at once.

A sweep of the walk holds, for every column, the cotangents before and after an op and a copy in between. Columns that
do not fit go down in later sweeps, of which only the sums over columns remain.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fxcurv.ir.program import Program, is_active, is_sharded

# How many cotangents of the widest value are alive at a time: at an op's output, at its input, and in a layout between.
HELD = 3
SHARE = 0.5
# On a CPU: the largest block that the C library's allocator keeps when it is freed. Larger ones are mapped, and cleared
# page by page, at every call, which takes longer than what most ops do with them.
KEPT = 32 << 20
# How many nodes of the forward pass all sweeps together may walk over.
NODES = 2000
# Free memory where the system does not tell.
UNKNOWN = 8 << 30


def available(device: torch.device) -> int:
    """Bytes of memory that are free on `device`, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # free pages alone would not count what the system caches and can give back
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return UNKNOWN


def budget_of(program: Program) -> int:
    """The bytes that columns may take: the user's budget, or a share of what is free."""
    device = next(iter(program.params.values())).meta["val"].device
    return program.options.memory_budget or int(SHARE * available(device))


def bytes_per_column(program: Program) -> int:
    """The bytes that one column of one sample takes where the values are widest."""
    return HELD * _widest(program)


def _widest(program: Program) -> int:
    vals = [n.meta.get("val") for n in program.graph.nodes if is_active(n) and is_sharded(n)]
    widest = max((program.batch.per_sample(v) * v.itemsize for v in vals if isinstance(v, Tensor)), default=1)
    return max(widest, 1)


def capacity(program: Program) -> int:
    """The columns that a sweep may carry at the captured batch size, one at least."""
    return max(1, budget_of(program) // (bytes_per_column(program) * program.batch.samples))


def convenient(program: Program) -> int:
    """How many columns a sweep may carry so that the allocator keeps its stacks' memory; unlimited but on a CPU."""
    if any(p.meta["val"].device.type != "cpu" for p in program.params.values()):
        return 1 << 62
    return max(1, KEPT // (_widest(program) * program.batch.samples))


def sizes(columns: int, fits: int, convenient: int, forward: int) -> int:
    """The columns of each sweep, as even as can be, when `columns` go down in sweeps of at most `fits`."""
    most = max(2, NODES // max(1, forward))
    room = min(fits, max(convenient, -(-columns // most)))
    return -(-columns // -(-columns // room))


def largest_batch(program: Program, columns: int) -> int | None:
    """The largest batch for which a sweep of `columns` fits the budget; None if smaller sweeps would not help."""
    if columns <= 2:
        return None
    return max(program.batch.size, budget_of(program) // (bytes_per_column(program) * columns))
