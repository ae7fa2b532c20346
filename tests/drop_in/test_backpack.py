"""BackPACK's use: forward and backward apart, against the oracle, plain autograd, and BackPACK itself where it is there."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle
from oracle_kron import KroneckerOracle
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxcurv import errors
from fxcurv.backpack import backpack, disable, extend
from fxcurv.backpack.extended import _parts
from fxcurv.backpack.extensions import (
    GGNMP,
    HMP,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    Jacobian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from fxcurv.extensions import KFAC, KFLR  # fmt: skip

FIRST = [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance()]
SECOND = [BatchDiagGGNExact(), DiagGGNExact(), SqrtGGNExact(), DiagHessian(), BatchDiagHessian()]


def mlp(act=nn.Sigmoid, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), act(), nn.Linear(4, classes)).double()


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


def one_hot(y):
    return torch.eye(3).double()[y]


@pytest.fixture(scope="module")
def shared():
    return extend(mlp())


@pytest.fixture
def model(shared):
    """The extended `mlp()`, as new but for its programs."""
    shared.load_state_dict(mlp().state_dict())
    for p in shared.parameters():
        p.grad = None
        for name in list(vars(p)):
            delattr(p, name)
    return shared


def close(a, b):
    for s, t in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(s, t)


def same(model, oracle, extensions):
    """The gradient and every quantity on the parameters are the oracle's."""
    expected = {field: getattr(oracle, field)() for field in ["grad", *(e.savefield for e in extensions)]}
    for name, p in model.named_parameters():
        for field, values in expected.items():
            torch.testing.assert_close(getattr(p, field), values[name], msg=lambda m, field=field: f"{field}: {m}")


def backward(model, lossfunc, x, y, extensions, factor=1, **kwargs):
    loss = lossfunc(model(x), y)
    with backpack(*extensions):
        (factor * loss).backward(**kwargs)
    return loss


# ---- against the oracle ------------------------------


def test_every_extension_in_one_backward():
    """The cotangent that reaches the loss scales both orders."""
    model, lossfunc, (x, y) = mlp(), nn.CrossEntropyLoss(), vectors()
    oracle = KroneckerOracle(copy.deepcopy(model), lambda f, t: 2 * lossfunc(f, t), x, y, kind="ce")
    oracle.calls  # noqa: B018 (before anything else: it makes the graph anew)
    sampled = [SqrtGGNMC(1), DiagGGNMC(1), BatchDiagGGNMC(1), KFAC(1)]
    products, deterministic = [HMP(), GGNMP(), PCHMP()], [*FIRST, *SECOND]
    backward(extend(model), extend(lossfunc), x, y, [*deterministic, *sampled, *products, KFLR(), Jacobian()], 2)
    same(model, oracle, [*deterministic, Jacobian()])
    params = dict(model.named_parameters())
    columns = oracle.recover({name: p.sqrt_ggn_mc for name, p in params.items()}).columns
    oracle.draws(columns)
    b, a = oracle.factors("0", columns, "backpack")
    close(list(params["0.weight"].kfac), [b, a])
    close(list(params["0.bias"].kflr), [oracle.factors("0", oracle.columns, "backpack")[0]])
    ggn, hessian = oracle.ggn(), oracle.hessian()
    for name, p in params.items():
        torch.testing.assert_close(p.diag_ggn_mc_batch, p.sqrt_ggn_mc.square().sum(0))
        torch.testing.assert_close(p.diag_ggn_mc, p.diag_ggn_mc_batch.sum(0))
        v = torch.randn(2, *p.shape).double()
        torch.testing.assert_close(p.ggnmp(v).flatten(1), v.flatten(1) @ ggn[name])
        torch.testing.assert_close(p.hmp(v[0]).flatten(), hessian[name] @ v[0].flatten())
    last = params["2.weight"]  # nothing curved follows but the loss
    torch.testing.assert_close(last.pchmp(last.detach()), last.ggnmp(last.detach()))


class Quartic(nn.Module):
    def forward(self, f, t):
        return ((f - t) ** 4).sum()


LOSSES = {
    "ce-sum-smooth": (nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1), None, lambda y: y),
    "ce-weighted": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double()), "ce", lambda y: y),
    "mse": (nn.MSELoss(), "mse", one_hot),
    "bce": (nn.BCEWithLogitsLoss(), "bce", one_hot),
    "no-closed-form": (Quartic(), None, one_hot),
}


