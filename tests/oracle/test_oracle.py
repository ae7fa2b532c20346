"""The oracle against closed forms, finite differences and its own identities."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from oracle import Oracle, recover_columns, second_derivative, tensors
from torch import nn


def oracle_of(name: str) -> Oracle:
    return Oracle(*CASES[name].build(), **CASES[name].oracle)


def close(left, right, tol=1e-12):
    torch.testing.assert_close(left, right, atol=tol, rtol=tol)


def without(tag: str) -> list[str]:
    return [name for name, case in CASES.items() if tag not in case.tags]


# ---- closed forms ------------------------------


def test_linear_regression():
    """Y = x WT + b: J = I (x) x, Hessian = GGN = 2/(N D) I (x) sum x xT."""
    o = oracle_of("linear_regression")
    x, t = o.inputs, o.targets
    n, d = t.shape
    error = 2 / (n * d) * (o.f.detach() - t)
    close(o.grad_batch()["weight"], torch.einsum("no,ni->noi", error, x))
    close(o.batch_l2()["bias"], error.square().sum(1))
    block = torch.kron(torch.eye(d, dtype=x.dtype), 2 / (n * d) * x.T @ x)
    close(o.ggn()["weight"], block)
    close(o.hessian()["weight"], block)
    close(o.diag_ggn_exact()["bias"], torch.full((d,), 2 / d, dtype=x.dtype))
    want = math.sqrt(2 / (n * d)) * torch.einsum("vo,ni->vnoi", torch.eye(d, dtype=x.dtype), x)
    close(o.sqrt_ggn_exact()["weight"], want)
    close(o.jacobian()["weight"], torch.einsum("po,ni->npoi", torch.eye(d, dtype=x.dtype), x))


def test_logistic_regression_columns():
    """Column v: sqrt(1/N) sqrt(p_v) (delta_vc - p_c), times x."""
    o = oracle_of("logistic_regression")
    x, p = o.inputs, o.f.detach().softmax(1)
    n = len(x)
    want = torch.einsum("nv,vnc,ni->vnci", (p / n).sqrt(), torch.eye(3)[:, None] - p, x)
    close(o.sqrt_ggn_exact()["weight"], want)
    fisher = torch.diag_embed(p) - torch.einsum("nc,nd->ncd", p, p)
    close(o.ggn()["weight"], torch.einsum("ncd,ni,nj->cidj", fisher, x, x).reshape(12, 12) / n)
    close(o.diag_h_batch()["bias"], p * (1 - p) / n)


def test_two_scalars():
    """L = sum (a tanh(b x) - t)^2 by hand: the diagonal of the Hessian per sample."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
            self.b = nn.Parameter(torch.tensor(-1.3, dtype=torch.float64))

        def forward(self, x):
            return self.a * torch.tanh(self.b * x)

    x, t = torch.tensor([[0.5], [-1.0], [2.0]]).double(), torch.tensor([[1.0], [0.0], [-2.0]]).double()
    model = Model()
    o = Oracle(model, nn.MSELoss(reduction="sum"), x, t)
    a, y = model.a.detach(), torch.tanh(model.b.detach() * x)
    error, dy, d2y = 2 * (a * y - t), x * (1 - y**2), -2 * x**2 * y * (1 - y**2)
    close(o.grad_batch()["b"], (error * a * dy)[:, 0])
    close(o.diag_h_batch()["a"], (2 * y**2)[:, 0])
    close(o.diag_h_batch()["b"], (2 * (a * dy) ** 2 + error * a * d2y)[:, 0])
    close(o.hessian_matrix()[0, 1], (2 * y * a * dy + error * dy).sum())
    close(o.diag_ggn_exact()["b"], (2 * (a * dy) ** 2).sum())


def test_clipping():
    o = oracle_of("logistic_regression")
    g = torch.cat([v.flatten(1) for v in o.grad_batch().values()], 1)
    norms = g.norm(dim=1)
    close(o.sample_norms(), norms)
    bound = norms.median().item()
    want = (g * (bound / norms).clamp(max=1)[:, None]).sum(0)
    close(torch.cat([v.flatten() for v in o.grad_clipped(bound).values()]), want)
    bias = o.grad_batch()["bias"]
    want = (bias * (0.05 / bias.norm(dim=1)).clamp(max=1)[:, None]).sum(0)
    close(o.grad_clipped(0.05, over="param")["bias"], want)


