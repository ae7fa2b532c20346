"""How ranks go over their loaders together: their batches are one batch, and all raise what one raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed.tensor import DTensor

from fxcurv.errors import ArgumentError
from fxcurv.front.arguments import Arguments, filled
from fxcurv.ir.placement import REPLICATE, Placement, Shard
from fxcurv.ir.private import pytree
from fxcurv.runtime.ranks import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Empty:
    """A batch without samples, for a rank that has run out of batches: (inputs, targets), unpacked."""

    inputs: Any
    targets: tuple


class Together:
    """Ranks that go over a loader each; without `ranks`, this process alone.

    Args:
        ranks: of `compile(mesh=)`.
        emptied: a batch -> the same without samples.
    """

    def __init__(self, ranks: Ranks | None = None, emptied: Callable[[Any], Any] = lambda batch: batch):
        self.ranks, self._emptied = ranks, emptied

    def do(
        self, fn: Callable[[], T], say: Callable[[T], Sequence[int]] = lambda value: ()
    ) -> tuple[T, list[list[int]]]:
        """(`fn()`, the numbers that `say` gives for it on every rank); `fn` must not communicate.

        Raises:
            RankError: where it raised on another rank.
        """
        if self.ranks is not None:
            return self.ranks.together(fn, say)
        value = fn()
        return value, [list(say(value))]

    def values(self, fn: Callable[[], T]) -> list[T]:
        """The values of `fn()` on all ranks, of any kind that can be pickled (tensors come on the CPU).

        Raises:
            RankError: where it raised on another rank.
        """
        mine, _ = self.do(fn)
        if self.ranks is None:
            return [mine]
        return self.ranks.objects(pytree.tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, mine))

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches; a rank that has run out goes on with empty ones until no rank has another.

        Raises:
            ArgumentError: on all ranks, if one has no batch at all, from which an empty one could be made.
        """
        if self.ranks is None:
            yield from loader
            return
        own, last = iter(loader), None
        while True:
            batch, rows = self.do(lambda: next(own, _END), lambda found: (found is not _END,))
            if not any(row[0] for row in rows):
                return
            last = self.do(lambda: self._own_or_empty(batch, last))[0]  # noqa: B023
            yield last

    def _own_or_empty(self, batch: Any, last: Any) -> Any:
        if batch is not _END:
            return batch
        if last is None:
            raise ArgumentError(
                "a rank has no batch at all: give it one of no samples, x[:0] and y[:0], which says of what shape"
            )
        return last if isinstance(last, Empty) else self._emptied(last)


_END = object()
ALONE = Together()


def emptied(arguments: Arguments) -> Empty:
    """The batch of these arguments without its samples."""
    none = arguments.along_samples(lambda t, d: t.narrow(d, 0, 0))
    positional, named = filled(none.input_template, none.inputs)
    return Empty(named or positional, filled(none.target_template, none.targets))


def sample_place(how: str, axis: int) -> Placement:
    """Where the samples are on a value that combines by `how` (`Combine`)."""
    return Shard(axis) if how == "rows" else REPLICATE


def local(t: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return t.to_local() if isinstance(t, DTensor) else t
