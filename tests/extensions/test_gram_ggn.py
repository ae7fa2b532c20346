"""Gram matrices of columns, and eigenpairs of the Gauss-Newton, against dense matrices by plain autograd."""

import pytest
import torch
from many_uses import Net
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.errors import ExtensionError
from fxcurv.extensions import NTK, EighGGN, GramGGN, GramGrad, SqrtGGNMC

CE = nn.CrossEntropyLoss()


class Tied(nn.Module):
    """A table that is looked up and multiplied with, under a scale through another op."""

    def __init__(self):
        super().__init__()
        self.table, self.scale = nn.Embedding(5, 4), nn.Parameter(torch.ones(4))

    def forward(self, words):
        return torch.tanh(self.table(words)).mean(1) * self.scale.exp() @ self.table.weight.t()


def net(n=5):
    torch.manual_seed(0)
    return Net().double(), torch.randn(n, 2, 3).double(), torch.randint(3, (n,))


def tied(n=4):
    torch.manual_seed(0)
    return Tied().double(), torch.randint(5, (n, 3)), torch.randint(5, (n,))


class Twice(nn.Linear):
    """One weight used twice."""

    def forward(self, x):
        return super().forward(torch.tanh(super().forward(x)))


def twice():
    torch.manual_seed(0)
    return Twice(3, 3).double(), torch.randn(4, 3).double(), torch.randint(3, (4,))


def flat(named, names, lead=1):
    """The chosen parameters side by side."""
    return torch.cat([named[n].flatten(lead) for n in names], lead)


@pytest.mark.parametrize("case", [tied, pytest.param(net, marks=pytest.mark.slow)])
def test_gram_matrices(case):
    model, x, y = case()
    compiled = fxcurv.compile(model, CE, [GramGGN(), NTK(), GramGrad()], debug=True)
    result, oracle = compiled(x, y), Oracle(model, CE, x, y, kind="ce")
    for name, rows in oracle.sqrt_ggn_exact().items():
        j, g = oracle.jac[name].flatten(2), oracle.grad_batch()[name].flatten(1)
        torch.testing.assert_close(
            result.gram_ggn[name], torch.einsum("vnp,wmp->vnwm", rows.flatten(2), rows.flatten(2))
        )
        torch.testing.assert_close(result.ntk[name], torch.einsum("ncp,mdp->ncmd", j, j))
        torch.testing.assert_close(result.gram_grad[name], g @ g.t())
    compiled(x[:3], y[:3])
    assert compiled.recompiles == []
    assert compiled(x[:0], y[:0]).gram_ggn["unused" if case is net else "scale"].shape[1::2] == (0, 0)