def test_cross_entropy_weight_of_a_position():
    """Omega / Z: weights, smoothing and ignored targets."""
    o = oracle_of("ce_ignore_weights_smoothing")
    w, y = o._loss.weight, o.targets
    kept = y >= 0
    soft = 0.8 * F.one_hot(y.clamp(min=0), 3).to(w) + 0.2 / 3
    omega = torch.where(kept, soft @ w, 0.0)
    close(o.ce_scale[1][:, 0], omega / w[y[kept]].sum())


def test_binary_cross_entropy_weight():
    o = oracle_of("bce_weights_soft")
    sigma = o.f.detach().sigmoid()
    omega = o._loss.weight * (o._loss.pos_weight * o.targets + 1 - o.targets)
    close(o.h, torch.diag_embed(omega * sigma * (1 - sigma) / sigma.numel()))


def test_column_order_of_extra_axes():
    """Outputs [N, C, d1, d2]: column (v, d) lives at position d, and equals the vector formula there."""
    o = oracle_of("ce_maps_soft")
    n, c = len(o.f), 3
    p = o.leaves[0].detach().softmax(1)
    columns = o.columns.reshape(c, 4, n, c, 4)
    want = torch.einsum(
        "nvd,vncd->vdnc", (p.flatten(2) / (n * 4)).sqrt(), torch.eye(c)[:, None, :, None] - p.flatten(2)
    )
    close(torch.stack([columns[:, d, :, :, d] for d in range(4)], 1), want)
    columns[:, range(4), :, :, range(4)] = 0
    assert columns.abs().max() == 0


# ---- identities, on every case ------------------------------


@pytest.mark.parametrize("name", CASES)
def test_first_order_and_ggn(name):
    """Sum of g_n = grad - grad r; g_n by another road; V VT = GGN, whose diagonal is DiagGGN."""
    o = oracle_of(name)
    grad, batch, rest = o.grad(), o.grad_batch(), o.grad_regulariser()
    assert list(grad) == [k for k, p in o.model.named_parameters() if p.requires_grad]
    for k, p in o.params.items():
        assert p.dtype == torch.float64 and p.grad is None and grad[k].isfinite().all()
        close(batch[k].sum(0) + rest[k], grad[k])
        assert ("regularised" in CASES[name].tags) or rest[k].abs().max() == 0
    # the same per-sample gradients by autograd through f, without a Jacobian
    for i in range(len(o.f)):
        other = torch.autograd.grad(o.f[i] @ o.s[i], list(o.params.values()), retain_graph=True, allow_unused=True)
        for k, g in zip(o.params, other, strict=True):
            close(batch[k][i], torch.zeros_like(o.params[k]) if g is None else g)
    if "nonconvex" in CASES[name].tags:
        with pytest.raises(ValueError, match="not convex"):
            o.sqrt_ggn_exact()
        return
    for k, root in o.sqrt_ggn_exact().items():
        flat = root.reshape(-1, o.params[k].numel())
        close(flat.T @ flat, o.ggn()[k], 1e-11)
        close(o.ggn()[k].diagonal().reshape(o.params[k].shape), o.diag_ggn_exact()[k], 1e-11)
        close(root.square().sum(0), o.diag_ggn_exact_batch()[k], 1e-11)


@pytest.mark.parametrize("name", without("no_hessian"))
def test_hessian_is_the_sum_over_samples(name):
    """Sum of diag_h_batch + diag of the regulariser's Hessian = diag_h, made from the whole loss."""
    o = oracle_of(name)
    rest, whole, batch = o.loss_of_flat(o.f.detach()), o.diag_h(), o.diag_h_batch()
    for k, p in o.params.items():
        want = batch[k].sum(0)
        if rest.requires_grad:
            (first,) = torch.autograd.grad(rest, p, create_graph=True)
            want = want + second_derivative(first, p).diagonal().reshape(p.shape)
        close(whole[k], want, 1e-10)


# padding_idx and no_grad make autograd's gradient another thing than the derivative, as they are meant to.
NOT_A_DERIVATIVE = ("embedding_padding", "no_grad_region")


