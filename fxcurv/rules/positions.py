"""Placements of positions between a model's output f and the gradient there: `rules.split` for another axis.

f has slices along an axis of positions. A value computed from f is `Shard` if each of its slices is computed from
those of f at the same positions, and `Partial` if it is a sum over positions. A value not computed from f may be read
slice by slice or whole, whichever keeps positions apart.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence

from torch import SymInt, fx

from fxcurv.ir.graph import is_tensor
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Alike, Placement, Shard, places_of
from fxcurv.ir.private import schema_of
from fxcurv.ir.program import Program
from fxcurv.rules.split import Found, Sites, Split
from fxcurv.rules.traits import MEANS, over_ranks, random

# How many placements of an op's arguments are tried.
TRIED = 200

# Names of arguments that are the sizes of an op's output.
SIZES = ("size", "shape", "input_sizes")


class Positions(Split):
    """The placements of positions, node by node, in `across`.

    Args:
        count: how many positions there are.
    """

    def __init__(self, program: Program, count: int):
        super().__init__(program)
        self.n = count

    def size(self, value: int | SymInt) -> int:
        """A size as a number, with a prime for the number of samples."""
        batch = self.program.batch
        return batch.evaluate(value, batch.stand_in) if isinstance(value, SymInt) else int(value)

    def begin(self, chain: Sequence[fx.Node], place: Placement) -> bool:
        """Whether the last node of `chain` can have its positions at `place`; sets `across` for the chain if so.

        The chain computes this node from a value with fewer entries.
        """
        outside = self._unplaced_inputs(chain[0])
        for seeds in self._assignments(outside):
            self.across.clear()
            self.across.update(zip(outside, seeds, strict=True))
            for node in chain:
                self.follow(node)
            if self.across[chain[-1]] == place:
                return True
        self.across.clear()
        return False

    def follow(self, node: fx.Node) -> None:
        """Set `across[node]`; that of its arguments computed from f is set before."""
        read = [self.across[i] for i in node.all_input_nodes if i in self.across]
        if node.target is operator.getitem:
            found = read[0]
            self.across[node] = found[node.args[1]] if isinstance(found, list) else MIXED
            return
        self.across[node] = MIXED
        if MIXED in read or PARTIAL in read or over_ranks(node) or random(node.target):
            return
        outside = self._unplaced_inputs(node)
        for seeds in self._assignments(outside):
            self.across.update(zip(outside, seeds, strict=True))
            found = self.visit(node).place
            if MIXED not in places_of(found):
                self.across[node] = found
                return
        for value in outside:
            del self.across[value]

    def _unplaced_inputs(self, node: fx.Node) -> list[fx.Node]:
        return [i for i in node.all_input_nodes if is_tensor(i) and i not in self.across]

    def _assignments(self, values: Sequence[fx.Node]) -> Iterator[tuple[Placement, ...]]:
        return itertools.islice(itertools.product(*(self._candidates(v) for v in values)), TRIED)

    def _candidates(self, value: fx.Node) -> list[Placement]:
        """A `Shard` for every axis that may hold the positions, then `REPLICATE`."""
        found: list[Placement] = []
        for dim, size in enumerate(self.shape(value.meta["val"])):
            if size and size % self.n == 0:
                rest, samples = size // self.n, self.program.batch.stand_in
                outer = [samples] if rest % samples == 0 else [1]
                inner = rest // outer[0]
                found += [Shard(dim, rest // k, k) for k in range(1, min(inner, TRIED) + 1) if inner % k == 0]
        return [*found, REPLICATE]

    # ---- differences from the sample axis ------------------------------

    def _sound(self, place: Placement, shape: tuple[int, ...] | None) -> Placement:
        """As for samples, but another axis may have the size of the positions by coincidence."""
        if shape is None:
            return REPLICATE
        if not isinstance(place, Shard):
            return place
        return place if shape[place.dim] == place.outer * place.inner * self.n else MIXED

    def _constant(self, shape: tuple[int, ...], like: Sites) -> Placement:
        """Placed as the argument whose shape it has, perhaps behind more axes."""
        for s in like:
            if s and isinstance(s.place, Shard) and shape[len(shape) - len(s.shape) :] == s.shape:
                return Alike(s.place.dim + len(shape) - len(s.shape), s.place.outer, s.place.inner)
        return REPLICATE

    def _by_rule(self, node: fx.Node, leaves: list, sites: list, outs: list) -> Found:
        found = super()._by_rule(node, leaves, sites, outs)
        return MIXED if node.target in MEANS and found == PARTIAL else found  # a chunk has another mean

    def _tried(self, node: fx.Node, leaves: list, sites: list) -> Placement:
        return MIXED

    def _declared(self, node: fx.Node, found: Found) -> Found:
        return found


def of_sizes(node: fx.Node) -> list[int]:
    """The positions of an op's arguments that are the sizes of its output."""
    schema = schema_of(node.target)
    if schema is None:
        return []
    return [k for k, a in enumerate(schema.arguments) if a.name in SIZES and str(a.type) == "List[int]"]
