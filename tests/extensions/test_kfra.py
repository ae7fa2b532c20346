"""KFRA: against the recursion done densely with `torch.func`, against BackPACK, and where it has no answer."""

from __future__ import annotations

import copy
import importlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net
from torch import nn
from torch.func import jacrev, vmap

import fxcurv
from fxcurv import kronecker
from fxcurv.errors import ExtensionError, LossError
from fxcurv.extensions import KFAC, KFLR, KFRA, BatchGrad, DiagGGNExact, DiagHessian
from fxcurv.walks.averaged import mathematics as averages

averaging = importlib.import_module("fxcurv.passes.average")  # the package has the pass under this name


def close(actual, expected, what=""):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12, msg=lambda m: f"{what}: {m}")


slow = pytest.mark.slow


def some(names, quick):
    """Parameters, of which only the quick ones are not slow."""
    return [n if n in quick else pytest.param(n, marks=slow) for n in names]


# ---- the oracle ------------------------------

SEED = 5


def jacobians(module, x):
    """J_n of a module at every sample, [N, Dy, Dx]."""
    n = len(x)
    if isinstance(module, nn.Dropout) and module.training:  # the mask that the program draws
        torch.manual_seed(SEED)
        _, mask = torch.ops.aten.native_dropout(x, module.p, True)
        return torch.diag_embed(mask.flatten(1).to(x.dtype) / (1 - module.p)), x * mask / (1 - module.p)
    y = module(x)
    each = vmap(jacrev(lambda s: module(s[None])[0]))(x)
    return each.reshape(n, y[0].numel(), x[0].numel()), y


def outputs_factor(layer, y, m):
    """B of a layer whose output is y, from M there: pairs of positions for a convolution, else equal positions."""
    conv = isinstance(layer, nn.modules.conv._ConvNd)
    shape = y.shape[1:]
    o = shape[0] if conv else shape[-1]
    t = m.reshape(*shape, *shape)
    t = t.reshape(o, -1, o, m.shape[0] // o) if conv else t.reshape(-1, o, m.shape[0] // o, o).permute(1, 0, 3, 2)
    return t.sum((1, 3)) if conv and layer.groups == 1 else torch.einsum("asbs->ab", t)


def inputs_factor(layer, x):
    """A of a layer whose input is x."""
    if isinstance(layer, nn.Linear):
        a = x.reshape(len(x), -1, x.shape[-1])
        return torch.einsum("nsi,nsj->ij", a, a) / (len(x) * a.shape[1])
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # [N, C k k, S]
    k, (n, _, s) = layer.groups, patches.shape
    a = patches.reshape(n, k, -1, s).mean(1)
    return torch.einsum("nis,njs->ij", a, a) / (n if k == 1 else n * s)


def oracle(model, loss, x, y):
    """Parameter name -> factors, for a Sequential: one step of the recursion per module."""
    with torch.no_grad():
        trace = []
        for name, module in model.named_children():
            j, after = jacobians(module, x)
            trace.append((name, module, x, after, j))
            x = after
        n = len(x)
        h = jacrev(jacrev(lambda f: loss(f.reshape(x.shape), y)))(x.flatten()).reshape(n, x[0].numel(), n, -1)
        m = torch.einsum("ninj->ij", h)
        factors = {}
        for name, module, before, after, j in reversed(trace):
            if hasattr(module, "weight") and module.weight is not None:
                b = outputs_factor(module, after, m)
                factors[f"{name}.weight"] = [b, inputs_factor(module, before)]
                factors[f"{name}.bias"] = [b]
            m = torch.einsum("nai,ab,nbj->ij", j, m, j) / n
    return factors


def check(model, loss, x, y, *others):
    """The compiled factors are the oracle's; returns the result."""
    model, x = model.double(), x.double()
    y = y.double() if y.is_floating_point() else y
    compiled = fxcurv.compile(model, loss, [KFRA(), *others], debug=True)
    torch.manual_seed(SEED)
    result = compiled(x, y)
    expected = oracle(model, loss, x, y)
    for name, _ in model.named_parameters():
        found = result.kfra[name]
        assert len(found) == len(expected[name])
        for k, (ours, theirs) in enumerate(zip(found, expected[name], strict=True)):
            close(ours, theirs, f"factor {k} of {name}")
    return result


# ---- networks of linear layers ------------------------------

ACTIVATIONS = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU, "elu": nn.ELU, "leaky": nn.LeakyReLU,
    "hardtanh": nn.Hardtanh, "softplus": nn.Softplus,
}  # fmt: skip


