"""A data set in batches gives what one call on all of it gives; and what goes wrong on the way is said, and lost is nothing."""

import io
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from asked import against, exact, first, hessian
from rich.console import Console
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import fxcurv
from fxcurv.data.batches import mark
from fxcurv.data.identity import identity
from fxcurv.data.rows import Rows
from fxcurv.data.weights import Weights
from fxcurv.errors import ArgumentError, ExtensionError, LossError, MixedSamplesError
from fxcurv.extensions import (
    EKFAC,
    GGNMP,
    KFAC,
    KFLR,
    KFRA,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    Dots,
    Jacobian,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)
from fxcurv.kronecker import dense

SIZES = [7, 2, 10]


def data(n=19):
    torch.manual_seed(0)
    return torch.randn(n, 3).double(), torch.randint(3, (n,))


def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()


def batches(sizes=SIZES):
    x, y = data(sum(sizes))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def compiled(loss=None, extensions=(), model=None):
    return fxcurv.compile(model or small(), loss or nn.CrossEntropyLoss(), extensions, check=None)


def leaves(field):
    """The tensors of a field; an eigenbasis, which is one of several, as the matrix that it is."""
    values = field.values() if isinstance(field, dict) else [field]
    return pytree.tree_leaves([dense(v) if type(v).__name__ == "Eigenbasis" else v for v in values])


def same(found, wanted, fields):
    for field in fields:
        pairs = zip(leaves(getattr(found, field)), leaves(getattr(wanted, field)), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13, msg=lambda m, f=field: f"{f}: {m}")


# Draws of sampled columns are compared below, and so are clipped sums, whose bound needs a loss that is a sum.
EVERY = [
    *[e for e in first() if not isinstance(e, ClippedGrad)], *exact(), Jacobian(), *hessian(),
    KFLR(), KFAC(fisher="empirical"), EKFAC(fisher="empirical"), *against(small()),
]  # fmt: skip
LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 5]).double(), ignore_index=0),
}


