"""What each script of BackPACK's documentation holds, in small and against autograd; the scripts' names stand on the tests.

`example_first_order_resnet` holds nothing, it points to another script.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fxcurv.backpack import backpack, extend, extensions
from fxcurv.backpack.core.derivatives.convnd import weight_jac_t_save_memory
from fxcurv.backpack.custom_module.branching import Parallel, SumModule
from fxcurv.backpack.custom_module.graph_utils import BackpackTracer
from fxcurv.backpack.custom_module.permute import Permute
from fxcurv.backpack.custom_module.reduce_tuple import ReduceTuple
from fxcurv.backpack.custom_module.slicing import Slicing
from fxcurv.backpack.extensions.module_extension import FirstOrderModuleExtension
from fxcurv.backpack.hessianfree.ggnvp import ggn_vector_product
from fxcurv.backpack.hessianfree.hvp import hessian_vector_product
from fxcurv.backpack.utils.examples import autograd_diag_ggn_exact
from fxcurv.errors import MixedSamplesError

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def in_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def close(found, expected) -> None:
    torch.testing.assert_close(list(found), list(expected), rtol=1e-8, atol=1e-10)


def images(n: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 6, 6), torch.randint(3, (n,))


def convolutional(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        activation(),
        nn.MaxPool2d(2, 2),
        nn.Flatten(),
        nn.Linear(8, 4),
        activation(),
        nn.Linear(4, 3),
    )


def individual(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, graph: bool = False) -> list[Tensor]:
    """Gradients of each sample's loss alone, stacked, by autograd."""
    each = [
        torch.autograd.grad(loss(model(a), b), list(model.parameters()), create_graph=graph)
        for a, b in zip(x.split(1), y.split(1), strict=True)
    ]
    return [torch.stack(rows) for rows in zip(*each, strict=True)]


