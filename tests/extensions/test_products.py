"""Products with the Gauss-Newton, the Hessian and the positive-curvature Hessian, against the oracle, in float64."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from case_tools import mlp
from cases import CASES
from compiled import close, compiled_case
from oracle import Oracle, derivative, second_derivative
from torch import nn

import fxcurv
from fxcurv.errors import ArgumentError, ExtensionError, LossError
from fxcurv.extensions import GGNMP, HMP, PCHMP, BatchDiagHessian, DiagGGNExact, DiagHessian


def dense(block, shape, dtype=torch.float64):
    """The matrix [P, P] behind a block's callable."""
    size = shape.numel()
    return block(torch.eye(size, dtype=dtype).reshape(size, *shape)).reshape(size, size)


def check_blocks(blocks, expected, params):
    assert set(blocks) == set(params)
    for name, matrix in expected.items():
        shape = params[name].shape
        torch.testing.assert_close(
            dense(blocks[name], shape), matrix, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
        one = torch.ones(shape, dtype=torch.float64)
        torch.testing.assert_close(blocks[name](one).flatten(), matrix.sum(1), rtol=1e-8, atol=1e-10)


def check_operator(operator, expected):
    eye = torch.eye(len(expected), dtype=torch.float64)
    torch.testing.assert_close(operator @ eye, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(operator @ eye[0], expected[0], rtol=1e-8, atol=1e-10)


QUICK = {"layer_norm", "loss_regularised"}
# Others have their parts: two layers and two directions are twice the same, at four to six times the cost.
ALIKE = {"lstm_two_layers_bidirectional_projected", "gru_two_layers_bidirectional", "transformer_sequence_first"}
NAMES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name, case in CASES.items()
    if "no_hessian" not in case.tags and name not in ALIKE
]


@pytest.mark.parametrize("name", NAMES)
def test_second_order(name):
    """Diagonals, operators, and blocks of a parameter, all of one program.

    Each block and each of its kinds of vectors is a program of its own. Positive parts are of the first parameter, as what is
    between it and the loss is most; those of matrices are of one by turns, and of all in the operator.
    """
    convex = "nonconvex" not in CASES[name].tags
    asked = [
        DiagHessian(),
        BatchDiagHessian(),
        HMP(),
        PCHMP(),
        PCHMP("pchmp_abs", "abs"),
        *([GGNMP()] if convex else []),
    ]
    compiled, arguments, oracle = compiled_case(CASES[name], asked)
    result, hessian = compiled(*arguments), oracle.hessian()
    params = list(oracle.params)
    first, one = ({k: oracle.params[k]} for k in (params[0], params[[*CASES].index(name) % len(params)]))
    close(result.diag_h, oracle.diag_h(), "diag_h")
    close(result.diag_h_batch, oracle.diag_h_batch(), "diag_h_batch")
    assert set(result.hmp) == set(result.pchmp) == set(result.pchmp_abs) == set(params)
    check_blocks({k: result.hmp[k] for k in one}, {k: hessian[k] for k in one}, one)
    check_operator(result.hessian, oracle.hessian_matrix())
    check_positive(result, {k: hessian[k] for k in first}, first)
    if convex:
        ggn = oracle.ggn()
        check_blocks({k: result.ggnmp[k] for k in one}, {k: ggn[k] for k in one}, one)
        check_operator(result.ggn, oracle.ggn_matrix())


def smallest(matrix):
    return torch.linalg.eigvalsh((matrix + matrix.mT) / 2).min().item()


def check_positive(result, hessians, params):
    """0 <= P, H <= P, and clipping is the mean of the identity and the absolute value, as for every eigenvalue."""
    for name, hessian in hessians.items():
        shape = params[name].shape
        clipped, absolute = dense(result.pchmp[name], shape), dense(result.pchmp_abs[name], shape)
        tolerance = 1e-9 * (1 + hessian.abs().max().item())
        torch.testing.assert_close(clipped, clipped.mT, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(clipped, (absolute + hessian) / 2, rtol=1e-8, atol=1e-10)
        for matrix in (clipped, clipped - hessian, absolute - hessian, absolute + hessian):
            assert smallest(matrix) > -tolerance, name


# ---- positive curvature by its definition ------------------------------


def positive_curvature(layers, loss, x, y, modify):
    """GGN + sum over elementwise layers of J^T diag(modify(g f'')) J, from plain autograd; name -> [P, P]."""
    params = dict(layers.named_parameters())
    values = [x]
    for layer in layers:
        values.append(layer(values[-1]))
    total = loss(values[-1], y)
    gradients = torch.autograd.grad(total, values[1:], retain_graph=True)
    out = Oracle(layers, loss, x, y).ggn()
    for layer, before, g in zip(layers, values[:-1], gradients, strict=True):
        if list(layer.parameters()) or not before.requires_grad:
            continue
        entries = before.detach().requires_grad_()
        first = torch.autograd.grad(layer(entries).sum(), entries, create_graph=True)[0]
        second = derivative(first.sum(), [entries])[0]
        curvature = (g * second).flatten()
        curvature = curvature.clamp(min=0) if modify == "clip" else curvature.abs()
        for name, p in params.items():
            j = second_derivative(before, p)
            out[name] = out[name] + j.mT @ (curvature[:, None] * j)
    return out


@pytest.mark.parametrize("modify", ["clip", "abs"])
@pytest.mark.parametrize(
    "act", [nn.Sigmoid, nn.Tanh, nn.ELU, nn.SELU, nn.LogSigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.ReLU]
)
def test_positive_curvature_of_chains(act, modify):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), act(), nn.Linear(4, 3), act(), nn.Linear(3, 2)).double()
    loss = nn.CrossEntropyLoss()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    result = fxcurv.compile(layers, loss, [PCHMP(modify=modify)], debug=True)(x, y)
    check_blocks(result.pchmp, positive_curvature(layers, loss, x, y, modify), dict(layers.named_parameters()))


