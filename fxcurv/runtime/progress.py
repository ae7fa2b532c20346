"""A line on the terminal while compiling takes longer than a moment."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.status import Status

# Seconds; most models are compiled before then.
PATIENCE = 2.0


def silent(step: str) -> None:
    """Show nothing."""


@contextlib.contextmanager
def progress(what: str, patience: float = PATIENCE) -> Iterator[Callable[[str], None]]:
    """Show `what` and the present step on stderr, if it is a terminal, from `patience` seconds on.

    Yields:
        a function to call with the name of each step that begins.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield silent
        return
    status = Status(what, console=console)
    timer = threading.Timer(patience, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda step: status.update(f"{what}: {step}")
    finally:
        timer.cancel()
        timer.join()  # it may be starting the line just now
        status.stop()