@pytest.mark.parametrize("extensions", [
    pytest.param([BatchL2Grad(), Variance(), KFLR()], id="few"),
    pytest.param(EVERY, id="every", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("loss", [
    "weighted", pytest.param("mean", marks=pytest.mark.slow), pytest.param("sum", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_data_set_is_as_one_call(loss, extensions):
    both = compiled(LOSSES[loss], extensions)
    same(fxcurv.over(both, batches()), both(*data()), ["loss", "grad", *(e.savefield for e in extensions)])


@pytest.mark.slow
def test_ekfac_takes_the_bases_of_all_samples():
    both = compiled(extensions=[EKFAC(fisher="empirical")])
    same(fxcurv.over(both, batches()), both(*data()), ["grad", "ekfac"])


@pytest.mark.slow
def test_sampled_columns_are_scaled_as_exact_ones():
    """In the mean over many columns."""
    both = compiled(extensions=[DiagGGNMC(4000), DiagGGNExact()])
    found = fxcurv.over(both, batches(), seed=3)
    for name, want in found.diag_ggn_exact.items():
        torch.testing.assert_close(found.diag_ggn_mc[name], want, rtol=0.1, atol=0.03 * float(want.max()))


@pytest.mark.parametrize("asked", [DiagGGNMC(2), pytest.param(EKFAC(mc_samples=2), marks=pytest.mark.slow)])
def test_sampled_columns_are_those_of_one_call(asked):
    """Drawn by the sample's number in the data set, over two passes too."""
    both = compiled(extensions=[asked])
    same(fxcurv.over(both, batches(), seed=3), both(*data(), seed=3), [asked.savefield])


@pytest.mark.slow
def test_clipping_wants_a_sum():
    wanted = [ClippedGrad(0.5)]
    both = compiled(nn.CrossEntropyLoss(reduction="sum"), wanted)
    same(fxcurv.over(both, batches()), both(*data()), ["grad_clipped", "sample_norms"])
    with pytest.raises(ArgumentError, match="ClippedGrad of a mean"):
        fxcurv.over(compiled(extensions=wanted), batches())


def test_a_regulariser_counts_once():
    model = small()
    decayed = lambda f, t: nn.functional.cross_entropy(f, t) + model[0].weight.square().sum()  # noqa: E731
    both = compiled(decayed, [DiagHessian()], model)
    same(fxcurv.over(both, batches()), both(*data()), ["loss", "grad", "diag_h"])
    summed = lambda f, t: nn.functional.cross_entropy(f, t, reduction="sum") + model[0].weight.square().sum()  # noqa: E731
    with pytest.raises(LossError, match="a term that reads parameters"):
        fxcurv.over(compiled(summed, model=model), batches())


def weights_of(loss, pairs):
    """What each batch (f, targets) weighs, in units of the first."""
    weights = Weights(nn.Linear(1, 1), loss, None)
    found = []
    for f, t in pairs:
        arguments = fxcurv.compile(nn.Linear(1, 1), loss).arguments(f, t)
        found.append(weights.of(fxcurv.Result({"output": f}, (), None), f, (t,), arguments))
    return found if found[0] is None else [z / found[0] for z in found]


@pytest.mark.parametrize("loss, sizes, z", [
    (nn.functional.mse_loss, (3, 6), [1, 2]),
    (lambda f, t: 3 * nn.functional.mse_loss(f, t, reduction="sum"), (3, 5), [None, None]),
    (lambda f, t: (f - t).square().sum(1).mean(), (1, 1, 6), [1, 1, 6]),
], ids=["mean", "sum", "own"])  # fmt: skip
@pytest.mark.parametrize("fit", [0, 1])
def test_the_loss_says_its_weights(loss, sizes, z, fit):
    """Also of a perfect fit, where it has no slope."""
    torch.manual_seed(0)
    outputs = [torch.randn(n, 4) for n in sizes]
    found = weights_of(loss, [(f, f if fit else torch.randn_like(f)) for f in outputs])
    assert found == z or np.allclose(found, z, rtol=1e-12)


def test_tokens_count_where_they_are_not_ignored():
    loss = lambda f, t: nn.functional.cross_entropy(f.flatten(0, 1), t.flatten(), ignore_index=0)  # noqa: E731
    targets = [
        torch.tensor([[1, 0, 0]]),
        torch.zeros(3, 3, dtype=torch.long),
        torch.tensor([[1, 2, 0], [3, 3, 3], [0, 0, 0]]),
    ]
    torch.manual_seed(0)
    assert np.allclose(weights_of(loss, [(torch.randn(*t.shape, 4), t) for t in targets]), [1, 0, 5], rtol=1e-12)


@pytest.mark.slow
def test_losses_that_do_not_add_up_are_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3).double()

        def forward(self, x, t):
            f = self.linear(x)
            return {"loss": nn.functional.cross_entropy(f, t), "f": f}

    own = fxcurv.compile(Own(), lambda out: out["loss"], [DiagGGNExact()], check=None)
    pairs = [((x, y),) for x, y in batches()]
    unpack = lambda batch: batch  # noqa: E731
    with pytest.raises(LossError, match='reduction="sum"'):
        fxcurv.over(own, pairs, unpack=unpack)
    same(fxcurv.over(own, pairs, unpack=unpack, reduction="mean"), own(data()), ["loss", "grad", "diag_ggn_exact"])
    by_count = fxcurv.over(own, pairs, unpack=unpack, reduction=lambda inputs: len(inputs[0]))
    same(by_count, own(data()), ["loss", "grad"])
    with pytest.raises(MixedSamplesError, match="several batches"):
        fxcurv.over(compiled(lambda f, t: nn.functional.cross_entropy(f, t) ** 2), batches())
    norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(MixedSamplesError, match="batch norm"):
        fxcurv.over(compiled(model=norm), batches())


def test_running_averages():
    both = compiled(extensions=[SumGradSquared()])
    found = fxcurv.over(both, batches(), decay=0.75)
    each = [both(x, y) for x, y in batches()]
    weights = np.array([0.75**2, 0.75, 1]) / (0.75**2 + 0.75 + 1)
    for name, value in found.sum_grad_squared.items():
        torch.testing.assert_close(value, sum(w * r.sum_grad_squared[name] for w, r in zip(weights, each, strict=True)))
    clipped = compiled(extensions=[ClippedGrad(0.1)])  # each batch clips what its own mean has
    found = fxcurv.over(clipped, batches(), decay=0.75)
    for name, value in found.grad_clipped.items():
        own = [clipped(x, y).grad_clipped[name] for x, y in batches()]
        torch.testing.assert_close(value, sum(w * t for w, t in zip(weights, own, strict=True)))
    assert not hasattr(found, "sample_norms")
    with pytest.raises(ArgumentError, match="BatchGrad is per sample"):
        fxcurv.over(compiled(extensions=[BatchGrad()]), batches(), decay=0.75)


# ---- interrupted ------------------------------


class Broken(list):
    """A loader that fails at one batch, the first time round or the second."""

    def __init__(self, items, at, round_=0):
        super().__init__(items)
        self.at, self.round = at, round_

    def __iter__(self):
        for k, item in enumerate(super().__iter__()):
            if k == self.at and self.round == 0:
                raise KeyboardInterrupt
            yield item
        self.round -= 1


@pytest.mark.parametrize("round_", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_pass_goes_on(tmp_path, round_):
    both = compiled(
        extensions=[EKFAC(fisher="empirical"), SumGradSquared()] if round_ else [SumGradSquared(), BatchL2Grad()]
    )
    file = tmp_path / "pass.pt"
    with pytest.raises(KeyboardInterrupt):
        fxcurv.over(both, Broken(batches(), 2, round_), checkpoint=file)
    assert torch.load(file, weights_only=True)["batches"] == 2
    counted, call = [], fxcurv.Totals._call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fxcurv.Totals, "_call", lambda own, c, x, t: counted.append(len(x)) or call(own, c, x, t))
        found = fxcurv.over(both, batches(), checkpoint=file)
    assert counted == [10] and not file.exists()
    same(found, both(*data()), ["loss", "grad", *(e.savefield for e in both.extensions)])


def test_rows_stream_to_files_and_survive(tmp_path):
    both = compiled(extensions=[BatchGrad(), SqrtGGNExact()])
    with pytest.raises(KeyboardInterrupt):
        fxcurv.over(both, Broken(batches(), 2), to=tmp_path / "rows", checkpoint=tmp_path / "pass.pt")
    with open(tmp_path / "rows" / "grad_batch.0.bias.npy", "ab") as f:
        f.write(b"half a row")  # a batch that was being written when the process died
    found = fxcurv.over(both, batches(), to=tmp_path / "rows", checkpoint=tmp_path / "pass.pt")
    same(found, both(*data()), ["grad_batch", "sqrt_ggn_exact"])
    there = np.load(tmp_path / "rows" / "grad_batch.0.weight.npy", mmap_mode="r")
    assert np.array_equal(there, found.grad_batch["0.weight"].numpy())
    assert found.sqrt_ggn_exact["2.weight"].shape == (3, 19, 3, 2)


@pytest.mark.slow
def test_rows_are_divided_once(tmp_path):
    """A process that dies while they are leaves a file that no one goes on with."""
    both = compiled(extensions=[BatchL2Grad()])
    state = tmp_path / "pass.pt"
    with pytest.raises(KeyboardInterrupt):
        fxcurv.over(both, Broken(batches(), 2), to=tmp_path, checkpoint=state)
    saved = state.read_bytes()
    found = fxcurv.over(both, batches(), to=tmp_path, checkpoint=state)
    state.write_bytes(saved)  # as if it had died at the end
    with pytest.raises(ArgumentError, match="was being finished"):
        fxcurv.over(both, batches(), to=tmp_path, checkpoint=state)
    state.unlink()
    same(fxcurv.over(both, batches(), to=tmp_path), found, ["batch_l2"])


@pytest.mark.slow
def test_a_full_disk_leaves_a_state(monkeypatch):
    both = compiled(extensions=[BatchGrad(), BatchL2Grad(), SumGradSquared()])
    add, left = Rows.add, [9]

    def full(self, *args):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        add(self, *args)

    totals = fxcurv.Totals(both)
    monkeypatch.setattr(Rows, "add", full)
    with pytest.raises(OSError, match="No space"):
        totals.run(batches())
    assert totals.batches == 1  # the second batch had some of its rows written
    same(totals.run(batches()), both(*data()), ["grad", "grad_batch", "batch_l2", "sum_grad_squared"])


def other_loss():
    """In the same place, a closure with another number."""
    return [lambda f, t, eps=eps: nn.functional.cross_entropy(f, t, label_smoothing=eps) for eps in (0.0, 0.3)]


class Scaled(nn.Module):
    """A user's module with a number that no parameter is."""

    def __init__(self, by):
        super().__init__()
        self.linear, self.by, self.calls = nn.Linear(3, 3).double(), by, 0

    def forward(self, x):
        return self.scaled(self.linear(x))

    def scaled(self, x):
        return self.by * x


def scaled(by):
    torch.manual_seed(1)
    return Scaled(by)


def weighted(last):
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, last]).double())


PASSES = {  # name: (arguments of the first pass, of the second, what the message says)
    "loss": ({"loss": nn.CrossEntropyLoss(label_smoothing=0.3)}, {}, "another loss module"),
    "closure": ({"loss": other_loss()[0]}, {"loss": other_loss()[1]}, "another loss"),
    "weights of the loss": ({"loss": weighted(5)}, {"loss": weighted(6)}, r"the model has changed.*loss\.weight"),
    "activation": ({"model": nn.Sequential(small()[0], nn.ReLU(), small()[2])}, {}, "another module '1'"),
    "number": ({"model": scaled(1.0)}, {"model": scaled(2.0)}, "another model"),
    "params": ({"params": "0"}, {}, "params=0.weight, 0.bias, not"),
    "unpack": ({"unpack": lambda b: (2 * b[0], b[1])}, {"unpack": lambda b: b}, "batch 0 is not the one"),
    "reduction": ({"reduction": lambda x, t: 1}, {"reduction": lambda x, t: len(t)}, "batch 0 is not the one"),
    "fewer batches": ({}, {"of": batches()[:1]}, "1 batches, and 2 were counted"),
    "vectors": ({"extensions": [Dots({"0.bias": torch.tensor([[1.0, 2]])}, params="0.bias")]},
                {"extensions": [Dots({"0.bias": torch.tensor([[2.0, 1]])}, params="0.bias")]}, "another argument of an ext"),
}  # fmt: skip


QUICK = ("closure", "activation", "params", "unpack", "fewer batches")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PASSES])
def test_a_state_of_another_pass_is_refused(tmp_path, name):
    first, second, said = PASSES[name]

    def go(loader, loss=None, model=None, params=None, extensions=(), of=None, **options):
        both = fxcurv.compile(model or small(), loss or nn.CrossEntropyLoss(), extensions, params=params, check=None)
        return fxcurv.over(both, of or loader, checkpoint=tmp_path / "pass.pt", **options)

    with pytest.raises(KeyboardInterrupt):
        go(Broken(batches(), 2), **first)
    with pytest.raises(ArgumentError, match=said):
        go(batches(), **second)
    same(go(batches(), **first), go(batches(), **first), ["loss", "grad"])


