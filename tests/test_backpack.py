"""BackPACK's use: forward and backward apart, against `fxcurv.compile`, plain autograd, and BackPACK itself."""

import copy
import gc
import importlib.util
import pickle
import weakref

import pytest
import torch
from torch import nn

import fxcurv
from fxcurv import errors
from fxcurv.backpack import backpack, disable, extend
from fxcurv.backpack.extensions import (
    GGNMP,
    KFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)  # fmt: skip

ALL = [
    BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), BatchDiagGGNExact(), DiagGGNExact(), DiagGGNMC(),
    SqrtGGNMC(mc_samples=3), SqrtGGNExact(), DiagHessian(), KFAC(), KFAC(fisher="empirical", savefield="kfac_empirical"), KFLR(),
]  # fmt: skip


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 3)).double()


def cnn():
    torch.manual_seed(0)
    features = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*features, nn.Dropout(0.5), nn.Linear(27, 4)).double()


def vectors(n=6):
    torch.manual_seed(1)
    return torch.randn(n, 5).double(), torch.randint(0, 3, (n,))


def images(n=5):
    torch.manual_seed(1)
    return torch.randn(n, 1, 8, 8).double(), torch.randint(0, 4, (n,))


def close(a, b):
    for s, t in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(s, t)


def same(model, expected, extensions, factor=1):
    """Every quantity on the parameters is the expected result's, times `factor` where it is linear in the loss."""
    for name, p in model.named_parameters():
        close(p.grad, factor * expected.grad[name])
        for e in extensions:
            value, other = getattr(p, e.savefield), expected[e][name]
            if e.savefield.startswith(("kf",)):
                value, other = list(value), list(other)
            close(value, other)


def backward(model, lossfunc, x, y, extensions, factor=1, seed=3):
    loss = lossfunc(model(x), y)
    torch.manual_seed(seed)
    with backpack(*extensions):
        (factor * loss).backward()
    return loss


@pytest.mark.parametrize(
    ("lossfunc", "target"),
    [
        (nn.CrossEntropyLoss(), lambda y: y),
        (nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1), lambda y: y),
        (nn.MSELoss(), lambda y: torch.eye(3).double()[y]),
        (nn.BCEWithLogitsLoss(), lambda y: torch.eye(3).double()[y]),
    ],
    ids=["ce", "ce-sum", "mse", "bce"],
)
@pytest.mark.parametrize("factor", [1, 2])
def test_equals_compile(lossfunc, target, factor):
    model, (x, y) = mlp(), vectors()
    y = target(y)
    torch.manual_seed(3)
    expected = fxcurv.compile(model, lambda f, t: factor * lossfunc(f, t), ALL)(x, y)
    loss = backward(extend(model), extend(lossfunc), x, y, ALL, factor)
    torch.testing.assert_close(factor * loss, expected.loss)
    same(model, expected, ALL)


def test_loss_without_closed_form():
    class Quartic(nn.Module):
        def forward(self, f, t):
            return ((f - t) ** 4).sum()

    model, (x, y) = mlp(), vectors()
    y, extensions = torch.eye(3).double()[y], [DiagGGNExact(), BatchGrad()]
    expected = fxcurv.compile(model, Quartic(), extensions)(x, y)
    backward(extend(model), extend(Quartic()), x, y, extensions)
    same(model, expected, extensions)


@pytest.mark.parametrize("n", [1, 5])
def test_convolutions_in_eval_mode(n):
    model, (x, y) = cnn().eval(), images(n)
    torch.manual_seed(3)
    expected = fxcurv.compile(model, nn.CrossEntropyLoss(), ALL)(x, y)
    backward(extend(model), extend(nn.CrossEntropyLoss()), x, y, ALL)
    same(model, expected, ALL)


def test_batch_sizes_share_a_program():
    model, lossfunc = extend(mlp()), extend(nn.CrossEntropyLoss())
    for n in (4, 7, 1, 4):
        x, y = vectors(n)
        model.zero_grad()
        backward(model, lossfunc, x, y, [DiagGGNExact()])
        with disable():
            same(model, fxcurv.compile(model, lossfunc, [DiagGGNExact()])(x, y), [DiagGGNExact()])