def mlp(act, out=3):
    return nn.Sequential(nn.Linear(4, 6), act, nn.Linear(6, 5), copy.deepcopy(act), nn.Linear(5, out))


@pytest.mark.parametrize("name", some(ACTIVATIONS, ["gelu"]))
def test_activations(name):
    torch.manual_seed(0)
    check(mlp(ACTIVATIONS[name]()), nn.CrossEntropyLoss(), torch.randn(7, 4), torch.randint(3, (7,)))


LOSSES = {
    "ce_mean": (nn.CrossEntropyLoss(), lambda: torch.randint(3, (7,))),
    "ce_sum": (nn.CrossEntropyLoss(reduction="sum"), lambda: torch.randint(3, (7,))),
    "ce_weights": (nn.CrossEntropyLoss(torch.tensor([0.5, 1, 2]).double()), lambda: torch.randint(3, (7,))),
    "mse_mean": (nn.MSELoss(), lambda: torch.randn(7, 3)),
    "mse_sum": (nn.MSELoss(reduction="sum"), lambda: torch.randn(7, 3)),
    "bce": (nn.BCEWithLogitsLoss(), lambda: torch.rand(7, 3)),
    "two_terms": (lambda f, y: F.cross_entropy(f, y) + 0.3 * f.square().mean(), lambda: torch.randint(3, (7,))),
    "general": (lambda f, y: (f - y).pow(4).sum() + f.exp().sum(), lambda: torch.randn(7, 3)),
}


@pytest.mark.parametrize("name", some(LOSSES, ["mse_sum"]))
def test_losses(name):
    torch.manual_seed(0)
    loss, targets = LOSSES[name]
    check(mlp(nn.Tanh()), loss, torch.randn(7, 4), targets())


@slow
def test_two_terms_in_closed_form():
    """What two terms bring to one prediction is added; they may read it through different views."""
    torch.manual_seed(0)

    def loss(f, y):
        return F.cross_entropy(f, y) + 0.3 * F.mse_loss(f.flatten(), torch.ones(21).double(), reduction="sum")

    check(mlp(nn.ReLU()), loss, torch.randn(7, 4), torch.randint(3, (7,)))


@slow
def test_a_sequence_has_equal_positions_summed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Flatten(), nn.Linear(9, 3))
    check(model, nn.CrossEntropyLoss(), torch.randn(5, 3, 3), torch.randint(3, (5,)))


BETWEEN = {
    "layer_norm": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "softmax": lambda: nn.Softmax(1),
    "dropout": lambda: nn.Dropout(0.4),
    "glu": lambda: nn.GLU(),
    "batch_norm": lambda: nn.BatchNorm1d(6, affine=False).eval(),
    "group_norm": lambda: nn.GroupNorm(2, 6, affine=False),
}