def test_what_is_equal_resumes():
    """New objects of the same code, and counters that no code reads."""
    first, again = (identity(compiled(other_loss()[1], model=scaled(2.0))) for _ in range(2))
    assert first == again and first != identity(compiled(other_loss()[0], model=scaled(2.0)))
    counting = compiled(model=scaled(2.0))
    known = identity(counting)
    counting.model.calls += 1
    assert identity(counting) == known


def test_marks_are_of_all_numbers_and_of_what_programs_take():
    """Images with empty borders; and batches that are objects of a loader's own."""
    x = torch.zeros(2, 40, 40)
    y = x.clone()
    y[1, 20, 20] = 1
    assert mark((x, ())) != mark((y, ())) and mark((x, ())) == mark((x.clone(), ()))
    assert mark((x, (1,))) != mark((x, (2,))) != mark((x.flatten(), (2,)))

    class Own:
        def __init__(self, pair):
            self.pair = pair

    both, own = compiled(), [Own(pair) for pair in batches([5, 5, 5])]
    totals = fxcurv.Totals(both, unpack=lambda b: b.pair)
    with pytest.raises(KeyboardInterrupt):
        totals.run(Broken(own, 2))
    with pytest.raises(ArgumentError, match="batch 0 is not the one"):
        totals.run(own[::-1])


