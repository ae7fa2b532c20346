"""Packed sequences: recurrent layers that stop where each sequence ends, exact at every length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from situations import Situation, classes, parametrized
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fxcurv
from fxcurv.errors import ArgumentError, CaptureError
from fxcurv.extensions import BatchGrad

LENGTHS, STEPS = (3, 2, 1, 2, 3), 3


class Last(nn.Module):
    """Classifies by the last hidden state; `how` the lengths are given."""

    def __init__(self, kind: type[nn.RNNBase], how: str = "tensor", **options) -> None:
        super().__init__()
        options = {"batch_first": True, **options}
        self.rnn, self.how = kind(3, 2, **options), how
        self.head = nn.Linear(options.get("proj_size") or 2, 3)

    def lengths(self, x: Tensor, lengths: Tensor) -> Tensor | list[int]:
        if self.how == "computed":
            return (x.abs().sum(-1) > 0).sum(1)
        return list(LENGTHS[: x.shape[0]]) if self.how == "list" else lengths

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        rows = x if self.rnn.batch_first else x.transpose(0, 1)
        packed = pack_padded_sequence(rows, self.lengths(x, lengths), self.rnn.batch_first, enforce_sorted=self.how == "sorted")
        _, state = self.rnn(packed)
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])


class Tagger(Last):
    """Classifies every step; padding is left out by the loss."""

    def __init__(self, kind: type[nn.RNNBase], total: int | None = None, **options) -> None:
        super().__init__(kind, **options)
        self.total = total
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, counts = pad_packed_sequence(self.rnn(packed)[0], True, -0.5, self.total)
        return self.head(out) * (counts.view(-1, 1, 1) + 1)


def sentences(n: int, order=lambda lengths: lengths) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor(order(LENGTHS[:n]))
    x = torch.randn(n, STEPS, 3)
    return x * (torch.arange(STEPS) < lengths.unsqueeze(1)).unsqueeze(-1), lengths


def descending(n: int) -> tuple[Tensor, Tensor]:
    return sentences(n, lambda lengths: sorted(lengths, reverse=True))


def last(kind: type[nn.RNNBase], x=sentences, quick: bool = False, asks: str = "first ggn", **options) -> Situation:
    return Situation("", lambda: Last(kind, **options), F.cross_entropy, x, classes(), asks, quick=quick)


def every(kind: type[nn.RNNBase], steps: int = STEPS, **options) -> Situation:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.transpose(1, 2), y, ignore_index=2)

    return Situation("", lambda: Tagger(kind, **options), loss, sentences, classes(steps), "first ggn products")


SITUATIONS = {
    "lstm": last(nn.LSTM),
    "gru": last(nn.GRU, quick=True),
    "rnn": last(nn.RNN, asks="first ggn hessian products"),
    "rnn of rectifiers": last(nn.RNN, nonlinearity="relu"),
    "lengths in a list": last(nn.GRU, how="list"),
    "lengths computed": last(nn.LSTM, how="computed"),
    "sorted lengths": last(nn.RNN, descending, how="sorted"),
    "time first": last(nn.GRU, batch_first=False),
    "no biases": last(nn.LSTM, bias=False),
    "projected": last(nn.LSTM, proj_size=1),
    "two layers": last(nn.LSTM, num_layers=2),
    "tagger, both directions, two layers": every(nn.LSTM, bidirectional=True, num_layers=2),
    "tagger, gru": every(nn.GRU, bidirectional=True),
    "total length": every(nn.GRU, steps=5, bidirectional=True, total=5),
}


@pytest.mark.parametrize("name", parametrized(SITUATIONS))
def test_equals_the_oracle(name: str) -> None:
    SITUATIONS[name].check((3, 5))


@pytest.mark.slow
@pytest.mark.parametrize("name", SITUATIONS)
def test_of_one_sample(name: str) -> None:
    SITUATIONS[name].check((1,))


@pytest.mark.slow
def test_dropout_between_layers_draws() -> None:
    """Other numbers than PyTorch draws for its packed data, which are fewer; a program agrees with itself."""
    torch.manual_seed(0)
    model = Last(nn.RNN, num_layers=2, dropout=0.5).train()
    x, lengths = sentences(4)
    compiled = fxcurv.compile(model, F.cross_entropy, [BatchGrad()])
    results = [compiled((x, lengths), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    assert not torch.equal(results[0].output, results[1].output)
    for result in results:
        for name, g in result.grad.items():
            torch.testing.assert_close(result.grad_batch[name].sum(0), g)


def test_shorter_than_the_batch_was_padded_is_refused() -> None:
    """Also after the first call: the program is of one size, PyTorch's result is as long as the longest sequence."""
    model, y = Tagger(nn.GRU, bidirectional=True), torch.randint(3, (3, STEPS))
    compiled = fxcurv.compile(model, lambda out, y: F.cross_entropy(out.transpose(1, 2), y[:, : out.shape[1]]), [])
    x, lengths = sentences(3)
    compiled((x, lengths), y)
    with pytest.raises(ArgumentError, match="total_length=3, or cut the batch"):
        compiled((x, lengths.clamp(max=2)), y)


class Flat(Last):
    """Reads what is packed."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(pack_padded_sequence(x, lengths, True, False).data[:, :2])


class Cut(Last):
    """Makes a list of sequences."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.rnn(pack_sequence([row[:2] for row in x]))[1][-1])


def test_data_of_a_packed_sequence_are_refused() -> None:
    with pytest.raises(CaptureError, match="with a mask") as error:
        fxcurv.compile(Flat(nn.GRU), F.cross_entropy, [])(sentences(3), torch.tensor([0, 1, 2]))
    assert "class Flat" not in str(error.value) and "pack_padded_sequence(x, lengths, True, False).data" in str(error.value)


def test_pytorch_is_as_it_was() -> None:
    before = pack_padded_sequence.__code__, pack_padded_sequence.__defaults__, nn.LSTM.forward
    fxcurv.compile(Last(nn.RNN), F.cross_entropy, [])(sentences(3), torch.tensor([0, 1, 2]))
    assert before == (pack_padded_sequence.__code__, pack_padded_sequence.__defaults__, nn.LSTM.forward)
    packed = pack_padded_sequence(*sentences(3), True, False)
    assert packed.data.shape == (6, 3) and pad_packed_sequence(packed)[0].shape == (3, 3, 3)