@pytest.mark.parametrize("name", ["mlp_relu", "residual_net", "dense_prediction", "linear_regression"])
def test_positive_curvature_of_piecewise_linear_networks_is_the_gauss_newton(name):
    compiled, arguments, oracle = compiled_case(CASES[name], [PCHMP()])
    check_blocks(compiled(*arguments).pchmp, oracle.ggn(), oracle.params)


def test_positive_curvature_refuses():
    with pytest.raises(ExtensionError, match="use 'clip' or 'abs'"):
        PCHMP(modify="square")
    compiled, arguments, _ = compiled_case(CASES["mlp_gelu"], [PCHMP()])
    with pytest.raises(ExtensionError, match="create_graph"):
        compiled(*arguments, create_graph=True)


# ---- samples that interact ------------------------------


def whole_batch(model, loss, x, y):
    """(Hessian, Gauss-Newton) over all parameters, samples not taken apart."""
    params = list(model.parameters())
    f = model(x)
    firsts = derivative(loss(f, y), params, create_graph=True)
    hessian = torch.cat([torch.cat([second_derivative(g, p) for p in params], 1) for g in firsts])
    j = torch.cat([second_derivative(f, p) for p in params], 1)
    of_loss = torch.autograd.functional.hessian(lambda flat: loss(flat.view_as(f), y), f.detach().flatten())
    return hessian, j.mT @ of_loss @ j


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_batch_norm_in_training(images, squared):
    torch.manual_seed(0)
    if images:
        model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    else:
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(*((5, 1, 3, 3) if images else (5, 4)), dtype=torch.float64)
    y = torch.randint(3, (5,))

    def loss(f, y):
        return F.cross_entropy(f, y) ** (2 if squared else 1)

    result = fxcurv.compile(model, loss, [HMP(), GGNMP(), PCHMP()], debug=True)(x, y)
    hessian, ggn = whole_batch(model, loss, x, y)
    check_operator(result.hessian, hessian)
    check_operator(result.ggn, ggn)
    start = 0
    for name, p in model.named_parameters():
        block = slice(start, start + p.numel())
        start += p.numel()
        torch.testing.assert_close(dense(result.hmp[name], p.shape), hessian[block, block])
        positive = dense(result.pchmp[name], p.shape)
        assert min(smallest(positive), smallest(positive - hessian[block, block])) > -1e-9


# ---- what is kept ------------------------------


def dropout_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3), nn.Dropout(0.3)).double()
    return model, nn.CrossEntropyLoss(), torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))


def test_dropout_is_drawn_once():
    model, loss, x, y = dropout_net()
    compiled = fxcurv.compile(model, loss, [HMP(), GGNMP()], debug=True)
    torch.manual_seed(1)
    result = compiled(x, y)
    torch.manual_seed(1)
    hessian, _ = whole_batch(model, loss, x, y)
    torch.manual_seed(1)
    _, ggn = whole_batch(model, loss, x, y)
    for _ in range(2):
        check_operator(result.hessian, hessian)
        check_operator(result.ggn, ggn)