@pytest.fixture(scope="module")
def both_of_rows():
    return compiled(extensions=[BatchL2Grad(), SumGradSquared()])


@pytest.mark.parametrize("at", range(13, 24))
def test_an_interrupt_leaves_no_half_of_a_batch(monkeypatch, both_of_rows, at):
    """Wherever it comes while a batch is added: between two sums, between two fields of rows, before the mark."""
    both = both_of_rows
    calls, left = {"summed": fxcurv.Totals._summed, "add": Rows.add}, [at]

    def interrupted(name):
        def fn(*args):
            found = calls[name](*args)
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return found

        return fn

    monkeypatch.setattr(fxcurv.Totals, "_summed", interrupted("summed"))
    monkeypatch.setattr(Rows, "add", interrupted("add"))
    totals, again = fxcurv.Totals(both), fxcurv.Totals(both)
    with pytest.raises(KeyboardInterrupt):
        totals.run(batches([7, 2, 4, 3, 3]))
    again.load_state_dict(pickle.loads(pickle.dumps(totals.state_dict())))
    for one in (totals, again):
        same(one.run(batches([7, 2, 4, 3, 3])), both(*data()), ["loss", "grad", "sum_grad_squared", "batch_l2"])


@pytest.mark.slow
def test_rows_of_an_earlier_pass_stay_in_their_files(tmp_path):
    both, state = compiled(extensions=[BatchGrad(), EKFAC(fisher="empirical")]), tmp_path / "pass.pt"
    many = batches([100] * 5)
    with pytest.raises(KeyboardInterrupt):
        fxcurv.over(both, Broken(many, 2, 1), to=tmp_path / "rows", checkpoint=state)
    saved = torch.load(state, weights_only=True)
    assert "grad_batch" not in saved["earlier"][0] and saved["earlier"][0]["files"]["grad_batch"]
    found = fxcurv.over(both, many, to=tmp_path / "rows", checkpoint=state)
    same(found, both(*data(500)), ["grad_batch", "ekfac"])


