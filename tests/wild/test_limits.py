"""What docs/errors.md says is limited: each sentence that no other file tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import (
    ArgumentError,
    CaptureError,
    ExtensionError,
    FxcurvError,
    MixedSamplesError,
    UnsupportedOpError,
)
from fxcurv.extensions import HMP, KFAC, BatchGrad, DiagHessian

MSE = nn.MSELoss()


def compiled(forward: Any, extensions: Any = (), loss: Any = MSE) -> fxcurv.Compiled:
    return fxcurv.compile(Net(forward, body=nn.Linear(3, 2)), loss, extensions)


def recompiled(model: fxcurv.Compiled, shapes: list[tuple[int, ...]]) -> list[str]:
    for shape in shapes:
        x = torch.randn(shape)
        model(x, torch.randn(*shape[:-1], 2))
    return model.recompiles


def test_len_fixes_the_batch_size() -> None:
    assert len(recompiled(compiled(lambda m, x: m.body(x) / len(x)), [(4, 3), (5, 3)])) == 1
    assert not recompiled(compiled(lambda m, x: m.body(x) / x.shape[0]), [(4, 3), (5, 3)])


def test_a_curvature_slice_by_slice_fixes_the_batch_size() -> None:
    (why,) = recompiled(compiled(lambda m, x: m.body(x).softmax(1), [DiagHessian()]), [(4, 3), (5, 3)])
    assert "fixed at 4 by aten.softmax" in why


def test_a_second_length_compiles_again() -> None:
    (why,) = recompiled(compiled(lambda m, x: m.body(x)), [(4, 2, 3), (4, 5, 3), (4, 6, 3)])
    assert "[n, 5, 3] instead of float32[n, 2, 3]" in why


def each(f: Tensor, y: Tensor) -> Tensor:
    return torch.stack([F.mse_loss(p, q) for p, q in zip(f, y, strict=True)]).mean()


def test_a_loop_over_the_batch_has_no_samples() -> None:
    x, y = torch.randn(3, 3), torch.randn(3, 2)
    found, plain = (compiled(lambda m, x: m.body(x), (), loss) for loss in (each, MSE))
    torch.manual_seed(0)
    found.model.load_state_dict(plain.model.state_dict())
    torch.testing.assert_close(found(x, y).grad["body.weight"], plain(x, y).grad["body.weight"])
    with pytest.raises(MixedSamplesError):
        compiled(lambda m, x: m.body(x), [BatchGrad()], each)(x, y)


@pytest.mark.parametrize(
    "forward", [lambda m, x: m.body(x).detach().numpy(), lambda m, x: torch.from_numpy(m.body(x).numpy())]
)
def test_numpy_is_refused(forward: Any) -> None:
    with pytest.raises(FxcurvError):
        compiled(forward)(torch.randn(4, 3), torch.randn(4, 2))


def test_kronecker_factors_of_merged_samples_are_refused() -> None:
    def pooled(m: Any, x: Tensor, of: Tensor, like: Tensor) -> Tensor:
        return torch.zeros(like.shape[0], 2).index_add(0, of, m.body(x))

    model = fxcurv.compile(Net(pooled, body=nn.Linear(3, 2)), MSE, [KFAC()], sample_index=1)
    with pytest.raises(ExtensionError, match="KFAC is not defined with sample_index="):
        model((torch.randn(3, 3), torch.tensor([0, 0, 1]), torch.zeros(2)), torch.randn(2, 2))


ADJACENCY = torch.eye(2).to_sparse()


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.body(x).to_sparse().to_dense(),
        lambda m, x: torch.sparse.mm(ADJACENCY, m.body(x).T).T,
        lambda m, x: m.body(x) @ ADJACENCY.to_dense(),
        lambda m, x: F.linear(
            x, m.body.weight + torch.sparse_coo_tensor(torch.tensor([[0], [2]]), m.body.bias[:1], (2, 3))
        ),
    ],
)
def test_sparse_tensors_are_refused(forward: Any) -> None:
    with pytest.raises(UnsupportedOpError, match=r"(?s)test_limits.*sparse_coo.*Way out"):
        compiled(forward, [BatchGrad()])(torch.randn(4, 3), torch.randn(4, 2))


def test_an_op_that_writes_what_its_signature_does_not_say_is_refused() -> None:
    statistics = {"mean": torch.zeros(2), "var": torch.ones(2)}

    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.native_batch_norm(m.body(x), None, None, m.mean, m.var, True, 0.1, 1e-5)[0]

    model = Net(forward, body=nn.Linear(3, 2))
    for name, value in statistics.items():
        model.register_buffer(name, value)
    with pytest.raises(UnsupportedOpError, match=r"(?s)native_batch_norm.*test_limits.*functional.batch_norm"):
        fxcurv.compile(model, MSE, [DiagHessian()])(torch.randn(4, 3), torch.randn(4, 2))


def test_a_norm_under_two_names_is_refused_by_both() -> None:
    norm = nn.BatchNorm1d(4)
    model, x, y = nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), norm), torch.randn(5, 3), torch.randn(5, 4)
    with pytest.raises(CaptureError, match=r"'1' and '3' are one module.*Way out"):
        fxcurv.compile(model, MSE, [])(x, y)
    fxcurv.compile(model.eval(), MSE, [])(x, y)


def test_a_derivative_that_branches_on_values_is_refused_in_these_words() -> None:
    index = torch.tensor([[0, 1, 1]])

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.body(x)
        return torch.zeros_like(h[:, :2]).scatter_reduce(
            1, index.expand(len(h), -1)[:, :2], h, "prod", include_self=False
        )

    with pytest.raises(
        UnsupportedOpError, match=r"(?s)scatter_reduce.*test_limits.*branches on values of the data.*Way out"
    ):
        compiled(forward)(torch.randn(4, 3), torch.randn(4, 2))


@pytest.mark.parametrize("asked", [[BatchGrad()], [HMP()]], ids=["first order", "products"])
def test_layers_and_inputs_of_two_dtypes_are_refused_by_the_op(asked: list, capfd: Any) -> None:
    """A trace by shapes passes over it; the derivative is not what fails."""
    model = nn.Sequential(nn.Linear(3, 2)).double()
    with pytest.raises(
        ArgumentError, match=r"(?s)aten.linear.default in module '0'.*float32\[4, 3\].*same dtype.*Way out"
    ):
        fxcurv.compile(model, MSE, asked)(torch.randn(4, 3), torch.randn(4, 2).double())
    assert capfd.readouterr().err == ""


def test_classes_in_bytes() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 4), torch.randn(5, 3), torch.tensor([0, 3, 1, 1, 2], dtype=torch.uint8)
    result = fxcurv.compile(model, nn.CrossEntropyLoss(), [BatchGrad()])(x, y)
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), model.weight)
    torch.testing.assert_close(result.grad["weight"], grad)
    torch.testing.assert_close(result.grad_batch["weight"].sum(0), grad)
