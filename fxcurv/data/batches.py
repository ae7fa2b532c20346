"""The batches of a loader: inputs and targets, marks that tell one batch from another, and what is refused of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fxcurv.api import Compiled
from fxcurv.data.together import local
from fxcurv.errors import ArgumentError, MixedSamplesError
from fxcurv.front.arguments import map_leaves
from fxcurv.ir.program import Program

Batch = tuple[Any, tuple]  # inputs, targets


def check_given(compiled: Any, data: Any, whose: str) -> None:
    """Refuse what is no compiled object, and data that cannot be gone over.

    Raises:
        ArgumentError: naming what was given.
    """
    if not isinstance(compiled, Compiled):
        raise ArgumentError(
            f"{whose} takes what fxcurv.compile returns, not a {type(compiled).__name__}: pass "
            "fxcurv.compile(model, loss, extensions)"
        )
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise ArgumentError(f"the data of {whose} is a {type(data).__name__}: pass a DataLoader, or a list of batches")


def given(compiled: Compiled, batch: Any, unpack: Callable[[Any], tuple] | None) -> Batch:
    """(inputs, targets) of a batch, where the loader has them.

    Raises:
        ArgumentError: for a batch of another form.
    """
    alone = compiled.loss is None
    if unpack is not None:
        found: Any = unpack(batch)
    elif isinstance(batch, tuple | list) and len(batch) >= 1 + (not alone):
        found = batch
    elif alone and isinstance(batch, Tensor):
        found = (batch,)
    else:
        keys = f" with {', '.join(map(str, batch))}" if isinstance(batch, dict) else ""
        one = " (every entry of a list is a batch; one batch is a tuple)" if isinstance(batch, Tensor) else ""
        raise ArgumentError(
            f"the loader yields a {type(batch).__name__}{keys}, not (inputs, targets){one}: pass "
            "unpack=lambda batch: (inputs, targets), where inputs are a tensor, or a tuple or dict of them"
        )
    if not isinstance(found, tuple | list) or not found:
        raise ArgumentError(f"unpack= gave a {type(found).__name__}: return (inputs, *targets)")
    return found[0], () if alone and unpack is None else tuple(found[1:])


def moved(compiled: Compiled, batch: Batch) -> Batch:
    """The same on the model's device."""
    device = next(compiled.model.parameters()).device
    return map_leaves(batch, Tensor, lambda t: t.to(device))


def unpacked(compiled: Compiled, batch: Any, unpack: Callable[[Any], tuple] | None) -> Batch:
    """(inputs, targets) of a batch, on the model's device.

    Raises:
        ArgumentError: for a batch of another form.
    """
    return moved(compiled, given(compiled, batch, unpack))


def mark(batch: Batch) -> int:
    """A checksum of what a program takes of a batch: all numbers, with their shapes and dtypes, and plain values.

    It takes 0.25 ms per MiB on one core, where tensors are on the CPU; that is why batches are marked before they move.
    """
    found = 0

    def note(leaf: Any) -> Any:
        nonlocal found
        for t in leaf if isinstance(leaf, PackedSequence) else (leaf,):
            if not isinstance(t, Tensor):
                found = zlib.crc32(f"{type(t).__name__} {t!r}".encode(), found)
                continue
            t = local(t.detach())
            t = t if t.layout is torch.strided else t.to_dense()
            found = zlib.crc32(f"{t.dtype} {tuple(t.shape)}".encode(), found)
            found = zlib.crc32(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), found)
        return leaf

    map_leaves(batch, (Tensor, PackedSequence, bool, int, float, str), note)
    return found


def check_apart(program: Program) -> None:
    """Refuse a model in which samples interact: values of all samples do not follow from those of batches.

    Raises:
        MixedSamplesError: naming the op.
    """
    reason = program.analysis.mixing
    if reason:
        raise MixedSamplesError(reason.format(asked="a quantity of several batches"))


class Batches:
    """Data that is gone over several times: batches (inputs, *targets) with samples, on the model's device.

    Args:
        compiled: what they are for.
        data: a loader; `unpack`: see `fxcurv.over`; `whose`: what it is called in messages.

    Attributes:
        marks: of the batches, as the first time shows them; None before its end.
    """

    def __init__(self, compiled: Compiled, data: Iterable[Any], unpack: Callable[[Any], tuple] | None, whose: str):
        self._compiled, self._data, self._unpack, self._whose = compiled, data, unpack, whose
        self.marks: list[int] | None = None

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple]:
        """Yield the batches; see `marked`."""
        return (batch for _, batch in self.marked())

    def known(self) -> list[int]:
        """The marks, for which the data is gone over if it was not yet."""
        if self.marks is None:
            for _ in self:
                pass
        return self.marks or []

    def marked(self) -> Iterator[tuple[int, tuple]]:
        """Yield (mark, batch).

        Raises:
            ArgumentError: for a batch of another form; if other batches come than the first time, or in another order.
        """
        marks: list[int] = []
        for batch in self._data:
            inputs, targets = known = given(self._compiled, batch, self._unpack)
            if not self._compiled.arguments(inputs, *targets).batch_size:
                continue
            marks.append(mark(known))
            if self.marks is not None and self.marks[len(marks) - 1 : len(marks)] != marks[-1:]:
                self._refuse(f"batch {len(marks) - 1} is another one than the first time")
            inputs, targets = moved(self._compiled, known)
            yield marks[-1], (inputs, *targets)
        if self.marks is not None and len(marks) != len(self.marks):
            self._refuse(f"there are {len(marks)} batches, and there were {len(self.marks)} the first time")
        self.marks = marks

    def _refuse(self, what: str) -> None:
        raise ArgumentError(
            f"{self._whose} comes in another order every time, or as other data: {what}. Way out: "
            "DataLoader(shuffle=False) without random transforms, or a list of batches."
        )
