"""Batches without samples, as Poisson sampling draws them: no program of its own, zeros, and no rows. And those of one."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxcurv
from fxcurv.backpack import backpack, extend
from fxcurv.errors import ArgumentError
from fxcurv.extensions import (
    EKFAC,
    GGNMP,
    KFLR,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    DiagHessian,
    Jacobian,
    SqrtGGNExact,
    Variance,
)
from fxcurv.kronecker import dense

ROWS = {"grad_batch": 0, "batch_l2": 0, "sqrt_ggn_exact": 1, "jacobian": 0}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()


def data(n):
    torch.manual_seed(1)
    return torch.randn(n, 1, 4, 4).double(), torch.randint(3, (n,))


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_no_sample_gives_zeros_and_no_rows(first):
    extensions = [BatchGrad(), Variance(), KFLR(), ClippedGrad(1.0)]
    if not first:
        extensions += [EKFAC(), BatchL2Grad(), DiagGGNExact(), SqrtGGNExact(), Jacobian()]
    compiled = fxcurv.compile(model(), nn.CrossEntropyLoss(reduction="sum"), extensions, check=None)
    some = None if first else compiled(*data(5))
    empty = compiled(*data(0))
    some = some or compiled(*data(5))
    assert len(vars(compiled._programs.named)) == 1, "one program serves both"
    assert float(empty.loss) == 0 and empty.output.shape == (0, 3) and empty.sample_norms.shape == (0,)
    for e in (None, *extensions):
        field = "grad" if e is None else e.savefield
        for name, value in getattr(empty, field).items():
            like = getattr(some, field)[name]
            assert type(value) is type(like)
            for got, want in zip(pytree.tree_leaves(value), pytree.tree_leaves(like), strict=True):
                axis = ROWS.get(field)
                assert (
                    got.shape == tuple(0 if k == axis else s for k, s in enumerate(want.shape))
                    and got.dtype == want.dtype
                )
                assert field == "ekfac" or not got.any()
    if not first:
        assert not any(dense(value).any() for value in empty.ekfac.values())
        assert torch.equal(empty.ekfac["3.weight"][0], torch.eye(3).double())


def test_the_loss_is_pytorchs_and_a_regulariser_stays():
    net = model()
    loss = lambda f, t: nn.functional.cross_entropy(f, t) + net[3].bias.square().sum()  # noqa: E731
    empty = fxcurv.compile(net, loss, [DiagGGNExact()], check=None)(*data(0))
    assert empty.loss.isnan(), "PyTorch's mean over nothing"
    torch.testing.assert_close(empty.grad["3.bias"], 2 * net[3].bias.detach())
    with pytest.raises(ArgumentError, match="regulariser"):
        fxcurv.compile(net, loss, [DiagHessian()], check=None)(*data(0))


@pytest.mark.slow
def test_flattened_targets_and_fixed_sizes():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.embed(x)).flatten(0, 1)

    x = torch.randint(5, (3, 6))
    compiled = fxcurv.compile(Tokens().double(), nn.CrossEntropyLoss(), [BatchGrad()], check=None)
    compiled(x, x.flatten())
    assert compiled(x[:0], x[:0].flatten()).grad_batch["head.weight"].shape == (0, 5, 4)
    assert compiled.recompiles == []


@pytest.mark.slow
def test_what_an_empty_batch_is_refused():
    compiled = fxcurv.compile(model(), nn.CrossEntropyLoss(), [GGNMP()], check=None)
    with pytest.raises(ArgumentError, match="empty, which products"):
        compiled(*data(0))
    plain = fxcurv.compile(model(), nn.CrossEntropyLoss(), [BatchGrad()], check=None)
    with pytest.raises(ArgumentError, match="empty, which create_graph"):
        plain(*data(0), create_graph=True)
    for wrong in (plain.explain, plain.lower, plain.export):
        with pytest.raises(ArgumentError, match="the batch is empty"):
            wrong(*data(0))


def test_the_drop_in_gives_zeros_and_no_rows():
    """As `compile` does, before and after batches with samples; what looks at modules' inputs is refused."""
    net, loss = extend(model()), extend(nn.CrossEntropyLoss())
    extensions = BatchGrad(), SqrtGGNExact(), KFLR(), Variance()
    for n in (0, 4, 0):
        net.zero_grad()
        x, y = data(n)
        with backpack(*extensions):
            loss(net(x), y).backward()
        p = net[3].weight
        assert p.grad_batch.shape == (n, 3, 8) and p.sqrt_ggn_exact.shape == (3, n, 3, 8)
        assert [t.shape for t in p.kflr] == [(3, 3), (8, 8)] and p.variance.shape == (3, 8)
        assert n or not any(t.any() for t in (p.grad, p.variance, *p.kflr))
    for asked, says in (({"extension_hook": print}, "look at modules"), ({}, "GGNMP cannot be of")):
        with backpack(GGNMP() if not asked else BatchGrad(), **asked), pytest.raises(ArgumentError, match=says):
            loss(net(x), y).backward()


@pytest.mark.parametrize("squeezes", [False, True])
def test_one_sample_runs_by_the_program_for_more_where_it_is_right(squeezes):
    class Net(nn.Sequential):
        def forward(self, x):
            z = super().forward(x)
            return z.squeeze().reshape(-1, 3) if squeezes else z

    net = Net(*model())
    extensions = [BatchGrad(), DiagGGNExact(), KFLR()]
    compiled, alone = (fxcurv.compile(net, nn.CrossEntropyLoss(), extensions) for _ in range(2))
    compiled(*data(5))
    found, wanted = compiled(*data(1)), alone(*data(1))
    assert len(vars(compiled._programs.named)) == 1 + squeezes
    for field in ("grad", "grad_batch", "diag_ggn_exact", "kflr"):
        pairs = zip(pytree.tree_leaves(getattr(found, field)), pytree.tree_leaves(getattr(wanted, field)), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want)


class InRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x.reshape(x.shape[0], -1, 4)).flatten(1)


@pytest.mark.parametrize("first", [True, False])
def test_what_plain_pytorch_refuses_names_the_line(first, capfd):
    compiled = fxcurv.compile(InRows(), nn.MSELoss(), [BatchGrad()], check=None)
    if not first:
        compiled(torch.randn(3, 8), torch.randn(3, 4))
    with pytest.raises(ArgumentError, match=r"empty(.|\n)*x.reshape\(x.shape\[0\], -1, 4\)(.|\n)*Way out"):
        compiled(torch.randn(0, 8), torch.randn(0, 4))
    assert capfd.readouterr().err == ""
