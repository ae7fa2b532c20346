"""What is measured: problems, and quantities with how each implementation makes them.

Both are data: a new problem is a builder and a line in ``PROBLEMS``, a new quantity a line in
``QUANTITIES``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Problem:
    """A model with a batch of data; every problem is a classification with the mean cross-entropy.

    Attributes:
        title: What the table's heading says.
        build: Makes the model and a batch, ``() -> (model, x, y)``, the same ones at every call.
        only: Module classes that hooks may be put on; empty for models that hook-based peers know as a whole.
            Where it is set, those peers leave the other modules' parameters out.
    """

    title: str
    build: Callable[[], tuple[nn.Module, Tensor, Tensor]]
    only: tuple[type[nn.Module], ...] = ()


@dataclass(frozen=True)
class Quantity:
    """How each implementation makes a quantity (an empty entry: it does not).

    Attributes:
        extensions: Class names with their arguments, the same in fxcurv and BackPACK; asked for together.
        func: Name of the reduction of ``vmap(grad)`` in ``peers.REDUCTIONS``, or of the product in ``peers.BLOCKS``.
        curvlinops: Arguments of ``KFACLinearOperator``.
        product: The extensions give a function; each parameter's is applied to one random vector.
        save_memory: BackPACK has a second algorithm for it on convolutions; the faster one counts.
        random: Monte-Carlo, so that values of two implementations cannot be compared.
    """

    extensions: tuple[tuple[str, dict[str, Any]], ...]
    func: str = ""
    curvlinops: dict[str, Any] = field(default_factory=dict)
    product: bool = False
    save_memory: bool = False
    random: bool = False


def logistic_regression() -> tuple[nn.Module, Tensor, Tensor]:
    """784-10 on 512 samples."""
    return nn.Sequential(nn.Linear(784, 10)), torch.randn(512, 784), torch.randint(10, (512,))


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """784-512-512-10 with ReLU on 256 samples."""
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return model, torch.randn(256, 784), torch.randint(10, (256,))


def mnist_cnn() -> tuple[nn.Module, Tensor, Tensor]:
    """The network of BackPACK's DiagGGN example on 128 images [1, 28, 28]."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 20, 5, 1), nn.ReLU(), nn.MaxPool2d(2, 2)),
        *(nn.Conv2d(20, 50, 5, 1), nn.ReLU(), nn.MaxPool2d(2, 2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )
    return model, torch.rand(128, 1, 28, 28), torch.randint(10, (128,))


def net_3c3d() -> tuple[nn.Module, Tensor, Tensor]:
    """3C3D on 64 images [3, 32, 32]; sides 32-28-14-12-6-6-3."""

    def stage(inputs: int, outputs: int, kernel: int, padding: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=padding)
        return [conv, nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2)]

    model = nn.Sequential(
        *stage(3, 64, 5, 0),
        *stage(64, 96, 3, 0),
        *stage(96, 128, 3, 1),
        *(nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)),
    )
    return model, torch.rand(64, 3, 32, 32), torch.randint(10, (64,))


def all_cnn_c() -> tuple[nn.Module, Tensor, Tensor]:
    """All-CNN-C without its dropout (peers would draw other masks) on 32 images [3, 32, 32], 100 classes."""
    layers = [(3, 96, 3, 1, 1), (96, 96, 3, 1, 1), (96, 96, 3, 2, 1), (96, 192, 3, 1, 1), (192, 192, 3, 1, 1)]
    layers += [(192, 192, 3, 2, 1), (192, 192, 3, 1, 0), (192, 192, 1, 1, 0), (192, 100, 1, 1, 0)]
    modules: list[nn.Module] = []
    for layer in layers:
        modules += [nn.Conv2d(*layer), nn.ReLU()]
    return (
        nn.Sequential(*modules, nn.AvgPool2d(6), nn.Flatten()),
        torch.rand(32, 3, 32, 32),
        torch.randint(100, (32,)),
    )


