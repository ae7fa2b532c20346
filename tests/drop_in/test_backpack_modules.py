"""What stands beside the drop-in: names, Hessian-free products, Kronecker helpers, modules; and BackPACK's own numbers."""

from __future__ import annotations

import importlib
import inspect
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector
from torch.utils import _pytree as pytree

from fxcurv import errors
from fxcurv import extensions as native
from fxcurv.backpack import backpack, extend, extensions
from fxcurv.backpack.custom_module.branching import Parallel, SumModule, _Branch
from fxcurv.backpack.custom_module.graph_utils import convert_module_to_backpack
from fxcurv.backpack.custom_module.pad import Pad
from fxcurv.backpack.custom_module.permute import Permute
from fxcurv.backpack.custom_module.reduce_tuple import ReduceTuple
from fxcurv.backpack.custom_module.scale_module import ScaleModule
from fxcurv.backpack.custom_module.slicing import Slicing
from fxcurv.backpack.hessianfree import ggnvp, hvp, lop, rop
from fxcurv.backpack.utils import kroneckers
from fxcurv.backpack.utils.convert_parameters import vector_to_parameter_list


def close(a, b, **tolerance):
    for s, t in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(s, t, **tolerance)


# ---- extensions ------------------------------


@pytest.mark.parametrize("name", ["HMP", "GGNMP", "PCHMP"])
def test_products_take_their_field_first(name):
    assert getattr(extensions, name)("field").savefield == "field"
    assert getattr(extensions, name)().savefield == name.lower()
    assert isinstance(getattr(extensions, name)(), getattr(native, name))


def test_hbp():
    ggn, botev = extensions.Curvature.GGN, extensions.ExpectationApproximation.BOTEV_MARTENS
    start, carried = extensions.LossHessianStrategy, extensions.BackpropStrategy
    assert extensions.HBP(ggn, start.EXACT, carried.SQRT, botev) == extensions.KFLR(savefield="hbp")
    assert extensions.HBP("ggn", "sampling", "sqrt", botev, "field") == extensions.KFAC(savefield="field")
    assert extensions.HBP(ggn, start.SUM, carried.BATCH_AVERAGE, botev) == extensions.KFRA(savefield="hbp")
    refused = [
        ("none", "exact", "sqrt", botev), (ggn, "sum", "sqrt", botev), (ggn, "exact", "average", botev),
        ("pch-abs", "sum", "average", botev), (ggn, "exact", "sqrt", extensions.ExpectationApproximation.CHEN),
    ]  # fmt: skip
    for choices in refused:
        with pytest.raises(errors.ExtensionError, match="HBP"):
            extensions.HBP(*choices)


# ---- Hessian-free products ------------------------------