@pytest.mark.parametrize("name", [n for n in without("no_hessian") if n not in NOT_A_DERIVATIVE])
def test_finite_differences(name):
    """Gradient and Hessian block along a random direction, by central differences of the loss alone."""
    o = oracle_of(name)
    torch.manual_seed(1)
    grad, hessian, h = o.grad(), o.hessian(), 3e-4
    for k, p in o.params.items():
        d, kept = torch.randn_like(p) / p.numel() ** 0.5, p.detach().clone()

        def loss_at(step: float, p=p, d=d, kept=kept) -> float:
            with torch.no_grad():
                p.copy_(kept + step * d)
            value = Oracle(o.model, o._loss, o.inputs, o.targets).loss().item()
            with torch.no_grad():
                p.copy_(kept)
            return value

        ends = [loss_at(i * h) for i in (-2, -1, 0, 1, 2)]
        slope = sum(c * e for c, e in zip((1, -8, 0, 8, -1), ends, strict=True)) / (12 * h)
        bend = sum(c * e for c, e in zip((-1, 16, -30, 16, -1), ends, strict=True)) / (12 * h * h)
        close(slope, (grad[k] * d).sum().item(), 1e-8)
        close(bend, (d.flatten() @ hessian[k] @ d.flatten()).item(), 1e-5)


def test_a_loss_that_couples_samples_is_refused():
    model, loss, x, t = CASES["linear_regression"].build()
    o = Oracle(model, lambda f, t: loss(f, t) ** 2, x, t)
    o.grad()
    with pytest.raises(ValueError, match="couples"):
        o.diag_ggn_exact()


# ---- sampled columns ------------------------------


def sampled(o: Oracle, m: int) -> torch.Tensor:
    """Columns [M, N, C] as the definitions have them, straight from the loss's name."""
    f = o.f.detach()
    if o.kind == "mse":
        z = 2 / o.h[0, 0, 0]
        return 2 * torch.randn(m, *f.shape, dtype=f.dtype) * math.sqrt(0.5) / (m * z).sqrt()
    if o.kind == "bce":
        p = f.sigmoid()
        omega_z = o.h.diagonal(dim1=1, dim2=2) / (p * (1 - p))
        return (omega_z / m).sqrt() * (p - torch.bernoulli(p.expand(m, *p.shape)))
    p, scale, place = o.ce_scale
    drawn = torch.distributions.Categorical(p).sample((m,))
    columns = (scale / m).sqrt()[..., None] * (p - F.one_hot(drawn, p.shape[-1]))
    return columns.flatten(2)[:, :, place.argsort()]


@pytest.mark.parametrize(
    "name",
    [
        "mlp_relu",
        "ce_ignore_weights_smoothing",
        "ce_maps_ignore_weights",
        "mse_maps",
        "tied_embedding_lm",
        "bce_weights_soft",
        "logistic_regression",
        "linear_regression",
    ],
)
def test_sampled_columns_are_recovered(name):
    """P -> s -> the draws; and the expectation of s sT is H, which the wrong scale fails."""
    o = oracle_of(name)
    torch.manual_seed(2)
    columns = sampled(o, 4000)
    few = columns[:5] * math.sqrt(4000 / 5)
    root = {k: torch.einsum("nc...,vnc->vn...", j, few) for k, j in o.jac.items()}
    found = recover_columns(o.jacobian(), root)
    assert found.residual < 1e-10
    if found.unique:
        close(found.columns, few, 1e-8)
        o.draws(found.columns)
    o.draws(few)
    assert o.expectation_z(columns) < 6
    assert o.expectation_z(columns * 1.2) > 6
    if o.kind != "mse":
        with pytest.raises(AssertionError, match="draw"):
            o.draws(few * 1.1)


def test_draws():
    """What `draws` returns is what was drawn."""
    o = oracle_of("ce_ignore")
    label = torch.tensor([[2, 0, 1, 1]])
    p = o.f.detach().softmax(1)
    columns = (F.one_hot(label, 3) - p).neg() / math.sqrt(3)
    columns[:, 0] = 0
    assert o.draws(columns)[..., 0].tolist() == [[-1, 0, 1, 1]]


# ---- the cases ------------------------------


@pytest.mark.parametrize("name", ["mlp_relu", "transformer_decoder_lm", "ce_weights", "inputs_dict", "spectral_norm"])
def test_cases_build_equal_parts(name):
    """Every build gives the same numbers, in any dtype, and leaves PyTorch's state alone."""
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    first, second, single = CASES[name].build(), CASES[name].build(), CASES[name].build(torch.float32)
    assert torch.equal(state, torch.get_rng_state()) and default == torch.get_default_dtype()
    for a, b, c in zip(
        *[list(m.state_dict().values()) + list(tensors((x, t))) for m, _, x, t in (first, second, single)],
        strict=True,
    ):
        assert torch.equal(a, b) and torch.equal(a.float(), c.float()) and c.dtype != torch.float64
    assert Oracle(*first, **CASES[name].oracle).loss() == Oracle(*second, **CASES[name].oracle).loss()
