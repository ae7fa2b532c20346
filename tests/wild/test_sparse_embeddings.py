"""`Embedding(sparse=True)` and `EmbeddingBag(sparse=True)`: dense results; `max_norm=`: what its refusal says to write."""

from __future__ import annotations

import copy

import pytest
import torch
from against_oracle import close
from oracle import Oracle
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import CaptureError
from fxcurv.extensions import GGNMP, HMP, BatchDiagHessian, BatchGrad, DiagGGNExact, DiagHessian, SumGradSquared

CE = nn.CrossEntropyLoss()


class Words(nn.Module):
    def __init__(self, kind: type[nn.Module], **options) -> None:
        super().__init__()
        self.words, self.head = kind(5, 2, **options), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        return self.head((h.mean(1) if h.ndim == 3 else h).tanh())


def built(kind: type[nn.Module], **options) -> tuple[Words, Tensor, Tensor]:
    torch.manual_seed(0)
    return Words(kind, **options).double(), torch.randint(5, (4, 3)), torch.randint(3, (4,))


KINDS = {
    "embedding": (nn.Embedding, {}),
    "mean": (nn.EmbeddingBag, {"mode": "mean"}),
    "sum": (nn.EmbeddingBag, {"mode": "sum"}),
}


@pytest.mark.parametrize("name", ["embedding", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mean", "sum"))])
def test_results_are_dense_and_right(name: str) -> None:
    kind, options = KINDS[name]
    model, x, y = built(kind, sparse=True, **options)
    dense = copy.deepcopy(model)
    dense.words.sparse = False
    asked = [BatchGrad(), SumGradSquared(), DiagGGNExact(), HMP(), GGNMP()]
    asked += [DiagHessian(), BatchDiagHessian()] if name == "embedding" else []
    compiled = fxcurv.compile(model, CE, asked)
    for n in (4, 3, 1):
        found, true = compiled(x[:n], y[:n]), Oracle(dense, CE, x[:n], y[:n])
        assert found.grad["words.weight"].layout is torch.strided
        close(found.grad, true.grad(), "grad")
        close(found.grad_batch, true.grad_batch(), "grad_batch")
        close(found.sum_grad_squared, {k: g.square().sum(0) for k, g in true.grad_batch().items()}, "sum_grad_squared")
        close(found.diag_ggn_exact, true.diag_ggn_exact(), "diag_ggn_exact")
        if name == "embedding":
            close(found.diag_h, true.diag_h(), "diag_h")
            close(found.diag_h_batch, true.diag_h_batch(), "diag_h_batch")
        hessian, p = true.hessian()["words.weight"], model.words.weight
        product = found.hmp["words.weight"](torch.eye(p.numel()).double().reshape(-1, *p.shape))
        close({"hmp": product.flatten(1)}, {"hmp": hessian}, "hmp")


def test_a_batch_without_samples() -> None:
    model, x, y = built(nn.Embedding, sparse=True)
    found = fxcurv.compile(model, nn.CrossEntropyLoss(reduction="sum"), [BatchGrad()])(x[:0], y[:0])
    assert found.grad["words.weight"].layout is torch.strided and not found.grad["words.weight"].any()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_what_a_refused_max_norm_says_to_write(kind: type[nn.Module]) -> None:
    model, x, y = built(kind, max_norm=0.7)
    with pytest.raises(CaptureError, match=r"without max_norm=.*e\.weight\.renorm\(norm_type, 0, max_norm\)"):
        fxcurv.compile(model, CE, [BatchGrad()])(x, y)
    instead = copy.deepcopy(model)
    e, instead.words.max_norm = instead.words, None
    CE(model(x), y).backward()
    with torch.no_grad():
        e.weight.copy_(e.weight.renorm(2.0, 0, 0.7))
    found = fxcurv.compile(instead, CE, [])(x, y)
    close(found.grad, {name: p.grad for name, p in model.named_parameters()}, "grad")
