"""Values of the data that become numbers or sizes: masks, counts, `.item()`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net
from situations import classes, numbers, parametrized, together
from test_derivatives_inside import Inside
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import ArgumentError, CaptureError, MixedSamplesError
from fxcurv.extensions import BatchGrad, DiagGGNExact

MSE = nn.MSELoss()
WHOLE = "ggn hessian"


def kept(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.body(x))[x[:, 0] > -0.7]).sum(0, keepdim=True).sin()


def masked_loss(f: Tensor, y: Tensor) -> Tensor:
    loss = (f - y).square().sum(1)
    return loss[y[:, 0] > -0.5].mean()


def selected(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.body(x))
    return m.head(torch.masked_select(h, x[:, :1] < 1).view(-1, 3)).square()


def nonzero(m: Any, x: Tensor) -> Tensor:
    rows = (x[:, 0] > -1).nonzero().squeeze(1)
    (columns,) = torch.where(m.mask)
    return m.head(torch.tanh(m.body(x))[rows][:, columns])


def assigned(m: Any, x: Tensor) -> Tensor:
    h, rows = torch.tanh(m.body(x)).clone(), x[:, 0] > -0.5
    h[rows] = torch.sin(h[rows])
    h[x[:, 1] > 0] = 0.3
    return m.head(h) + h[rows].sum()  # what was written to elsewhere is still a mask of the data


def repeated(m: Any, x: Tensor, counts: Tensor) -> Tensor:
    return m.head(torch.tanh(m.body(x)).repeat_interleave(counts, 0))


def scaled(m: Any, x: Tensor) -> Tensor:
    """A scale as in quantisation, a number, of the parameters: no derivative passes."""
    w = m.body.weight
    scale = torch.tensor(w.abs().max().item(), dtype=w.dtype) / 127
    h = torch.tanh(F.linear(x, w / (1 + scale), m.body.bias))
    return m.head(h * (1 + h.abs().max().item())) * x.abs().max().item()


def branch(m: Any, x: Tensor) -> Tensor:
    h = m.body(x)
    return m.head(torch.tanh(h) if x.sum() > 0 else torch.sin(h))


def counted(m: Any, x: Tensor, length: Tensor) -> Tensor:
    """The longest length of the batch, as packed sequences have it."""
    h = torch.tanh(m.body(x[:, : int(length.max())]))
    return m.head(h.mean(1))


def hashed(m: Any, x: Tensor, which: Tensor) -> Tensor:
    """A mixture of experts by the token's number, with `index_add`."""
    out = torch.zeros_like(x)
    for k, expert in enumerate(m.experts):
        (rows,) = torch.where(which == k)
        out = out.index_add(0, rows, torch.tanh(expert(x[rows])))
    return m.head(out)


def routed(m: Any, x: Tensor) -> Tensor:
    """A mixture of experts by its own router."""
    weight, which = m.router(x).softmax(-1).max(-1)
    out = torch.zeros_like(x)
    for k, expert in enumerate(m.experts):
        rows = torch.where(which == k)[0]
        out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
    return m.head(out)


def parts() -> dict[str, nn.Module]:
    return {"body": nn.Linear(2, 3), "head": nn.Linear(3, 2)}


