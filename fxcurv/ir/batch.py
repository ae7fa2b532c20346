"""The batch size, symbolic or a number, and the lengths: other sizes that are symbolic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import SymInt, Tensor

from fxcurv.ir.lengths import Length, LengthFixed, stand_in
from fxcurv.ir.private import captured_size

# Stands for the batch size wherever placements are computed: no size of a model has it as a factor by accident.
PRIME = 1_000_003


@dataclass
class Batch:
    """The batch size: its symbols in the captured sizes and its value at capture; `whole`: all of it is one sample.

    lengths: other symbolic sizes, each once; `others`: every symbol of such sizes, expressed in those of `lengths`.
    """

    symbols: frozenset = frozenset()
    size: int = 0
    whole: bool = False
    lengths: tuple[Length, ...] = ()
    others: dict[Any, Any] = field(default_factory=dict)

    def evaluate(self, value: int | SymInt, n: int, lengths: Sequence[int] | None = None) -> int:
        """`value` with the batch size replaced by `n`, and the lengths by their values (default: those at capture).

        At `n = PRIME`, where placements are computed, lengths are their stand-ins.
        """
        if not isinstance(value, SymInt) or not self.symbols:
            return int(value)
        known = self.values(n, self.stand_ins if n == PRIME and lengths is None else lengths)
        # `_expr` is the size as captured: a later specialisation of the batch must not hide where the samples are.
        expr = captured_size(value).subs(known)
        # other symbols are sizes that turned out to be numbers
        return int(expr if expr.is_number else value.node.shape_env.replace(expr).subs(known))

    def values(self, n: int, lengths: Sequence[int] | None = None) -> dict[Any, Any]:
        """The value of every symbol, at `n` samples and these lengths (default: those at capture)."""
        known = dict.fromkeys(self.symbols, n)
        if self.lengths:
            at = dict(zip((x.symbol for x in self.lengths), self.sizes if lengths is None else lengths, strict=True))
            known |= {symbol: expr.subs({**at, **known}) for symbol, expr in self.others.items()}
        return known

    @property
    def sizes(self) -> tuple[int, ...]:
        """The lengths at capture."""
        return tuple(x.size for x in self.lengths)

    @property
    def stand_ins(self) -> tuple[int, ...]:
        """The numbers that stand for the lengths in placements."""
        return tuple(map(stand_in, range(len(self.lengths))))

    def shape(self, val: Tensor, n: int | None = None, lengths: Sequence[int] | None = None) -> tuple[int, ...]:
        """The shape of a (fake) tensor with the batch size replaced by `n` (default: `PRIME`, if it is symbolic)."""
        n = n or (PRIME if self.symbols else self.size)
        return tuple(self.evaluate(s, n, lengths) for s in val.shape)

    def per_sample(self, val: Tensor) -> int:
        """The number of entries of a (fake) tensor with samples, divided by the number of samples; at the captured lengths."""
        return math.prod(self.shape(val, lengths=self.sizes)) // (1 if self.whole else self.stand_in)

    def columns(self, val: Tensor) -> int:
        """`per_sample` as a number of columns, which must not depend on a length.

        Raises:
            LengthFixed: if it does.
        """
        count = self.per_sample(val)
        if any(self._per_longer_sample(val, k) != count for k in range(len(self.lengths))):
            raise LengthFixed("a column for every entry of a sample")
        return count

    def _per_longer_sample(self, val: Tensor, k: int) -> int:
        """`per_sample` with length `k` larger by one."""
        other = [size + (j == k) for j, size in enumerate(self.sizes)]
        return math.prod(self.shape(val, lengths=other)) // self.stand_in

    @property
    def samples(self) -> int:
        """The number of samples at capture."""
        return 1 if self.whole else self.size

    @property
    def stand_in(self) -> int:
        """The number that stands for the batch size in placements."""
        return PRIME if self.symbols else self.size
