"""Models that compute their loss themselves: f is what the loss op inside reads, or the Gauss-Newton is refused by name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError, LossError, MixedSamplesError
from fxcurv.extensions import (
    GGNMP,
    HMP,
    KFAC,
    BatchGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    Jacobian,
    SqrtGGNExact,
    SqrtGGNMC,
    Variance,
)

N, T, C = 3, 5, 7
GGN = [DiagGGNExact(), DiagGGNMC(), SqrtGGNExact(), SqrtGGNMC(), KFAC(), GGNMP()]


@dataclass
class Output:
    """As models of Hugging Face return it."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class Net(nn.Module):
    """A small model, whose `forward` is a function of its body's output and the labels."""

    def __init__(self, body: nn.Module, finish):
        super().__init__()
        self.body, self.finish = body, finish

    def forward(self, x, labels=None):
        return self.finish(self.body(x), labels)


def tokens():
    return nn.Sequential(nn.Embedding(C, 4), nn.Tanh(), nn.Linear(4, C)).double()


def dense(out=3):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, out)).double()


def shifted(z, y):
    return F.cross_entropy(z[..., :-1, :].contiguous().view(-1, C), y[..., 1:].reshape(-1), ignore_index=2)


def nll(z, y):
    return F.nll_loss(F.log_softmax(z, -1), y)


def likelihood(z, y):
    return F.binary_cross_entropy(torch.sigmoid(z), y)


def two(z, y):
    return F.mse_loss(z, y) + 0.5 * F.binary_cross_entropy_with_logits(z, torch.sigmoid(y))


def huber(z, y):
    return F.smooth_l1_loss(z, y)


# (body, loss, labels, what of the output is the loss): the model returns the loss, the oracle has it past the logits
CASES = {
    "shifted cross-entropy": (tokens, shifted, "tokens", lambda out: out.loss),
    "scaled by the user": (dense, F.cross_entropy, "classes", lambda out: 3 * out.loss / 2),
    "mse": (dense, F.mse_loss, "numbers", lambda out: out.loss),
    "nll": (dense, nll, "classes", lambda out: out.loss),
    "bce of a sigmoid": (dense, likelihood, "shares", lambda out: out.loss),
    "two loss ops": (dense, two, "numbers", lambda out: out.loss),
    "loss op without a rule": (dense, huber, "numbers", lambda out: out.loss),
    "reduced by the user": (dense, lambda z, y: F.cross_entropy(z, y, reduction="none"), "classes", lambda out: out.loss.mean()),
}  # fmt: skip


def batch(kind):
    torch.manual_seed(1)
    if kind == "tokens":
        ids = torch.randint(0, C, (N, T))
        return ids, ids.clone()
    x = torch.randn(N, 4).double()
    numbers, shares = torch.randn(N, 3).double(), torch.rand(N, 3).double()
    return x, {"classes": torch.randint(0, 3, (N,)), "numbers": numbers, "shares": shares}[kind]


def built(name, returns):
    body, loss, kind, read = CASES[name]
    torch.manual_seed(0)
    model = Net(body(), lambda z, y: Output(loss(z, y), z) if returns == "both" else Output(loss(z, y)))
    x, y = batch(kind)
    outside = lambda z, t: read(Output(loss(z, t)))  # noqa: E731
    return model, read, x, y, Oracle(model.body, outside, x, y)


def close(actual, expected):
    assert {f"body.{name}" for name in expected} == set(actual)
    for name, value in expected.items():
        torch.testing.assert_close(actual[f"body.{name}"], value, rtol=1e-7, atol=1e-10)


def few(table, *default):
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in table]


@pytest.mark.parametrize("returns", few(["both", "loss alone"], "both"))
@pytest.mark.parametrize("name", few(CASES, "shifted cross-entropy", "nll", "two loss ops", "reduced by the user"))
def test_f_is_what_the_loss_op_reads(name, returns):
    model, read, x, y, oracle = built(name, returns)
    convex = [DiagGGNExact(), BatchGrad(), GGNMP(), SqrtGGNExact()]
    compiled = fxcurv.compile(model, read, [*convex, DiagHessian()], debug=True)
    result = compiled((x, y), seed=0)
    torch.testing.assert_close(result.loss, oracle.loss())
    close(result.diag_ggn_exact, oracle.diag_ggn_exact())
    close(result.grad_batch, oracle.grad_batch())
    close(result.diag_h, oracle.diag_h())
    for key, product in result.ggnmp.items():
        shape = result.grad[key].shape
        units = torch.eye(shape.numel()).double().reshape(-1, *shape)
        found = product(units).flatten(1).diagonal().reshape(shape)
        torch.testing.assert_close(found, oracle.diag_ggn_exact()[key.removeprefix("body.")], rtol=1e-7, atol=1e-10)
        roots = result.sqrt_ggn_exact[key]
        torch.testing.assert_close(roots.square().sum((0, 1)), found, rtol=1e-7, atol=1e-10)
    text = str(compiled.explain((x, y)))
    assert "the model's own loss reads" in text and "op aten." in text


