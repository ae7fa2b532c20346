"""Kronecker factors: against the definition, BackPACK's and curvlinops' numbers; arrangements; products with them."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net
from cases import CASES
from oracle import Oracle
from oracle_kron import LAYERS, KroneckerOracle, in_parameter_order, matrix
from torch import nn

import fxcurv
from fxcurv import kronecker
from fxcurv.errors import ExtensionError, LossError
from fxcurv.extensions import EKFAC, KFAC, KFLR, DiagGGNMC, SqrtGGNExact, SqrtGGNMC

NAMES = [
    "logistic_regression", "linear_regression", "mlp_relu", "mlp_deep_nobias", "mlp_sequence", "mlp_single_sample",
    "layer_called_twice", "conv_called_twice", "embedding_padding", "dense_prediction", "cnn_two_layers",
    "unet_transposed", "residual_net", *[n for n in CASES if n.startswith("conv") and n != "conv_called_twice"],
]  # fmt: skip
REPRESENTATIVE = {
    "mlp_relu", "mlp_sequence", "layer_called_twice", "embedding_padding", "dense_prediction", "conv2d", "conv1d_groups_stride",
    "conv_transpose2d_groups", "residual_net",
}  # fmt: skip
SHARING = ("backpack", "expand", "reduce")


def close(actual, expected, what=""):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-11, msg=lambda m: f"{what}: {m}")


def compiled_case(name, extensions):
    model, loss, inputs, targets = CASES[name].build()
    compiled = fxcurv.compile(model, loss, extensions, debug=True)
    oracle = KroneckerOracle(model, loss, inputs, targets, **CASES[name].oracle)
    return compiled, (inputs, targets), oracle


def layers(oracle):
    """(path, layer) of all layers, which hold all parameters."""
    found = [(path, m) for path, m in oracle.model.named_modules() if isinstance(m, LAYERS)]
    assert {id(p) for _, m in found for p in m.parameters()} == {id(p) for p in oracle.model.parameters()}
    return found


def folded(oracle):
    """Sums exact columns [V, N, O] over the positions of the loss: classes first, or last axis of f for squares."""
    f = oracle.leaves[0]
    if oracle.kind == "ce":
        return lambda b: b.unflatten(0, (f.shape[1], -1)).sum(1)
    return lambda b: b.unflatten(0, (-1, f.shape[-1])).sum(0)


def check_factors(oracle, field, columns, sharing, exact=False):
    for path, layer in layers(oracle):
        b, a = oracle.factors(path, columns, sharing, folded(oracle) if exact else None)
        found = field[f"{path}.weight" if path else "weight"]
        lookup = isinstance(layer, nn.Embedding)
        close(found[0], b, f"B of {path}")
        close(found[1], a.diagonal() if lookup else a, f"A of {path}")
        known = torch.diag(found[1]) if lookup else found[1]
        close(kronecker.dense(found), in_parameter_order(layer, torch.kron(found[0], known)), path)
        if getattr(layer, "bias", None) is not None:
            (only,) = field[f"{path}.bias" if path else "bias"]
            close(only, b, f"B of the bias of {path}")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in REPRESENTATIVE else pytest.mark.slow) for n in NAMES]
)
def test_exact_columns(name):
    """KFLR in all ways of sharing."""
    extensions = [KFLR(weight_sharing=s, savefield=f"kflr_{s}") for s in SHARING]
    compiled, arguments, oracle = compiled_case(name, extensions)
    result = compiled(*arguments)
    oracle.calls  # noqa: B018
    for extension, sharing in zip(extensions, SHARING, strict=True):
        check_factors(oracle, result[extension], oracle.columns, sharing, exact=True)


@pytest.mark.parametrize("name", ["mlp_relu", "conv2d", "conv_transpose1d", "layer_called_twice", "linear_regression"])
def test_sampled_columns(name):
    """KFAC has the columns of the other sampled quantities, which the oracle gets back from their roots."""
    sharing = {s: KFAC(mc_samples=2, weight_sharing=s, savefield=f"kfac_{s}") for s in SHARING}
    compiled, arguments, oracle = compiled_case(name, [SqrtGGNMC(mc_samples=2), *sharing.values()])
    result = compiled(*arguments, seed=3)
    oracle.calls  # noqa: B018
    found = oracle.recover(result.sqrt_ggn_mc)
    assert found.unique
    for s, extension in sharing.items():
        check_factors(oracle, result[extension], found.columns, s)


EMPIRICAL = [
    "mlp_relu", "conv2d", "mlp_sequence", "dense_prediction", "ce_soft", "bce_weights_soft",
    "ce_ignore_weights_smoothing",
]  # fmt: skip


@pytest.mark.parametrize("name", EMPIRICAL)
def test_empirical(name):
    """The gradient over the root of its weight, in place of a sampled column."""
    compiled, arguments, oracle = compiled_case(name, [KFAC(fisher="empirical")])
    result = compiled(*arguments)
    oracle.calls  # noqa: B018
    check_factors(oracle, result.kfac, oracle.empirical(), "backpack")


ROTATED = ["mlp_relu", "conv2d_groups", "conv_transpose2d_groups", "embedding_padding", "layer_called_twice"]


@pytest.mark.parametrize("name", ROTATED)
def test_eigenbasis(name):
    """Orthogonal, diagonalises KFAC's factors, and its moments are those of P in it."""
    extensions = [EKFAC(mc_samples=2), KFAC(mc_samples=2), SqrtGGNMC(mc_samples=2)]
    compiled, arguments, oracle = compiled_case(name, extensions)
    result = compiled(*arguments, seed=1)
    for path, layer in layers(oracle):
        w = f"{path}.weight"
        q_b, q_a, moments = result.ekfac[w]
        turn = torch.diag(q_a) if q_a.ndim == 1 else q_a
        p = matrix(layer, result.sqrt_ggn_mc[w])
        close(moments, (q_b.T @ p @ turn).square().sum((0, 1)), w)
        for q, factor in zip((q_b, turn), result.kfac[w], strict=True):
            inside = q.T @ (torch.diag(factor) if factor.ndim == 1 else factor) @ q
            close(q.T @ q, torch.eye(len(q), dtype=q.dtype))
            close(inside, torch.diag(inside.diagonal()))
        if getattr(layer, "bias", None) is not None:
            q, of_bias = result.ekfac[f"{path}.bias"]
            close(of_bias, (result.sqrt_ggn_mc[f"{path}.bias"] @ q).square().sum((0, 1)))