@pytest.mark.parametrize("name", some(BETWEEN, ["layer_norm"]))
@pytest.mark.parametrize("room", some([2**27, 1], [2**27]))
def test_ops_between_linear_layers(name, room, monkeypatch):
    """Jacobians that are full, random or constant; all samples at once and one after the other."""
    monkeypatch.setattr(averages, "ROOM", room)
    torch.manual_seed(0)
    between = BETWEEN[name]()
    if isinstance(between, nn.BatchNorm1d):
        between.running_mean.uniform_()
        between.running_var.uniform_(0.5, 2)
    width = 3 if isinstance(between, nn.GLU) else 6
    model = nn.Sequential(nn.Linear(4, 6), between, nn.Linear(width, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    if isinstance(between, nn.GroupNorm | nn.Softmax):
        model = nn.Sequential(nn.Linear(4, 6), between, nn.Tanh(), nn.Linear(width, 3))
    check(model, nn.CrossEntropyLoss(), x, y)


# ---- convolutions ------------------------------


def conv_net(*front, shape=(2, 8, 8)):
    with torch.no_grad():
        width = nn.Sequential(*front)(torch.zeros(1, *shape)).numel()
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(width, 3))


CNNS = {
    "strided": lambda: conv_net(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 2, dilation=2), nn.Tanh()
    ),
    "max_pool": lambda: conv_net(
        *(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.Sigmoid()), nn.MaxPool2d(2)
    ),
    "overlapping_max_pool": lambda: conv_net(
        *(nn.Conv2d(2, 9, 2), nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(9, 3, 2), nn.Tanh(), nn.MaxPool2d(2, 1)),
    ),
    "padded_max_pool": lambda: conv_net(
        *(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d((3, 2), (2, 3), (1, 0), dilation=(1, 2), ceil_mode=True)),
        *(nn.Conv2d(3, 2, 2), nn.Tanh()),
    ),
    "avg_pool": lambda: conv_net(
        *(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AvgPool2d(2, 1), nn.Conv2d(3, 4, 2), nn.ReLU()),
        nn.AdaptiveAvgPool2d(2),
    ),
    "adaptive_max_pool": lambda: conv_net(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AdaptiveMaxPool2d((2, 3))),
    "batch_norm": lambda: conv_net(
        *(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False).eval(), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2, affine=False).eval(), nn.Tanh()),
    ),
    "groups": lambda: conv_net(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 2), nn.Tanh()),
    "dropout": lambda: conv_net(nn.Conv2d(2, 3, 3), nn.Dropout(0.5), nn.MaxPool2d(2)),
    "linear_only": lambda: conv_net(nn.Conv2d(2, 3, 3), nn.ConstantPad2d(1, 2.0), nn.Conv2d(3, 2, 3)),
    "two_pools": lambda: conv_net(
        *(nn.Conv2d(2, 3, 2), nn.MaxPool2d(2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1)), nn.Tanh()
    ),
}


def of_cnn(name):
    torch.manual_seed(0)
    model = CNNS[name]()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_()
            module.running_var.uniform_(0.5, 2)
    return model, nn.CrossEntropyLoss(), torch.randn(4, 2, 8, 8), torch.randint(3, (4,))


@pytest.mark.parametrize("name", some(CNNS, ["overlapping_max_pool"]))
def test_convolutions(name):
    check(*of_cnn(name))


PLANS = [(k, by_offsets) for k in (0, 1, 2, 3) for by_offsets in (False, True)]
# of the ops from the first convolution up to the next layer, which are max-poolings
POOLS = {
    "overlapping_max_pool": [False, False, True],
    "padded_max_pool": [False, True],
    "two_pools": [True, False, True],
}


@slow
@pytest.mark.parametrize("k, by_offsets", PLANS)
@pytest.mark.parametrize("name", POOLS)
def test_every_way_to_the_first_convolution(name, k, by_offsets, monkeypatch):
    """However many ops are passed without their M, and by pairs of samples or of offsets, in blocks of every size."""

    def cost(self, tail, ops, offsets):
        pools = ops > 0 and self._kind(tail[ops - 1]) == "max_pooled"
        return float("inf") if offsets and not pools else abs(min(k, len(tail)) - ops) + 0.5 * (offsets != by_offsets)

    taken = []

    def summed(tail, *args, own=averages.summed):
        taken.append((len(tail), bool(args[1])))
        return own(tail, *args)

    monkeypatch.setattr(averaging._Walk, "_cost_of", cost)
    monkeypatch.setattr(averages, "summed", summed)
    monkeypatch.setattr(averages, "ROOM", 2**27 if by_offsets else 2000)
    check(*of_cnn(name))
    passed = POOLS[name][:k]
    assert taken == ([(len(passed), by_offsets and passed[-1])] if passed else [])