def targets_of(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def test_products_repeat_no_expensive_op():
    """The linear layers' outputs are kept, not the activations that follow from them."""
    model, loss, x, y = (
        mlp(nn.Tanh()).double(),
        nn.CrossEntropyLoss(),
        torch.randn(5, 4).double(),
        torch.randint(3, (5,)),
    )
    result = fxcurv.compile(model, loss, [GGNMP()])(x, y)
    products = [t for t in targets_of(result.ggn.graph_module) if "mm" in t]
    # forward: x dW, h dW', t W'; backward: W'^T u, u^T h, u^T x
    assert len(products) == 6
    block = result.ggnmp["2.weight"].graph_module
    assert len([t for t in targets_of(block) if "mm" in t]) == 2
    sizes = [n.meta["val"].numel() for n in result.ggn.graph_module.graph.nodes if n.name.startswith("saved")]
    assert len(sizes) <= 6
    assert "parameter '2.weight'" in result.ggn.labels
    assert "parameter '0.weight'" not in result.ggn.labels


def test_the_batch_size_stays_symbolic():
    model, loss, x, y = (
        mlp(nn.GELU()).double(),
        nn.CrossEntropyLoss(),
        torch.randn(6, 4).double(),
        torch.randint(3, (6,)),
    )
    compiled = fxcurv.compile(model, loss, [GGNMP(), HMP(), PCHMP()])
    for n in (6, 4):
        result = compiled(x[:n], y[:n])
        oracle = Oracle(model, loss, x[:n], y[:n])
        check_blocks(result.hmp, oracle.hessian(), oracle.params)
        check_blocks(result.ggnmp, oracle.ggn(), oracle.params)
        assert smallest(dense(result.pchmp["0.weight"], torch.Size([5, 4]))) > -1e-12
    assert compiled.lower(x[:5], y[:5]).program is compiled.lower(x, y).program


def test_changes_in_place_are_named():
    model, loss, x, y = dropout_net()
    compiled = fxcurv.compile(model.eval(), loss, [HMP(), PCHMP()])
    result = compiled(x, y)
    v = torch.ones_like(model[0].weight)
    before = result.hmp["0.weight"](v)
    copied = copy.deepcopy(result)
    with torch.no_grad():
        model[3].weight.add_(1)
    for call in (
        lambda: result.hmp["0.weight"](v),
        lambda: result.pchmp["0.weight"](v),
        lambda: result.hessian @ torch.ones(51),
    ):
        with pytest.raises(ArgumentError, match=r"parameter '3\.weight' was changed in place"):
            call()
    torch.testing.assert_close(copied.hmp["0.weight"](v), before)
    again = compiled(x, y)
    assert not torch.equal(again.hmp["0.weight"](v), before)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(ArgumentError, match="tensor 0 of the inputs was changed in place"):
        again.hmp["0.weight"](v)


# ---- calling them ------------------------------


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = mlp(nn.Tanh()).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    compiled = fxcurv.compile(
        model, nn.CrossEntropyLoss(), [GGNMP(), HMP(), GGNMP(savefield="other"), DiagGGNExact(), DiagHessian()]
    )
    return model, compiled(x, y), x, y, compiled


def test_fields_of_results_and_parameters(small):
    model, result, *_ = small
    result.attach()
    v = torch.randn(2, 5, 4, dtype=torch.float64)
    for product in (model[0].weight.ggnmp, result[GGNMP()]["0.weight"], result.other["0.weight"]):
        torch.testing.assert_close(product(v), result.ggnmp["0.weight"](v), rtol=0, atol=0)
    diagonal = dense(result.hmp["0.weight"], torch.Size([5, 4])).diagonal().reshape(5, 4)
    torch.testing.assert_close(diagonal, result.diag_h["0.weight"])
    diagonal = dense(result.ggnmp["0.weight"], torch.Size([5, 4])).diagonal().reshape(5, 4)
    torch.testing.assert_close(diagonal, result.diag_ggn_exact["0.weight"])


@pytest.mark.parametrize("shape", [(5, 4), (0, 5, 4), (1, 5, 4), (3, 5, 4)])
def test_shapes_of_vectors(small, shape):
    _, result, *_ = small
    v = torch.randn(*shape, dtype=torch.float64)
    out = result.hmp["0.weight"](v)
    assert out.shape == v.shape
    if len(shape) == 3 and shape[0]:
        torch.testing.assert_close(out[-1], result.hmp["0.weight"](v[-1]))


def test_wrong_vectors_are_refused(small):
    _, result, *_ = small
    block = result.hmp["0.weight"]
    for wrong in (torch.ones(4, 5).double(), torch.ones(2, 2, 5, 4).double()):
        with pytest.raises(ArgumentError, match="multiplies"):
            block(wrong)
    with pytest.raises(ArgumentError, match="float32"):
        block(torch.ones(5, 4))
    with pytest.raises(ArgumentError, match="pass a tensor"):
        block([1.0])
    with pytest.raises(ArgumentError, match="one tensor for each"):
        result.ggn @ {"0.weight": torch.ones(5, 4).double()}
    with pytest.raises(ArgumentError, match="multiply a dict"):
        result.ggn @ torch.ones(7)
    with pytest.raises(AttributeError, match="hessian"):
        fxcurv.compile(mlp().double(), nn.CrossEntropyLoss(), [GGNMP()])(*small[2:4]).hessian  # noqa: B018
    with pytest.raises(ExtensionError, match="every result has"):
        fxcurv.compile(mlp(), nn.CrossEntropyLoss(), [GGNMP(savefield="ggn")])
    with pytest.raises(ArgumentError, match="cannot be pickled"):
        pickle.dumps(result)


def test_vectors_as_dicts(small):
    model, result, *_ = small
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    flat = torch.cat([t.flatten() for t in v.values()])
    found = result.ggn @ v
    assert list(found) == list(v)
    torch.testing.assert_close(torch.cat([t.flatten() for t in found.values()]), result.ggn @ flat)


def test_scipy(small):
    sparse = pytest.importorskip("scipy.sparse.linalg")
    _, result, *_ = small
    operator = result.hessian.to_scipy()
    d = operator.shape[0]
    matrix = result.hessian @ torch.eye(d, dtype=torch.float64)
    assert operator.dtype == np.float64
    np.testing.assert_allclose(operator @ np.eye(d), matrix.numpy(), atol=1e-12)
    np.testing.assert_allclose(operator.T @ np.ones(d), matrix.sum(0).numpy(), atol=1e-12)
    largest = sparse.eigsh(operator, k=1, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(largest, torch.linalg.eigvalsh(matrix).max().item(), rtol=1e-8)


def test_results_are_pytrees(small):
    _, result, *_ = small
    leaves, spec = torch.utils._pytree.tree_flatten(result)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    v = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(again.hmp["0.weight"](v), result.hmp["0.weight"](v), rtol=0, atol=0)


def test_in_a_compiled_step(small):
    _, result, *_ = small
    v = torch.randn(2, 5, 4, dtype=torch.float64)
    result.ggnmp["0.weight"](v)  # emits the block's program
    step = torch.compile(lambda v: result.ggnmp["0.weight"](2 * v), backend="eager", fullgraph=True)
    torch.testing.assert_close(step(v), result.ggnmp["0.weight"](2 * v))
    torch.testing.assert_close(step(v[0]), result.ggnmp["0.weight"](2 * v[0]))


def test_products_can_be_differentiated(small):
    """v^T H v by its gradient, against three backward passes."""
    model, _, x, y, compiled = small
    v = torch.randn(5, 4, dtype=torch.float64)
    weight = model[0].weight
    first = torch.autograd.grad(F.cross_entropy(model(x), y), weight, create_graph=True)[0]
    second = torch.autograd.grad(first, weight, v, create_graph=True)[0]
    expected = torch.autograd.grad(second, weight, v)[0]
    result = compiled(x, y, create_graph=True)
    for product in (result.hmp["0.weight"](v), result.hmp["0.weight"](torch.stack([v, 2 * v]))[0]):
        torch.testing.assert_close(torch.autograd.grad(product, weight, v, retain_graph=True)[0], expected)


def test_losses_that_are_not_convex():
    for name in ("loss_negative_scale", "loss_gaussian_nll"):
        compiled, arguments, _ = compiled_case(CASES[name], [GGNMP()])
        with pytest.raises(LossError, match="not convex"):
            compiled(*arguments)


def test_the_report_counts_what_is_kept():
    compiled, arguments, _ = compiled_case(CASES["mlp_gelu"], [GGNMP()])
    assert "matrix-free" in str(compiled.explain(*arguments))