def test_dropout_is_drawn_once():
    plain, (x, y) = cnn().train(), images()
    model, lossfunc = extend(copy.deepcopy(plain)), extend(nn.CrossEntropyLoss())
    torch.manual_seed(7)
    nn.CrossEntropyLoss()(plain(x), y).backward()
    state = torch.get_rng_state()
    torch.manual_seed(7)
    loss = lossfunc(model(x), y)
    assert torch.equal(torch.get_rng_state(), state)
    with backpack(BatchGrad()):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
        torch.testing.assert_close(q.grad_batch.sum(0), p.grad)


def test_running_statistics_are_updated_once():
    plain = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    model, (x, y) = extend(copy.deepcopy(plain)), vectors()
    nn.CrossEntropyLoss()(plain(x), y).backward()
    nn.CrossEntropyLoss()(model(x), y).backward()
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    with pytest.raises(errors.MixedSamplesError), backpack(BatchGrad()):
        nn.CrossEntropyLoss()(model(x), y).backward()
    backward(model.eval(), extend(nn.CrossEntropyLoss()), x, y, [BatchGrad(), DiagGGNExact()])


def test_scalars_of_the_output():
    """[N, C, *param] of a column c is that column's individual gradient; no extended loss."""
    model, (x, _) = mlp(), vectors()
    jacobian = fxcurv.compile(model, None, [fxcurv.extensions.Jacobian()])(x).jacobian
    model = extend(model)
    f = model(x)
    for c in range(3):
        with backpack(BatchGrad(), retain_graph=True):
            f[:, c].sum().backward(retain_graph=True)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad_batch, jacobian[name][:, c])


def test_frozen_parameters_and_gradient_accumulation():
    model, (x, y) = mlp(), vectors()
    model[0].requires_grad_(False)
    expected = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagGGNExact()])(x, y)
    extend(model)
    for _ in range(2):
        backward(model, extend(nn.CrossEntropyLoss()), x, y, [DiagGGNExact()])
    assert model[0].weight.grad is None and not hasattr(model[0].weight, "diag_ggn_exact")
    torch.testing.assert_close(model[2].weight.grad, 2 * expected.grad["2.weight"])
    torch.testing.assert_close(model[2].weight.diag_ggn_exact, expected.diag_ggn_exact["2.weight"])


def test_several_losses_on_one_output():
    first, second = nn.CrossEntropyLoss(), nn.MSELoss()
    model, (x, y) = mlp(), vectors()
    t, extensions = torch.eye(3).double()[y], [DiagGGNExact(), DiagHessian(), BatchGrad()]
    expected = fxcurv.compile(model, lambda f, y, t: first(f, y) + 3 * second(f, t), extensions)(x, y, t)
    f = extend(model)(x)
    with backpack(*extensions):
        (extend(first)(f, y) + 3 * extend(second)(f, t)).backward()
    same(model, expected, extensions)


@pytest.mark.parametrize("view", [lambda f: f.view(-1, 3), lambda f: f.transpose(1, 2)], ids=["flat", "classes-second"])
def test_views_of_the_output(view):
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(5, 2, 4).double(), torch.randint(0, 3, (5, 2))
    y = y.flatten() if view(torch.zeros(5, 2, 3)).ndim == 2 else y
    extensions, lossfunc = [DiagGGNExact(), BatchDiagGGNExact(), BatchGrad()], nn.CrossEntropyLoss()
    expected = fxcurv.compile(model, lambda f, t: lossfunc(view(f), t), extensions)(x, y)
    loss = extend(lossfunc)(view(extend(model)(x)), y)
    with backpack(*extensions):
        loss.backward()
    same(model, expected, extensions)