SLOW = {"ce-sum-smooth", "ce-weighted", "bce"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in LOSSES])
def test_losses(model, name):
    lossfunc, kind, target = LOSSES[name]
    x, y = vectors()
    oracle = Oracle(mlp(), lossfunc, x, target(y), kind=kind)
    extensions = [DiagGGNExact(), DiagHessian(), BatchGrad()]
    backward(model, extend(copy.deepcopy(lossfunc)), x, target(y), extensions)
    same(model, oracle, extensions)


def test_loss_that_is_not_convex(model):
    class Waves(nn.Module):
        def forward(self, f, t):
            return (f - t).sin().square().sum()

    lossfunc, (x, y) = extend(Waves()), vectors()
    oracle = Oracle(mlp(), Waves(), x, one_hot(y))
    extensions = [DiagHessian(), BatchDiagHessian(), HMP()]
    backward(model, lossfunc, x, one_hot(y), extensions)
    same(model, oracle, extensions[:2])
    p = model[0].weight
    torch.testing.assert_close(p.hmp(p.detach()).flatten(), oracle.hessian()["0.weight"] @ p.detach().flatten())
    with pytest.raises(errors.LossError, match="not convex"):
        backward(model, lossfunc, x, one_hot(y), [DiagGGNExact()])


def test_convolutions_in_eval_mode():
    model, (x, y), extensions = cnn().eval(), images(2), [BatchGrad(), DiagGGNExact()]
    oracle = Oracle(copy.deepcopy(model), nn.CrossEntropyLoss(), x, y, kind="ce")
    backward(extend(model), extend(nn.CrossEntropyLoss()), x, y, extensions)
    same(model, oracle, extensions)


def test_logits_behind_a_log_softmax():
    model, (x, y) = nn.Sequential(mlp(), nn.LogSoftmax(1)), vectors()
    with_logits = Oracle(copy.deepcopy(model[0]), nn.CrossEntropyLoss(), x, y, kind="ce")
    backward(extend(model), extend(nn.NLLLoss()), x, y, [DiagGGNExact()])
    same(model[0], with_logits, [DiagGGNExact()])


def test_several_losses_on_one_output(model):
    first, second, (x, y) = nn.CrossEntropyLoss(), nn.MSELoss(), vectors()
    oracle = Oracle(mlp(), lambda f, y: first(f, y) + 3 * second(f, one_hot(y)), x, y)
    f, extensions = model(x), [DiagGGNExact()]
    with backpack(*extensions):
        (extend(first)(f, y) + 3 * extend(second)(f, one_hot(y))).backward()
    same(model, oracle, extensions)


VIEWS = [
    pytest.param(lambda f: f.view(-1, 3), marks=pytest.mark.slow, id="flat"),
    pytest.param(lambda f: f.transpose(1, 2), id="classes-second"),
]


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_the_output(view):
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(5, 2, 4).double(), torch.randint(0, 3, (5, 2))
    y = y.flatten() if view(torch.zeros(5, 2, 3)).ndim == 2 else y
    extensions, lossfunc = [DiagGGNExact(), BatchDiagGGNExact(), BatchGrad()], nn.CrossEntropyLoss()
    oracle = Oracle(copy.deepcopy(model), lambda f, t: lossfunc(view(f), t), x, y)
    loss = extend(lossfunc)(view(extend(model)(x)), y)
    with backpack(*extensions):
        loss.backward()
    same(model, oracle, extensions)


