"""A function on every rank of a group of processes, with a limit on the time; gloo on this machine."""

from __future__ import annotations

import datetime
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(count: int, fn: Callable, *args: Any, limit: float = 500) -> list[Any]:
    """What `fn(rank, *args)` returns on each of `count` ranks.

    Raises:
        AssertionError: with the traceback of the first rank that raised, or if the time is up.
    """
    context = mp.get_context("spawn")
    found = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            context.Process(target=_rank, args=(k, count, os.path.join(folder, "store"), found, fn, args), daemon=True)
            for k in range(count)
        ]
        for job in jobs:
            job.start()
        try:
            return _collected(count, jobs, found, time.monotonic() + limit)
        finally:
            for job in jobs:
                job.join(10)
                if job.is_alive():
                    job.kill()


def _collected(count: int, jobs: list, found: Any, until: float) -> list[Any]:
    values: dict[int, Any] = {}
    while len(values) < count:
        try:
            rank, value, error = found.get(timeout=1)
        except queue.Empty:
            assert time.monotonic() < until, f"ranks {sorted(set(range(count)) - set(values))} hang"
            dead = [k for k, job in enumerate(jobs) if not job.is_alive() and k not in values and found.empty()]
            assert not dead, f"ranks {dead} died"
            continue
        assert error is None, f"on rank {rank}:\n{error}"
        values[rank] = value
    return [values[k] for k in range(count)]


def _rank(rank: int, count: int, store: str, found: Any, fn: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        limit = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=limit)
        found.put((rank, fn(rank, *args), None))
        dist.barrier()
    except BaseException:
        found.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def each(functions: tuple[Callable[[int], Any], ...], rank: int) -> dict[str, Any]:
    """What every function gives on a rank, by name; of one that raises, its traceback."""
    return {fn.__name__: _noted(fn, rank) for fn in functions}


def _noted(fn: Callable[[int], Any], rank: int) -> Any:
    try:
        return fn(rank)
    except Exception:
        return traceback.format_exc()