def test_one_use_at_one_position_of_one_sample_is_the_gauss_newton():
    """N = S = 1 and one column: nothing is approximated."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double(), torch.randn(1, 3).double()
    compiled = fxcurv.compile(model, nn.MSELoss(), [KFLR(), EKFAC(), SqrtGGNExact(), SqrtGGNMC()])
    result = compiled(x, torch.randn(1, 1).double())
    for name, p in result.sqrt_ggn_exact.items():
        close(kronecker.dense(result.kflr[name]), torch.outer(p.flatten(), p.flatten()))
        p = result.sqrt_ggn_mc[name]
        close(kronecker.dense(result.ekfac[name]), torch.outer(p.flatten(), p.flatten()))


# ---- arrangements ------------------------------


def factors_of(model, x, *extensions, loss=None, y=None):
    y = torch.zeros_like(model(x)) if y is None else y
    compiled = fxcurv.compile(model, loss or nn.MSELoss(), extensions, debug=True)
    return compiled(x, y, seed=0)


def test_weights_that_reach_their_op_through_a_view():
    """x @ W, a transposed, a flat and a broadcast parameter: the same layer, arranged in other ways."""
    torch.manual_seed(0)
    w, c, x = torch.randn(4, 3).double(), torch.randn(4).double(), torch.randn(5, 3).double()

    def net(run, w, c=c):
        return Net(run, w=nn.Parameter(w.contiguous()), c=nn.Parameter(c))

    plain = net(lambda m, x: F.linear(x, m.w, m.c).tanh(), w)
    others = [
        net(lambda m, x: (x @ m.w + m.c).tanh(), w.T),
        net(lambda m, x: F.linear(x, m.w.t(), m.c[0]).tanh(), w.T, c[None]),
        net(lambda m, x: torch.tanh(m.c + F.linear(x, m.w.view(4, 3))), w.flatten(), c[None]),
        net(lambda m, x: torch.einsum("ni,oi->no", x, m.w[0]).add(m.c).tanh(), w[None]),
        net(lambda m, x: F.conv1d(x[:, :, None], m.w, m.c).tanh()[:, :, 0], w[:, :, None]),
    ]
    expected = factors_of(plain, x, KFLR()).kflr
    v = torch.randn(4, 3).double()
    for k, model in enumerate(others):
        found = factors_of(model, x, KFLR()).kflr
        for name in ("w", "c"):
            for a, b in zip(found[name], expected[name], strict=True):
                close(a, b, f"{name} of {k}")
        own = found["w"].arrangement.vector(v)
        assert own.shape == model.w.shape
        close(found["w"].arrangement.matrix(own), v)
        close(kronecker.matmul(found["w"], own), found["w"].arrangement.vector(expected["w"][0] @ v @ expected["w"][1]))


def test_slices_of_a_joint_projection():
    """Each slice is a use whose rows (or columns) are zero elsewhere."""
    torch.manual_seed(0)
    w, x = torch.randn(5, 3).double(), torch.randn(4, 3).double()

    def of_rows(first, second):
        return torch.cat([first, second * first.sum(1, keepdim=True)], 1)

    joint = Net(lambda m, x: of_rows(F.linear(x, m.w[:2]), F.linear(x.tanh(), m.w[2:])), w=nn.Parameter(w))
    a, b = (nn.Parameter(part.clone()) for part in (w[:2], w[2:]))
    apart = Net(lambda m, x: of_rows(F.linear(x, m.a), F.linear(x.tanh(), m.b)), a=a, b=b)
    found, expected = factors_of(joint, x, KFLR()).kflr["w"], factors_of(apart, x, KFLR()).kflr
    close(found[0], torch.block_diag(expected["a"][0], expected["b"][0]))
    close(found[1], (expected["a"][1] + expected["b"][1]) / 2)

    w = nn.Parameter(torch.randn(2, 4).double())
    joint = Net(lambda m, x: F.linear(x, m.w[:, 1:]) + F.linear(x[:, :1], m.w[:, :1]).tanh(), w=w)
    a = factors_of(joint, x, KFLR()).kflr["w"][1]
    close(a, torch.block_diag(x[:, :1].T @ x[:, :1], x.T @ x) / 8)


def test_attention_projections():
    """Self-attention has one use of the joint projection, cross-attention two slices; all have factors."""
    torch.manual_seed(0)
    x, memory = torch.randn(3, 2, 4).double(), torch.randn(3, 5, 4).double()
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    for run in (lambda m, x, y: m.attention(x, x, x)[0], lambda m, x, y: m.attention(x, y, y)[0]):
        model = Net(run, attention=attention)
        compiled = fxcurv.compile(model, nn.MSELoss(), [KFLR(), EKFAC(), SqrtGGNMC()], debug=True)
        result = compiled((x, memory), torch.zeros_like(x), seed=0)
        for name, p in model.named_parameters():
            factors = result.kflr[name]
            assert [len(f) for f in factors] == list(p.shape)
            q_b, moments = result.ekfac[name][0], result.ekfac[name][-1]
            q_a = result.ekfac[name][1] if p.ndim == 2 else torch.ones(1, 1).double()
            root = result.sqrt_ggn_mc[name].reshape(1, 3, len(p), -1)
            close(moments, (q_b.T @ root @ q_a).square().sum((0, 1)).reshape(moments.shape), name)


# ---- what has no factors ------------------------------


def test_a_norm_has_its_exact_block_or_an_error():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()
    with pytest.raises(ExtensionError, match=r"(?s)'1\.weight'.*others=\"exact\""):
        factors_of(model, x, KFLR(others="error"))
    kflr, kfac = KFLR(others="exact"), KFAC(mc_samples=3, others="exact")
    roots = SqrtGGNExact(), SqrtGGNMC(mc_samples=3)
    result = factors_of(model, x, kflr, kfac, EKFAC(mc_samples=3, others="exact"), *roots)
    for field, root in ((result.kflr, result.sqrt_ggn_exact), (result.kfac, result.sqrt_ggn_mc)):
        for name in ("1.weight", "1.bias"):
            (b,) = field[name]
            p = root[name].flatten(0, 1)
            close(b, p.T @ p)
    close(kronecker.dense(result.ekfac["1.weight"]), result.kfac["1.weight"][0])
    assert [len(result.kflr[n]) for n in result.kflr] == [2, 1, 1, 1, 2, 1]


@pytest.mark.parametrize("name", ["weight_norm_linear", "low_rank_adapter", "weight_in_two_kinds", "tied_embedding_lm"])
def test_refused_by_name(name):
    """A prefix that is no index map, and uses of different kinds."""
    model, loss, inputs, targets = CASES[name].build()
    with pytest.raises(ExtensionError, match="parameter '"):
        fxcurv.compile(model, loss, [KFAC(others="error")])(inputs, targets)
    alone = fxcurv.compile(model, loss, [KFLR(others="exact")])(inputs, targets)
    result = fxcurv.compile(model, loss, [KFLR(others="exact"), SqrtGGNExact()])(inputs, targets)
    loss(model(inputs), targets).backward()
    for param, p in result.sqrt_ggn_exact.items():
        close(alone.grad[param], model.get_parameter(param).grad)
        close(alone.kflr[param], result.kflr[param])
        if len(result.kflr[param]) == 1:
            flat = p.reshape(-1, model.get_parameter(param).numel())
            close(result.kflr[param][0], flat.T @ flat)


def test_arguments():
    for wrong in (
        lambda: KFAC(mc_samples=0), lambda: KFLR(weight_sharing="sum"), lambda: KFAC(fisher="exact"),
        lambda: KFAC(others="all"),
        lambda: KFAC(mc_samples=2, fisher="empirical"), lambda: EKFAC(weight_sharing="none"),
    ):  # fmt: skip
        with pytest.raises(ExtensionError):
            wrong()
    with pytest.raises(LossError, match="empirical"):
        factors_of(nn.Linear(2, 2), torch.randn(3, 2), KFAC(fisher="empirical"), loss=lambda f, y: (f - y).pow(4).sum())


def test_a_parameter_past_the_loss_has_zeros():
    torch.manual_seed(0)
    model = Net(lambda m, x: m.last(x) + m.unused(x).detach(), last=nn.Linear(3, 2), unused=nn.Linear(3, 2))
    result = factors_of(model, torch.randn(4, 3), KFLR(), EKFAC())
    assert [tuple(f.shape) for f in result.kflr["unused.weight"]] == [(2, 2), (3, 3)]
    assert not any(f.any() for f in result.kflr["unused.weight"])
    assert not kronecker.dense(result.ekfac["unused.weight"]).any()
    assert not kronecker.dense(result.ekfac["unused.bias"]).any()


# ---- sharing of work ------------------------------


def test_factors_are_shared():
    """A does not depend on the columns, and B of a layer's weight is that of its bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), [KFAC(), KFLR()])
    program = compiled.lower(torch.randn(4, 1, 3, 3), torch.randint(3, (4,)))
    for layer in ("0", "3"):
        kfac, kflr = program.results["kfac"], program.results["kflr"]
        assert kfac[f"{layer}.weight"][1] is kflr[f"{layer}.weight"][1]
        for field in (kfac, kflr):
            assert field[f"{layer}.weight"][0] is field[f"{layer}.bias"][0]
    assert "covariances" in str(compiled.explain(torch.randn(4, 1, 3, 3), torch.randint(3, (4,))))


