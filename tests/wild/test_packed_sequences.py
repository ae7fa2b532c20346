"""Packed sequences: recurrent layers that stop where each sequence ends, exact at every length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net
from situations import Situation, classes, parametrized
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import fxcurv
from fxcurv.errors import ArgumentError, CaptureError, MixedSamplesError
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
        packed = pack_padded_sequence(
            rows, self.lengths(x, lengths), self.rnn.batch_first, enforce_sorted=self.how == "sorted"
        )
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


# ---- packed sequences as inputs ------------------------------


class Given(Last):
    """Its input is packed, beside a vector of each sequence."""

    def forward(self, packed: PackedSequence, scale: Tensor) -> Tensor:
        return self.head(self.rnn(packed)[1][-1]) * scale.unsqueeze(1)


class GivenTagger(Tagger):
    def forward(self, packed: PackedSequence) -> Tensor:
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def packed(n: int) -> PackedSequence:
    """Sequences in any order, the longest not first."""
    return pack_sequence([torch.randn(k, 3) for k in (2, 3, 1, 2, 3)[-n:]], enforce_sorted=False)


INPUTS = {
    "last state": Situation(
        "", lambda: Given(nn.GRU), F.cross_entropy, lambda n: (packed(n), torch.rand(n) + 0.5), classes(), "first ggn",
        quick=True,
    ),
    "in order of lengths, by keyword": Situation(
        "", lambda: Given(nn.RNN), F.cross_entropy,
        lambda n: {"packed": pack_sequence([torch.randn(k, 3) for k in (3, 2, 2, 1, 1)[:n]]), "scale": torch.rand(n) + 0.5},
        classes(), "first ggn hessian products",
    ),
    "tagger": Situation(
        "", lambda: GivenTagger(nn.LSTM, bidirectional=True), lambda f, y: F.cross_entropy(f.transpose(1, 2), y, ignore_index=2),
        lambda n: (packed(n),), lambda n: torch.randint(3, (n, 3)), "first ggn products",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", parametrized(INPUTS))
def test_an_input_equals_the_oracle(name: str) -> None:
    INPUTS[name].check((5, 3, 1))


def test_a_packed_sequence_is_refused_where_it_has_no_rows() -> None:
    y = torch.tensor([0, 1, 2])
    for model, says in (
        (Net(lambda m, p: m.head(p.data[:3]), head=nn.Linear(3, 3)), "with a mask"),
        (Net(lambda m, p: m.rnn(p)[0], rnn=nn.GRU(3, 3)), "pad_packed_sequence(sequence, total_length=...)"),
    ):
        with pytest.raises(CaptureError) as error:
            fxcurv.compile(model, F.cross_entropy, [])((packed(3),), y)
        assert says in str(error.value)


@pytest.mark.slow
def test_a_packed_sequence_is_not_exported() -> None:
    """Inside `torch.compile` the call is one outside of the graph."""
    compiled = fxcurv.compile(Given(nn.RNN), F.cross_entropy, [])
    given, y = (packed(3), torch.rand(3)), torch.tensor([0, 1, 2])
    loss = compiled(given, y).loss
    with pytest.raises(
        ArgumentError, match="packed sequence is no argument of torch.compile or of an exported program"
    ):
        compiled.export(given, y)
    torch.testing.assert_close(torch.compile(lambda x, y: compiled(x, y).loss, backend="eager")(given, y), loss)


class Counted(Last):
    """Reads a number of the lengths after `.to()`, which gives the lengths themselves."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = self.rnn(pack_padded_sequence(x, lengths.to(x.device), True, enforce_sorted=False))[1][-1]
        return self.head(h) * int(lengths.max())


def test_a_number_of_the_lengths() -> None:
    torch.manual_seed(0)
    model, (x, lengths), y = Counted(nn.GRU).double(), sentences(3), torch.tensor([0, 1, 2])
    x = x.double()
    found = fxcurv.compile(model, F.cross_entropy, [])((x, lengths), y).grad
    true = torch.autograd.grad(F.cross_entropy(model(x, lengths), y), list(model.parameters()))
    for g, expected in zip(found.values(), true, strict=True):
        torch.testing.assert_close(g, expected)


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
    assert "class Flat" not in str(error.value) and "pack_padded_sequence(x, lengths, True, False).data" in str(
        error.value
    )


def test_pytorch_is_as_it_was() -> None:
    before = pack_padded_sequence.__code__, pack_padded_sequence.__defaults__, nn.LSTM.forward
    fxcurv.compile(Last(nn.RNN), F.cross_entropy, [])(sentences(3), torch.tensor([0, 1, 2]))
    assert before == (pack_padded_sequence.__code__, pack_padded_sequence.__defaults__, nn.LSTM.forward)
    packed = pack_padded_sequence(*sentences(3), True, False)
    assert packed.data.shape == (6, 3) and pad_packed_sequence(packed)[0].shape == (3, 3, 3)


class SortedByHand(nn.Module):
    """Sentences sorted by their lengths, which become a list; the last states of each."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x, lengths):
        ordered, places = lengths.sort(descending=True)
        out, _ = self.rnn(pack_padded_sequence(x[places], ordered.tolist(), batch_first=True))
        out, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        return self.head(out[places.argsort()][torch.arange(len(x)), lengths - 1])


def test_a_list_of_lengths_in_batches_of_other_sizes(capfd):
    torch.manual_seed(0)
    model = SortedByHand().double()
    compiled = fxcurv.compile(model, F.cross_entropy, [])
    for n in (3, 2, 1, 3):
        x, lengths, y = torch.randn(n, 4, 3, dtype=torch.float64), torch.tensor([4, 3, 2])[:n], torch.arange(n)
        result = compiled((x, lengths), y)
        want = torch.autograd.grad(F.cross_entropy(model(x, lengths), y), list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), want, strict=True):
            torch.testing.assert_close(result.grad[name], g)
    assert not capfd.readouterr().err


def test_the_way_out_of_samples_sorted_by_hand():
    model, y = SortedByHand(), torch.arange(3)
    with pytest.raises(MixedSamplesError, match=r"samples in the order given \(.* has enforce_sorted=False\)"):
        fxcurv.compile(model, F.cross_entropy, [BatchGrad()])(sentences(3), y)