@pytest.fixture
def problem():
    """(model, loss, output, vectors for the parameters, dense J [N C, D], H at f, Hessian [D, D])."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    x, y = torch.randn(4, 3).double(), torch.randint(0, 2, (4,))
    named, flat = dict(model.named_parameters()), parameters_to_vector(model.parameters()).detach()

    def f(vector):
        parts = vector_to_parameter_list_with_graph(vector, named.values())
        return torch.func.functional_call(model, dict(zip(named, parts, strict=True)), x).flatten()

    def loss(output):
        return functional.cross_entropy(output.reshape(4, 2), y)

    output = model(x)
    vectors = [torch.randn_like(p) for p in model.parameters()]
    dense = torch.autograd.functional.jacobian(f, flat)
    curvature = torch.autograd.functional.hessian(loss, output.flatten().detach())
    hessian = torch.autograd.functional.hessian(lambda vector: loss(f(vector)), flat)
    return model, loss(output), output, vectors, dense, curvature, hessian


def vector_to_parameter_list_with_graph(vector, parameters):
    parameters = list(parameters)
    return [t.view_as(p) for t, p in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)]


def test_hessian_free_products(problem):
    model, loss, output, vectors, j, h, hessian = problem
    params, flat = list(model.parameters()), parameters_to_vector(vectors)
    w = torch.randn_like(output)
    (along,) = rop.R_op(output, params, vectors)
    assert not along.requires_grad
    torch.testing.assert_close(along.flatten(), j @ flat)
    torch.testing.assert_close(rop.jacobian_vector_product(output, params, vectors)[0], along)
    back = lop.L_op(output, params, w)
    torch.testing.assert_close(parameters_to_vector(back), w.flatten() @ j)
    close(lop.transposed_jacobian_vector_product(output, params, w), back)
    found = hvp.hessian_vector_product(loss, params, vectors)
    torch.testing.assert_close(parameters_to_vector(found), hessian @ flat)
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    again = hvp.hessian_vector_product(loss, params, vectors, grad_params=gradient, detach=False)
    assert again[0].requires_grad
    close(again, found)
    found = ggnvp.ggn_vector_product(loss, output, model, vectors)
    torch.testing.assert_close(parameters_to_vector(found), j.T @ h @ j @ flat)
    block = ggnvp.ggn_vector_product_from_plist(loss, output, params[:1], vectors[:1])
    size = params[0].numel()
    torch.testing.assert_close(block[0].flatten(), (j.T @ h @ j)[:size, :size] @ vectors[0].flatten())


def test_hessian_free_products_of_an_extended_model(problem):
    """Its gradient is differentiated again."""
    model, _, _, vectors, *_ = problem
    x, y = torch.randn(4, 3).double(), torch.randint(0, 2, (4,))
    params = list(model.parameters())
    loss = functional.cross_entropy(model(x), y)
    expected = hvp.hessian_vector_product(loss, params, vectors)
    output = extend(model)(x)
    close(hvp.hessian_vector_product(functional.cross_entropy(output, y), params, vectors), expected)


# ---- vectors and Kronecker factors ------------------------------


def test_vector_to_parameter_list():
    params = [torch.randn(2, 3), torch.randn(4), torch.randn(())]
    vector = parameters_to_vector(p.reshape(-1) for p in params)
    close(vector_to_parameter_list(vector, iter(params)), params)
    assert vector_to_parameter_list(vector, []) == []
    with pytest.raises(TypeError):
        vector_to_parameter_list([1.0], params)


def symmetric(n):
    a = torch.randn(n, n).double()
    return a @ a.T + torch.eye(n).double()


def test_kronecker_products():
    torch.manual_seed(0)
    a, b, c = torch.randn(2, 3).double(), torch.randn(4, 2).double(), torch.randn(3, 3).double()
    dense = torch.kron(torch.kron(a, b), c)
    torch.testing.assert_close(kroneckers.kfacs_to_mat([a, b, c]), dense)
    torch.testing.assert_close(kroneckers.two_kfacs_to_mat(a, b), torch.kron(a, b))
    torch.testing.assert_close(kroneckers.kfacs_to_mat([a]), a)
    m = torch.randn(dense.shape[1], 5).double()
    torch.testing.assert_close(kroneckers.kfac_mat_prod([a, b, c])(m), dense @ m)
    torch.testing.assert_close(kroneckers.apply_kfac_mat_prod([a, b, c], m[:, 0]), dense @ m[:, 0])
    equation = kroneckers.kfac_mat_prod_einsum_equation(3)
    einsum = torch.einsum(equation, m.reshape(3, 2, 3, 5), a, b, c)
    torch.testing.assert_close(einsum.reshape(-1, 5), dense @ m)
    assert kroneckers.is_matrix(a) and kroneckers.is_vector(a[0]) and not kroneckers.all_tensors_of_order(2, [a, a[0]])
    assert list(kroneckers.get_letters(3)) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="matrices"):
        kroneckers.kfacs_to_mat([a, a[0]])
    with pytest.raises(ValueError, match="takes"):
        kroneckers.kfac_mat_prod([a])(m)


@pytest.mark.parametrize("shift", [None, 0.5, [0.1, 0.3]])
def test_inverse_kronecker_products(shift):
    torch.manual_seed(0)
    a, b = symmetric(3), symmetric(2)
    shifts = [shift or 0.0] * 2 if not isinstance(shift, list) else shift
    inverses = [torch.linalg.inv(f + s * torch.eye(len(f)).double()) for f, s in zip((a, b), shifts, strict=True)]
    close(kroneckers.inv_kfacs([a, b], shift), inverses)
    m = torch.randn(6, 2).double()
    expected = torch.kron(*inverses) @ m
    torch.testing.assert_close(kroneckers.inv_kfac_mat_prod([a, b], shift)(m), expected)
    torch.testing.assert_close(kroneckers.apply_inv_kfac_mat_prod([a, b], m, shift), expected)


def test_inverse_of_a_singular_factor_is_truncated():
    (inverse,) = kroneckers.inv_kfacs([torch.diag(torch.tensor([0.0, 2.0])).double()])
    torch.testing.assert_close(inverse, torch.diag(torch.tensor([1e8, 0.5])).double())


# ---- modules ------------------------------


def test_custom_modules_are_plain():
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(Pad([1, 0, 0, 2], value=1.5)(x), functional.pad(x, [1, 0, 0, 2], value=1.5))
    torch.testing.assert_close(Pad((1, 1), mode="reflect")(x), functional.pad(x, (1, 1), mode="reflect"))
    torch.testing.assert_close(Permute(0, 2, 1)(x), x.permute(0, 2, 1))
    torch.testing.assert_close(Permute(1, -1, init_transpose=True)(x), x.transpose(1, 2))
    torch.testing.assert_close(ScaleModule(2.0)(x), 2 * x)
    torch.testing.assert_close(Slicing((slice(None), 1, slice(0, 2)))(x), x[:, 1, :2])
    assert ReduceTuple()((x, None)) is x and ReduceTuple(1)((None, x)) is x
    torch.testing.assert_close(Parallel(nn.Identity(), ScaleModule(3.0))(x), 4 * x)
    named = _Branch(OrderedDict(left=nn.Identity(), right=nn.ReLU()))
    assert list(dict(named.named_children())) == ["left", "right"] and len(named(x)) == 2

    class Product(nn.Module):
        def forward(self, a, b):
            return a * b

    torch.testing.assert_close(Parallel(nn.Identity(), nn.ReLU(), merge_module=Product())(x), x * x.relu())
    assert convert_module_to_backpack(named, False) is named
    for wrong in (lambda: Permute(1, 0), lambda: Permute(0, 1, init_transpose=True), lambda: ScaleModule(1)):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(AssertionError):
        SumModule()(x, x[0])


def residual():
    torch.manual_seed(0)
    inner = Parallel(nn.Identity(), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), ScaleModule(0.5)))
    return nn.Sequential(nn.Linear(5, 4), inner, nn.Linear(4, 3)).double()


def test_a_model_of_custom_modules():
    """Individual gradients by a loop."""
    x, y = torch.randn(3, 5).double(), torch.randint(0, 3, (3,))
    model, plain = extend(residual()), residual()
    with backpack(extensions.BatchGrad()):
        functional.cross_entropy(model(x), y, reduction="sum").backward()
    for n in range(3):
        loss = functional.cross_entropy(plain(x[n : n + 1]), y[n : n + 1])
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        close([p.grad_batch[n] for p in model.parameters()], list(gradients))


# ---- BackPACK itself ------------------------------


@pytest.fixture
def original():
    return pytest.importorskip("backpack")


PATHS = [
    "hessianfree.hvp", "hessianfree.ggnvp", "hessianfree.rop", "hessianfree.lop", "utils.kroneckers",
    "utils.convert_parameters", "custom_module.branching", "custom_module.pad", "custom_module.permute",
    "custom_module.reduce_tuple", "custom_module.scale_module", "custom_module.slicing",
]  # fmt: skip


def own(module):
    """Public functions and classes that a module defines."""
    return {k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and k[0] != "_"}


@pytest.mark.parametrize("path", PATHS)
def test_paths_and_arguments_are_backpacks(original, path):
    theirs = own(importlib.import_module(f"backpack.{path}"))
    ours = importlib.import_module(f"fxcurv.backpack.{path}")
    for name, value in theirs.items():
        given = inspect.signature(value).parameters
        assert list(inspect.signature(getattr(ours, name)).parameters)[: len(given)] == list(given), name


def test_extension_names_and_arguments_are_backpacks(original):
    theirs = importlib.import_module("backpack.extensions")
    for name in theirs.__all__:
        given = list(inspect.signature(getattr(theirs, name)).parameters)
        parameters = inspect.signature(getattr(extensions, name)).parameters
        positional = [k for k, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
        assert positional[: len(given)] == given, name
    for ours, where in ((backpack, original.backpack), (extend, original.extend)):
        theirs = list(inspect.signature(where).parameters)[1:]
        assert list(inspect.signature(ours).parameters)[1:][: len(theirs)] == theirs


SAME = [
    "BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance", "DiagGGNExact", "BatchDiagGGNExact", "SqrtGGNExact",
    "KFLR", "KFRA", "DiagHessian", "BatchDiagHessian",
]  # fmt: skip
PRODUCTS = ["HMP", "GGNMP", "PCHMP"]


def mlp():
    torch.manual_seed(0)
    # BackPACK's PCHMP is right on piecewise linear activations only
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double(), torch.randn(6, 5).double()


def smooth():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid()).double(), torch.randn(6, 5).double()


def cnn():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double(), torch.randn(4, 2, 8, 8).double()


def run_both(original, make, names, lossfunc, target):
    """(parameters of the original's model, of ours) after one backward pass with all of `names`."""
    from backpack import extensions as theirs

    out = []
    for package, known in ((original, theirs), (None, extensions)):
        model, x = make()
        do_extend, context = (package.extend, package.backpack) if package else (extend, backpack)
        model, loss = do_extend(model), do_extend(lossfunc())
        value = loss(model(x), target(len(x)))
        with context(*(getattr(known, name)() for name in names)):
            value.backward()
        out.append(list(model.parameters()))
    return out


def classes(n):
    return torch.arange(n) % 3


def squares(n):
    return torch.linspace(-1, 1, 3 * n).double().reshape(n, 3)


@pytest.fixture
def double():
    """BackPACK makes convolutions of its own, in the default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "names", "lossfunc", "target"),
    [
        (mlp, [*SAME, *PRODUCTS], nn.CrossEntropyLoss, classes),
        pytest.param(smooth, [*SAME, *PRODUCTS[:2]], nn.MSELoss, squares, marks=pytest.mark.slow),
        pytest.param(cnn, [*SAME, *PRODUCTS[:2]], nn.CrossEntropyLoss, classes, marks=pytest.mark.slow),
    ],
    ids=["mlp", "smooth", "cnn"],
)
def test_numbers_are_backpacks(original, double, make, names, lossfunc, target):
    """All in a single backward."""
    theirs, ours = run_both(original, make, names, lossfunc, target)
    for p, q in zip(theirs, ours, strict=True):
        for field in ["grad", *(getattr(extensions, name)().savefield for name in names)]:
            a, b = getattr(p, field), getattr(q, field)
            if callable(a) and not isinstance(a, torch.Tensor):
                v = torch.randn(3, *p.shape).double()
                a, b = a(v), b(v)
            close(list(a), list(b))
