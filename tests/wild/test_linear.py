"""Matrices of a data set against the same, dense, by plain autograd; and as other libraries use them."""

import numpy as np
import pytest
import torch
from oracle import Oracle
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxcurv
from fxcurv import linear
from fxcurv.errors import ArgumentError, ExtensionError, MixedSamplesError
from fxcurv.extensions import DiagGGNExact, Jacobian, SqrtGGNMC

SIZES = [5, 3]


class Net(nn.Module):
    """The output is behind a log-softmax, so f is before it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 3, 2), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).flatten(1)).log_softmax(1)

    def logits(self, x):
        return self.head(torch.tanh(self.conv(x)).flatten(1))


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model, x, y = Net().double(), torch.randn(8, 2, 3).double(), torch.randint(3, (8,))
    compiled = fxcurv.compile(model, nn.NLLLoss(), [DiagGGNExact()], check=None)
    oracle = Oracle(
        model, nn.NLLLoss(), x, y, kind="ce", logits=lambda m, x: m.logits(x), head=lambda f: f.log_softmax(1)
    )
    return compiled, (x, y), list(zip(x.split(SIZES), y.split(SIZES), strict=True)), oracle


def flat(named, lead):
    return torch.cat([t.reshape(*t.shape[:lead], -1) for t in named.values()], lead)


def dense(name, oracle, compiled, x, y):
    if name == "GGN":
        return oracle.ggn_matrix()
    if name == "Hessian":
        return oracle.hessian_matrix()
    if name == "EmpiricalFisher":
        g = flat(oracle.grad_batch(), 1)
        return g.t() @ g * len(g)  # c = 1/N
    if name == "MCFisher":
        p = flat(compiled.asking([SqrtGGNMC(2)])(x, y, seed=5).sqrt_ggn_mc, 2).flatten(0, 1)
        return p.t() @ p
    j = flat(oracle.jac, 2).flatten(0, 1)
    return j if name == "Jacobian" else j @ j.t()


NAMES = ["GGN", "Hessian", "EmpiricalFisher", "MCFisher", "Jacobian", "NTK"]
QUICK = [("EmpiricalFisher", True)]
EVERY = [(name, loader) for name in NAMES for loader in (False, True)]


@pytest.mark.parametrize("name, loader", [p if p in QUICK else pytest.param(*p, marks=pytest.mark.slow) for p in EVERY])
def test_products_are_those_of_the_dense_matrix(case, name, loader):
    compiled, batch, batches, oracle = case
    more = {"mc_samples": 2, "seed": 5} if name == "MCFisher" else {}
    matrix = getattr(linear, name)(compiled, batches if loader else batch, **more)
    want = dense(name, oracle, compiled, *batch)
    assert matrix.shape == tuple(want.shape) and matrix.dtype == torch.float64 and matrix.device.type == "cpu"
    v = torch.randn(want.shape[1], 2, generator=torch.Generator().manual_seed(1)).double()
    u = torch.randn(want.shape[0], generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(matrix @ v, want @ v, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(matrix.T @ u, want.t() @ u, rtol=1e-9, atol=1e-12)
    if name != "Jacobian":
        torch.testing.assert_close(matrix.diag(), want.diagonal(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(matrix.trace(), want.trace(), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_matrices_of_some_parameters_over_a_loader(case, name):
    """Every attribute, of the rows and columns of the head alone."""
    compiled, batch, batches, oracle = case
    more = {"mc_samples": 2, "seed": 5} if name == "MCFisher" else {}
    matrix = getattr(linear, name)(compiled, batches, params="head", **more)
    own = slice(-21, None)  # of the parameters side by side
    if name == "NTK":
        j = dense("Jacobian", oracle, compiled, *batch)[:, own]
        want = j @ j.t()
    else:
        want = dense(name, oracle, compiled, *batch)[:, own]
        want = want if name == "Jacobian" else want[own]
    rows, columns = want.shape
    assert matrix.shape == (rows, columns) and matrix.T.shape == (columns, rows)
    for m in (matrix, matrix.T):
        assert m.dtype == torch.float64 and m.device == torch.device("cpu")
    torch.testing.assert_close(matrix @ torch.eye(columns).double(), want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(matrix.T @ torch.eye(rows).double(), want.t(), rtol=1e-9, atol=1e-12)
    operator = matrix.to_scipy()
    assert operator.shape == (rows, columns) and operator.dtype == np.float64
    assert np.allclose(operator @ np.ones(columns), want.sum(1)) and np.allclose(
        operator.rmatvec(np.ones(rows)), want.sum(0)
    )
    assert np.allclose(matrix.T.to_scipy() @ np.ones(rows), want.sum(0))
    if name == "Jacobian":
        for m in (matrix, matrix.T):
            with pytest.raises(ExtensionError, match="not square"):
                m.trace()
    else:
        torch.testing.assert_close(matrix.diag(), want.diagonal(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(matrix.trace(), want.trace(), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_parts_dicts_and_scipy(case):
    compiled, batch, batches, oracle = case
    part = linear.Jacobian(compiled, batches, params="head")
    want = flat({n: t for n, t in oracle.jac.items() if n.startswith("head")}, 2).flatten(0, 1)
    v = {n: torch.ones_like(p) for n, p in compiled.model.named_parameters() if n.startswith("head")}
    torch.testing.assert_close(part @ v, want.sum(1))
    assert np.allclose(part.to_scipy().rmatvec(np.ones(24)), want.sum(0)) and part.to_scipy().shape == (24, 21)
    fisher = linear.EmpiricalFisher(compiled, batch, params="head")
    assert {n: t.shape for n, t in (fisher @ v).items()} == {n: t.shape for n, t in v.items()}
    with pytest.raises(ExtensionError, match="not square"):
        part.diag()
    with pytest.raises(ArgumentError, match=r"multiply \[21\]"):
        part @ torch.ones(5)
    with pytest.raises(ArgumentError, match="an iterator"):
        linear.NTK(compiled, iter(batches))


def test_a_loader_with_an_empty_batch_and_one_in_which_nothing_counts():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(9, 4).double()
    y = torch.tensor([0, 1, 2, 1, -100, -100, -100, 0, 2])
    loader = [(x[a:b], y[a:b]) for a, b in ((0, 4), (4, 7), (7, 7), (7, 9))]
    v = torch.randn(15).double()

    def loss(p):
        return nn.functional.cross_entropy(x @ p[:12].reshape(3, 4).T + p[12:], y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(loss, flat)  # of a linear model the Gauss-Newton is the same
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [])
    for matrix in (linear.GGN(compiled, loader), linear.Hessian(compiled, loader)):
        torch.testing.assert_close(matrix @ v, hessian @ v)
        torch.testing.assert_close(matrix.diag(), hessian.diagonal())


def test_kernel_of_two_batches(case):
    """J J^T of the first five samples with all; and the other way round."""
    compiled, (x, y), batches, oracle = case
    kernel = linear.NTK(compiled, (x[:5], y[:5]), other=batches)
    j = dense("Jacobian", oracle, compiled, x, y)
    v = torch.randn(24, generator=torch.Generator().manual_seed(1)).double()
    assert kernel.shape == (15, 24) and kernel.T.shape == (24, 15)
    torch.testing.assert_close(kernel @ v, j[:15] @ (j.t() @ v))
    torch.testing.assert_close(kernel.T @ v[:15], j @ (j[:15].t() @ v[:15]))
    with pytest.raises(ArgumentError, match="no diagonal"):
        kernel.diag()


def shuffled(n=12):
    torch.manual_seed(0)
    x, y = torch.randn(n, 4).double(), torch.randint(3, (n,))
    y[: n // 2] = -100
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)


class Fewer(list):
    """One batch less every time."""

    def __iter__(self):
        yield from list(super().__iter__())
        self.pop()


@pytest.mark.parametrize("name", [n if n in ("GGN", "NTK") else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_loader_in_another_order_is_refused(name):
    """Its weights, rows and draws are kept from the first time."""
    compiled = fxcurv.compile(nn.Linear(4, 3).double(), nn.CrossEntropyLoss(), [], check=None)
    make = getattr(linear, name)
    moving = make(compiled, shuffled())
    for use in (lambda: moving @ torch.ones(moving.shape[1]).double(), *([] if name == "Jacobian" else [moving.diag])):
        with pytest.raises(ArgumentError, match=r"data comes in another order .*shuffle=False"):
            use()
    x = torch.randn(12, 4).double()
    fewer = make(compiled, Fewer((x[i : i + 4], torch.zeros(4).long()) for i in (0, 4, 8)))
    with pytest.raises(ArgumentError, match="there are 2 batches, and there were 3"):
        fewer @ torch.ones(fewer.shape[1]).double()
    longer = make(compiled, still := [(x[:4], torch.zeros(4).long())])
    still.append((x[4:], torch.zeros(8).long()))
    with pytest.raises(ArgumentError, match="batch 1 is another one"):
        longer @ torch.ones(15).double()


@pytest.mark.parametrize(
    "name", [n if n in ("GGN", "Jacobian") else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_samples_that_meet_and_random_numbers_are_refused(name):
    """And batch norm's statistics stay as they are."""
    norm, drop = (nn.Sequential(nn.Linear(4, 3), m).double() for m in (nn.BatchNorm1d(3), nn.Dropout()))
    x, y = torch.randn(8, 4).double(), torch.randint(3, (8,))
    compiled, make = fxcurv.compile(norm, nn.CrossEntropyLoss(), [], check=None), getattr(linear, name)
    before = [t.clone() for t in norm.buffers()]
    with pytest.raises(MixedSamplesError, match="in module '1'"):
        make(compiled, [(x[:4], y[:4]), (x[4:], y[4:])])
    if name in ("GGN", "Hessian"):  # of the batch as a whole
        make(compiled, (x, y)) @ torch.ones(21).double()
    else:
        with pytest.raises(MixedSamplesError, match="in module '1'"):
            make(compiled, (x, y))
    assert all(torch.equal(t, b) for t, b in zip(norm.buffers(), before, strict=True))
    with pytest.raises(ArgumentError, match=r"(?s)in module '1'.*draws random numbers.*eval"):
        make(fxcurv.compile(drop, nn.CrossEntropyLoss(), [], check=None), (x, y))


def test_loaders_are_read_as_over_reads_them():
    model, x, y = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.randint(3, (6,))
    bare = fxcurv.compile(model, None, [Jacobian()], check=None)
    for data in ([x[:3], x[3:]], [(x[:3], y[:3]), (x[3:], y[3:])], (x,), (x, y)):
        jacobian = linear.Jacobian(bare, data)
        torch.testing.assert_close(jacobian @ torch.ones(15).double(), (x.sum(1) + 1).repeat_interleave(3))
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [], check=None)
    for data, said in [
        ([], "no sample"), ([(x[:0], y[:0])], "no sample"), (None, "is a NoneType"),
        ([{"image": x, "label": y}], "pass unpack="), ([x, y], r"one batch is a tuple"),
    ]:  # fmt: skip
        with pytest.raises(ArgumentError, match=said):
            linear.GGN(compiled, data)
    with pytest.raises(ArgumentError, match="takes what fxcurv.compile returns"):
        linear.GGN(model, (x, y))