def test_sampled_and_factored_are_those_of_the_loss_outside():
    model, read, x, y, _ = built("shifted cross-entropy", "both")
    own = fxcurv.compile(model, read, [KFAC(), SqrtGGNMC(mc_samples=2)])((x, y), seed=3)
    other = fxcurv.compile(model.body, shifted, [KFAC(), SqrtGGNMC(mc_samples=2)])(x, y, seed=3)
    for name, expected in other.kfac.items():
        for a, b in zip(own.kfac[f"body.{name}"], expected, strict=True):
            torch.testing.assert_close(a, b)
    close(own.sqrt_ggn_mc, other.sqrt_ggn_mc)


def test_f_is_the_output_that_the_user_knows():
    """The logits that are returned, not the ones that were shifted and flattened for the loss."""
    model, read, x, y, _ = built("shifted cross-entropy", "both")
    result = fxcurv.compile(model, read, [Jacobian()])((x, y))
    assert result.jacobian["body.2.bias"].shape == (N, T, C, C)


def test_a_regulariser_in_the_model_is_not_of_f():
    torch.manual_seed(0)
    model = Net(dense(), None)
    model.finish = lambda z, y: Output(
        F.cross_entropy(z, y) + 0.1 * sum(p.square().sum() for p in model.body.parameters())
    )
    x, y = batch("classes")
    result = fxcurv.compile(model, lambda out: out.loss, [DiagGGNExact(), DiagHessian(), BatchGrad()])((x, y))
    oracle = Oracle(model.body, F.cross_entropy, x, y)
    close(result.diag_ggn_exact, oracle.diag_ggn_exact())
    close(result.grad_batch, oracle.grad_batch())
    close(result.diag_h, {name: value + 0.2 for name, value in oracle.diag_h().items()})


HIDDEN = {
    "squares by hand": lambda z, y: (z - y).square().mean(),
    "a norm": lambda z, y: (z - y).norm(),
    "a term beside the loss op": lambda z, y: F.mse_loss(z, y) + z.exp().mean(),
    "a non-linear function of the loss": lambda z, y: F.mse_loss(z, y).exp(),
}


@pytest.mark.parametrize("extension", GGN, ids=lambda e: type(e).__name__)
def test_a_loss_without_a_loss_op_is_refused(extension):
    check_hidden("squares by hand", extension)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_number_hides_is_refused(name):
    check_hidden(name, DiagGGNExact())


def check_hidden(name, extension):
    model = Net(dense(), lambda z, y: Output(HIDDEN[name](z, y), z))
    x, y = batch("numbers")
    with pytest.raises(LossError, match="split=") as error:
        fxcurv.compile(model, lambda out: out.loss, [extension])((x, y), seed=0)
    assert "op aten." in str(error.value) and __file__ in str(error.value)


@pytest.mark.parametrize("name", few(HIDDEN, "a term beside the loss op"))
def test_what_a_number_hides_has_a_hessian(name):
    """The Hessian does not ask where the model ends."""
    model = Net(dense(), lambda z, y: Output(HIDDEN[name](z, y), z))
    x, y = batch("numbers")
    result = fxcurv.compile(model, lambda out: out.loss, [DiagHessian(), HMP()])((x, y))
    for key, product in result.hmp.items():
        shape = result.grad[key].shape

        def loss(p, key=key):
            return torch.func.functional_call(model, {key: p}, (x, y)).loss

        param = dict(model.named_parameters())[key].detach()
        expected = torch.autograd.functional.hessian(loss, param).reshape(shape.numel(), -1).diagonal().reshape(shape)
        torch.testing.assert_close(result.diag_h[key], expected, rtol=1e-7, atol=1e-10)
        found = product(torch.eye(shape.numel()).double().reshape(-1, *shape)).flatten(1).diagonal()
        torch.testing.assert_close(found.reshape(shape), expected, rtol=1e-7, atol=1e-10)


def test_split_is_the_way_out():
    model = Net(dense(), lambda z, y: Output(HIDDEN["squares by hand"](z, y), z))
    x, y = batch("numbers")
    result = fxcurv.compile(model, lambda out: out.loss, [DiagGGNExact(), BatchGrad()], split="body")((x, y))
    oracle = Oracle(model.body, F.mse_loss, x, y)
    close(result.diag_ggn_exact, oracle.diag_ggn_exact())
    close(result.grad_batch, oracle.grad_batch())


def test_a_loss_op_that_is_no_loss_of_the_model():
    """Distances to prototypes are logits here: the user's loss is not linear in them, so the model ends at its output."""

    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.means = dense(), nn.Parameter(torch.randn(6, 3).double())

        def forward(self, x):
            z = self.body(x)
            each = F.mse_loss(z.unsqueeze(1).expand(-1, 6, -1), self.means.expand(x.shape[0], -1, -1), reduction="none")
            return -each.sum(-1)

    torch.manual_seed(0)
    model, x, y = Prototypes(), torch.randn(N, 4).double(), torch.randint(0, 6, (N,))
    compiled = fxcurv.compile(model, F.cross_entropy, [DiagGGNExact(), BatchGrad()])
    result, oracle = compiled(x, y), Oracle(model, F.cross_entropy, x, y)
    for field in ("diag_ggn_exact", "grad_batch"):
        for name, value in getattr(oracle, field)().items():
            torch.testing.assert_close(getattr(result, field)[name], value, rtol=1e-7, atol=1e-10)
    assert compiled.explain(x, y).output == ""


