"""Models and losses that take derivatives themselves: physics-informed nets, gradient penalties, forces, `torch.func`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net, param
from situations import Situation, numbers, parametrized, together
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fxcurv
from fxcurv.errors import CaptureError, CustomFunctionError, LossError
from fxcurv.extensions import HMP, BatchGrad, DiagGGNExact

MSE, grad = nn.MSELoss(), torch.autograd.grad
ALL = "first ggn hessian products"


@dataclass(frozen=True)
class Inside(Situation):
    """A row that is of no thread in particular."""

    def __post_init__(self) -> None:
        pass


def field(act: nn.Module | None = None, inputs: int = 2, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 4), act or nn.Tanh(), nn.Linear(4, outputs))


# ---- torch.autograd.grad ------------------------------


def burgers(m: Any, x: Tensor) -> Tensor:
    """u_t + u u_x - nu u_xx at points (x, t), and u."""
    x.requires_grad_(True)
    u = m.net(x)
    first = grad(u, x, grad_outputs=torch.ones_like(u), create_graph=True)[0]
    second = grad(first[:, 0].sum(), x, create_graph=True)[0]
    return torch.cat([first[:, 1:] + u * first[:, :1] - 0.1 * second[:, :1], u], 1)


def burgers_by_columns(m: Any, x: Tensor, t: Tensor) -> Tensor:
    """The same where the coordinates are inputs of their own."""
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    u = m.net(torch.cat([x, t], 1))
    u_t, u_x = grad(u.sum(), (t, x), create_graph=True)
    (u_xx,) = grad(u_x.sum(), x, create_graph=True)
    return u_t + u * u_x - m.viscosity.exp() * u_xx


def critic(m: Any, real: Tensor, fake: Tensor, mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """WGAN-GP: scores, and the norm of the critic's gradient at a point between."""
    between = (mix * real + (1 - mix) * fake).requires_grad_(True)
    score = m.net(between)
    (g,) = grad(score, between, torch.ones_like(score), create_graph=True, retain_graph=True, only_inputs=True)
    return m.net(real), m.net(fake), g.flatten(1).norm(dim=1)


def wgan(out: tuple[Tensor, ...]) -> Tensor:
    real, fake, norm = out
    return fake.mean() - real.mean() + 10 * ((norm - 1) ** 2).mean()


