"""Models and what is asked of them on several ranks, and the comparison with one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fxcurv
from fxcurv import kronecker
from fxcurv.extensions import (
    ClippedGrad,
)
from fxcurv.ir.private import pytree


def mlp(n: int):
    """Class weights and ignored samples: the ranks' normalisers differ."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    weight = torch.tensor([1.0, 3.0, 0.5]).double()
    return model, nn.CrossEntropyLoss(weight=weight, ignore_index=2), torch.randn(n, 4), torch.randint(3, (n,))


def squares(n: int):
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    return model, nn.MSELoss(), torch.randn(n, 3), torch.randn(n, 2)


def cnn(n: int):
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers), nn.CrossEntropyLoss(), torch.randn(n, 2, 4, 4), torch.randint(3, (n,))


class Transformer(nn.Module):
    """One block, whose embedding is also the head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return (x @ self.embed.weight.t()).transpose(1, 2)


def transformer(n: int):
    """A mean over valid tokens, of which every sample has another number."""
    tokens = torch.randint(7, (n, 3))
    targets = torch.where(torch.rand(n, 3) < 0.3, -100, torch.randint(7, (n, 3)))
    return Transformer(), nn.CrossEntropyLoss(), tokens, targets


def batch_norm(n: int):
    layers = [
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.BatchNorm1d(4),
        nn.Linear(4, 3),
    ]
    return nn.Sequential(*layers), nn.CrossEntropyLoss(), torch.randn(n, 2, 4, 4), torch.randint(3, (n,))


MODELS = {f.__name__: f for f in (mlp, squares, cnn, transformer, batch_norm)}


def made(name: str, n: int):
    """(model, loss, inputs, targets) in float64, the same in every process."""
    torch.manual_seed(0)
    model, loss, x, y = MODELS[name](n)
    return model.double(), loss, *(t.double() if t.is_floating_point() else t for t in (x, y))


def part(t: Tensor, sizes, rank: int) -> Tensor:
    return t[sum(sizes[:rank]) : sum(sizes[: rank + 1])]


def mesh_of(count: int):
    return init_device_mesh("cpu", (count,), mesh_dim_names=("dp",))


def compare(result, want, asked, output=True) -> None:
    """Every field of the whole batch is what one process has."""
    fields = ["loss", *(["output"] if output else []), "grad", *(e.savefield for e in asked)]
    fields += ["sample_norms"] if any(isinstance(e, ClippedGrad) for e in asked) else []
    for field in fields:
        got, expected = (_of_one_basis(value) for value in (result.whole(field), getattr(want, field)))
        leaves = pytree.tree_leaves(expected)
        assert leaves
        for a, b in zip(pytree.tree_leaves(got), leaves, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, field=field: f"{field}: {text}")


def _of_one_basis(field):
    """Eigenvectors of equal eigenvalues may be any: the matrices that they are of are compared."""
    if not isinstance(field, dict):
        return field
    return {name: kronecker.dense(v) if isinstance(v, kronecker.Eigenbasis) else v for name, v in field.items()}


def alone(name: str, n: int, asked):
    """What one process has, and its model."""
    model, loss, x, y = made(name, n)
    return fxcurv.compile(model, loss, asked, check=None)(x, y, seed=7), model
