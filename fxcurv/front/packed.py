"""Packed sequences while a model is captured: they stay padded, and recurrent layers keep the state past the end.

The data of a packed sequence are as long as all lengths together, with samples sorted by length: both depend on values.
Padded, samples stay where they are, and a step past the end of a sequence keeps the state (`torch.where`), in both directions:
values and all derivatives equal those of the packed sequence.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fxcurv.errors import CaptureError
from fxcurv.ir.origin import running_line
from fxcurv.ir.private import original, patched, rerouted
from fxcurv.kernels.longest import longest


class Padded(PackedSequence):
    """A packed sequence as rows [T, N, *] that are zero past the end of each sequence, and `lengths` [N]."""

    rows: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, rows: Tensor, lengths: Tensor) -> Padded:
        new = tuple.__new__(cls, (None,) * 4)
        new.rows, new.lengths = _fill_padding(rows, _step_masks(rows, lengths), 0), lengths
        return new

    def _refuse(self, *_: Any) -> Any:
        raise CaptureError(
            f"the data of a packed sequence are read, whose size depends on the values of the lengths.\n{running_line()}"
            "Way out: work on the padded tensor, before pack_padded_sequence or after pad_packed_sequence, with a mask "
            "where padding would count; ignore_index in the loss."
        )

    data = property(_refuse)
    batch_sizes = property(_refuse)
    __iter__ = _refuse  # type: ignore[assignment]
    __getitem__ = _refuse  # type: ignore[assignment]


def _fill_padding(rows: Tensor, within: list[Tensor], value: float) -> Tensor:
    """`rows` [T, N, *] with `value` past the end of each sequence."""
    steps = [torch.where(w.reshape(-1, *[1] * (row.ndim - 1)), row, value) for row, w in zip(rows, within, strict=True)]
    return torch.stack(steps)


def _step_masks(rows: Tensor, lengths: Tensor) -> list[Tensor]:
    """For every step, whether it is within each sequence [N]: vectors, so that no axis T is taken for another."""
    return [lengths.to(rows.device) > t for t in range(rows.shape[0])]


def _pack(input: Tensor, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True) -> Padded:  # noqa: A002
    """`pack_padded_sequence`; samples keep their order, sorted or not."""
    rows = input.transpose(0, 1) if batch_first else input
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    return Padded.of(rows, lengths)


def _pad(
    sequence: PackedSequence, batch_first: bool = False, padding_value: float = 0.0, total_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """`pad_packed_sequence`; without a total length, the longest sequence must fill the padded rows."""
    if not isinstance(sequence, Padded):
        raise CaptureError(
            f"a packed sequence that is neither an input nor packed by pack_padded_sequence cannot be traced.\n{running_line()}"
            "Way out: pass it to the compiled call, or the padded tensor and the lengths, and pack them in the model."
        )
    rows, lengths = sequence.rows, sequence.lengths
    if total_length is None:
        lengths = longest(lengths, rows.shape[0])
    rows = _fill_padding(rows, _step_masks(rows, lengths), padding_value)
    if total_length is not None:
        more = total_length - rows.shape[0]
        rows = (
            torch.cat([rows, rows.new_full((more, *rows.shape[1:]), padding_value)])
            if more > 0
            else rows[:total_length]
        )
    return rows.transpose(0, 1) if batch_first else rows, lengths


def refuse_output(sequence: PackedSequence) -> None:
    """Refuse a packed sequence that the model returns."""
    raise CaptureError(
        "the model returns a packed sequence, in which samples have no rows of their own. Way out: return "
        "pad_packed_sequence(sequence, total_length=...)[0], and have the loss leave padding out."
    )


# ---- recurrent layers ------------------------------


def _recurrent(own: Callable) -> Callable:
    """The forward pass of a recurrent layer, which takes packed sequences to `_run_masked`."""

    @functools.wraps(own)
    def forward(self, input, hx=None):  # noqa: A002
        return _run_masked(self, input, hx) if isinstance(input, Padded) else own(self, input, hx)

    return forward


def _run_masked(rnn: nn.RNNBase, packed: Padded, hx: Any) -> tuple[Padded, Any]:
    """Run a recurrent layer: (output, last states); a state is a tuple of tensors [layers * directions, N, *]."""
    rows, directions = packed.rows, 2 if rnn.bidirectional else 1
    within = _step_masks(rows, packed.lengths)
    several = isinstance(hx, tuple) or rnn.mode == "LSTM"
    given = None if hx is None else hx if several else (hx,)
    last: list[tuple[Tensor, ...]] = []
    for layer in range(rnn.num_layers):
        outs = []
        for direction in range(directions):
            k = layer * directions + direction
            state = _zeros(rnn, rows) if given is None else tuple(s[k] for s in given)
            out, state = _run_direction(rnn, rows, within, state, rnn.all_weights[k], bool(direction))
            outs.append(out)
            last.append(state)
        rows = torch.cat(outs, -1) if directions > 1 else outs[0]
        if rnn.dropout and rnn.training and layer < rnn.num_layers - 1:
            rows = F.dropout(rows, rnn.dropout)
    states = tuple(torch.stack(s) for s in zip(*last, strict=True))
    return Padded.of(rows, packed.lengths), states if several else states[0]


def _zeros(rnn: nn.RNNBase, rows: Tensor) -> tuple[Tensor, ...]:
    sizes = (rnn.proj_size or rnn.hidden_size, rnn.hidden_size) if rnn.mode == "LSTM" else (rnn.hidden_size,)
    return tuple(rows.new_zeros(rows.shape[1], size) for size in sizes)


def _run_direction(
    rnn: nn.RNNBase, rows: Tensor, within: list[Tensor], state: tuple[Tensor, ...], weights: Any, backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one layer in one direction: (outputs of all steps [T, N, H], state after the last)."""
    into, again, *rest = weights
    biases = rest[:2] if rnn.bias else (None, None)
    gates = F.linear(rows, into, biases[0])
    steps = range(rows.shape[0])
    outs = [rows] * rows.shape[0]
    for t in reversed(steps) if backwards else steps:
        new = _CELLS[rnn.mode](gates[t], F.linear(state[0], again, biases[1]), state)
        if rnn.proj_size:
            new = (F.linear(new[0], rest[-1]), new[1])
        state = tuple(torch.where(within[t].unsqueeze(-1), n, s) for n, s in zip(new, state, strict=True))
        outs[t] = state[0]
    return torch.stack(outs), state


def _lstm(given: Tensor, kept: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (given + kept).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru(given: Tensor, kept: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (r, z, n), (hr, hz, hn) = given.chunk(3, -1), kept.chunk(3, -1)
    new = (n + (r + hr).sigmoid() * hn).tanh()
    return (new + (z + hz).sigmoid() * (state[0] - new),)


_CELLS: dict[str, Callable] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": lambda given, kept, state: ((given + kept).tanh(),),
    "RNN_RELU": lambda given, kept, state: ((given + kept).relu(),),
}


@contextlib.contextmanager
def padded_sequences() -> Iterator[None]:
    """While a model is captured, packed sequences stay padded, and recurrent layers take them."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(rerouted("torch.nn.utils.rnn.pack_padded_sequence", _pack))
        stack.enter_context(rerouted("torch.nn.utils.rnn.pad_packed_sequence", _pad))
        for name in ("torch.nn.LSTM.forward", "torch.nn.GRU.forward", "torch.nn.RNN.forward"):
            stack.enter_context(patched(name, _recurrent(original(name))))
        yield
