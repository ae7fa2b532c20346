"""The batch size, symbolic or a number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import SymInt, Tensor

from fxcurv.ir.private import captured_size

# Stands for the batch size wherever placements are computed: no size of a model has it as a factor by accident.
PRIME = 1_000_003


@dataclass
class Batch:
    """The batch size: its symbols in the captured sizes and its value at capture; `whole`: all of it is one sample."""

    symbols: frozenset = frozenset()
    size: int = 0
    whole: bool = False

    def evaluate(self, value: int | SymInt, n: int) -> int:
        """`value` with the batch size replaced by `n`."""
        if not isinstance(value, SymInt) or not self.symbols:
            return int(value)
        # `_expr` is the size as captured: a later specialisation of the batch must not hide where the samples are.
        expr = captured_size(value).subs({s: n for s in self.symbols})
        # other symbols are sizes that turned out to be numbers
        return int(expr if expr.is_number else value.node.shape_env.replace(expr).subs({s: n for s in self.symbols}))

    def shape(self, val: Tensor, n: int | None = None) -> tuple[int, ...]:
        """The shape of a (fake) tensor with the batch size replaced by `n` (default: `PRIME`, if it is symbolic)."""
        n = n or (PRIME if self.symbols else self.size)
        return tuple(self.evaluate(s, n) for s in val.shape)

    def per_sample(self, val: Tensor) -> int:
        """The number of entries of a (fake) tensor with samples, divided by the number of samples."""
        return math.prod(self.shape(val)) // (1 if self.whole else self.probe)

    @property
    def samples(self) -> int:
        """The number of samples at capture."""
        return 1 if self.whole else self.size

    @property
    def probe(self) -> int:
        """The batch size in which placements are computed."""
        return PRIME if self.symbols else self.size