def test_both_sides_of_a_loss_op_are_f():
    """A target that is learned as well, as of two views: the Gauss-Newton is that in both."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = dense(2), dense(2)

        def forward(self, x):
            return F.mse_loss(self.a(x), self.b(-x))

    torch.manual_seed(0)
    model, x = Views(), torch.randn(N, 4).double()
    result = fxcurv.compile(model, lambda loss: loss, [DiagGGNExact(), BatchGrad()])(x)

    class Apart(Views):
        def forward(self, x):
            return self.a(x), self.b(-x)

    apart = Apart()
    apart.load_state_dict(model.state_dict())
    oracle = Oracle(apart, lambda f: F.mse_loss(*f), x, None)
    for field in ("diag_ggn_exact", "grad_batch"):
        for name, value in getattr(oracle, field)().items():
            torch.testing.assert_close(getattr(result, field)[name], value, rtol=1e-7, atol=1e-10)


def test_a_critic_that_returns_its_mean():
    """Of a layer's output the loss is linear: every Gauss-Newton is zero, and individual gradients exist."""
    torch.manual_seed(0)
    model, x = Net(dense(1), lambda z, y: z.mean()), torch.randn(N, 4).double()
    compiled = fxcurv.compile(model, lambda loss: -loss, [DiagGGNExact(), SqrtGGNExact(), BatchGrad(), DiagHessian()])
    result, oracle = compiled(x), Oracle(model.body, lambda z: -z.mean(), x, None)
    close(result.grad_batch, oracle.grad_batch())
    close(result.diag_h, oracle.diag_h())
    for name, value in result.diag_ggn_exact.items():
        assert not value.any() and result.sqrt_ggn_exact[name].shape == (1, N, *value.shape)
    assert "linear" in compiled.explain(x).output


def test_the_drop_in_refuses_a_models_own_loss():
    from fxcurv.backpack import backpack, extend
    from fxcurv.backpack import extensions as dropped

    model, (x, y) = extend(Net(dense(), lambda z, y: F.mse_loss(z, y))), batch("numbers")
    with backpack(dropped.DiagGGNExact()), pytest.raises(FxcurvError):
        model(x, y).backward()


class Policy(nn.Module):
    """Returns the deviation that it has for all states, as actors of public reinforcement learning do."""

    def __init__(self, *shape):
        super().__init__()
        self.mean, self.log_std = nn.Linear(3, 2), nn.Parameter(torch.zeros(*shape, 2))

    def forward(self, x):
        return self.mean(x), self.log_std


def likelihood(output, action):
    return -torch.distributions.Normal(output[0], output[1].exp()).log_prob(action).sum(-1).mean()


RETURNED = [[BatchGrad()], [Variance()], [BatchGrad(), HMP()], [BatchGrad(), DiagHessian()]]


@pytest.mark.parametrize("shape", [(), pytest.param((1,), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "extensions", [RETURNED[0], *(pytest.param(extensions, marks=pytest.mark.slow) for extensions in RETURNED[1:])]
)
def test_a_parameter_that_the_model_returns(shape, extensions):
    """Individual gradients and the Hessian do not depend on where the model ends; the Gauss-Newton does, and is refused."""
    torch.manual_seed(0)
    model, x, action = Policy(*shape).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    found = fxcurv.compile(model, likelihood, extensions)(x, action)
    parameters = dict(model.named_parameters())
    alone = [
        torch.autograd.grad(likelihood(model(x[k : k + 1]), action[k : k + 1]) / 4, [*parameters.values()])
        for k in range(4)
    ]
    for i, (name, p) in enumerate(parameters.items()):
        each = torch.stack([g[i] for g in alone])
        for e in extensions:
            if isinstance(e, BatchGrad):
                torch.testing.assert_close(found.grad_batch[name], each)
            elif isinstance(e, Variance):
                torch.testing.assert_close(found.variance[name], each.var(0, correction=0))
            else:
                (g,) = torch.autograd.grad(likelihood(model(x), action), p, create_graph=True)
                rows = [torch.autograd.grad(v, p, retain_graph=True)[0].flatten() for v in g.flatten()]
                hessian = torch.stack(rows)
                if isinstance(e, DiagHessian):
                    torch.testing.assert_close(found.diag_h[name].flatten(), hessian.diag())
                else:
                    torch.testing.assert_close(found.hmp[name](torch.ones_like(p)).flatten(), hessian.sum(1))
    with pytest.raises((MixedSamplesError, LossError)):
        fxcurv.compile(model, likelihood, [DiagGGNExact()])(x, action)