def test_what_a_state_is_not_for(tmp_path):
    both = compiled(extensions=[SumGradSquared()])
    totals = fxcurv.Totals(both)
    with pytest.raises(KeyboardInterrupt):
        totals.run(Broken(batches(), 1))
    state = totals.state_dict()
    with pytest.raises(ArgumentError, match="batch 0 is not the one"):
        totals.run(batches()[::-1])
    with pytest.raises(ArgumentError, match="the state is of another pass .seed=0, not 1."):
        fxcurv.Totals(both, seed=1).load_state_dict(state)
    with torch.no_grad():
        both.model[2].bias.add_(1)
    with pytest.raises(ArgumentError, match=r"the model has changed.*2\.bias"):
        totals.run(batches())


# ---- what a loader yields ------------------------------


def test_loaders():
    both = compiled(extensions=[SumGradSquared()])
    x, y = data()
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    same(fxcurv.over(both, loader), both(x, y), ["loss", "grad", "sum_grad_squared"])
    same(fxcurv.over(both, iter(loader)), both(x, y), ["grad"])
    named = [{"x": a, "label": b} for a, b in batches()]
    with pytest.raises(ArgumentError, match="a dict with x, label, not .* pass unpack="):
        fxcurv.over(both, named)
    same(fxcurv.over(both, named, unpack=lambda b: (b["x"], b["label"])), both(x, y), ["grad"])
    empty = [(x[:0], y[:0]), *batches(), (x[:0], y[:0])]
    same(fxcurv.over(both, empty), both(x, y), ["loss", "grad", "sum_grad_squared"])
    with pytest.raises(ArgumentError, match="no sample"):
        fxcurv.over(both, [])


def test_a_sample_that_is_not_finite_is_named():
    both = compiled(extensions=[SumGradSquared()])
    x, y = data()
    x[11] = torch.nan
    with pytest.raises(
        ArgumentError, match=r"sample 11 of the data set \(number 2 of batch 2\): its input is not finite"
    ):
        fxcurv.over(both, zip(x.split(SIZES), y.split(SIZES), strict=True))
    x[11] = 1e200
    root = compiled(lambda f, t: (f.square().sum(1) ** 2).mean(), [SumGradSquared()], nn.Linear(3, 3).double())
    with pytest.raises(ArgumentError, match="sample 11 .*: its loss is not finite"):
        fxcurv.over(root, zip(x.split(SIZES), y.split(SIZES), strict=True))


