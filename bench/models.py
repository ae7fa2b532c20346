"""Problems beyond the first six: ResNet-18 and ResNet-50 on [3, 224, 224], GPT-2's smallest shape, transformers for a CPU.

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
    vocabulary: int = 50257,
    length: int = 1024,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    t: int = 256,
    batch: int = 8,
) -> tuple[nn.Module, Tensor, Tensor]:
    """`batch` sequences of `t` tokens."""
    model = GPT2(vocabulary, length, width, depth, heads)
    return model, torch.randint(vocabulary, (batch, t)), torch.randint(vocabulary, (batch, t))


def decoder(t: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Problem f with a tied head, at other lengths."""
    return gpt2(vocabulary=256, length=t, width=128, depth=4, heads=4, t=t, batch=batch)


class RMSNorm(nn.Module):
    """x over the root of its mean square, as Llama writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to the same shape."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotated(x: Tensor) -> Tensor:
    """Su et al. 2021: pairs of features of [N, heads, T, D], turned by angles that grow with the position."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[2], device=x.device).unsqueeze(1) * rates
    a, b = x.split(half, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class LlamaBlock(nn.Module):
    """Touvron et al. 2023: queries in groups that share keys and values, rotated; a gated two-layer network."""

    def __init__(self, width: int, heads: int, groups: int, inner: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        kv = width // heads * groups
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, size, bias=False) for size in (width, kv, kv))
        self.proj, self.down = nn.Linear(width, width, bias=False), nn.Linear(inner, width, bias=False)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, T, width] to the same shape."""
        h = self.norm1(x)
        q, k, v = (
            layer(h).unflatten(-1, (count, -1)).transpose(1, 2)
            for layer, count in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        )
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True, enable_gqa=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Token indices [N, T] to logits [N, vocabulary, T]."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, groups: int, inner: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(LlamaBlock(width, heads, groups, inner) for _ in range(depth)))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits with the classes on axis 1, as cross-entropy wants them."""
        return self.head(self.norm(self.blocks(self.tokens(x)))).transpose(1, 2)


class Adapted(nn.Module):
    """Hu et al. 2021: a frozen linear layer, and beside it a product of two thin ones."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a, self.b = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives, and what the adapter adds."""
        return self.layer(x) + self.b(self.a(x))


def llama(
    vocabulary: int = 1000,
    width: int = 128,
    depth: int = 4,
    heads: int = 8,
    groups: int = 2,
    inner: int = 352,
    batch: int = 8,
    t: int = 128,
    rank: int = 0,
) -> tuple[nn.Module, Tensor, Tensor]:
    """`rank`: of adapters on queries and values, all else frozen; 0: none, and all is trained."""
    model = Llama(vocabulary, width, depth, heads, groups, inner)
    if rank:
        model.requires_grad_(False)
        for block in model.blocks:
            block.q, block.v = Adapted(block.q, rank), Adapted(block.v, rank)
    return model, torch.randint(vocabulary, (batch, t)), torch.randint(vocabulary, (batch, t))


# Hooks go to what the hook-based peers know; a tied head is not among it.
LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
SMALL = partial(gpt2, vocabulary=5000, length=128, width=384, depth=6, heads=6, t=128, batch=4)
PROBLEMS = {
    "resnet18": Problem("ResNet-18, [3, 224, 224], N=64", partial(resnet, basic, (2, 2, 2, 2)), only=LAYERS),
    "resnet50": Problem("ResNet-50, [3, 224, 224], N=64", partial(resnet, bottleneck, (3, 4, 6, 3)), only=LAYERS),
    "gpt2": Problem("GPT-2, 124M parameters, T=256, N=8", gpt2, only=(nn.Linear,)),
    "f64": Problem("decoder d=128 L=4, tied head, T=64, N=16", partial(decoder, 64, 16), only=(nn.Linear,)),
    "f256": Problem("decoder d=128 L=4, tied head, T=256, N=8", partial(decoder, 256, 8), only=(nn.Linear,)),
    "f1024": Problem("decoder d=128 L=4, tied head, T=1024, N=2", partial(decoder, 1024, 2), only=(nn.Linear,)),
    "gpt2-small": Problem("GPT-2, 12.7M parameters, T=128, N=4", SMALL, only=(nn.Linear,)),
    "llama-tiny": Problem("Llama d=128 L=4, 8 heads in 2 groups, T=128, N=8", llama, only=(nn.Linear, nn.Embedding)),
    "lora": Problem(
        "the same, adapters of rank 4 on q and v, all else frozen", partial(llama, rank=4), only=(nn.Linear,)
    ),
}

# The same architectures at a size that any machine runs, for `--quick`.
TINY = {
    "resnet18": partial(resnet, basic, (1, 1), width=4, side=32, batch=4, classes=10),
    "resnet50": partial(resnet, bottleneck, (1, 1), width=4, side=32, batch=4, classes=10),
    "gpt2": partial(gpt2, vocabulary=61, length=16, width=16, depth=2, heads=2, t=8),
    **dict.fromkeys(
        ("f64", "f256", "f1024", "gpt2-small"), partial(gpt2, vocabulary=61, length=16, width=16, depth=2, heads=2, t=8)
    ),
    "llama-tiny": partial(llama, vocabulary=61, width=16, depth=2, heads=4, inner=24, t=8),
    "lora": partial(llama, vocabulary=61, width=16, depth=2, heads=4, inner=24, t=8, rank=2),
}