def test_what_is_under_the_first_convolution_is_not_made():
    """No matrix over the first convolution's output, nor over that of its activation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(18, 3))
    program = fxcurv.compile(model, nn.CrossEntropyLoss(), [KFRA()]).lower(
        torch.randn(3, 1, 9, 9), torch.zeros(3).long()
    )
    sizes = [n.meta["val"].numel() for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert max(int(s) for s in sizes) < 98**2


@slow
def test_three_dimensions_and_transposed():
    """Sums over pairs of positions of the dense recursion, written out."""
    torch.manual_seed(0)
    for conv, shape in ((nn.Conv1d(2, 3, 2), (2, 5)), (nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
                        (nn.ConvTranspose2d(2, 3, 2, 2), (2, 2, 2))):  # fmt: skip
        model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
        x, y = torch.randn(4, *shape).double(), torch.randn(4, 3).double()
        model(x)
        result = fxcurv.compile(model, nn.MSELoss(), [KFRA(), KFLR()], debug=True)(x, y)
        d = (1 - torch.tanh(conv(x)).square()).flatten(1)
        m = 2 / 3 * model[3].weight.T @ model[3].weight * (d.T @ d / 4)
        o = conv.out_channels
        close(result.kfra["0.weight"][0], m.reshape(o, d.shape[1] // o, o, -1).sum((1, 3)).detach())
        close(result.kfra["0.weight"][1], result.kflr["0.weight"][1])


# ---- other forms ------------------------------


def compiled_kfra(model, x, y=None, loss=None, *others):
    y = torch.zeros_like(model(x)) if y is None else y
    return fxcurv.compile(model, loss or nn.MSELoss(), [KFRA(), *others], debug=True)(x, y)


@slow
def test_weights_that_reach_their_op_through_a_view():
    """x @ W + c is the linear layer, arranged in another way; so is a weight that is permuted first."""
    torch.manual_seed(0)
    w, c, x = torch.randn(4, 3).double(), torch.randn(4).double(), torch.randn(5, 3).double()
    runs = [
        (lambda m, x: F.linear(x, m.w, m.c).tanh(), w), (lambda m, x: (x @ m.w + m.c).tanh(), w.T),
        (lambda m, x: (m.c + F.linear(x, m.w.t())).tanh(), w.T),
    ]  # fmt: skip
    models = [Net(run, w=nn.Parameter(t.contiguous()), c=nn.Parameter(c)) for run, t in runs]
    expected, *others = [compiled_kfra(model, x).kfra for model in models]
    for found in others:
        for name in ("w", "c"):
            for a, b in zip(found[name], expected[name], strict=True):
                close(a, b, name)
    v = torch.randn(4, 3).double()
    b, a = expected["w"]
    close(kronecker.matmul(others[0]["w"], v.T.contiguous()), (b @ v @ a).T)


def test_embedding():
    """Its output is one value per token; A is diagonal."""
    torch.manual_seed(0)
    tokens = torch.randint(5, (6, 2))
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    result = compiled_kfra(model, tokens)
    m = model[2].weight.T @ model[2].weight
    b, a = result.kfra["0.weight"]
    close(b, (m[:3, :3] + m[3:, 3:]).detach())
    close(a, F.one_hot(tokens, 5).double().mean((0, 1)))


@slow
def test_one_sample_is_the_exact_recursion_of_kflr():
    """With one sample nothing is averaged: B is that of KFLR."""
    torch.manual_seed(0)
    model = conv_net(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.Tanh()).double()
    result = compiled_kfra(model, torch.randn(1, 2, 8, 8).double(), torch.tensor([1]), nn.CrossEntropyLoss(), KFLR())
    for name, factors in result.kfra.items():
        for ours, theirs in zip(factors, result.kflr[name], strict=True):
            close(ours, theirs, name)


@slow
def test_a_parameter_past_the_loss_has_zeros_and_a_frozen_one_nothing():
    torch.manual_seed(0)
    model = Net(lambda m, x: m.last(m.act(x)) + m.unused(x).detach(), act=mlp(nn.ReLU()), last=nn.Linear(3, 2),
                unused=nn.Linear(4, 2)).double()  # fmt: skip
    model.act[0].requires_grad_(False)
    result = compiled_kfra(model, torch.randn(5, 4).double())
    assert "act.0.weight" not in result.kfra
    assert [tuple(f.shape) for f in result.kfra["unused.weight"]] == [(2, 2), (4, 4)]
    assert not any(f.any() for f in result.kfra["unused.weight"])


@slow
def test_beside_other_quantities():
    """One program for all; KFRA shares the inputs' factor with KFLR and adds no columns to the walk."""
    model, loss, x, y = of_cnn("max_pool")
    quantities = [DiagGGNExact(), KFAC(), KFLR(), BatchGrad(), DiagHessian()]
    result = check(model, loss, x, y, *quantities)
    for quantity in quantities:
        alone = fxcurv.compile(model, loss, [quantity])(x.double(), y, seed=0)[quantity]
        if not isinstance(quantity, KFAC):
            for name, value in alone.items():
                torch.utils._pytree.tree_map(close, list(value), list(result[quantity][name]))
    program = fxcurv.compile(model, loss, [KFRA(), KFLR()]).lower(x.double(), y)
    assert program.results["kfra"]["0.weight"][1] is program.results["kflr"]["0.weight"][1]
    assert program.results["kfra"]["0.weight"][0] is program.results["kfra"]["0.bias"][0]
    assert list(fxcurv.compile(model, loss, [KFRA()]).lower(x.double(), y).walked.columns.values()) == [1]


