"""Kronecker factors of weight and bias together: from [a, 1] and b by plain autograd; the GGN where nothing is approximated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net
from cases import CASES
from oracle_kron import LAYERS, KroneckerOracle, inputs_of, matrix, outer
from test_kfac import close, folded
from torch import nn

import fxcurv
from fxcurv import kronecker
from fxcurv.errors import ArgumentError, ExtensionError
from fxcurv.extensions import EKFAC, KFAC, KFLR, Quadratic, SqrtGGNExact, SqrtGGNMC
from fxcurv.kronecker import Blocks, Joint, Within
from fxcurv.over import Totals

SHARING = ("backpack", "expand", "reduce")
QUICK = ["mlp_sequence"]
NAMES = [
    *QUICK, "mlp_relu", "conv_transpose2d_groups", "layer_called_twice", "conv2d", "conv1d_groups_stride", "conv2d_groups", 
    "dense_prediction", "residual_net",
]  # fmt: skip


def factors_with_ones(oracle, path, sharing):
    """(B, A) of a layer with its bias, by the definition."""
    b, _ = oracle.factors(path, oracle.columns, sharing, folded(oracle))
    layer, calls = oracle.model.get_submodule(path), oracle.calls[path]
    a = torch.cat([inputs_of(layer, x) for x, _ in calls], 1)
    a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    n, s = a.shape[:2]
    once = isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == 1 and len(calls) == 1
    if sharing == "reduce":
        return b, outer(a.mean(1)) / n
    return b, outer(a) / (n if sharing == "backpack" and once else n * s)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_factors_and_moments(name):
    model, loss, inputs, targets = CASES[name].build()
    kflr = [KFLR(weight_sharing=s, joint=True, savefield=f"kflr_{s}") for s in SHARING]
    asked = [*kflr, EKFAC(mc_samples=2, joint=True), KFAC(mc_samples=2, joint=True), SqrtGGNMC(mc_samples=2)]
    compiled = fxcurv.compile(model, loss, asked, debug=True)
    result = compiled(inputs, targets, seed=1)
    oracle = KroneckerOracle(model, loss, inputs, targets, **CASES[name].oracle)
    oracle.calls  # noqa: B018
    seen = 0
    for path, layer in oracle.model.named_modules():
        if not isinstance(layer, LAYERS) or getattr(layer, "bias", None) is None:
            continue
        seen, weight, bias = seen + 1, f"{path}.weight".lstrip("."), f"{path}.bias".lstrip(".")
        for extension, sharing in zip(kflr, SHARING, strict=True):
            found = result[extension][weight]
            assert isinstance(found.arrangement, Joint) and result[extension][bias] == Within(weight)
            for got, want in zip(found, factors_with_ones(oracle, path, sharing), strict=True):
                close(got, want, f"{weight} {sharing}")
        q_b, q_a, moments = result.ekfac[weight]
        root = torch.cat([matrix(layer, result.sqrt_ggn_mc[weight]), result.sqrt_ggn_mc[bias].unsqueeze(-1)], -1)
        close(moments, (q_b.T @ root @ q_a).square().sum((0, 1)), weight)
        for q, factor in zip((q_b, q_a), result.kfac[weight], strict=True):
            inside = q.T @ factor @ q
            close(inside, torch.diag(inside.diagonal()))
    assert seen


def test_one_sample_is_the_gauss_newton_of_weight_and_bias():
    """N = S = 1 and one column, or one linear layer: the block is the dense one, between weight and bias too."""
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double(), nn.MSELoss(), torch.randn(1, 1).double()
    flat = nn.Sequential(nn.Linear(3, 4)).double(), nn.CrossEntropyLoss(), torch.tensor([2])
    x = torch.randn(1, 3).double()
    for model, loss, y in (deep, flat):
        result = fxcurv.compile(model, loss, [KFLR(joint=True), SqrtGGNExact()])(x, y)
        blocks, d = Blocks(result.kflr), sum(p.numel() for p in model.parameters())
        assert blocks.shape == (d, d) and list(blocks) == [n for n, _ in model.named_parameters()]
        full = blocks.dense()
        start = 0
        for name in [n for n in result.kflr if n.endswith("weight")]:
            own = torch.cat([result.sqrt_ggn_exact[n].flatten(2) for n in (name, name.replace("weight", "bias"))], 2)
            own = own.flatten(0, 1)
            stop = start + own.shape[1]
            close(full[start:stop, start:stop], own.T @ own, name)
            assert own[:, -1].abs().max() > 0 and not full[start:stop, stop:].any()
            start = stop


class Behind(nn.Module):
    """Biases that are added behind products: of [N, T, I] by a matrix, of images; and one that comes before its weight."""

    def __init__(self):
        super().__init__()
        self.c, self.w = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 4))
        self.other = nn.Linear(3, 4, bias=False)
        self.k, self.e = nn.Parameter(torch.randn(2, 1, 2, 2)), nn.Parameter(torch.randn(2, 1, 1))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = torch.tanh(x @ self.w + self.c) + self.other(x)
        return self.head(torch.tanh(F.conv2d(h.unsqueeze(1), self.k, stride=2) + self.e).flatten(1))


class Plain(nn.Module):
    """The same of modules."""

    def __init__(self, like):
        super().__init__()
        self.a, self.other, self.conv, self.head = nn.Linear(3, 4), like.other, nn.Conv2d(1, 2, 2, stride=2), like.head
        with torch.no_grad():
            for p, q in ((self.a.weight, like.w.T), (self.a.bias, like.c), (self.conv.weight, like.k)):
                p.copy_(q)
            self.conv.bias.copy_(like.e.flatten())

    def forward(self, x):
        h = torch.tanh(self.a(x)) + self.other(x)
        return self.head(torch.tanh(self.conv(h.unsqueeze(1))).flatten(1))


@pytest.fixture(scope="module")
def behind():
    torch.manual_seed(0)
    model, x, y = Behind().double(), torch.randn(6, 4, 3).double(), torch.randint(3, (6,))
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [KFLR(joint=True), EKFAC(joint=True, fisher="empirical")])
    return model, compiled, x, y, compiled(x, y)


def test_a_bias_that_is_added_behind_a_product(behind):
    model, compiled, x, y, result = behind
    plain = fxcurv.compile(Plain(model).double(), nn.CrossEntropyLoss(), [KFLR(joint=True)])(x, y).kflr
    for ours, theirs in (("w", "a.weight"), ("k", "conv.weight"), ("head.weight", "head.weight")):
        assert isinstance(result.kflr[ours].arrangement, Joint)
        for got, want in zip(result.kflr[ours], plain[theirs], strict=True):
            close(got, want, ours)
    assert result.kflr["c"] == Within("w") and result.kflr["e"] == Within("k") and len(result.kflr["other.weight"]) == 2
    said = {(row.param, row.algorithm) for row in compiled.explain(x, y).rows if row.extension == "KFLR"}
    assert ("c", "in the block of 'w'") in said and ("w", "covariances, expand, with 'c'") in said


@pytest.mark.parametrize("field", ["kflr", "ekfac"])
def test_blocks_of_both_together(behind, field):
    """All that a matrix of blocks does, against the dense one, in the order of the parameters."""
    model, _, _, _, result = behind
    factors = getattr(result, field)
    blocks, names = Blocks(factors), [n for n, _ in model.named_parameters()]
    full, d = blocks.dense(), blocks.shape[0]
    assert list(blocks) == names
    own = kronecker.dense(factors["w"])  # of the weight, then the bias, where the model has the bias first
    close(full[:16, :16], torch.cat([own[12:], own[:12]])[:, [*range(12, 16), *range(12)]])
    eye, v = torch.eye(d).double(), torch.randn(d, 3).double()
    damped = full + 0.1 * eye
    close(blocks @ v, full @ v)
    close(blocks.solve(v, 0.1), torch.linalg.solve(damped, v))
    close(blocks.sqrt().dense() @ blocks.sqrt().dense(), full)
    close(blocks.logdet(0.1), torch.logdet(damped))
    close(blocks.trace(), full.trace())
    close(blocks.quadratic(v), (v * (full @ v)).sum(0))
    close(torch.cat([t.flatten() for t in blocks.diag().values()]), full.diagonal())
    close(blocks.inverse(0.1).dense(), torch.linalg.inv(damped))
    parts = v.mT.split([p.numel() for p in model.parameters()], 1)
    named = {n: t.reshape(3, *p.shape) for (n, p), t in zip(model.named_parameters(), parts, strict=True)}
    assert list(blocks @ named) == names
    close(torch.cat([t.flatten(1) for t in (blocks @ named).values()], 1).mT, full @ v)
    draws = blocks.sample(2, torch.Generator().manual_seed(0))
    assert {n: t.shape[1:] for n, t in draws.items()} == {n: p.shape for n, p in model.named_parameters()}
    w, c = kronecker.matmul(factors["w"], (named["w"], named["c"]))
    close(w, (blocks @ named)["w"])
    close(c, (blocks @ named)["c"])
    w, c = kronecker.solve(factors["w"], (named["w"], named["c"]), 0.1)
    close(w, blocks.solve(named, 0.1)["w"])
    close(c, blocks.solve(named, 0.1)["c"])
    with pytest.raises(ValueError, match="a pair of vectors"):
        kronecker.matmul(factors["w"], named["w"])
    with pytest.raises(ArgumentError, match="that is not given"):
        Blocks({n: f for n, f in factors.items() if n != "w"})
    assert set(Blocks({"w": factors["w"]}) @ {"w": named["w"], "c": named["c"]}) == {"w", "c"}


@pytest.mark.slow
def test_a_data_set_has_the_factors_of_all_samples(behind, tmp_path):
    """Sums over batches, on from a state that was saved in between, and the second pass of EKFAC."""
    model, compiled, x, y, result = behind
    loader = [(x[:4], y[:4]), (x[4:], y[4:])]
    first = Totals(compiled)
    with pytest.raises(InterruptedError):
        first.run(Stops(loader))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again = Totals(compiled)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    found = again.run(loader)
    assert found.kflr["c"] == Within("w") and found.ekfac["e"] == Within("k")
    for name in ("w", "k", "head.weight"):
        for got, want in zip(found.kflr[name], result.kflr[name], strict=True):
            close(got, want, name)
    close(Blocks(found.ekfac).trace(), Blocks(result.ekfac).trace())
    close(Blocks(found.ekfac).dense(), Blocks(result.ekfac).dense())


class Stops(list):
    def __iter__(self):
        yield self[0]
        raise InterruptedError


@pytest.mark.slow
def test_what_is_no_pair():
    """A bias of two layers, one behind something else, one that is not among `params`; and an embedding's."""
    torch.manual_seed(0)
    c, e, g = (nn.Parameter(torch.randn(3)) for _ in range(3))

    def run(m, x):
        a = m.a(x) + m.c + m.b(x).tanh() + m.c
        return m.d(F.relu(a) + m.e) + m.table(x[:, 0].long()) + m.g

    a, b = (nn.Linear(3, 3, bias=False) for _ in range(2))
    model = Net(run, a=a, b=b, c=c, d=nn.Linear(3, 3), e=e, g=g, table=nn.Embedding(4, 3)).double()
    x = torch.randint(4, (5, 3)).double()
    found = fxcurv.compile(model, nn.MSELoss(), [KFLR(joint=True)])(x, torch.zeros(5, 3).double()).kflr
    own = fxcurv.compile(model, nn.MSELoss(), [KFLR()])(x, torch.zeros(5, 3).double()).kflr
    joint = [n for n, f in found.items() if isinstance(getattr(f, "arrangement", None), Joint)]
    assert joint == ["d.weight"] and found["d.bias"] == Within("d.weight")
    for name in set(own) - {"d.weight", "d.bias"}:
        for got, want in zip(found[name], own[name], strict=True):
            close(got, want, name)
    alone = fxcurv.compile(model, nn.MSELoss(), [KFLR(joint=True, params="*.weight")])(
        x, torch.zeros(5, 3).double()
    ).kflr
    assert [len(f) for f in alone.values()] == [2, 2, 2, 2]
    with pytest.raises(ExtensionError, match="joint"):
        KFAC(joint="yes")


def test_a_form_of_one_parameter_is_refused(behind):
    model, compiled, x, y, result = behind
    for name in ("w", "c"):
        with pytest.raises(ExtensionError, match="are not both among the blocks and the parameters"):
            compiled.asking([Quadratic(Blocks(result.kflr), params=name, total=True)])(x, y)
    with pytest.raises(ExtensionError, match="pass total=True"):
        compiled.asking([Quadratic(Blocks(result.kflr))])(x, y)
    close(Blocks(result.kflr).scaled(0.5).dense(), Blocks(result.kflr).dense() / 2)


def test_an_empty_batch_and_attached_results(behind):
    model, compiled, x, y, result = behind
    empty = compiled(x[:0], y[:0])
    assert empty.kflr["c"] == Within("w") and not Blocks(empty.ekfac).dense().any()
    result.attach()
    assert model.w.kflr[1].shape == (4, 4) and model.c.kflr == Within("w")
    leaves, spec = torch.utils._pytree.tree_flatten(result)
    assert torch.utils._pytree.tree_unflatten(leaves, spec).kflr["c"] == Within("w")