def test_loss_of_several_outputs_and_parameters():
    """What a loss module reads of the model: a structure of outputs, in any argument, and parameters past the output."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.left(x), self.right(x).tanh()

    class Both(nn.Module):
        def forward(self, y, outputs):
            penalty = model.left.weight.square().sum()
            return nn.functional.cross_entropy(outputs[0] + outputs[1], y) + 0.1 * penalty

    torch.manual_seed(0)
    model, (x, y) = Two().double(), vectors()
    oracle = Oracle(model, lambda f, t: Both()(t, f), x, y)
    expected = [oracle.grad(), oracle.diag_ggn_exact(), oracle.diag_h()]
    loss = extend(Both())(y, extend(model)(x))
    with backpack(DiagGGNExact(), DiagHessian()):
        loss.backward()
    for name, p in model.named_parameters():
        close([p.grad, p.diag_ggn_exact, p.diag_h], [field[name] for field in expected])


# ---- programs ------------------------------


def test_batch_sizes_and_losses_share_programs():
    model, extensions = extend(mlp()), [DiagGGNExact()]
    for n in (4, 7, 1, 4):
        x, y = vectors(n)
        model.zero_grad()
        weight = torch.rand(3).double() + 1
        backward(model, extend(nn.CrossEntropyLoss(weight)), x, y, extensions)  # another loss each time
        with disable():
            same(model, Oracle(copy.deepcopy(model), nn.CrossEntropyLoss(weight), x, y, kind="ce"), extensions)
    forwards = vars(_parts[model]._programs.named).values()
    endings = [vars(parts._programs.named) for forward in forwards for parts in forward.with_loss.values()]
    assert list(map(len, endings)) == [1, 1]  # one sample has its own


class Transformed(nn.Module):
    """Resamples its images on grids of its own: an op whose derivative is traced at batch sizes that are numbers only."""

    def __init__(self):
        super().__init__()
        self.grid, self.head = nn.Linear(4, 6), nn.Linear(4, 3)

    def forward(self, x):
        grid = F.affine_grid(torch.tanh(self.grid(x)).unflatten(1, (2, 3)), (x.shape[0], 1, 2, 2), align_corners=False)
        return self.head(F.grid_sample(x.unflatten(1, (1, 2, 2)), grid, align_corners=False).flatten(1))


def test_an_op_that_needs_numbers_for_sizes():
    """With the output's gradient alone, with the loss, and at one sample; each batch size has backward parts of its own."""
    torch.manual_seed(0)
    model, lossfunc = extend(Transformed().double()), nn.CrossEntropyLoss()
    for n in (4, 7, 4, 1):
        x, y = torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))
        for extensions in ([BatchGrad()], [BatchGrad(), DiagGGNExact()]):
            model.zero_grad()
            backward(model, extend(copy.deepcopy(lossfunc)), x, y, extensions)
            with disable():
                same(model, Oracle(copy.deepcopy(model), lossfunc, x, y, kind="ce"), extensions)


class Counted(TorchDispatchMode):
    """How often each op runs."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] = self.counts.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def test_one_forward_and_one_backward():
    """The forward part runs once, the backward part does not run it again, and the gradient is a part of it."""
    model, lossfunc, (x, y) = extend(mlp(nn.Softplus)), extend(nn.CrossEntropyLoss()), vectors()
    extensions = [BatchGrad(), DiagGGNExact()]
    backward(model, lossfunc, x, y, extensions)
    with Counted() as counted:
        loss = lossfunc(model(x), y)
        assert counted.counts[torch.ops.aten.softplus.default] == 1
        with backpack(*extensions):
            loss.backward()
    assert counted.counts[torch.ops.aten.softplus.default] == 1
    assert counted.counts.get(torch.ops.aten.softplus_backward.default, 0) <= 1


def test_dropout_is_drawn_once():
    plain, (x, y) = cnn().train(), images()
    model, lossfunc = extend(copy.deepcopy(plain)), extend(nn.CrossEntropyLoss())
    torch.manual_seed(7)
    nn.CrossEntropyLoss()(plain(x), y).backward()
    state = torch.get_rng_state()
    torch.manual_seed(7)
    loss = lossfunc(model(x), y)
    assert torch.equal(torch.get_rng_state(), state)
    with backpack(BatchGrad(), DiagGGNExact()):
        loss.backward(retain_graph=True)
    with backpack(Variance()):
        again = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    assert torch.equal(torch.get_rng_state(), state)
    for p, q, g in zip(plain.parameters(), model.parameters(), again, strict=True):
        torch.testing.assert_close(q.grad, p.grad)
        torch.testing.assert_close(g.detach(), p.grad)
        torch.testing.assert_close(q.grad_batch.sum(0), p.grad)
        torch.testing.assert_close(q.variance.detach(), q.grad_batch.var(0, correction=0))
    assert (model[5].weight.diag_ggn_exact == 0).any()


def test_running_statistics_are_updated_once():
    plain = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    model, (x, y) = extend(copy.deepcopy(plain)), vectors()
    nn.CrossEntropyLoss()(plain(x), y).backward()
    loss = nn.CrossEntropyLoss()(model(x), y)
    loss.backward(retain_graph=True)
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for p, q, g in zip(plain.parameters(), model.parameters(), gradients, strict=True):
        torch.testing.assert_close(q.grad, p.grad)
        torch.testing.assert_close(g.detach(), p.grad)
    with pytest.raises(errors.MixedSamplesError), backpack(BatchGrad()):
        nn.CrossEntropyLoss()(model(x), y).backward()


def test_frozen_parameters_and_gradient_accumulation():
    model, (x, y) = mlp(), vectors()
    model[0].requires_grad_(False)
    oracle = Oracle(copy.deepcopy(model), nn.CrossEntropyLoss(), x, y, kind="ce")
    extend(model)
    for _ in range(2):
        backward(model, nn.CrossEntropyLoss(), x, y, [BatchGrad()])
    assert model[0].weight.grad is None and not hasattr(model[0].weight, "grad_batch")
    torch.testing.assert_close(model[2].weight.grad, 2 * oracle.grad()["2.weight"])
    torch.testing.assert_close(model[2].weight.grad_batch, oracle.grad_batch()["2.weight"])
    model[0].requires_grad_(True)
    backward(model, extend(nn.CrossEntropyLoss()), x, y, [BatchGrad()])
    assert model[0].weight.grad_batch.shape == (6, 4, 5)


def test_moved_after_extend():
    model, (x, y) = extend(mlp().float()), vectors()
    backward(model, extend(nn.CrossEntropyLoss()), x.float(), y, [BatchGrad()])
    assert model[0].weight.grad_batch.dtype == torch.float32
    model.zero_grad()
    backward(model.double(), extend(nn.CrossEntropyLoss()), x, y, [BatchGrad()])
    oracle = Oracle(mlp().float().double(), nn.CrossEntropyLoss(), x, y)
    same(model, oracle, [BatchGrad()])


# ---- what the first order takes ------------------------------


def test_scalars_of_the_output(model):
    """[N, C, *param] of a column c is that column's individual gradient; no extended loss."""
    x, _ = vectors()
    jacobian = Oracle(mlp(), lambda f: f.sum(), x).jacobian()
    f = model(x)
    for c in range(3):
        with backpack(BatchGrad(), retain_graph=True):
            f[:, c].sum().backward(retain_graph=True)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad_batch, jacobian[name][:, c])