def test_second_order_needs_the_whole_loss():
    model, lossfunc, (x, y) = extend(mlp()), extend(nn.CrossEntropyLoss()), vectors()
    for loss in (
        lambda f: lossfunc(2 * f, y),
        lambda f: lossfunc(f[:, :3].clone(), y),
        lambda f: lossfunc(f, y) + f.square().sum(),
        lambda f: nn.CrossEntropyLoss()(f, y),
    ):
        value = loss(model(x))
        with pytest.raises(errors.LossError), backpack(DiagGGNExact()):
            value.backward(retain_graph=True)
        with backpack(BatchGrad()):
            value.backward()
        with disable():
            gradients = torch.autograd.grad(loss(model(x)), list(model.parameters()))
        for p, g in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad_batch.sum(0), g)


def test_what_is_refused_by_name():
    model, (x, y) = mlp(), vectors()
    extend(model)
    with pytest.raises(errors.ExtensionError, match="class"):
        backpack(BatchGrad)
    with pytest.raises(errors.ArgumentError):
        extend(torch.relu)
    with pytest.raises(errors.ArgumentError, match="requires grad"):
        model(x.requires_grad_())
    x = x.detach()
    f = model(x)
    with pytest.raises(errors.ExtensionError, match="create_graph"):
        torch.autograd.grad(f.sum(), list(model.parameters()), create_graph=True)
    with pytest.raises(errors.ExtensionError), backpack(GGNMP()):
        model(x).sum().backward()
    with pytest.raises(errors.LossError, match="not convex"):
        backward(model, extend(nn.CrossEntropyLoss()), x, y, [DiagGGNExact()], factor=-1)
    logs = extend(nn.Sequential(mlp(), nn.LogSoftmax(1)))
    with pytest.raises(errors.LossError, match="logits"):
        backward(logs, extend(nn.NLLLoss()), x, y, [DiagGGNExact()])


def test_hook_and_plain_modules():
    model, (x, y) = extend(mlp()), vectors()
    seen = []

    def hook(module):
        seen.append((type(module).__name__, [p.grad_batch.shape[0] for p in module.parameters()]))

    loss = nn.CrossEntropyLoss()(model(x), y)
    with backpack(BatchGrad(), extension_hook=hook):
        loss.backward()
    assert seen == [("Linear", [6, 6]), ("Sigmoid", []), ("Linear", [6, 6])]
    with torch.no_grad():
        assert model(x).grad_fn is None
    with disable():
        assert not hasattr(model(x), "_fxcurv_pass")
    assert isinstance(model, nn.Sequential) and repr(model) == repr(mlp())


def test_copies_are_extended_and_free_themselves():
    model, (x, y) = extend(mlp()), vectors()
    backward(model, extend(nn.CrossEntropyLoss()), x, y, [DiagGGNExact()])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.zero_grad()
        backward(other, extend(nn.CrossEntropyLoss()), x, y, [DiagGGNExact()])
        torch.testing.assert_close(other[0].weight.diag_ggn_exact, model[0].weight.diag_ggn_exact)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_changed_parameters_are_noticed():
    model, (x, y) = extend(mlp()), vectors()
    loss = nn.CrossEntropyLoss()(model(x), y)
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


THERE = importlib.util.find_spec("backpack") is not None


@pytest.mark.skipif(not THERE, reason="BackPACK is not installed")
@pytest.mark.filterwarnings("ignore")
def test_equals_backpack():
    import backpack as original
    from backpack import extensions as theirs

    (x, y), lossfunc = images(), nn.CrossEntropyLoss()
    asked = [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance()]
    asked += [DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact(), KFLR()]
    same_names = [getattr(theirs, type(e).__name__)() for e in asked]
    other = original.extend(cnn().eval())
    loss = original.extend(copy.deepcopy(lossfunc))(other(x), y)
    with original.backpack(*same_names):
        loss.backward()
    model = extend(cnn().eval())
    backward(model, extend(lossfunc), x, y, asked)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for field in ("grad", *(e.savefield for e in asked)):
            close(list(getattr(p, field)), list(getattr(q, field)))
