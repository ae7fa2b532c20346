"""Random numbers of Python and numpy: a trace would draw them once, and its program keep them for ever."""

from __future__ import annotations

import dis
import random
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from fxcurv.errors import CaptureError
from fxcurv.ir.origin import line_number, line_of

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


class PythonRandom:
    """Notes the states of generators, and refuses a trace that drew from one."""

    def __init__(self) -> None:
        self._noted: list[tuple[str, Callable[[], str], Any, Any]] = []
        self._drew: tuple[str, str] | None = None
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

    def restore(self) -> None:
        """Give the generators that were drawn from the states that they had."""
        for what, line, generator, before in self._noted:
            if not _equal(_state(generator), before):
                self._drew = what, line()
                _set_state(generator, before)

    def check(self, codes: Iterable[types.CodeType]) -> None:
        """Refuse draws; `codes`: of the functions that ran.

        Raises:
            CaptureError: if there were any.
        """
        if self._drew is not None:
            what, line = self._drew
            raise CaptureError(
                f"the model or loss draws {what}, which a program would draw once, and keep for ever\n"
                f"{line or next(filter(None, map(_drawing_line, codes)), '')}"
                "Way out: torch.rand(()) in place of it, or pass it as an input; draw what only training needs below "
                "`if self.training`."
            )


def _numpy() -> Any:
    """`numpy.random`, if it is there."""
    return sys.modules.get("numpy.random")


def _drawing_line(code: types.CodeType) -> str:
    """The first line of a function that names a module `random`, or a function of one; "" if there is none."""
    here = [
        i for i in dis.get_instructions(code) if i.opname.startswith(("LOAD", "IMPORT")) and isinstance(i.argval, str)
    ]
    at = next((i for i in here if i.argval in _NAMES), None)
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
