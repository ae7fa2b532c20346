"""Complex numbers between a parameter and the loss: spectra, Fourier layers, rotations, spectral losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net, param
from oracle import Oracle
from situations import numbers, parametrized
from test_derivatives_inside import Inside
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import UnsupportedOpError
from fxcurv.extensions import BatchGrad, DiagGGNExact, DiagHessian, SumGradSquared

MSE = nn.MSELoss()
ALL = "first ggn hessian"


def mixing(m: Any, x: Tensor) -> Tensor:
    """FNet's layer, over positions and features."""
    h = m.body(x)
    return m.head((h + torch.fft.fft(torch.fft.fft(h, dim=-1), dim=-2).real).tanh()).mean(1)


def fourier_layer(m: Any, x: Tensor) -> Tensor:
    """A layer of a Fourier neural operator: the lowest frequencies, written into zeros, by a weight kept as real numbers."""
    h = m.body(x)
    spectrum = torch.fft.rfft(h, dim=1)
    out = torch.zeros_like(spectrum)
    out[:, :2] = torch.einsum("nkc,cdk->nkd", spectrum[:, :2], torch.view_as_complex(m.weight))
    return m.head(F.gelu(torch.fft.irfft(out, n=x.shape[1], dim=1) + h)).mean(1)


def written(m: Any, x: Tensor) -> Tensor:
    """Complex writes: of one frequency, of every second one, and added."""
    spectrum = torch.fft.rfft(m.body(x), dim=1)
    out = torch.zeros_like(spectrum)
    out[:, -1] = spectrum[:, 1]
    out[:, 1::2] = spectrum[:, :1] * 0.5
    out[:, :2] += torch.einsum("nkc,cdk->nkd", spectrum[:, :2], torch.view_as_complex(m.weight))
    return m.head(torch.fft.irfft(out, n=5, dim=1)).mean(1)


def twice(m: Any, x: Tensor) -> Tensor:
    return m.head(mixed_by(m.weight, mixed_by(m.weight, m.body(x)).tanh())).mean(1)


def mixed_by(weight: Tensor, h: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(h, dim=1) * weight.tanh(), n=h.shape[1], dim=1)


def magnitudes(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.log1p(torch.fft.rfft(m.body(x)).abs()))


def filtered(m: Any, x: Tensor) -> Tensor:
    """A trained filter on the spectrum of the data: the complex numbers of the data come from outside."""
    return m.head(torch.fft.irfft(torch.fft.rfft(x) * m.weight.sigmoid(), n=x.shape[-1]).tanh())


def gated(m: Any, x: Tensor) -> Tensor:
    """A spectrum that real numbers made of it change: the way there and back is one part."""
    z = torch.fft.rfft(m.body(x))
    return m.head(torch.fft.irfft(z * torch.sigmoid(z.abs() - 1), n=4))


def rotary(m: Any, x: Tensor) -> Tensor:
    """Rotary positions as Llama's first code has them: pairs as complex numbers, angles in a complex buffer."""
    q, k, v = (layer(x) for layer in (m.q, m.k, m.v))
    q, k = (
        torch.view_as_real(torch.view_as_complex(t.reshape(*t.shape[:2], 2, 2)) * m.angles[: x.shape[1]]).flatten(2)
        for t in (q, k)
    )
    return m.head(F.scaled_dot_product_attention(q, k, v)).mean(1)


def polar(m: Any, x: Tensor) -> Tensor:
    r, angle = m.body(x).chunk(2, -1)
    z = torch.polar(r.exp(), angle)
    return m.head(torch.cat([z.real, z.imag], -1)) + z.angle().sum(-1, keepdim=True)


