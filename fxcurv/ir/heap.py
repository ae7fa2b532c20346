"""Python's cyclic garbage collector, which is off while a program is made."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Turn the collector off, if it was on; enter it under `compile_lock`, as the collector is the process's.

    What is traced lives until its program is there, so collections find little, and each one goes through all objects of
    the process: two thirds of a small model's compile where there are a million of them. And what others hang in
    `gc.callbacks` would run as if the model had called it.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