def diagonal(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return autograd_diag_ggn_exact(x, y, model, loss)


def flat(model: nn.Module, field: str) -> Tensor:
    return torch.cat([getattr(p, field).flatten() for p in model.parameters() if p.requires_grad])


@slow
def test_all_in_one() -> None:
    """example_all_in_one, of quantities that test_backpack.py does not ask for together: products and PCHMP."""
    (x, y), plain = images(), nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    model, loss = extend(copy.deepcopy(plain)), extend(nn.CrossEntropyLoss())
    every = (
        extensions.HMP(),
        extensions.GGNMP(),
        extensions.PCHMP(savefield="pchmp_clip", modify="clip"),
        extensions.PCHMP(savefield="pchmp_abs", modify="abs"),
    )
    with backpack(*every):
        loss(model(x), y).backward()
    value = nn.functional.cross_entropy(plain(x), y)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        v = torch.randn(2, *p.shape)
        true = torch.stack([hessian_vector_product(value, [q], [one])[0].detach() for one in v])
        for field in ("hmp", "ggnmp", "pchmp_clip", "pchmp_abs"):  # one layer: all of them are the Hessian
            close([getattr(p, field)(v)], [true])


@slow
def test_batched_jacobians() -> None:
    """The numbers of example_batched_jacobians."""
    x, plain = torch.randn(4, 5), nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    f = plain(x)
    rows = [
        [torch.autograd.grad(f[n, c], list(plain.parameters()), retain_graph=True) for c in range(3)] for n in range(4)
    ]
    true = [torch.stack([torch.stack([rows[n][c][k] for c in range(3)]) for n in range(4)]) for k in range(4)]
    model = extend(plain)
    f, found = model(x), []
    for c in range(3):
        with backpack(extensions.BatchGrad(), retain_graph=True):
            f[:, c].sum().backward(retain_graph=True)
        found.append([p.grad_batch for p in model.parameters()])
    close([torch.stack(parts, 1) for parts in zip(*found, strict=True)], true)
    with backpack(extensions.SqrtGGNExact()):
        extend(nn.MSELoss(reduction="sum"))(model(x), torch.zeros(4, 3)).backward()
    close([p.sqrt_ggn_exact.transpose(0, 1) / math.sqrt(2) for p in model.parameters()], true)


def solved(product, b: Tensor, steps: int) -> Tensor:
    """Conjugate gradients."""
    x, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for _ in range(steps):
        ap = product(p)
        a = (r * r).sum() / (p * ap).sum()
        x, new = x + a * p, r - a * ap
        p, r = new + (new * new).sum() / (r * r).sum() * p, new
    return x


@slow
@pytest.mark.parametrize("name", ["ggnmp", "hmp", "pchmp"])
def test_cg_newton(name: str) -> None:
    """example_cg_newton: steps by conjugate gradients on each parameter's block, which solve the damped system."""
    (x, y), model, loss = images(), extend(convolutional(nn.Sigmoid)), extend(nn.CrossEntropyLoss())
    extension = {"ggnmp": extensions.GGNMP(), "hmp": extensions.HMP(), "pchmp": extensions.PCHMP(modify="abs")}[name]
    losses = []
    for _ in range(3):
        model.zero_grad()
        value = loss(model(x), y)
        with backpack(extension):
            value.backward()
        for p in model.parameters():
            block = getattr(p, extension.savefield)

            def product(v: Tensor, block=block) -> Tensor:
                return 0.3 * v + block(v.unsqueeze(0)).squeeze(0)

            step = solved(product, -p.grad, min(p.numel(), 8))
            assert (product(step) + p.grad).norm() < 1e-2 * p.grad.norm() + 1e-8
            p.data.add_(step, alpha=0.3)
        losses.append(value.item())
    assert losses[2] < losses[1] < losses[0]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class OfScale(FirstOrderModuleExtension):
    def __init__(self) -> None:
        super().__init__(params=["weight"])

    def weight(self, ext, module, g_inp, g_out, quantities):
        assert ext.get_subsampling() is None
        return (g_out[0] * module.input0).sum(1, keepdim=True)


@slow
def test_custom_module() -> None:
    """example_custom_module, its diagonal without a rule: no module needs one."""
    x, y, loss = torch.randn(5, 3), torch.randint(3, (5,)), nn.CrossEntropyLoss(reduction="sum")
    true, model = individual(Scale(), loss, x, y), extend(Scale())
    own = extensions.BatchGrad()
    own.set_module_extension(Scale, OfScale())
    with backpack(own):
        extend(loss)(model(x), y).backward()
    close([model.weight.grad_batch], true)
    with backpack(extensions.DiagGGNExact()):
        extend(loss)(model(x), y).backward()
    f = Scale()(x)
    scale = Scale()
    f = scale(x)
    (block,) = ggn_vector_product(loss(f, y), f, scale, [torch.ones(1)])
    close([model.weight.diag_ggn_exact], [block])


@slow
def test_diag_ggn_optimizer() -> None:
    """The numbers of example_diag_ggn_optimizer."""
    (x, y), model, loss = images(6), extend(convolutional()), extend(nn.CrossEntropyLoss())
    losses = []
    for _ in range(6):
        model.zero_grad()
        value = loss(model(x), y)
        with backpack(extensions.DiagGGNMC()):
            value.backward()
        for p in model.parameters():
            assert (p.diag_ggn_mc >= 0).all()
            p.data.sub_(0.5 * p.grad / (p.diag_ggn_mc + 1.0))
        losses.append(value.item())
    assert losses[-1] < losses[0]


@slow
def test_differential_privacy() -> None:
    """The numbers of example_differential_privacy."""
    (x, y), plain, loss = images(4), convolutional(), nn.CrossEntropyLoss()
    true = [g / 4 for g in individual(plain, loss, x, y)]
    norms = sum(g.flatten(1).square().sum(1) for g in true).sqrt()
    model = extend(plain)
    with backpack(extensions.BatchGrad(), extensions.BatchL2Grad()):
        loss(model(x), y).backward()
    scale = (norms / 0.1).clamp(max=1)
    found_norms = sum(p.batch_l2 for p in model.parameters()).sqrt()
    close([found_norms], [norms])
    found = [torch.einsum("n...,n->...", p.grad_batch, (found_norms / 0.1).clamp(max=1)) for p in model.parameters()]
    close(found, [torch.einsum("n...,n->...", g, scale) for g in true])


@slow
def test_extension_hook() -> None:
    """The numbers of example_extension_hook."""
    (x, y), model, loss = images(), extend(nn.Sequential(nn.Flatten(), nn.Linear(36, 3))), extend(nn.CrossEntropyLoss())
    with backpack(extensions.DiagHessian()):
        loss(model(x), y).backward()
    after, during = flat(model, "diag_h").sum(), []

    def add(module: nn.Module) -> None:
        for p in module.parameters():
            if hasattr(p, "diag_h"):
                during.append(p.diag_h.sum())
                del p.diag_h

    with backpack(extensions.DiagHessian(), extension_hook=add):
        loss(model(x), y).backward()
    close([sum(during)], [after])
    assert not any(hasattr(p, "diag_h") for p in model.parameters())


@slow
@pytest.mark.filterwarnings("ignore:Using backward")  # as the script does
def test_gradient_of_variance() -> None:
    """The numbers of example_gradient_of_variance."""
    (x, y), plain, loss = images(), convolutional(), nn.CrossEntropyLoss(reduction="sum")
    variance = sum(g.var(0, correction=0).sum() for g in individual(plain, loss, x, y, graph=True))
    true = torch.autograd.grad(variance, list(plain.parameters()))
    model = extend(plain)
    with backpack(extensions.Variance()):
        loss(model(x), y).backward(retain_graph=True, create_graph=True)
    found = sum(p.variance.sum() for p in model.parameters())
    close([found], [variance])
    close(torch.autograd.grad(found, list(model.parameters())), true)


class Block(nn.Module):
    """A residual block, its sum in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = (
            nn.Conv2d(1, 2, 3, padding=1),
            nn.Conv2d(2, 2, 3, padding=1),
            nn.Conv2d(1, 2, 1),
        )
        self.norm, self.head = nn.BatchNorm2d(2), nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(torch.relu(self.norm(self.first(x)))) + self.shortcut(x)
        return self.head(h.flatten(1))


@slow
@pytest.mark.parametrize("converter", [False, True])
def test_resnet_all_in_one(converter: bool) -> None:
    """example_resnet_all_in_one: as it is and by the converter, whose graph is printed."""
    (x, y), plain, loss = images(), Block().eval(), nn.CrossEntropyLoss()
    rows, ggn = [g / 3 for g in individual(plain, loss, x, y)], diagonal(plain, loss, x, y)
    model, loss = extend(plain, use_converter=converter), extend(loss)
    assert any(node.op == "call_module" for node in BackpackTracer().trace(model).nodes)
    with backpack(extensions.BatchGrad(), extensions.DiagGGNExact()):
        loss(model(x), y).backward()
    close([p.grad_batch for p in model.parameters()], rows)
    close([flat(model, "diag_ggn_exact")], [ggn])


@slow
def test_resnet_of_modules() -> None:
    """example_resnet_all_in_one: its container of branches."""
    branch = Parallel(nn.Identity(), nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()), merge_module=SumModule())
    plain = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), branch, nn.Flatten(), nn.Linear(72, 3))
    (x, y), loss = images(), nn.CrossEntropyLoss()
    ggn = diagonal(plain, loss, x, y)
    model, loss = extend(plain), extend(loss)
    with backpack(extensions.DiagGGNExact()):
        loss(model(x), y).backward()
    close([flat(model, "diag_ggn_exact")], [ggn])


def test_retain_graph() -> None:
    """example_retain_graph: the diagonal of an auto-encoder in several backward passes through slices of its output."""
    x = torch.rand(2, 1, 4, 4)
    model = extend(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.ConvTranspose2d(2, 1, 3), nn.Flatten()))
    loss = extend(nn.MSELoss())
    with backpack(extensions.DiagGGNExact()):
        loss(model(x), x.flatten(1)).backward()
    whole, parts, f = flat(model, "diag_ggn_exact"), 0, model(x)
    for k in range(4):
        part = (slice(None), slice(4 * k, 4 * k + 4))
        with backpack(extensions.DiagGGNExact(), retain_graph=True):
            loss(extend(Slicing(part))(f), x.flatten(1)[part]).backward(retain_graph=True)
        parts = parts + flat(model, "diag_ggn_exact")
    close([parts / 4], [whole])


@pytest.mark.parametrize("take", [lambda f: f[:, 0], lambda f: f[:, 1:2].squeeze(1)])
def test_targets_that_are_a_slice(take) -> None:
    """An output and a target of which every n-th entry is read: neither is contiguous."""
    x, y = torch.randn(4, 3), torch.randn(4, 5)
    plain, found = nn.Linear(3, 2), []
    for target in (y[:, 2], y[:, 2].clone(), y.t()[2]):
        model, loss = extend(copy.deepcopy(plain)), extend(nn.MSELoss())
        with backpack(extensions.DiagGGNExact(), extensions.HMP()):
            loss(take(model(x)), target).backward()
        found.append(
            [
                *(p.diag_ggn_exact for p in model.parameters()),
                *(p.hmp(torch.ones(1, *p.shape)) for p in model.parameters()),
            ]
        )
    f = plain(x)
    (ones,) = [
        [
            hessian_vector_product(nn.functional.mse_loss(take(plain(x)), y[:, 2]), [p], [torch.ones_like(p)])[0][None]
            for p in plain.parameters()
        ]
    ]
    assert f.shape == (4, 2)
    for one in found:
        close(one[2:], ones)
        close(one[:2], found[0][:2])


class Characters(nn.Module):
    """Two LSTM layers with dropout on characters; a class per position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(5, 4), nn.Dropout(0.2)
        self.lstm, self.dense = nn.LSTM(4, 4, 2, dropout=0.3, batch_first=True), nn.Linear(4, 5)
        for layer in range(2):
            bias = getattr(self.lstm, f"bias_ih_l{layer}")
            bias.data = torch.zeros_like(bias)
            bias.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(self.dropout(self.embedding(x)))
        return self.dense(self.dropout(h)).permute(0, 2, 1)


@slow
@pytest.mark.filterwarnings("ignore:TF32")  # of PyTorch's own, where oneDNN is turned off
def test_rnn() -> None:
    """example_rnn: by the converter, and of modules alone."""
    x, loss = torch.randint(5, (2, 3)), nn.CrossEntropyLoss()
    y, plain = x.roll(1, 1), Characters().eval()
    with torch.backends.mkldnn.flags(enabled=False):
        ggn = diagonal(plain, loss, x, y)
    layers = [nn.LSTM(4, 4, batch_first=True) for _ in range(2)]
    for k, layer in enumerate(layers):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            p = getattr(plain.lstm, f"{name}_l{k}")
            getattr(layer, f"{name}_l0").data = p.data.clone()
            getattr(layer, f"{name}_l0").requires_grad = p.requires_grad
    of_modules = nn.Sequential(
        copy.deepcopy(plain.embedding), nn.Dropout(0.2), layers[0], ReduceTuple(0), nn.Dropout(0.3), layers[1], ReduceTuple(0),
        copy.deepcopy(plain.dense), Permute(0, 2, 1),
    ).eval()  # fmt: skip
    close([of_modules(x)], [plain(x)])
    for model in (extend(plain, use_converter=True), extend(of_modules)):
        with backpack(extensions.BatchGrad(), extensions.DiagGGNExact()):
            extend(loss)(model(x), y).backward()
        close([flat(model, "diag_ggn_exact")], [ggn])


@slow
def test_an_lstm_that_takes_time_first() -> None:
    """As `nn.LSTM` does by default: the samples are the second axis inside. Those of an input are the first."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.dense = nn.LSTM(2, 3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.dense(self.lstm(x.transpose(0, 1))[0]).permute(1, 2, 0)

    x, y, loss, plain = torch.randn(3, 4, 2), torch.randint(4, (3, 4)), nn.CrossEntropyLoss(), TimeFirst()
    rows, ggn = [g / 3 for g in individual(plain, loss, x, y)], diagonal(plain, loss, x, y)
    model = extend(plain)
    with backpack(extensions.BatchGrad(), extensions.DiagGGNExact()):
        extend(loss)(model(x), y).backward()
    close([p.grad_batch for p in model.parameters()], rows)
    close([flat(model, "diag_ggn_exact")], [ggn])
    alone = extend(nn.LSTM(2, 3))
    with backpack(extensions.BatchGrad()), pytest.raises(MixedSamplesError, match="(?s)lstm.*batch_first=True"):
        alone(x)[0][-1].sum().backward()


@slow
def test_save_memory_convolutions() -> None:
    """example_save_memory_convolutions: the choice changes no number."""
    (x, y), plain, loss, found = images(), convolutional(), nn.CrossEntropyLoss(), []
    for save in (True, False):
        model = extend(copy.deepcopy(plain))
        with weight_jac_t_save_memory(save_memory=save), backpack(extensions.BatchGrad()):
            extend(loss)(model(x), y).backward()
        found.append([p.grad_batch for p in model.parameters()])
    close(found[0], found[1])
    close(found[0], [g / 3 for g in individual(plain, loss, x, y)])


@slow
def test_subsampling() -> None:
    """The numbers of example_subsampling."""
    (x, y), model, loss = (
        images(5),
        extend(nn.Sequential(nn.Flatten(), nn.Linear(36, 3))),
        extend(nn.CrossEntropyLoss()),
    )
    with backpack(extensions.BatchGrad()):
        loss(model(x), y).backward()
    naive = [p.grad_batch[[0, 3, 1]] for p in model.parameters()]
    with backpack(extensions.BatchGrad(subsampling=[0, 3, 1])):
        loss(model(x), y).backward()
    close([p.grad_batch for p in model.parameters()], naive)


@slow
def test_trace_estimation() -> None:
    """example_trace_estimation: HMP after a backward pass that keeps the graph, and autograd's products on the same loss."""
    (x, y), loss = images(), extend(nn.CrossEntropyLoss())
    model = extend(nn.Sequential(nn.Flatten(), nn.Linear(36, 3, bias=False), nn.Sigmoid(), nn.Linear(3, 3, bias=False)))
    value = loss(model(x), y)
    with backpack(extensions.DiagHessian(), extensions.HMP()):
        value.backward(retain_graph=True)
    for p in model.parameters():
        signs = torch.where(torch.rand(4, *p.shape) < 0.5, -1.0, 1.0)
        true = torch.stack([hessian_vector_product(value, [p], [v])[0].detach() for v in signs])
        close([p.hmp(signs)], [true])
        units = torch.eye(p.numel()).reshape(-1, *p.shape)
        close([p.diag_h.sum()], [(units * p.hmp(units)).sum()])
