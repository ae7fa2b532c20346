"""In-place writes in all their spellings, against the oracle: what autograd makes of them is what is wanted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_oracle import between, check, close, kflr_of
from case_tools import Net
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.errors import CaptureError, ExtensionError, MixedSamplesError
from fxcurv.extensions import KFRA, BatchGrad, DiagGGNExact, DiagHessian

SPELLINGS = {}


def spelling(fn):
    SPELLINGS[fn.__name__] = fn
    return fn


@spelling
def ellipsis(h):
    z = torch.zeros_like(h)
    z[..., 2:] = h[..., :3]
    return z


@spelling
def one_column_of_zeros(h):
    z = torch.zeros_like(h)
    z[:, 1] = h[:, 0] * h[:, 2]
    return z + h


@spelling
def columns_in_a_loop(h):
    out = torch.zeros(h.shape[0], 5, dtype=h.dtype)
    state = h[:, 0]
    for t in range(5):
        state = torch.sin(state) + h[:, t] ** 2
        out[:, t] = state
    return out


@spelling
def a_mask(h):
    h = h.clone()
    h[h < 0] = 0.25
    return h


@spelling
def a_mask_of_the_features(h):
    h = h * h
    h[:, torch.tensor([True, False, True, False, False])] = 0.5
    return h


@spelling
def a_mask_adds(h):
    h = h.clone()
    return h.index_put((h < 0,), torch.tensor(0.5, dtype=h.dtype), accumulate=True)


@spelling
def a_mask_of_rows(h):
    h = h.clone()
    h[h.sum(1) > 0] = torch.arange(5, dtype=h.dtype)
    return h * h


@spelling
def add_to_a_column(h):
    h = h.clone()
    h[:, 0] += 3
    return h


@spelling
def multiply_columns(h):
    h = h.clone()
    h[:, :-2] *= h[:, 2:].clone()
    return h


@spelling
def negative_index(h):
    z = h.clone()
    z[..., -1] = h[:, 0] ** 2
    return z


@spelling
def negative_slice(h):
    z = h.clone()
    z[:, -4:-2] = h[:, -2:] ** 2
    return z


@spelling
def steps(h):
    z = h.new_zeros(h.shape)
    z[:, 1::2] = h[:, :2] * h[:, 3:]
    return z + h


@spelling
def beyond_the_end(h):
    z = torch.ones_like(h)
    z[:, 3:100] = h[:, :2]
    return z


@spelling
def nothing(h):
    h = h.clone()
    h[:, 5:] = 1.0
    h[:, 3:1] = 2.0
    return h


@spelling
def a_list_of_columns(h):
    h = h.clone()
    h[:, [0, 2]] = h[:, [1, 3]] ** 2
    return h


@spelling
def a_new_axis(h):
    z = h.clone()
    z[:, None, 1:2] = h[:, None, :1] ** 2
    return z


@spelling
def a_transposed_view(h):
    h = h.clone()
    h.t()[1] = h.t()[2] * 2
    return h


@spelling
def a_narrow_copy(h):
    h = h.clone()
    h.narrow(1, 1, 2).copy_(h[:, :2].clone() ** 2)
    return h


@spelling
def a_strided_view(h):
    h = h.clone()
    h.as_strided((h.shape[0], 2), (5, 2)).mul_(h[:, :2].clone())
    return h


@spelling
def a_diagonal(h):
    z = h.new_zeros(h.shape[0], 5, 5)
    torch.diagonal(z, dim1=1, dim2=2).copy_(h)
    return (z * h.unsqueeze(1)).sum(1)


@spelling
def masked_fill(h):
    return h.clone().masked_fill_(h < 0, 1.5)


@spelling
def index_fill(h):
    return (h * h).index_fill_(1, torch.tensor([0, 2]), 1.0)


@spelling
def index_copy(h):
    return h.clone().index_copy_(1, torch.tensor([0, 2]), h[:, 1:3] * h[:, 2:4])


@spelling
def fill_with_a_value(h):
    z = torch.zeros(h.shape[0], 3, 5, dtype=h.dtype)
    z[:, 1] = h
    z[:, 2].fill_(2.0)
    z[:, 0, 1:3] = 0.5
    return (z * z).sum(1) + h


@spelling
def everything(h):
    z = torch.empty_like(h)
    z[:] = h
    z[..., :] *= 2
    z.zero_()
    z.add_(h).mul_(h).clamp_(min=0.01)
    return z


BRIEF = {"ellipsis", "columns_in_a_loop", "a_mask", "add_to_a_column", "a_strided_view"}


def batch(n=4):
    torch.manual_seed(1)
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(0, 3, (n,))


@pytest.mark.parametrize("name", [n if n in BRIEF else pytest.param(n, marks=pytest.mark.slow) for n in SPELLINGS])
def test_spelling(name):
    check(between(SPELLINGS[name]), nn.CrossEntropyLoss(), *batch(), sizes=(3, 1), kind="ce")


@pytest.mark.parametrize("name", ["ellipsis", "a_mask", "columns_in_a_loop"])
def test_the_batch_size_stays_symbolic(name):
    x, y = batch()
    compiled = fxcurv.compile(
        between(SPELLINGS[name]), nn.CrossEntropyLoss(), [BatchGrad(), DiagGGNExact(), DiagHessian()]
    )
    assert not compiled.lower(x, y).fixed


def reference_kfra_of_a(model, x, y, fn):
    """B of the first layer by KFRA's recursion, with J from autograd: M <- mean of J^T M J."""
    z = torch.stack([model.a(v) for v in x])
    f = lambda v: model.b(fn(torch.tanh(v.unsqueeze(0))))[0]  # noqa: E731
    p = torch.softmax(model(x), 1)
    m = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).sum(0) / len(x)
    h = lambda v: fn(torch.tanh(v.unsqueeze(0)))[0]  # noqa: E731
    m = model.b.weight.t() @ m @ model.b.weight
    tanh = [torch.diag(1 - torch.tanh(v) ** 2) for v in z]
    through = [torch.func.jacrev(lambda t: fn(t.unsqueeze(0))[0])(torch.tanh(v)) for v in z]
    m = sum(j.t() @ m @ j for j in through) / len(x)
    assert f(z[0]).shape == (3,) and h(z[0]).shape == (5,)
    return sum(j.t() @ m @ j for j in tanh) / len(x)