def experts() -> dict[str, nn.Module]:
    return {"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 2)}


def lengths(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5, 2), torch.arange(n) % 3 + 2


ROWS = {
    "a mask of the data": Inside(
        "", lambda: Net(kept, **parts()), lambda f: f.square().sum(), numbers(2), None, WHOLE,
    ),
    "a masked loss": Inside(
        "", lambda: Net(lambda m, x: m.head(m.body(x).tanh()), **parts()), masked_loss, numbers(2), numbers(2),
        "first ggn hessian",
    ),
    "masked_select": Inside("", lambda: Net(selected, **parts()), lambda f: f.mean(), numbers(2), None, WHOLE),
    "nonzero": Inside(
        "", lambda: Net(nonzero, body=nn.Linear(2, 3), head=nn.Linear(2, 2), mask=torch.tensor([True, False, True])),
        lambda f: f.square().mean(), numbers(2), None, WHOLE,
    ),
    "assigned": Inside("", lambda: Net(assigned, **parts()), MSE, numbers(2), numbers(2), WHOLE),
    "repeat_interleave": Inside(
        "", lambda: Net(repeated, **parts()), lambda f: f.square().mean(), together(numbers(2), classes(of=3)), None, WHOLE
    ),
    "numbers of parameters": Inside("", lambda: Net(scaled, **parts()), MSE, numbers(2), numbers(2), "grad"),
    "a branch on the data": Inside(
        "", lambda: Net(branch, **parts()), MSE, numbers(2), numbers(2), "first ggn hessian",
    ),
    "the longest": Inside("", lambda: Net(counted, **parts()), MSE, lengths, numbers(2), "first ggn hessian"),
    "experts by number": Inside(
        "", lambda: Net(hashed, **experts()), MSE, together(numbers(2), classes(of=2)), numbers(2), WHOLE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", parametrized(ROWS))
def test_value(name: str) -> None:
    ROWS[name].check((4, 1), ROWS[name].trains)


def grads(model: nn.Module, loss: Any, x: Any, *y: Tensor) -> dict[str, Tensor]:
    inputs = x if isinstance(x, tuple) else (x,)
    found = torch.autograd.grad(loss(model(*inputs), *y), list(model.parameters()))
    return dict(zip([name for name, _ in model.named_parameters()], found, strict=True))


def test_another_value_is_another_program() -> None:
    """The program is one for the values that it was made for: each call compares them, with the check of the numbers off."""
    torch.manual_seed(0)
    model, loss = Net(kept, **parts()).double(), lambda f: f.square().sum()
    compiled = fxcurv.compile(model, loss, [], check=None)
    three = torch.tensor([[1.0, 0.3], [-2, 0.2], [0.1, 1], [2, -1]]).double()
    again = torch.tensor([[-2.0, 0.3], [1, 0.5], [0.4, 0], [3, 1]]).double()  # three others
    two = torch.tensor([[1.0, 0.3], [-2, 0.2], [-1, 1], [2, -1]]).double()
    for x, programs in ((three, 0), (again, 0), (two, 1), (three, 1), (two, 1), (two[:2], 2)):
        result = compiled(x)
        for name, g in grads(model, loss, x).items():
            torch.testing.assert_close(result.grad[name], g)
        assert len(compiled.recompiles) == programs
    assert compiled.explain(three).notes[0].startswith("3 is a value of the data, which every call compares")
    assert "is 2 instead of 3" in compiled.recompiles[0] and "x[:, 0] > -0.7" in compiled.recompiles[0]


@pytest.mark.slow
def test_a_buffer_that_changes() -> None:
    """A size may come from a buffer, which is data as well."""
    torch.manual_seed(0)
    columns = torch.tensor([True, False, True])
    model, loss = (
        Net(nonzero, body=nn.Linear(2, 3), head=nn.Linear(2, 2), mask=columns).double(),
        lambda f: f.square().mean(),
    )
    compiled, x = fxcurv.compile(model, loss, [], check=None), torch.rand(4, 2).double()
    for mask in ([True, False, True], [True, True, False]):
        model.mask.copy_(torch.tensor(mask))
        result = compiled(x)
        for name, g in grads(model, loss, x).items():
            torch.testing.assert_close(result.grad[name], g)


@pytest.mark.slow
def test_a_number_of_parameters_follows_them() -> None:
    """`w.abs().max().item()` is what it is at each call."""
    torch.manual_seed(0)
    model = Net(scaled, **parts()).double()
    compiled, x, y = (
        fxcurv.compile(model, MSE, [BatchGrad()], check=None),
        torch.randn(3, 2).double(),
        torch.randn(3, 2).double(),
    )
    for _ in range(2):
        result = compiled(x, y)
        for name, g in grads(model, MSE, x, y).items():
            torch.testing.assert_close(result.grad[name], g)
        with torch.no_grad():
            model.body.weight.mul_(1.7)
    assert compiled.recompiles == []


def test_what_a_mask_leaves_is_no_sample() -> None:
    with pytest.raises(MixedSamplesError) as caught:
        fxcurv.compile(Net(kept, **parts()), lambda f: f.square().sum(), [BatchGrad()])(torch.randn(4, 2))
    assert "[x[:, 0] > -0.7]" in str(caught.value)


def smoothed_rows(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.body(x))
    h = h[x[:, 0].argsort()]
    h = 2 * h
    h = h.sin()
    return m.head(h)


def spread(m: Any, x: Tensor) -> Tensor:
    h = m.body(x)
    mean = h.sum(0)
    mean = mean / 3
    return m.head((h - mean).tanh())


@pytest.mark.parametrize(
    ("forward", "first", "then"),
    [
        pytest.param(smoothed_rows, "op aten.index.Tensor", "aten.sin.default"),
        pytest.param(spread, "op aten.sum.dim_IntList", "aten.sub.Tensor", marks=pytest.mark.slow),
    ],
)
def test_what_mixes_is_where_samples_come_together(forward: Any, first: str, then: str) -> None:
    """Lines before the one that makes more of it than a sum, which is named beside it."""
    with pytest.raises(MixedSamplesError) as caught:
        fxcurv.compile(Net(forward, **parts()), lambda f: f.square().sum(), [BatchGrad()])(torch.randn(4, 2))
    where, line, how, *_ = str(caught.value).splitlines()
    assert where == first and ("argsort" in line or "h.sum(0)" in line), caught.value
    assert how.startswith(f"mixes samples (op {then}") and "makes more of its result than a sum" in how, caught.value
    assert "h.sin()" in how or "h - mean" in how, caught.value


@pytest.mark.slow
def test_individual_gradients_beside_a_number() -> None:
    """A number of the batch is a constant: the gradient of each sample's own term."""
    torch.manual_seed(0)
    model = Net(scaled, **parts()).double()
    x, y = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    result = fxcurv.compile(model, MSE, [BatchGrad()])(x, y)
    each = (model(x) - y).square().mean(1) / 3
    for k in range(3):
        alone = torch.autograd.grad(each[k], list(model.parameters()), retain_graph=True)
        for (name, _), g in zip(model.named_parameters(), alone, strict=True):
            torch.testing.assert_close(result.grad_batch[name][k], g)


KEPT = fxcurv.compile(Net(kept, **parts()), lambda f: f.square().sum(), [])


@pytest.mark.slow
def test_neither_inside_torch_compile_nor_exported() -> None:
    """There nothing compares the values."""
    with pytest.raises(Exception, match="ArgumentError: the model or loss makes a number"):
        torch.compile(lambda x: KEPT(x).loss, backend="eager")(torch.ones(4, 2))
    with pytest.raises(ArgumentError, match="makes a number of the data's values"):
        KEPT.export(torch.ones(4, 2))


REFUSED: dict[str, tuple[Any, str, str]] = {
    "a mask": (
        lambda m, x: (lambda h: h[h[:, 0] > 0])(m.body(x)),
        "h[h[:, 0] > 0]",
        "(loss * mask).sum() / mask.sum()",
    ),
    "nonzero": (lambda m, x: x[m.body(x)[:, 0].nonzero()], ".nonzero()", "Keep all entries".lower()),
    "a count": (
        lambda m, x: m.body(x).repeat_interleave(m.body(x)[:, 0].long().abs(), 0),
        "repeat_interleave(",
        "whose size",
    ),
    "a branch": (
        lambda m, x: m.body(x) if m.body(x).sum() > 0 else x,
        "if m.body(x).sum() > 0",
        "torch.where(c, a, b)",
    ),
    "an index": (lambda m, x: m.body(x)[:, int(m.body(x).argmax())], "int(m.body(x).argmax())", "number of Python's"),
    "random": (lambda m, x: m.body(x)[torch.rand(4) > 0.5], "torch.rand(4) > 0.5", "whose size"),
    "its router": (routed, "torch.where(which == k)", "torch.where(mask, f(x), x)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, capfd: pytest.CaptureFixture) -> None:
    run, line, says = REFUSED[name]
    model = Net(run, **parts(), **{"router": nn.Linear(2, 2), "experts": experts()["experts"]})
    with pytest.raises(CaptureError) as caught:
        fxcurv.compile(model, lambda f: f.square().mean(), [])(torch.randn(4, 2))
    for words in (__file__, line, says):
        assert words in str(caught.value), caught.value
    assert capfd.readouterr() == ("", "")


def of_unique(i: Tensor) -> tuple[Tensor, ...]:
    return *torch.unique(i, return_inverse=True, return_counts=True), i.unique(sorted=False)


def of_runs(i: Tensor) -> tuple[Tensor, ...]:
    found, inverse, counts = torch.unique_consecutive(i, return_inverse=True, return_counts=True)
    return found, inverse, counts, torch.unique_consecutive(i, return_counts=True)[0]


class Bag(nn.Module):
    """Looks up every index once."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        self.of, self.table = of, nn.Embedding(9, 3).double()

    def forward(self, i: Tensor) -> Tensor:
        found, inverse, counts, again = self.of(i)
        rows = torch.tanh(self.table(found) * counts.unsqueeze(1).sqrt() + again.unsqueeze(1))
        return rows[inverse].flatten(1) * inverse.sum()


@pytest.mark.parametrize("of", [of_unique, of_runs])
def test_unique(of: Any) -> None:
    """Other indices, also another number of distinct ones, with the numbers of plain PyTorch."""
    torch.manual_seed(0)
    model, y = Bag(of), torch.randn(3, 6, dtype=torch.float64)
    compiled = fxcurv.compile(model, MSE, [])
    for values in ([1, 3, 1, 8, 1, 1], [2, 2, 2, 2, 2, 2], [8, 4, 6, 5, 0, 7], [1, 3, 1, 8, 1, 1]):
        i = torch.tensor(values).view(3, 2)
        wanted = MSE(model(i), y)
        (grad,) = torch.autograd.grad(wanted, model.table.weight)
        result = compiled(i, y)
        torch.testing.assert_close(result.loss, wanted.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(result.grad["table.weight"], grad, rtol=1e-9, atol=1e-12)
    assert len(compiled.recompiles) == 2


def test_unique_of_what_is_trained() -> None:
    class Rounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.unique(super().forward(x).round()).sum()

    x = torch.randn(4, 3)
    with pytest.raises(CaptureError, match="op unique[^$]*size depends on values that trained parameters enter"):
        fxcurv.compile(Rounded(3, 2), MSE, [])(x, x[:, :2])


# ---- data beside an activation ------------------------------

BESIDE = {
    "mse_loss": lambda f, y: F.mse_loss(f, y) * int((y > 0).sum()),
    "l1_loss": lambda f, y: F.l1_loss(f, y) / float(y.abs().mean()),
    "broadcast_tensors": lambda f, y: (lambda a, b: (a - b).square().mean() * float(b.sum()))(*torch.broadcast_tensors(f, y)),
    "expand_as": lambda f, y: (f - y[:, :1].expand_as(f)).square().mean() * float(y.mean()),
    "type_as": lambda f, y: ((f - y).square() * (m := (y > 0).type_as(f))).sum() / max(1, int(m.sum())),
    "view_as": lambda f, y: (f - (z := y.view_as(f))).square().mean() * (2 if z.sum() > 0 else 3),
}  # fmt: skip


@pytest.mark.parametrize("name", [n if n == "mse_loss" else pytest.param(n, marks=pytest.mark.slow) for n in BESIDE])
def test_data_that_met_an_activation_is_data(name: str) -> None:
    """An op that reads only the activation's shape, or broadcasts the two, does not make the data depend on parameters."""
    torch.manual_seed(0)
    loss, model = BESIDE[name], nn.Linear(3, 2).double()
    compiled = fxcurv.compile(model, loss, [BatchGrad()])
    for n in (4, 3):
        x, y = torch.randn(n, 3).double(), torch.randn(n, 2).double()
        found = compiled(x, y)
        (wanted,) = torch.autograd.grad(loss(model(x), y), [model.weight])
        torch.testing.assert_close(found.grad["weight"], wanted)
        torch.testing.assert_close(found.grad_batch["weight"].sum(0), wanted)


COUNTED = {
    "bincount": lambda f, y: F.cross_entropy(f, y, weight=1 / (torch.bincount(y).double() + 1)),
    "bincount of at least": lambda f, y: F.cross_entropy(f, y, weight=1 / (1 + y.bincount(minlength=3).double())),
    "weighted bincount": lambda f, y: F.cross_entropy(f, y, weight=1 + torch.bincount(y, y.double().cos())),
    "one_hot": lambda f, y: F.mse_loss(f, F.one_hot(y).double()),
    "tensor_split": lambda f, y: torch.tensor_split(f, y[:2], dim=1)[1].square().sum(),
}


@pytest.mark.parametrize("name", [n if n == "bincount" else pytest.param(n, marks=pytest.mark.slow) for n in COUNTED])
def test_what_is_as_long_as_the_data_say(name: str) -> None:
    """Classes that are counted, and places to split at; the individual gradients are those with the counts held."""
    torch.manual_seed(0)
    loss, model = COUNTED[name], nn.Linear(3, 3).double()
    compiled = fxcurv.compile(model, loss, [BatchGrad()])
    for y in ([0, 2, 1, 1, 2], [1, 2, 0, 2, 2, 0], [0, 2, 1]):
        x, y = torch.randn(len(y), 3).double(), torch.tensor(y)
        found, f = compiled(x, y), model(x)
        (wanted,) = torch.autograd.grad(loss(f, y), [model.weight], retain_graph=True)
        (cotangent,) = torch.autograd.grad(loss(f, y), [f])
        torch.testing.assert_close(found.grad["weight"], wanted)
        torch.testing.assert_close(found.grad_batch["weight"], cotangent[:, :, None] * x[:, None])


def test_a_write_through_a_view_reaches_the_data() -> None:
    """What an activation is written to depends on parameters, also where an older view of it is read."""

    def written(f: Tensor, y: Tensor) -> Tensor:
        z = y.clone()
        old = z.expand_as(f)
        z[:, 0] = f[:, 0].detach()
        return (f - y).square().mean() * int(old.sum())

    with pytest.raises(CaptureError, match="trained parameters"):
        fxcurv.compile(nn.Linear(3, 2).double(), written, [])(torch.randn(4, 3).double(), torch.randn(4, 2).double())


# ---- floats of the data ------------------------------


def test_a_float_of_the_data_is_a_tensor_from_the_second_one_on() -> None:
    """Every later call is of one program, and the individual gradients are those with the number held."""
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.head(torch.tanh(m.body(x / x.std().item()))), body=nn.Linear(3, 4), head=nn.Linear(4, 2)
    ).double()
    compiled = fxcurv.compile(model, lambda f, y: F.mse_loss(f, y) / y.abs().max().item(), [BatchGrad()])
    for n in (4, 4, 3, 5):
        x, y = torch.randn(n, 3).double(), torch.randn(n, 2).double()
        found, scale = compiled(x, y), x.std().item()
        for k in range(n):
            f = model.head(torch.tanh(model.body(x[k : k + 1] / scale)))
            alone = F.mse_loss(f, y[k : k + 1]) / n / y.abs().max().item()
            for (name, p), g in zip(
                model.named_parameters(), torch.autograd.grad(alone, [*model.parameters()]), strict=True
            ):
                torch.testing.assert_close(found.grad_batch[name][k], g, msg=lambda m, name=name: f"{name}: {m}")
                assert p.shape == g.shape
    assert len(compiled.recompiles) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "factor",
    [
        lambda y: max(1e-3, y.std().item()), lambda y: 2 if y.mean().item() > 0 else 3, lambda y: round(y.mean().item(), 2),
        lambda y: torch.full_like(y, y.mean().item()).mean(),
    ],
)  # fmt: skip
def test_a_float_whose_value_is_needed_makes_a_program_each_time(factor: Any) -> None:
    torch.manual_seed(0)
    model, loss = nn.Linear(3, 2).double(), lambda f, y: F.mse_loss(f, y) * factor(y)
    compiled = fxcurv.compile(model, loss, [])
    for _ in range(3):
        x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
        (wanted,) = torch.autograd.grad(loss(model(x), y), [model.weight])
        torch.testing.assert_close(compiled(x, y).grad["weight"], wanted)


@pytest.mark.parametrize(
    "use",
    [
        lambda f: max(1e-3, f.std().item()), lambda f: f"{f.mean().item():.3f}" and 1,
        lambda f: 2 * f.mean().item() > 0,
    ],
)  # fmt: skip
def test_the_value_of_a_trained_float_is_refused_by_name(use: Any) -> None:
    with pytest.raises(CaptureError, match=r"(?s)op item.*trained parameters.*Way out: leave it a tensor"):
        fxcurv.compile(nn.Linear(3, 2), lambda f, y: F.mse_loss(f, y) * use(f), [])(
            torch.randn(4, 3), torch.randn(4, 2)
        )


@pytest.mark.parametrize("reduced", ["mean", "sum"])
def test_a_mask_of_nothing(reduced: str) -> None:
    """The mean over nothing is NaN and its gradient zero, as in PyTorch."""

    def loss(f: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return getattr(F.cross_entropy(f, y, reduction="none")[mask], reduced)()

    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.randint(2, (4,))
    compiled = fxcurv.compile(model, loss, [BatchGrad(), DiagGGNExact()])
    for mask in (torch.zeros(4, dtype=torch.bool), torch.tensor([True, False, True, True])):
        found, plain = compiled(x, y, mask), loss(model(x), y, mask)
        torch.testing.assert_close(found.loss, plain.detach(), equal_nan=True)
        for name, g in zip(("weight", "bias"), torch.autograd.grad(plain, [model.weight, model.bias]), strict=True):
            torch.testing.assert_close(found.grad[name], g)
            torch.testing.assert_close(found.grad_batch[name].sum(0), g)
            assert bool(found.diag_ggn_exact[name].any()) is bool(mask.any())