def test_one_program_for_all_batch_sizes_and_a_report():
    model, loss, x, y = of_cnn("overlapping_max_pool")
    compiled = fxcurv.compile(model.double(), loss, [KFRA()])
    for n in (4, 3):
        found, expected = compiled(x[:n].double(), y[:n]).kfra, oracle(model, loss, x[:n].double(), y[:n])
        for name, factors in expected.items():
            close(list(found[name]), factors, name)
    assert compiled.recompiles == []
    report = str(compiled.explain(x.double(), y))
    assert "KFRA" in report and "averaged matrix" in report


@slow
def test_create_graph():
    """The gradient of a factor, by differences."""
    torch.manual_seed(0)
    model = conv_net(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.MaxPool2d(2), shape=(1, 5, 5)).double()
    x, y = torch.randn(3, 1, 5, 5).double(), torch.randint(3, (3,))
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [KFRA()])

    def value(**how):
        return sum(f.square().sum() for factors in compiled(x, y, **how).kfra.values() for f in factors)

    w, step = model[0].weight, 1e-5
    (gradient,) = torch.autograd.grad(value(create_graph=True), w)
    with torch.no_grad():
        w[0, 0, 1, 0] += step
        up = value()
        w[0, 0, 1, 0] -= 2 * step
        down = value()
    torch.testing.assert_close(gradient[0, 0, 1, 0], (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


# ---- where it does not exist ------------------------------


def linear(i, o):
    return nn.Linear(i, o)


REFUSED = {
    "residual": (lambda m, x: m.b(m.a(x).tanh() + x @ m.w), "joins two branches.*KFLR"),
    "square": (lambda m, x: m.b(m.a(x) * m.a.weight.sum() * m.a(x)), "joins two branches"),
    "called twice": (lambda m, x: m.a(m.a(x).tanh()), "'a.weight'.*used 2 times.*KFLR"),
    "tied": (lambda m, x: F.linear(m.a(x).tanh(), m.a.weight.t()), "'a.weight'.*used 2 times"),
    "norm": (lambda m, x: F.layer_norm(m.a(x), [4], m.c), "'c' has no factors.*KFLR"),
    "scaled": (lambda m, x: F.linear(x, m.w * m.w), "'w' has no factors.*reaches its op through"),
    "scale": (lambda m, x: m.a(x) * m.c, "'c' has no factors"),
}


@pytest.mark.parametrize("name", some(REFUSED, ["residual", "called twice", "norm"]))
def test_refused_by_name(name):
    torch.manual_seed(0)
    run, message = REFUSED[name]
    parts = {
        "a": linear(4, 4),
        "b": linear(4, 4),
        "w": nn.Parameter(torch.randn(4, 4)),
        "c": nn.Parameter(torch.ones(4)),
    }
    model, x = Net(run, **parts), torch.randn(3, 4)
    with pytest.raises(ExtensionError, match=rf"(?s){message}"):
        compiled_kfra(model, x)


@slow
def test_refused_losses_and_sizes(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    with pytest.raises(LossError, match="convex"):
        compiled_kfra(linear(4, 2), x, None, lambda f, y: -F.mse_loss(f, y))
    two = Net(lambda m, x: (m.a(x), m.b(x)), a=linear(4, 2), b=linear(4, 2))
    with pytest.raises(ExtensionError, match="couples 2 outputs"):
        fxcurv.compile(two, lambda f, y: (f[0] * f[1]).square().sum() + 0 * y.sum(), [KFRA()])(x, torch.zeros(3))
    widest = 4 * 6**2  # bytes
    monkeypatch.setattr(averaging, "LARGEST", widest)
    assert compiled_kfra(mlp(nn.ReLU()), x).kfra
    monkeypatch.setattr(averaging, "LARGEST", widest - 1)
    with pytest.raises(ExtensionError, match="reads 6 features per sample, whose matrix takes"):
        compiled_kfra(mlp(nn.ReLU(), 2), x)  # for an equal graph the program of before would be found


# ---- another implementation ------------------------------

PEERS = {
    "mlp": lambda: (mlp(nn.Sigmoid()), (4,)),
    "cnn": lambda: (conv_net(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2),
        nn.Conv2d(3, 4, 2), nn.Tanh(), nn.AvgPool2d(2)
    ), (2, 8, 8)),
    "transposed": lambda: (conv_net(nn.ConvTranspose2d(2, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2), shape=(2, 3, 3)), (2, 3, 3)),
}  # fmt: skip


@slow
@pytest.mark.parametrize("loss, classes", [(nn.CrossEntropyLoss(), True), (nn.MSELoss(reduction="sum"), False)])
@pytest.mark.parametrize("name", PEERS)
def test_backpack_has_the_same_numbers(name, loss, classes):
    backpack = pytest.importorskip("backpack", reason="compares with BackPACK, of the extra `bench`")
    torch.manual_seed(0)
    model, shape = PEERS[name]()
    model, x = model.double(), torch.randn(5, *shape).double()
    y = torch.randint(3, (5,)) if classes else torch.randn(5, 3).double()
    found = fxcurv.compile(model, loss, [KFRA()])(x, y).kfra
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # it makes the matrices of max-pooling in the default dtype
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            extended = backpack.extend(model)
            with backpack.backpack(backpack.extensions.KFRA()):
                backpack.extend(copy.deepcopy(loss))(extended(x), y).backward()
    finally:
        torch.set_default_dtype(before)
    for param, p in model.named_parameters():
        for ours, theirs in zip(found[param], p.kfra, strict=True):
            close(ours, theirs, param)