class Power(torch.autograd.Function):
    """The power spectrum, by complex numbers that nothing outside sees."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.fft.fft(x).abs().square()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * torch.fft.ifft(torch.fft.fft(x) * g).real * x.shape[-1]


def power(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.log1p(Power.apply(m.body(x))))


def derived(m: Any, x: Tensor) -> Tensor:
    """A derivative of complex numbers that the model takes itself."""
    h = m.body(x)
    energy = torch.fft.irfft(torch.fft.rfft(h) * m.weight.tanh(), n=4).pow(3).sum()
    (force,) = torch.autograd.grad(energy, h, create_graph=True)
    return m.head(force)


def linear(m: Any, x: Tensor) -> Tensor:
    return m.head(m.body(x).tanh())


def spectral_loss(f: Tensor, y: Tensor) -> Tensor:
    return (torch.fft.rfft(f).abs() - torch.fft.rfft(y).abs()).square().mean() + F.mse_loss(f, y)


def body(width: int = 4, of: int = 2) -> dict[str, nn.Module]:
    return {"body": nn.Linear(of, width), "head": nn.Linear(width, 2)}


ANGLES = torch.polar(torch.ones(5, 2), torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1]))).to(torch.complex128)

ROWS = {
    "FNet": Inside("", lambda: Net(mixing, **body()), MSE, numbers(3, 2), numbers(2), ALL),
    "a Fourier layer": Inside(
        "", lambda: Net(fourier_layer, weight=param(4, 4, 2, 2), **body()), MSE, numbers(5, 2), numbers(2), ALL,
    ),
    "written to": Inside(
        "", lambda: Net(written, weight=param(4, 4, 2, 2), **body()), MSE, numbers(5, 2), numbers(2), ALL,
    ),
    "two of them": Inside("", lambda: Net(twice, weight=param(3, 4), **body()), MSE, numbers(5, 2), numbers(2), ALL),
    "magnitudes": Inside(
        "", lambda: Net(magnitudes, body=nn.Linear(2, 4), head=nn.Linear(3, 2)), MSE, numbers(2), numbers(2), ALL, quick=True,
    ),
    "filtered data": Inside("", lambda: Net(filtered, weight=param(3), head=nn.Linear(4, 2)), MSE, numbers(4), numbers(2), ALL),
    "gated": Inside("", lambda: Net(gated, **body()), MSE, numbers(2), numbers(2), ALL),
    "rotary positions": Inside(
        "", lambda: Net(rotary, q=nn.Linear(2, 4), k=nn.Linear(2, 4), v=nn.Linear(2, 4), head=nn.Linear(4, 2), angles=ANGLES),
        MSE, numbers(3, 2), numbers(2), ALL,
    ),
    "polar": Inside("", lambda: Net(polar, **body()), MSE, numbers(2), numbers(2), ALL),
    "a custom function": Inside("", lambda: Net(power, **body()), MSE, numbers(2), numbers(2), ALL, quick=True),
    "a derivative": Inside("", lambda: Net(derived, weight=param(3), **body()), MSE, numbers(2), numbers(2), ALL, quick=True),
    "a spectral loss": Inside("", lambda: Net(linear, **body()), spectral_loss, numbers(2), numbers(2), "first ggn hessian"),
}  # fmt: skip


@pytest.mark.parametrize("name", parametrized(ROWS))
def test_quantities(name: str) -> None:
    torch.manual_seed(0)
    ROWS[name].check((3, 1), ROWS[name].trains)


def test_other_batch_sizes_and_a_program_on_its_own() -> None:
    """One program for all sizes; it may be drawn, exported and compiled, since after the walk there are plain ops alone."""
    torch.manual_seed(0)
    model = Net(fourier_layer, weight=param(4, 4, 2, 2), **body()).double()
    compiled = fxcurv.compile(model, MSE, [BatchGrad(), SumGradSquared()])
    for n in (4, 2, 7):
        x, y = torch.randn(n, 5, 2).double(), torch.randn(n, 2).double()
        result = compiled(x, y)
        wanted = torch.autograd.grad(MSE(model(x), y), list(model.parameters()))
        torch.testing.assert_close(list(result.grad.values()), list(wanted))
        torch.testing.assert_close({k: v.sum(0) for k, v in result.grad_batch.items()}, result.grad)
    assert compiled.recompiles == []
    assert "complex_region" not in str(compiled.lower(x, y).graph) and "_fft_r2c" in str(compiled.lower(x, y).graph)


def test_one_column_at_a_time() -> None:
    """The GGN's columns in sweeps, and the diagonal of the Hessian in single precision."""
    torch.manual_seed(0)
    model = Net(magnitudes, body=nn.Linear(2, 4), head=nn.Linear(3, 2))
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    found = fxcurv.compile(model, MSE, [DiagGGNExact(), DiagHessian()], memory_budget=1)(x, y)
    exact = fxcurv.compile(model.double(), MSE, [DiagGGNExact(), DiagHessian()])(x.double(), y.double())
    for field in ("diag_ggn_exact", "diag_h"):
        for name, value in getattr(exact, field).items():
            torch.testing.assert_close(getattr(found, field)[name], value.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["magnitudes", "filtered data"])
