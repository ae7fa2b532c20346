"""Problems of the size that a GPU is for: ResNet-18 and ResNet-50 on [3, 224, 224], and GPT-2's smallest shape.

Plain re-implementations in torch.nn, so that nothing is downloaded; parameters are PyTorch's initial ones.
"""

from collections.abc import Callable
from functools import partial

import torch
from cases import Block, Problem
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A block of ResNet: relu(x + f(x)); x through a strided 1x1 convolution where its shape changes."""

    def __init__(self, layers: list[tuple[int, int, int, int]]) -> None:
        """Take the convolutions of f, as (inputs, outputs, kernel, stride)."""
        super().__init__()
        modules: list[nn.Module] = []
        for inputs, outputs, kernel, stride in layers:
            modules += [*convolution(inputs, outputs, kernel, stride), nn.ReLU()]
        self.f = nn.Sequential(*modules[:-1])
        first, last, stride = layers[0][0], layers[-1][1], max(layer[3] for layer in layers)
        same = first == last and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(first, last, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        return F.relu(self.shortcut(x) + self.f(x))


def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    """A convolution without bias, and its normalisation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def basic(inputs: int, width: int, stride: int) -> Residual:
    """Two 3x3 convolutions (ResNet-18 and -34)."""
    return Residual([(inputs, width, 3, stride), (width, width, 3, 1)])


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """1x1, 3x3 with the stride, 1x1 to four times the width (ResNet-50)."""
    return Residual([(inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)])


def resnet(
    block: Callable[[int, int, int], Residual],
    depths: tuple[int, ...],
    width: int = 64,
    side: int = 224,
    batch: int = 64,
    classes: int = 1000,
) -> tuple[nn.Module, Tensor, Tensor]:
    """He et al. 2015, table 1; batch normalisation in eval mode, where samples do not interact."""
    growth = 4 if block is bottleneck else 1
    modules = [*convolution(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    inputs = width
    for stage, depth in enumerate(depths):
        for index in range(depth):
            own = width << stage
            modules.append(block(inputs, own, 2 if stage > 0 and index == 0 else 1))
            inputs = growth * own
    model = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
    return model.eval(), torch.rand(batch, 3, side, side), torch.randint(classes, (batch,))


class GPT2(nn.Module):
    """Radford et al. 2019: pre-norm decoder, its head tied to the embedding; [N, T] to logits [N, vocabulary, T]."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Logits with the classes on axis 1, as cross-entropy wants them."""
        h = self.tokens(x) + self.positions.weight[: x.shape[1]]
        return F.linear(self.norm(self.blocks(h)), self.tokens.weight).transpose(1, 2)


def gpt2(
    vocabulary: int = 50257, length: int = 1024, width: int = 768, depth: int = 12, heads: int = 12, t: int = 256
) -> tuple[nn.Module, Tensor, Tensor]:
    """Eight sequences of `t` tokens."""
    model = GPT2(vocabulary, length, width, depth, heads)
    return model, torch.randint(vocabulary, (8, t)), torch.randint(vocabulary, (8, t))


# Hooks go to what the hook-based peers know; a tied head is not among it.
LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
PROBLEMS = {
    "resnet18": Problem("ResNet-18, [3, 224, 224], N=64", partial(resnet, basic, (2, 2, 2, 2)), only=LAYERS),
    "resnet50": Problem("ResNet-50, [3, 224, 224], N=64", partial(resnet, bottleneck, (3, 4, 6, 3)), only=LAYERS),
    "gpt2": Problem("GPT-2, 124M parameters, T=256, N=8", gpt2, only=(nn.Linear,)),
}

# The same architectures at a size that any machine runs, for `--quick`.
TINY = {
    "resnet18": partial(resnet, basic, (1, 1), width=4, side=32, batch=4, classes=10),
    "resnet50": partial(resnet, bottleneck, (1, 1), width=4, side=32, batch=4, classes=10),
    "gpt2": partial(gpt2, vocabulary=61, length=16, width=16, depth=2, heads=2, t=8),
}