def check_eigenpairs(result, field, ggn, each, of_samples, names, top):
    """Eigenpairs against the dense matrix `ggn`, gradients `each` [N, D], Gauss-Newtons per sample [N, D, D]."""
    values = torch.linalg.eigvalsh(ggn).flip(0)[:top].clamp(min=0)
    values = nn.functional.pad(values, (0, top - len(values)))
    found = getattr(result, f"{field}_values")
    torch.testing.assert_close(found, values, rtol=1e-8, atol=1e-12)
    e = flat(getattr(result, field), names)
    rank = int((found > 0).sum())
    assert rank > 0 and not e[rank:].any()
    torch.testing.assert_close(e[:rank] @ e[:rank].t(), torch.eye(rank).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(e @ ggn, found.unsqueeze(1) * e, rtol=1e-7, atol=1e-11)
    torch.testing.assert_close(getattr(result, f"{field}_first"), each @ e.t())
    second = torch.einsum("kd,nde,ke->nk", e, of_samples, e)
    torch.testing.assert_close(getattr(result, f"{field}_second"), second, rtol=1e-7, atol=1e-12)


def of_samples(oracle, names):
    """[N, D, D]."""
    rows = flat({n: r.transpose(0, 1) for n, r in oracle.sqrt_ggn_exact().items()}, names, 2)
    return rows.mT @ rows


@pytest.mark.parametrize("case, group", [
    (twice, ["weight"]), pytest.param(net, ["a.weight", "a.bias"], marks=pytest.mark.slow),
    pytest.param(tied, ["table.weight"], marks=pytest.mark.slow),
])  # fmt: skip
def test_eigenpairs(case, group):
    """Of all parameters (more are asked for than there are), and of a group."""
    model, x, y = case()
    oracle, names = Oracle(model, CE, x, y, kind="ce"), [n for n, _ in model.named_parameters()]
    result = fxcurv.compile(model, CE, [EighGGN(99), EighGGN(3, params=group, savefield="own")])(x, y)
    each = oracle.grad_batch()
    ggns = of_samples(oracle, names)
    check_eigenpairs(result, "eigh_ggn", ggns.sum(0), flat(each, names), ggns, names, 99)
    ggns = of_samples(oracle, group)
    check_eigenpairs(result, "own", ggns.sum(0), flat(each, group), ggns, group, 3)
    torch.testing.assert_close(result.eigh_ggn_second.sum(0), result.eigh_ggn_values)


@pytest.mark.slow
def test_of_sampled_columns():
    model, x, y = net()
    names = [n for n, _ in model.named_parameters()]
    result = fxcurv.compile(model, CE, [GramGGN(mc_samples=2), EighGGN(4, mc_samples=2), SqrtGGNMC(2)])(x, y, seed=3)
    rows = flat({n: r.transpose(0, 1) for n, r in result.sqrt_ggn_mc.items()}, names, 2)  # held to the oracle elsewhere
    torch.testing.assert_close(sum(result.gram_ggn.values()), torch.einsum("nvp,mwp->vnwm", rows, rows))
    ggns, each = rows.mT @ rows, flat(Oracle(model, CE, x, y, kind="ce").grad_batch(), names)
    check_eigenpairs(result, "eigh_ggn", ggns.sum(0), each, ggns, names, 4)


@pytest.mark.slow
def test_columns_in_parts():
    """Beyond the memory budget columns go down in several sweeps, each a group of its own."""
    model, x, y = net()
    small = fxcurv.compile(model, CE, [GramGGN(), EighGGN(4)], memory_budget=1, check=None)
    found, wanted = small(x, y), fxcurv.compile(model, CE, [GramGGN(), EighGGN(4)], check=None)(x, y)
    for name, gram in wanted.gram_ggn.items():
        torch.testing.assert_close(found.gram_ggn[name], gram)
        torch.testing.assert_close(found.eigh_ggn[name].abs(), wanted.eigh_ggn[name].abs())


@pytest.mark.slow
def test_by_token():
    torch.manual_seed(0)
    model, words = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).double(), torch.randint(5, (3, 2))
    loss = lambda f, t: nn.functional.cross_entropy(f.flatten(0, 1), t.flatten(), reduction="sum")  # noqa: E731
    gram = fxcurv.compile(model, loss, [GramGrad()], sample="token")(words, words).gram_grad
    for name, p in model.named_parameters():
        each = [
            torch.autograd.grad(nn.functional.cross_entropy(model(words)[n, t], words[n, t]), p)[0].flatten()
            for n in range(3) for t in range(2)
        ]  # fmt: skip
        rows = torch.stack(each)
        torch.testing.assert_close(gram[name], (rows @ rows.t()).reshape(3, 2, 3, 2))


def test_columns_of_a_wide_layer_are_not_formed():
    """[V, N, *P] of a layer at shared positions has 3 * 16 * 6400 entries; nothing in the program has a tenth of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 80), nn.Tanh(), nn.Flatten(), nn.Linear(160, 3)).double()
    x, y = torch.randn(16, 2, 80).double(), torch.randint(3, (16,))
    compiled = fxcurv.compile(model, CE, [GramGGN(), EighGGN(3), NTK()], check=None)
    compiled(x, y)
    program = compiled.lower(x, y).program
    sizes = [v.numel() for node in program.graph.nodes for v in [node.meta.get("val")] if isinstance(v, torch.Tensor)]
    assert max(int(s) for s in sizes) < 3 * 16 * 6400 / 10


@pytest.mark.parametrize("extension, says", [
    (lambda: EighGGN(0), "top=0"), (lambda: GramGGN(mc_samples=0), "mc_samples=0"),
    (lambda: EighGGN(mc_samples="x"), "mc_samples='x'"),
])  # fmt: skip
def test_wrong_arguments(extension, says):
    with pytest.raises(ExtensionError, match=says):
        extension()


def test_not_of_a_data_set():
    model, x, y = net()
    with pytest.raises(ExtensionError, match="EighGGN of a data set"):
        fxcurv.over(fxcurv.compile(model, CE, [EighGGN()]), [(x, y)])


@pytest.mark.slow
def test_derivatives_of_results():
    """By plain products, which autograd follows."""
    model, x, y = net(3)
    total = sum(
        t.square().sum() for t in fxcurv.compile(model, CE, [GramGrad(), NTK()])(x, y, create_graph=True).ntk.values()
    )
    (found,) = torch.autograd.grad(total, [model.conv.weight])
    params = list(model.parameters())
    rows = [
        torch.autograd.grad(e, params, create_graph=True, allow_unused=True, materialize_grads=True)
        for e in model(x).flatten()
    ]
    each = [torch.stack(of_one).flatten(1) for of_one in zip(*rows, strict=True)]
    (wanted,) = torch.autograd.grad(sum((j @ j.t()).square().sum() for j in each), [model.conv.weight])
    torch.testing.assert_close(found, wanted)