def test_what_batches_do_not_say_is_refused():
    for extension in (KFRA(), GGNMP(), BatchGrad(subsampling=[0])):
        with pytest.raises(ExtensionError, match=type(extension).__name__):
            fxcurv.over(compiled(extensions=[extension]), batches())
    with pytest.raises(ArgumentError, match="EKFAC takes 2 passes"):
        fxcurv.over(compiled(extensions=[EKFAC()]), iter(batches()))
    for wrong in ({"decay": 1.0}, {"reduction": "none"}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            fxcurv.over(compiled(), batches(), **wrong)


def test_what_would_fail_later_is_refused_before_the_work(tmp_path):
    both, pairs, file = compiled(extensions=[BatchL2Grad()]), batches(), tmp_path / "a file"
    file.write_text("hello")
    for wrong, said in [
        ({"checkpoint": tmp_path / "nowhere" / "pass.pt"}, "make the folder first"),
        ({"checkpoint": tmp_path}, "is no file"),
        ({"checkpoint": file}, "is no saved state"),
        ({"checkpoint": tmp_path / "pass.pt", "every": 0}, "every=0"),
        ({"to": file}, "is a file, pass a folder"),
        ({"to": file / "rows"}, "is a file, pass a folder"),
        ({"reduction": lambda x, t: None}, "reduction= gave None"),
        ({"reduction": lambda x, t: float("nan")}, "reduction= gave nan"),
    ]:
        with pytest.raises(ArgumentError, match=said):
            fxcurv.over(both, pairs, **wrong)
    with pytest.raises(ArgumentError, match="is a NoneType"):
        fxcurv.over(both, None)
    for call in (fxcurv.over, fxcurv.accumulate, lambda c, _: fxcurv.Totals(c)):
        with pytest.raises(ArgumentError, match="takes what fxcurv.compile returns, not a Sequential"):
            call(both.model, pairs)
    torch.save({"a": 1}, file)
    with pytest.raises(ArgumentError, match="no state of a pass"):
        fxcurv.over(both, pairs, checkpoint=file)


def test_a_pass_that_is_over_takes_no_other_data():
    totals = fxcurv.Totals(compiled())
    totals.run(batches()[:1])
    with pytest.raises(ArgumentError, match="this pass is over, of 7 samples"):
        totals.run(batches()[1:])


def test_where_nothing_counts_the_loss_is_nan():
    x, y = data()
    found = fxcurv.over(compiled(extensions=[SumGradSquared()]), [(x, torch.full_like(y, -100))])
    assert found.loss.isnan() and not any(g.any() for g in found.grad.values())
    with pytest.raises(ArgumentError, match="nothing to average"):
        fxcurv.over(compiled(), [(x, torch.full_like(y, -100))], decay=0.5)


def test_batches_that_are_padded_to_their_own_length():
    """Z, what a batch's mean divides by, says how they add up; the loss cannot be asked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 2), nn.Linear(2, 9)).double()
    loss = lambda f, z: nn.functional.cross_entropy(f.flatten(0, 1), z.flatten(), ignore_index=0)  # noqa: E731
    words = [torch.randint(9, (2, n)) for n in (5, 7)]
    both = fxcurv.compile(model, loss, [], check=None)
    pairs = [(w, w) for w in words]
    with pytest.raises(LossError, match="padded to its own longest sequence"):
        fxcurv.over(both, pairs)
    padded = torch.cat([nn.functional.pad(words[0], (0, 2)), words[1]])
    same(fxcurv.over(both, pairs, reduction=lambda x, t: (t != 0).sum()), both(padded, padded), ["loss", "grad"])


class Terminal(Console):
    """What a terminal would show."""

    def __init__(self, stderr):
        super().__init__(file=io.StringIO(), force_terminal=True, width=100)
        SHOWN.append(self.file)


SHOWN: list[io.StringIO] = []


@pytest.mark.parametrize(
    "loader, shown", [(batches(), "2/3"), (iter(batches()), "batches 2 ")], ids=["length", "counter"]
)
def test_progress_is_a_bar_or_a_counter(monkeypatch, loader, shown):
    module = sys.modules["fxcurv.over"]
    monkeypatch.setattr(module, "Console", Terminal)
    with module._bar(loader, True, 0, 1) as tell:
        tell()
        tell()
    assert shown in re.sub(r"\x1b\[[\d;]*m", "", SHOWN[-1].getvalue())