@pytest.mark.parametrize("name", ["ellipsis", "a_mask", "beyond_the_end"])
def test_kfra(name):
    model, (x, y) = between(SPELLINGS[name]), batch()
    found = fxcurv.compile(model, nn.CrossEntropyLoss(), [KFRA()])(x, y).kfra["a.weight"][0]
    torch.testing.assert_close(found, reference_kfra_of_a(model, x, y, SPELLINGS[name]).detach())


def test_kfra_refuses_a_real_branch_by_name():
    x, y = batch()
    with pytest.raises(ExtensionError, match="joins two branches"):
        fxcurv.compile(between(SPELLINGS["add_to_a_column"]), nn.CrossEntropyLoss(), [KFRA()])(x, y)


def test_kflr_is_exact_on_vectors():
    """N = 1 and no shared positions: the Kronecker product is the block."""
    model, (x, y) = between(SPELLINGS["columns_in_a_loop"]), batch(1)
    b, a = kflr_of(model, nn.CrossEntropyLoss(), x, y)["a.weight"]
    true = Oracle(model, nn.CrossEntropyLoss(), x, y, kind="ce").ggn()["a.weight"]
    torch.testing.assert_close(torch.kron(b, a), true.reshape(torch.kron(b, a).shape))


def test_a_parameter_is_written():
    def run(m, x):
        z = torch.zeros(x.shape[0], 6, dtype=x.dtype)
        z[:, 1:4] = m.w
        z[:, 0] = m.w[1] * x[:, 0]
        z[:, 5:] = x[:, :1] * m.w[2] ** 2
        return torch.sin(z) @ m.v

    torch.manual_seed(0)
    model = Net(run, w=nn.Parameter(torch.randn(3).double()), v=nn.Parameter(torch.randn(6, 3).double()))
    check(model, nn.CrossEntropyLoss(), *batch(), sizes=(2,), kind="ce")


def test_writing_along_the_samples_is_refused_and_its_gradient_right():
    def run(h):
        z = torch.zeros_like(h)
        z[1:] = h[:-1]
        z[0] = h[2]
        return z

    model, (x, y) = between(run), batch()
    with pytest.raises(MixedSamplesError, match="mixes samples"):
        fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad()])(x, y)
    result = fxcurv.compile(model, nn.CrossEntropyLoss(), [DiagHessian()])(x, y)
    firsts = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()), create_graph=True)
    names = [n for n, _ in model.named_parameters()]
    close(result.grad, dict(zip(names, (g.detach() for g in firsts), strict=True)), "grad")
    diagonal = {
        n: torch.stack([torch.autograd.grad(e, p, retain_graph=True)[0].flatten()[i] for i, e in enumerate(g.flatten())])
        .reshape(p.shape)
        for g, (n, p) in zip(firsts, model.named_parameters(), strict=True)
    }  # fmt: skip
    close(result.diag_h, diagonal, "diag_h")


def test_sizes_that_count_values_are_refused_by_line():
    def run(h):
        h = h.clone()
        h[h < 0] *= 0.1
        return h

    with pytest.raises(CaptureError, match=r"h\[h < 0\] \*= 0.1\n.*size depends on values"):
        fxcurv.compile(between(run), nn.CrossEntropyLoss(), [BatchGrad()])(*batch())
