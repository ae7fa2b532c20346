"""Lengths: symbolic sizes other than the batch's, and the numbers that stand for them in placements.

Placements hold plain integers. A prime far beyond any size stands for a length, so a size that depends on lengths is a
polynomial in these primes with small coefficients. `said` reads it back: as a symbolic size while a function is traced,
as a number where tensors are real.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

_PRIMES = (10**9 + 7, 10**36 + 67, 10**144 + 91)
# How many lengths a program may have: height and width of an image, source and target of a translation, and one more.
MOST = len(_PRIMES)
# Coefficients beyond this are no sizes: a division did not come out even.
_LARGEST = 10**8

_AT: ContextVar[tuple[Any, ...]] = ContextVar("lengths", default=())


class LengthFixed(RuntimeError):
    """Something needs a length as a number."""


@dataclass(frozen=True)
class Length:
    """A symbolic size: its symbol, its value at capture, and where a call finds it, dimension `dim` of a tensor.

    kind: "input" or "target"; index: among the (split) tensors of that kind.
    """

    symbol: Any
    size: int
    kind: str
    index: int
    dim: int


def stand_in(k: int) -> int:
    """The number that stands for length `k` in placements, a prime larger than any product of those before it."""
    return _PRIMES[min(k, MOST - 1)]


@contextlib.contextmanager
def at(values: Sequence[Any]) -> Iterator[None]:
    """Within, `said` gives sizes at these values of the lengths."""
    token = _AT.set(tuple(values))
    try:
        yield
    finally:
        _AT.reset(token)


def said(size: int) -> Any:
    """The size that a number of a placement stands for, at the lengths set by `at`.

    Raises:
        LengthFixed: if the number is no polynomial in the lengths.
    """
    return size if abs(size) < _LARGEST else _read(size, len(_AT.get()) - 1)


def _read(number: int, k: int) -> Any:
    if k < 0:
        if abs(number) >= _LARGEST:
            raise LengthFixed("a part of it that is needed as a number")
        return number
    base = stand_in(k)
    more, rest = divmod(number + base // 2, base)
    constant = _read(rest - base // 2, k - 1)
    return constant + _AT.get()[k] * _read(more, k) if more else constant