def test_results_are_lists_that_copy_and_attach(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    result = factors_of(model, x, KFAC())
    result.attach()
    b, a = model.weight.kfac
    assert b.shape == (2, 2) and a.shape == (3, 3) and isinstance(model.weight.kfac, list)
    torch.save(list(model.weight.kfac), tmp_path / "factors.pt")
    leaves, spec = torch.utils._pytree.tree_flatten(result)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert again.kfac["weight"].arrangement == model.weight.kfac.arrangement


# ---- products with factors ------------------------------


@pytest.mark.parametrize("name", ["mlp_relu", "conv_transpose2d_groups", "embedding_padding"])
def test_products(name):
    """Matrix and damped inverse products are those of the dense form, on one vector and on several."""
    compiled, arguments, oracle = compiled_case(name, [KFAC(mc_samples=2), EKFAC(mc_samples=2)])
    result = compiled(*arguments, seed=0)
    torch.manual_seed(0)
    for field in (result.kfac, result.ekfac):
        for param, factors in field.items():
            shape = oracle.params[param].shape
            block, n = kronecker.dense(factors), oracle.params[param].numel()
            close(block, block.T)
            for v in (torch.randn(shape).double(), torch.randn(2, 3, *shape).double()):
                flat = v.reshape(-1, n)
                close(kronecker.matmul(factors, v), (flat @ block).reshape(v.shape))
                damped = block + 0.1 * torch.eye(n, dtype=block.dtype)
                close(kronecker.solve(factors, v, 0.1), torch.linalg.solve(damped, flat, left=False).reshape(v.shape))
    v = torch.randn(2, *shape).double()
    with pytest.raises(ValueError, match="do not end in"):
        kronecker.matmul(factors, v[..., :-1])
    with pytest.raises(ValueError, match="pair"):
        kronecker.solve(factors, v, (0.1, 0.1))


def test_damping_of_each_factor():
    torch.manual_seed(0)
    model = Net(lambda m, t: m.head(m.emb(t).sum(1)), emb=nn.Embedding(4, 3), head=nn.Linear(3, 2)).double()
    tokens = torch.tensor([[0, 1], [1, 1], [3, 0]])
    kfac = factors_of(model, tokens, KFAC(mc_samples=4)).kfac
    for param, factors in kfac.items():
        sides = [torch.diag(f) if f.ndim == 1 else f for f in factors]
        sides = [s + d * torch.eye(len(s), dtype=s.dtype) for s, d in zip(sides, (0.1, 0.2), strict=False)]
        damped = type(factors)(sides, factors.arrangement)
        v = torch.randn(2, *model.get_parameter(param).shape).double()
        close(kronecker.matmul(damped, kronecker.solve(factors, v, (0.1, 0.2))), v)


# ---- other implementations ------------------------------


@pytest.mark.parametrize("name", ["mlp_relu", "cnn_two_layers", "conv_transpose2d", "conv1d_same_dilated"])
def test_backpack_has_the_same_numbers(name):
    backpack = pytest.importorskip("backpack", reason="compares with BackPACK, of the extra `bench`")
    model, loss, inputs, targets = CASES[name].build()
    found = fxcurv.compile(model, loss, [KFLR()])(inputs, targets).kflr
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extended = backpack.extend(flat(model))
        with backpack.backpack(backpack.extensions.KFLR()):
            backpack.extend(loss)(extended(inputs), targets).backward()
    for param, p in model.named_parameters():
        for ours, theirs in zip(found[param], p.kflr, strict=True):
            close(ours, theirs, param)


def flat(model):
    """Nested Sequentials as one."""
    if not isinstance(model, nn.Sequential):
        return model
    parts = [flat(m) for m in model]
    return nn.Sequential(*[q for p in parts for q in (p if isinstance(p, nn.Sequential) else [p])])


class TokenClassifier(nn.Module):
    """[N, T, I] -> logits [N * T, C]: a loss at every position."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        return self.body(x).flatten(0, -2)


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, stride=2, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(3, 3)
    )  # fmt: skip


def pooled():
    return Net(lambda m, x: m.b(m.a(x).tanh().mean(1)), a=nn.Linear(3, 4), b=nn.Linear(4, 3))


PEERS = {
    "vectors": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), (3,), (), nn.CrossEntropyLoss),
    "images": (small_cnn, (2, 4, 4), (), nn.CrossEntropyLoss),
    "tokens": (TokenClassifier, (5, 3), (5,), nn.CrossEntropyLoss),
    "tokens_sum": (TokenClassifier, (5, 3), (5,), lambda: nn.CrossEntropyLoss(reduction="sum")),
    "pooled": (pooled, (5, 3), (), nn.CrossEntropyLoss),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", PEERS)
def test_curvlinops_has_the_same_blocks(name, sharing):
    curvlinops = pytest.importorskip("curvlinops", reason="compares with curvlinops, of the extra `bench`")
    make, shape, positions, loss = PEERS[name]
    torch.manual_seed(0)
    model, x, y = make().double(), torch.randn(4, *shape).double(), torch.randint(3, (4, *positions))
    params = list(model.parameters())
    arguments = dict(fisher_type="type-2", kfac_approx=sharing, num_per_example_loss_terms=y[0].numel())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operator = curvlinops.KFACLinearOperator(
            model, loss(), params, [(x, y.flatten())], num_data=4, check_deterministic=False, **arguments
        )
        dense = torch.as_tensor(operator @ torch.eye(operator.shape[1]).double())
    found = fxcurv.compile(model, loss(), [KFLR(weight_sharing=sharing)])(x, y.flatten()).kflr
    expected = torch.block_diag(*[kronecker.dense(f) for f in found.values()])
    close(expected, dense, name)


class Scaled(nn.Module):
    """A layer's output times a parameter without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale


def test_a_parameter_without_a_dimension_has_its_exact_block():
    torch.manual_seed(0)
    model, x, y = Scaled().double(), torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    asked = [KFLR(), EKFAC(mc_samples=2), DiagGGNMC(mc_samples=2)]
    found, oracle = (
        fxcurv.compile(model, nn.CrossEntropyLoss(), asked)(x, y, seed=0),
        Oracle(model, nn.CrossEntropyLoss(), x, y),
    )
    exact = oracle.diag_ggn_exact()["scale"]
    (block,) = found.kflr["scale"]
    torch.testing.assert_close(block, exact.reshape(1, 1))
    torch.testing.assert_close(kronecker.dense(found.ekfac["scale"]).reshape(()), found.diag_ggn_mc["scale"])
    one = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    torch.testing.assert_close((kronecker.Blocks(found.kflr) @ one)["scale"], exact)