def test_several_outputs():
    """Any structure of tensors; a loss may read one of them."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.left, self.right = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x):
            h = self.body(x).tanh()
            return {"left": self.left(h), "others": (self.right(h), h.argmax(1))}

    torch.manual_seed(0)
    model, (x, y), lossfunc = Two().double(), vectors(), nn.CrossEntropyLoss()
    plain = copy.deepcopy(model)
    out = extend(model)(x)
    assert set(out) == {"left", "others"} and not out["others"][1].requires_grad
    with backpack(BatchGrad()):
        (extend(lossfunc)(out["left"], y) + out["others"][0].square().sum()).backward()
    same(model, Oracle(plain, lambda o, t: lossfunc(o["left"], t) + o["others"][0].square().sum(), x, y), [BatchGrad()])
    model.zero_grad()
    loss = extend(lossfunc)(model(x)["left"], y)
    with backpack(DiagGGNExact()):
        loss.backward()
    same(model, Oracle(plain, lambda o, t: lossfunc(o["left"], t), x, y, kind="ce"), [DiagGGNExact()])
    out = model(x)
    loss = extend(lossfunc)(out["left"], y) + out["others"][0].sum()
    with pytest.raises(errors.LossError, match="another way"), backpack(DiagGGNExact()):
        loss.backward()


def test_inputs_that_require_grad():
    """An extended part behind another one, and the gradient of an input."""
    whole, (x, y), lossfunc = mlp(), vectors(), extend(nn.CrossEntropyLoss())
    oracle = Oracle(copy.deepcopy(whole), nn.CrossEntropyLoss(), x, y, kind="ce")
    x.requires_grad_()
    (expected,) = torch.autograd.grad(nn.CrossEntropyLoss()(whole(x), y), x)
    body, head = extend(nn.Sequential(whole[0], whole[1])), extend(whole[2])
    loss = lossfunc(head(body(x)), y)
    with backpack(BatchGrad()):
        loss.backward()
    same(whole, oracle, [BatchGrad()])
    torch.testing.assert_close(x.grad, expected)
    whole.zero_grad()
    loss = lossfunc(head(body(x.detach())), y)
    with backpack(DiagGGNExact()):
        loss.backward()
    same(whole, oracle, [DiagGGNExact()])


def test_second_order_needs_the_whole_loss(model):
    lossfunc, (x, y) = extend(nn.CrossEntropyLoss()), vectors()
    for loss in (
        lambda f: lossfunc(2 * f, y),
        lambda f: lossfunc(f.flip(0), y),
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


# ---- refusals, hooks, copies ------------------------------


def test_what_is_refused_by_name(model):
    lossfunc, (x, y) = extend(nn.CrossEntropyLoss()), vectors()
    with pytest.raises(errors.ExtensionError, match="class"):
        backpack(BatchGrad)
    with pytest.raises(errors.ExtensionError, match="both save"):
        backpack(BatchGrad(), BatchGrad())
    with pytest.raises(errors.ArgumentError):
        extend(torch.relu)
    with pytest.raises(errors.LossError, match="no extended loss"), backpack(GGNMP()):
        model(x).sum().backward()
    with pytest.raises(errors.LossError, match="not convex"):
        backward(model, lossfunc, x, y, [DiagGGNExact()], factor=-1)

    class Noisy(nn.Module):
        def forward(self, f, t):
            return (f - t + 1e-9 * torch.nn.functional.dropout(f)).square().sum()

    with pytest.raises(errors.LossError, match="random"):
        backward(model, extend(Noisy()), x, one_hot(y), [DiagGGNExact()])
    with pytest.raises(errors.ExtensionError, match="create_graph"), backpack(PCHMP()):
        torch.autograd.grad(lossfunc(model(x), y), list(model.parameters()), create_graph=True)


def test_hook_and_plain_modules(model):
    lossfunc, (x, y) = extend(nn.CrossEntropyLoss()), vectors()
    seen = []

    def hook(module):
        seen.append((type(module).__name__, [p.grad_batch.shape[0] for p in module.parameters()]))
        for p in module.parameters():
            del p.grad_batch

    loss = lossfunc(model(x), y)
    with backpack(BatchGrad(), extension_hook=hook):
        loss.backward()
    assert seen == [("CrossEntropyLoss", []), ("Linear", [6, 6]), ("Sigmoid", []), ("Linear", [6, 6])]
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())
    with torch.no_grad():
        assert model(x).grad_fn is None
    with disable():
        assert model(x).grad_fn.name() == "AddmmBackward0"
    assert isinstance(model, nn.Sequential) and repr(model) == repr(mlp())


@pytest.mark.parametrize("before", [True, False])
def test_hooks_on_the_extended_model_run_once(before):
    """They run where the model is called, so they are no part of its programs."""
    model, plain, (x, y) = mlp(), mlp(), vectors()
    if before:
        model.register_forward_pre_hook(lambda module, args: (3 * args[0],))
        run, extensions = lambda x: plain(3 * x), [BatchGrad(), DiagGGNExact()]
    else:
        model.register_forward_hook(lambda module, args, out: out.sin())
        run, extensions = lambda x: plain(x).sin(), [BatchGrad()]
    backward(extend(model), extend(nn.CrossEntropyLoss()), x, y, extensions)
    params = list(plain.parameters())
    each = [
        torch.autograd.grad(F.cross_entropy(run(a[None]), b[None]) / len(x), params) for a, b in zip(x, y, strict=True)
    ]
    for p, rows in zip(model.parameters(), zip(*each, strict=True), strict=True):
        close([p.grad, p.grad_batch], [sum(rows), torch.stack(rows)])
    if before:
        oracle = Oracle(mlp(), nn.CrossEntropyLoss(), 3 * x, y, kind="ce").diag_ggn_exact()
        close([p.diag_ggn_exact for p in model.parameters()], list(oracle.values()))


def test_copies_are_extended_and_free_themselves():
    model, (x, y) = extend(mlp()), vectors()
    backward(model, nn.CrossEntropyLoss(), x, y, [BatchGrad()])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.zero_grad()
        backward(other, nn.CrossEntropyLoss(), x, y, [BatchGrad()])
        torch.testing.assert_close(other[0].weight.grad_batch.sum(0), model[0].weight.grad)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_changed_parameters_are_noticed(model):
    x, y = vectors()
    loss = extend(nn.CrossEntropyLoss())(model(x), y)
    with backpack(GGNMP()):
        loss.backward(retain_graph=True)
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()
    p = model[0].weight
    with pytest.raises(errors.ArgumentError, match="changed in place"):
        p.ggnmp(p.detach())
