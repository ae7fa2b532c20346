"""The memory of earlier results, used again when nobody else holds it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import ArgumentError
from fxcurv.ir.private import base_of, uses_of_storage
from fxcurv.ir.program import Kept, Program


class Storage:
    """The memory of earlier results of one program, by buffer."""

    def __init__(self, program: Program):
        self._program = program
        self._kept: dict[int, Tensor] = {}
        # evaluating a symbolic shape takes longer than a small problem's kernels
        self._shapes: dict[Any, tuple[int, ...]] = {}

    def take(self, n: int, lengths: tuple[int, ...] = ()) -> list[Tensor]:
        """Memory for the program's buffers at batch size `n`: the last result's if nobody else holds it, else new."""
        return [self._view(index, n, lengths, free=True) for index in range(len(self._program.buffers))]

    def take_from(self, kept: Kept, n: int, flat: Sequence[Any], lengths: tuple[int, ...] = ()) -> list[Tensor]:
        """The memory of an earlier result for the program's buffers at batch size `n`, whoever holds it.

        Args:
            kept: the result's memory, where its fields must still lie.
            flat: what the graph reads, which must lie elsewhere.

        Raises:
            ArgumentError: if the result's memory cannot serve.
        """
        if kept.program is not self._program:
            raise ArgumentError(
                "out= is a result of another program: of another compiled object, another kind of input, or another batch "
                "size where it is fixed. Pass a result of the same kind of call, or none"
            )
        given = {t.untyped_storage().data_ptr() for t in flat if isinstance(t, Tensor)}
        for index, (tensor, memory) in enumerate(zip(kept.tensors, self._program.buffers, strict=True)):
            where, needed = tensor.untyped_storage().data_ptr(), math.prod(self._shape(index, n, lengths))
            names = [f"{field}['{name}']" for field, name in memory.results]
            values = [kept.fields.get(field, {}).get(name) for field, name in memory.results]
            for name, value in zip(names, values, strict=True):
                if not isinstance(value, Tensor) or value.untyped_storage().data_ptr() != where:
                    raise ArgumentError(
                        f"out=: {name} of the result has been replaced; pass a result as it was returned"
                    )
            if tensor.numel() < needed:
                raise ArgumentError(
                    f"out=: {names[0]} of the result has memory for {tensor.numel()} numbers, and a batch of {n} needs "
                    f"{needed}: pass a result of a batch at least as large, or none"
                )
            if where in given:
                raise ArgumentError(
                    f"out=: an argument or parameter of this call lies in the memory of {names[0]}: clone it"
                )
        self._kept.update(enumerate(kept.tensors))
        return [self._view(index, n, lengths, free=False) for index in range(len(self._program.buffers))]

    def kept(self, fields: dict[str, Any], memory: list[Tensor] | None = None) -> Kept:
        """The memory that a call wrote to (default: the last one's), with the fields of its result."""
        known = [self._kept[index] for index in range(len(self._program.buffers))] if memory is None else memory
        return Kept(self._program, tuple(t if (base := base_of(t)) is None else base for t in known), fields)

    def _view(self, index: int, n: int, lengths: tuple[int, ...], free: bool) -> Tensor:
        shape = self._shape(index, n, lengths)
        kept, numel = self._kept.pop(index, None), math.prod(shape)  # of several threads, one gets it
        if kept is None or free and (kept.numel() < numel or uses_of_storage(kept) > _OF_ONE[1]):
            kept = torch.empty(numel, dtype=self._program.buffers[index].dtype)
        view = kept[:numel].view(shape)
        self._kept[index] = kept  # the view holds it too
        return view

    def _shape(self, index: int, n: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
        key = index, n, lengths
        if key not in self._shapes:
            self._shapes[key] = self._program.buffers[index].shape(self._program.batch, n, lengths or None)
        return self._shapes[key]


def alone(box: list[Tensor]) -> bool:
    """Whether nothing but `box` holds its one tensor, or its memory. It may be a view of a tensor that nothing else holds."""
    usual = _OF_ONE if base_of(box[0]) is None else _OF_VIEW
    return all(found <= known for found, known in zip(_holders(box), usual, strict=True))


def _holders(box: list[Tensor]) -> tuple[int, int, int]:
    """How often the tensor of `box`, its storage, and the tensor that it is a view of are held, by this function too."""
    base = base_of(box[0])
    return sys.getrefcount(box[0]), uses_of_storage(box[0]), 0 if base is None else sys.getrefcount(base)


_OF_ONE, _OF_VIEW = _holders([torch.empty(1)]), _holders([torch.empty(1).view(1, 1)])