def test_in_parts(name: str) -> None:
    """`outputs=False`: a transform along another axis than the samples'."""
    torch.manual_seed(0)
    model, x, y = ROWS[name].built(4)
    result = fxcurv.compile(model, MSE, [BatchGrad()], outputs=False)(x, y)
    oracle = Oracle(model, MSE, x, y)
    torch.testing.assert_close(result.grad_batch, dict(oracle.grad_batch()))


def test_results_are_differentiated() -> None:
    """By `create_graph`, through the writes that the derivative of a real spectrum makes."""
    torch.manual_seed(0)
    model, x, y = ROWS["magnitudes"].built(3)
    result = fxcurv.compile(model, MSE, [BatchGrad()])(x, y, create_graph=True)
    params = list(model.parameters())
    plain = torch.autograd.grad(MSE(model(x), y), params, create_graph=True)
    norm = lambda gradients: sum(g.square().sum() for g in gradients)  # noqa: E731
    found, wanted = (torch.autograd.grad(norm(g), params) for g in (result.grad.values(), plain))
    torch.testing.assert_close(found, wanted)


def test_noise_inside_is_refused() -> None:
    """With the line of the noise, and the way out, which is served."""
    noisy = lambda draw: lambda m, x: m.head(torch.fft.irfft(draw(torch.fft.rfft(m.body(x))), n=4))  # noqa: E731
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    with pytest.raises(UnsupportedOpError, match="(?s)randn_like.*test_complex_numbers.*draws random numbers.*z.shape"):
        fxcurv.compile(Net(noisy(lambda z: z + torch.randn_like(z)), **body()), MSE, [BatchGrad()])(x, y)
    model = Net(noisy(lambda z: z + torch.randn(z.shape, dtype=z.dtype)), **body())
    torch.manual_seed(1)
    found = fxcurv.compile(model, MSE, [BatchGrad()])(x, y)
    torch.manual_seed(1)
    wanted = torch.autograd.grad(MSE(model(x), y), list(model.parameters()))
    torch.testing.assert_close(list(found.grad.values()), list(wanted))


def test_a_custom_function_between_complex_numbers_is_refused() -> None:
    class Spectrum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.fft.fft(x)

        @staticmethod
        def backward(ctx, g):
            return torch.fft.ifft(g).real * g.shape[-1]

    model = Net(lambda m, x: m.head(Spectrum.apply(m.body(x)).abs()), **body())
    with pytest.raises(
        UnsupportedOpError, match="(?s)Spectrum.*test_complex_numbers.*a backward of its own.*view_as_real"
    ):
        fxcurv.compile(model, MSE, [BatchGrad()])(torch.randn(3, 2), torch.randn(3, 2))


def test_a_complex_output_is_refused() -> None:
    model = Net(lambda m, x: torch.fft.rfft(m.body(x)), body=nn.Linear(2, 4))
    with pytest.raises(UnsupportedOpError, match="(?s)fft_rfft.*complex numbers.*real and imaginary parts"):
        fxcurv.compile(model, lambda f: f.abs().sum(), [BatchGrad()])(torch.randn(3, 2))