def scores_and_point(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    point = x.detach().clone().requires_grad_()
    return m.net(point), point


def penalised(out: tuple[Tensor, Tensor]) -> Tensor:
    """The derivative is taken in the loss, of one output in another."""
    score, point = out
    (g,) = grad(score.sum(), point, create_graph=True)
    return score.mean() + (g.square().sum(1) - 1).square().mean()


def forces(m: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Energy and forces of three atoms; the derivative is differentiable under training only."""
    with torch.enable_grad():
        positions.requires_grad_(True)
        distance = (positions[:, :, None] - positions[:, None]).square().sum(-1).add(1).sqrt()
        energy = m.net(distance.flatten(1)).squeeze(1)
        (g,) = grad([energy.sum()], [positions], create_graph=m.training, retain_graph=True)
    return energy, -g


def energy_and_forces(out: tuple[Tensor, Tensor]) -> Tensor:
    return out[0].square().mean() + out[1].square().mean()


def hamiltonian(m: Any, z: Tensor) -> Tensor:
    q, p = (part.requires_grad_() for part in z.chunk(2, 1))
    h = m.net(torch.cat([q, p], 1)).sum()
    dq, dp = grad(h, [q, p], create_graph=True)
    return torch.cat([dp, -dq], 1)


def adversarial(m: Any, x: Tensor) -> Tensor:
    """The step is a constant: no graph is made for it."""
    x = x.requires_grad_()
    (g,) = grad(m.net(x).square().sum(), x)
    assert not g.requires_grad
    return m.net(x + 0.1 * torch.tanh(g))


def contractive(m: Any, x: Tensor) -> Tensor:
    """The Jacobian by rows, the unused argument included."""
    x = x.requires_grad_()
    y = m.net(x)
    rows = [grad(y[:, k].sum(), [x, m.unused], create_graph=True, allow_unused=True) for k in range(y.shape[1])]
    assert all(r[1] is None for r in rows)
    return torch.stack([r[0] for r in rows], 1).flatten(1)


def batched(m: Any, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    y = m.net(x)
    basis = torch.eye(y.shape[1], dtype=y.dtype)[:, None].expand(-1, *y.shape)
    (rows,) = grad(y, x, basis, create_graph=True, is_grads_batched=True)
    return rows.transpose(0, 1).flatten(1)


def functional(m: Any, x: Tensor) -> Tensor:
    total = lambda z: m.net(z).square().sum()  # noqa: E731
    product = torch.autograd.functional.jvp(m.net, x, torch.ones_like(x), create_graph=True)[1]
    return torch.cat([torch.autograd.functional.jacobian(total, x, create_graph=True), product], 1)


def images(m: Any, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    score = m.head(F.max_pool2d(F.elu(m.norm(m.conv(x))), 2).flatten(1))
    return grad(score.sum(), x, create_graph=True)[0].flatten(1).square().sum(1, keepdim=True) + score


def attention(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x.requires_grad_())
    q, k, v = m.mix(h).chunk(3, -1)
    y = F.scaled_dot_product_attention(q, k, v).mean(1)
    return grad(y.sum(), x, create_graph=True)[0].mean(1)


def dropped(m: Any, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    y = m.out(F.dropout(torch.tanh(m.net(x)), 0.5, m.training))
    return grad(y.sum(), x, create_graph=True)[0] + y


def inner_step(m: Any, x: Tensor) -> Tensor:
    """A step down the model's own gradient in its parameters, then the output there: samples interact."""
    (g,) = grad((x @ m.weight).tanh().square().mean(), m.weight, create_graph=True)
    return (x @ (m.weight - 0.5 * g)).tanh()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Cube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0] ** 2


class Kept(torch.autograd.Function):
    """Keeps a value that is neither an input nor an output: PyTorch does not know that its backward depends on the input."""

    @staticmethod
    def forward(ctx, x):
        ctx.exp = x.exp()
        return ctx.exp + 1

    @staticmethod
    def backward(ctx, g):
        return g * ctx.exp


def custom(m: Any, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    y = Cube.apply(Square.apply(m.net(x)))
    return grad(y.sum(), x, create_graph=True)[0] + y


# ---- torch.func ------------------------------


def vmapped(m: Any, x: Tensor) -> Tensor:
    u = lambda z: m.net(z).squeeze()  # noqa: E731
    first = torch.func.vmap(torch.func.grad(u))(x)
    second = torch.func.vmap(torch.func.hessian(u))(x)
    return torch.cat([first, second.diagonal(dim1=1, dim2=2)], 1)


def jacobians(m: Any, x: Tensor) -> Tensor:
    return torch.cat([torch.vmap(torch.func.jacrev(m.net))(x), torch.vmap(torch.func.jacfwd(m.net))(x)], 1).flatten(1)


def products(m: Any, x: Tensor) -> Tensor:
    y, tangent = torch.func.jvp(m.net, (x,), (torch.ones_like(x),))
    again, pull = torch.func.vjp(m.net, x)
    return torch.cat([y * again, tangent, pull(torch.sin(again))[0]], 1)


def laplacian(m: Any, x: Tensor) -> Tensor:
    """A divergence by a random direction: a jvp of a gradient, with the value beside it."""
    u = lambda z: (m.net(z).sum(), z.square())  # noqa: E731
    g, aux = torch.func.grad(u, has_aux=True)(x)
    value, _ = torch.func.grad_and_value(lambda z: m.net(z).sum())(x)
    return torch.func.jvp(torch.func.grad(lambda z: m.net(z).sum()), (x,), (g,))[1] + aux * value


def called(m: Any, x: Tensor) -> Tensor:
    """Parameters that are computed, and a checkpoint that is differentiated."""
    halves = {name: p / 2 for name, p in m.net.named_parameters()}
    y = checkpoint(m.net, x.requires_grad_(), use_reentrant=False)
    return torch.func.functional_call(m.net, halves, (x,)) * grad(y.sum(), x, create_graph=True)[0]


def adapted(m: Any, x: Tensor) -> Tensor:
    """MAML: one step of the inner loop, by `functional_call`."""
    params = dict(m.net.named_parameters())
    inner = lambda p: torch.func.functional_call(m.net, p, (x,)).square().mean()  # noqa: E731
    step = torch.func.grad(inner)(params)
    return torch.func.functional_call(m.net, {k: p - 0.3 * step[k] for k, p in params.items()}, (x,))


def ensemble(m: Any, x: Tensor) -> Tensor:
    """Stacked parameters under vmap."""
    one = lambda w, b: torch.tanh(x @ w + b)  # noqa: E731
    return torch.vmap(one)(m.w, m.b).mean(0)


ROWS = {
    "burgers": Inside("", lambda: Net(burgers, net=field()), MSE, numbers(2), numbers(2), ALL),
    "burgers, by columns": Inside(
        "", lambda: Net(burgers_by_columns, net=field(nn.Softplus()), viscosity=param(1)), MSE,
        together(numbers(1), numbers(1)), numbers(1), ALL,
    ),
    "WGAN-GP": Inside(
        "", lambda: Net(critic, net=field(nn.LeakyReLU(0.2))), wgan, together(numbers(2), numbers(2), numbers(1)), None,
        ALL,
    ),
    "WGAN-GP, smooth": Inside(
        "", lambda: Net(critic, net=field(nn.SiLU())), wgan, together(numbers(2), numbers(2), numbers(1)), None, ALL,
    ),
    "forces": Inside(
        "", lambda: Net(forces, net=field(nn.SiLU(), 9)), energy_and_forces, numbers(3, 3), None, ALL, trains=True,
    ),
    "forces, as numbers": Inside(
        "", lambda: Net(forces, net=field(nn.SiLU(), 9)), energy_and_forces, numbers(3, 3), None, ALL,
    ),
    "a Hamiltonian": Inside(
        "", lambda: Net(hamiltonian, net=field(inputs=4)), MSE, numbers(4), numbers(4), "first ggn", quick=True
    ),
    "an adversarial step": Inside("", lambda: Net(adversarial, net=field()), MSE, numbers(2), numbers(1), ALL),
    "a contractive penalty": Inside(
        "", lambda: Net(contractive, net=field(nn.Sigmoid(), 2, 3), unused=param(2)), MSE, numbers(2), numbers(6), "first ggn"
    ),
    "batched cotangents": Inside(
        "", lambda: Net(batched, net=field(outputs=3)), MSE, numbers(2), numbers(6), "first ggn hessian",
    ),
    "torch.autograd.functional": Inside(
        "", lambda: Net(functional, net=field()), MSE, numbers(2), numbers(3), "first ggn hessian",
    ),
    "images": Inside(
        "", lambda: Net(images, conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2), head=nn.Linear(8, 1)), MSE, numbers(1, 6, 6),
        numbers(1), "first ggn hessian",
    ),
    "attention": Inside(
        "", lambda: Net(attention, norm=nn.LayerNorm(2), mix=nn.Linear(2, 6)), MSE, numbers(3, 2), numbers(2), "first ggn"
    ),
    "dropout": Inside(
        "", lambda: Net(dropped, net=nn.Linear(2, 4), out=nn.Linear(4, 1)), MSE, numbers(2), numbers(2), "first ggn hessian",
        trains=True,
    ),
    "custom functions": Inside("", lambda: Net(custom, net=field()), MSE, numbers(2), numbers(2), "first ggn hessian"),
    "an inner step": Inside("", lambda: Net(inner_step, weight=param(2, 2)), MSE, numbers(2), numbers(2), "grad"),
    "vmap of grad and hessian": Inside(
        "", lambda: Net(vmapped, net=field()), MSE, numbers(2), numbers(4), ALL,
    ),
    "jacrev and jacfwd": Inside(
        "", lambda: Net(jacobians, net=field(outputs=3)), MSE, numbers(2), numbers(12), "first ggn hessian",
    ),
    "jvp and vjp": Inside("", lambda: Net(products, net=field()), MSE, numbers(2), numbers(4), "first ggn hessian"),
    "a divergence": Inside("", lambda: Net(laplacian, net=field()), MSE, numbers(2), numbers(2), "grad"),
    "functional_call": Inside("", lambda: Net(called, net=field()), MSE, numbers(2), numbers(2), "first ggn hessian"),
    "MAML": Inside("", lambda: Net(adapted, net=field()), MSE, numbers(2), numbers(1), "grad"),
    "an ensemble by vmap": Inside(
        "", lambda: Net(ensemble, w=param(3, 2, 2), b=param(3, 2)), MSE, numbers(2), numbers(2), "first", quick=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", parametrized(ROWS))
def test_derivative(name: str) -> None:
    ROWS[name].check((3, 1, 2, 5), ROWS[name].trains)


@pytest.mark.slow
def test_a_penalty_in_the_loss() -> None:
    """Of one output in another, which is an input of the critic: the loss is a mean over samples, but no function of f."""
    torch.manual_seed(0)
    model = Net(scores_and_point, net=field()).double()
    for n in (3, 1):
        x = torch.randn(n, 2).double()
        result = fxcurv.compile(model, penalised, [BatchGrad(), HMP()])(x)
        for k in range(n):
            alone = grad(penalised(model(x[k : k + 1])) / n, list(model.parameters()))
            for (name, _), g in zip(model.named_parameters(), alone, strict=True):
                torch.testing.assert_close(result.grad_batch[name][k], g)
        weight = model.net[0].weight
        (first,) = grad(penalised(model(x)), weight, create_graph=True)
        (product,) = grad(first.sum(), weight)
        torch.testing.assert_close(result.hmp["net.0.weight"](torch.ones(1, *weight.shape).double())[0], product)
    with pytest.raises(LossError, match="Gauss-Newton is not defined"):
        fxcurv.compile(model, penalised, [DiagGGNExact()])(x)


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_batch_is_not_in_the_program(training: bool) -> None:
    """One program for all sizes, and the user's line on what is differentiated."""
    model = Net(critic, net=field()).double().train(training)
    compiled = fxcurv.compile(model, wgan, [BatchGrad()])
    for n in (4, 2, 7):
        compiled(tuple(draw(n).double() for draw in (numbers(2), numbers(2), numbers(1))))
    assert compiled.recompiles == []
    (note,) = compiled.explain(*[tuple(draw(4).double() for draw in (numbers(2), numbers(2), numbers(1)))]).notes
    assert note.startswith("torch.autograd.grad is said in the graph") and "(g,) = grad(score" in note


# ---- what is refused ------------------------------


def backward_inside(m: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    m.net(x).sum().backward()
    return m.net(x) * x.grad


def dual_numbers(m: Any, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(m.net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def kept_inside(m: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return grad(Kept.apply(m.net(x)).sum(), x, create_graph=True)[0]


def custom_mapped(m: Any, x: Tensor) -> Tensor:
    return torch.vmap(lambda z: Cube.apply(m.net(z)))(x)


def of_an_edge(m: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return grad(m.net(x).sum(), torch.autograd.graph.get_gradient_edge(x), create_graph=True)[0]


def unused(m: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return grad(m.net(x.detach()).sum(), x, create_graph=True)[0]


def linearized(m: Any, x: Tensor) -> Tensor:
    return torch.func.linearize(m.net, x)[1](x)


REFUSED: dict[str, tuple[Any, type[Exception], str, str]] = {
    "backward": (backward_inside, CaptureError, ".backward()", "torch.autograd.grad(y, x, create_graph=True)"),
    "dual numbers": (dual_numbers, CaptureError, "forward_ad.make_dual(", "torch.func.grad, vjp, jvp"),
    "a custom function": (kept_inside, CustomFunctionError, "Kept.apply", "'Kept' is differentiated by the model"),
    "a custom function under vmap": (custom_mapped, CustomFunctionError, "Cube.apply", "'Cube' cannot be traced"),
    "a gradient edge": (of_an_edge, CaptureError, "get_gradient_edge", "pass the tensors"),
    "an unused input": (unused, CaptureError, "x.detach()", "appears to not have been used"),
    "linearize": (linearized, CaptureError, "torch.func.linearize", "jvp"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, capfd: pytest.CaptureFixture) -> None:
    run, kind, line, says = REFUSED[name]
    with pytest.raises(kind) as caught:
        fxcurv.compile(Net(run, net=field()), lambda f: f.square().mean(), [BatchGrad()])(torch.randn(3, 2))
    for words in (__file__, line, says):
        assert words in str(caught.value), caught.value
    assert capfd.readouterr() == ("", "")


def test_the_cause_stays() -> None:
    with pytest.raises(CaptureError) as caught:
        fxcurv.compile(Net(unused, net=field()), lambda f: f.square().mean(), [BatchGrad()])(torch.randn(3, 2))
    assert isinstance(caught.value.__cause__, RuntimeError)