class Block(nn.Module):
    """Pre-norm decoder block: causal self-attention, then a two-layer network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, T, width] to the same shape."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Decoder transformer; token indices [N, T] to logits [N, vocabulary, T]."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Logits with the classes on axis 1, as cross-entropy wants them."""
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions))).transpose(1, 2)


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    """Width 128, 4 layers, 4 heads, 64 tokens of a vocabulary of 256, 16 sequences."""
    model = Decoder(vocabulary=256, length=64, width=128, depth=4, heads=4)
    return model, torch.randint(256, (16, 64)), torch.randint(256, (16, 64))


PROBLEMS = {
    "a": Problem("logistic regression 784-10, N=512", logistic_regression),
    "b": Problem("MNIST CNN, N=128", mnist_cnn),
    "c": Problem("3C3D, CIFAR-10 shape, N=64", net_3c3d),
    "d": Problem("All-CNN-C, CIFAR-100 shape, N=32", all_cnn_c),
    "e": Problem("MLP 784-512-512-10, N=256", mlp),
    "f": Problem("decoder transformer d=128 L=4 T=64, N=16", transformer, only=(nn.Linear, nn.Embedding)),
}

MC = {"mc_samples": 1}
CLIP = {"max_norm": 1e-2}  # of gradients with the mean's 1/N: below what problems a to f have when fresh
FIRST_ORDER = (("BatchGrad", {}), ("BatchL2Grad", {}), ("SumGradSquared", {}), ("Variance", {}))
GGN = (("DiagGGNExact", {}), ("DiagGGNMC", MC), ("BatchDiagGGNExact", {}), ("BatchDiagGGNMC", MC))
KRON = (("KFAC", MC), ("KFLR", {}), ("KFRA", {}))
HESSIAN = (("DiagHessian", {}), ("BatchDiagHessian", {}))
ROOTS = (("SqrtGGNExact", {}), ("SqrtGGNMC", MC))

QUANTITIES = {
    "Gradient": Quantity(()),
    "BatchGrad": Quantity((("BatchGrad", {}),), func="grad", save_memory=True),
    "BatchL2Grad": Quantity((("BatchL2Grad", {}),), func="l2"),
    "SumGradSquared": Quantity((("SumGradSquared", {}),), func="sgs"),
    "Variance": Quantity((("Variance", {}),), func="variance"),
    "FirstOrderAll": Quantity(FIRST_ORDER, func="all", save_memory=True),
    "ClippedGrad": Quantity((("ClippedGrad", CLIP),), func="clipped"),
    "DiagGGNExact": Quantity((("DiagGGNExact", {}),)),
    "DiagGGNMC": Quantity((("DiagGGNMC", MC),), random=True),
    "BatchDiagGGNExact": Quantity((("BatchDiagGGNExact", {}),)),
    "BatchDiagGGNMC": Quantity((("BatchDiagGGNMC", MC),), random=True),
    "KFAC": Quantity((("KFAC", MC),), curvlinops={"fisher_type": "mc"}, random=True),
    "KFLR": Quantity((("KFLR", {}),), curvlinops={"fisher_type": "type-2"}),
    "KFRA": Quantity((("KFRA", {}),)),
    "DiagHessian": Quantity((("DiagHessian", {}),)),
    "BatchDiagHessian": Quantity((("BatchDiagHessian", {}),)),
    "SqrtGGNExact": Quantity((("SqrtGGNExact", {}),), save_memory=True),
    "SqrtGGNMC": Quantity((("SqrtGGNMC", MC),), save_memory=True, random=True),
    "HMP": Quantity((("HMP", {}),), func="hmp", product=True),
    "GGNMP": Quantity((("GGNMP", {}),), func="ggnmp", product=True),
    "PCHMP": Quantity((("PCHMP", {"modify": "clip"}),), product=True),
    "DiagGGNExact+KFLR": Quantity((("DiagGGNExact", {}), ("KFLR", {}))),
    "DiagGGNMC+KFAC": Quantity((("DiagGGNMC", MC), ("KFAC", MC)), random=True),
    # Everything but the products that BackPACK's "all in one" documentation page computes, on its model (a).
    "DocsSet": Quantity((*FIRST_ORDER, *GGN, *KRON, *HESSIAN, *ROOTS), random=True),
}
