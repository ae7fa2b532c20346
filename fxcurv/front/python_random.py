"""Random numbers of Python and numpy, which a trace would draw once, and its program keep for ever; and seeds of PyTorch's.

A program draws from PyTorch's generator, at its present state. A forward pass that sets this state would do so while it is
traced, and no more.
"""

from __future__ import annotations

import dis
import inspect
import os
import random
import sys
import types
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch

from fxcurv.errors import CaptureError
from fxcurv.ir.origin import is_user_file, line_number, line_of

# what code that draws from the shared generators has in it: the module, or a function of it imported by name
_NAMES = {
    "random",
    "numpy.random",
    *(n for n in random.__all__ if n.islower()),
    "rand",
    "randn",
    "permutation",
    "normal",
}
# that set the state of PyTorch's generators, by their code
_SEEDS = {
    id(inspect.unwrap(getattr(module, name)).__code__): f"{module.__name__}.{name}"
    for module in (torch.random, torch.cuda.random)
    for name in ("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state", "set_rng_state_all", "fork_rng")
    if hasattr(module, name)
}
# files whose functions call a function that they were made of: `with fork_rng():`, and what `torch.compile` leaves out
_WRAPPERS = ("contextlib.py", "_compile.py", "eval_frame.py")


class PythonRandom:
    """Notes the states of generators, and refuses a trace that drew from one, or that sets PyTorch's."""

    def __init__(self) -> None:
        self._noted: list[tuple[str, Callable[[], str], Any, Any]] = []
        self._drew: tuple[str, str] | None = None
        self._seeded: tuple[str, str] | None = None
        self._seed, self._before = torch.initial_seed(), torch.get_rng_state()
        self.note("Python's random numbers", random.random.__self__)  # type: ignore[attr-defined]
        if _numpy() is not None:
            self.note("numpy's random numbers", _numpy().rand.__self__)

    def note(self, what: str, value: Any, line: Callable[[], str] = lambda: "") -> bool:
        """Note a generator, and what finds the line that reads it; whether the value is one."""
        found = isinstance(value, random.Random) and not isinstance(value, random.SystemRandom)
        if not found and not (_numpy() and isinstance(value, _numpy().Generator | _numpy().RandomState)):
            return False
        self._noted.append((what, line, value, _state(value)))
        return True

    def on_call(self, frame: types.FrameType) -> None:
        """Note the user's line whose call sets the state of PyTorch's generators, as its function begins."""
        if id(frame.f_code) not in _SEEDS or not frame.f_locals.get("enabled", True):
            return
        caller = frame.f_back
        while caller is not None and os.path.basename(caller.f_code.co_filename) in _WRAPPERS:
            caller = caller.f_back
        if caller is not None and is_user_file(caller.f_code.co_filename):
            line = line_of(caller.f_code.co_filename, caller.f_lineno, caller.f_code.co_name)
            self._seeded = self._seeded or (_SEEDS[id(frame.f_code)], line)

    def restore(self) -> None:
        """Give the generators that were drawn from the states that they had."""
        if torch.initial_seed() != self._seed:
            self._seeded = self._seeded or ("torch.default_generator", "")
        if self._seeded is not None:
            torch.set_rng_state(self._before)
        for what, line, generator, before in self._noted:
            if not _equal(_state(generator), before):
                self._drew = what, line()
                _set_state(generator, before)

    def check(self, codes: Iterable[types.CodeType]) -> None:
        """Refuse draws and seeds; `codes`: of the functions that ran.

        Raises:
            CaptureError: if there were any.
        """
        if self._seeded is not None:
            name, line = self._seeded
            line = line or next(filter(None, (_naming_line(c, {"default_generator"}) for c in codes)), "")
            raise CaptureError(
                f"the model or loss sets the state of PyTorch's random numbers ({name}), which a program does not repeat\n{line}"
                "Way out: call it before each call of the compiled program; or draw what is the same in every call once, in "
                "`__init__`, and keep it as a buffer."
            )
        if self._drew is not None:
            what, line = self._drew
            raise CaptureError(
                f"the model or loss draws {what}, which a program would draw once, and keep for ever\n"
                f"{line or next(filter(None, (_naming_line(c, _NAMES) for c in codes)), '')}"
                "Way out: torch.rand(()) in place of it, or pass it as an input; draw what only training needs below "
                "`if self.training`."
            )


def _numpy() -> Any:
    """`numpy.random`, if it is there."""
    return sys.modules.get("numpy.random")


def _naming_line(code: types.CodeType, names: Container[str]) -> str:
    """The first line of a function that has one of the names in it; "" if there is none."""
    here = [
        i for i in dis.get_instructions(code) if i.opname.startswith(("LOAD", "IMPORT")) and isinstance(i.argval, str)
    ]
    at = next((i for i in here if i.argval in names), None)
    return line_of(code.co_filename, line_number(code, at), code.co_name) if at is not None else ""


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(_equal(a[key], b[key]) for key in a)
    return a.tobytes() == b.tobytes() if hasattr(a, "tobytes") else a == b
