"""What ``bench/kernels.py`` measures: layers of real networks, and the kernels with their arguments at a layer.

A new kernel is a line in ``KERNELS``. Its FLOPs are those of its registered formula, its minimal bytes those of
its arguments read once and its result written once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Layer:
    """A layer as kernels see it: I inputs, O outputs, S positions that share the weight; square images.

    Attributes:
        name: Network and layer.
        batch: Samples N, of which a device takes what it can.
        inputs, outputs: Features or channels.
        positions: S of a layer that is no convolution.
        side, kernel, stride, padding: Of a convolution, in both dimensions; `side` of the input.
        columns: V.
    """

    name: str
    batch: int
    inputs: int
    outputs: int
    positions: int = 1
    side: int = 0
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    columns: int = 1

    @property
    def out(self) -> int:
        """Side of a convolution's output."""
        return (self.side + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def s(self) -> int:
        """Positions of the layer as a linear one."""
        return self.out**2 if self.side else self.positions

    @property
    def i(self) -> int:
        """Inputs of the layer as a linear one, its patches unfolded."""
        return self.inputs * self.kernel**2

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Kernel, stride, padding, dilation."""
        return [self.kernel] * 2, [self.stride] * 2, [self.padding] * 2, [1, 1]


@dataclass(frozen=True)
class Make:
    """Makes random arguments of a kernel."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        """Normal values of this shape."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def index(self, rows: int, *shape: int) -> Tensor:
        """Indices below `rows`."""
        return torch.randint(rows, shape, device=self.device)


@dataclass(frozen=True)
class Kernel:
    """A kernel of `fxcurv.kernels`, a module and an op of one name.

    Attributes:
        layers: Where it is measured, the cheapest first.
        arguments: Of the op, from a layer and the number of samples.
        naive: The same from public PyTorch, as one writes it; None where the kernel's reference is that.
        beside: The kernel in whose module this one is, for convolutions, with `reference_conv`; "" for one of its own.
    """

    layers: tuple[Layer, ...]
    arguments: Callable[[Make, Layer, int], tuple[Any, ...]]
    naive: Callable[..., Any] | None = None
    beside: str = ""


CONVOLUTIONS = (
    Layer("3C3D conv1", 64, 3, 64, side=32, kernel=5),
    Layer("3C3D conv2", 64, 64, 96, side=14, kernel=3),
    Layer("3C3D conv3", 64, 96, 128, side=6, kernel=3, padding=1),
    Layer("All-CNN-C conv2", 32, 96, 96, side=32, kernel=3, padding=1),
    Layer("All-CNN-C conv6", 32, 192, 192, side=16, kernel=3, stride=2, padding=1),
    Layer("ResNet-50 stage 1, 1x1", 64, 64, 256, side=56),
    Layer("ResNet-50 stage 2, 3x3", 64, 128, 128, side=28, kernel=3, padding=1),
    Layer("ResNet-50 stage 4, 3x3", 64, 512, 512, side=7, kernel=3, padding=1),
)
LINEAR = (
    Layer("MLP 784-512", 256, 784, 512),
    Layer("transformer 768-3072", 8, 768, 3072, positions=1024),
    Layer("transformer 3072-768", 8, 3072, 768, positions=1024),
)
COLUMNS = (
    Layer("MLP 784-512, 10 columns", 256, 784, 512, columns=10),
    Layer("3C3D conv2, 10 columns", 64, 64, 96, side=14, kernel=3, columns=10),
)
EMBEDDINGS = (
    Layer("bytes 256-128", 16, 256, 128, positions=64),
    Layer("GPT-2 50257-768", 8, 50257, 768, positions=1024),
)
POOLS = (
    Layer("3C3D pool1, 10 columns", 64, 64, 64, side=28, kernel=3, stride=2, padding=1, columns=10),
    Layer("ResNet-50 pool", 64, 64, 64, side=112, kernel=3, stride=2, padding=1),
)


def factors(make: Make, layer: Layer, n: int) -> tuple[Tensor, Tensor]:
    """A [N, S, I] and g [V, N, S, O]."""
    return make(n, layer.s, layer.i), make(layer.columns, n, layer.s, layer.outputs)


def images(make: Make, layer: Layer, n: int) -> tuple[Tensor, Tensor]:
    """X [N, C, H, W] and g [V, N, O, H', W']."""
    x = make(n, layer.inputs, layer.side, layer.side)
    return x, make(layer.columns, n, layer.outputs, layer.out, layer.out)


def one_column(make: Make, layer: Layer, n: int) -> tuple[Tensor, Tensor]:
    """X [N, C, H, W] and g [N, O, H', W']."""
    x, g = images(make, layer, n)
    return x, g[0]


def pooled(make: Make, layer: Layer, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """G [V, N, C, H', W'], x [N, C, H, W] and where its maxima are."""
    x, g = images(make, layer, n)
    kernel, stride, padding, _ = layer.geometry
    return g, x, F.max_pool2d(x, kernel, stride, padding, return_indices=True)[1]


def unfolded(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """Patches [N, C * kernel, S]."""
    return F.unfold(x, kernel, dilation, padding, stride)


def naive_conv(x: Tensor, g: Tensor, w: None, per_sample: bool, *geometry: Any) -> Tensor:
    """Individual gradients from unfolded images, squared and summed; without weights, one group."""
    p = torch.einsum("vnos,nis->vnoi", g.flatten(3), unfolded(x, *geometry[:4]))
    return p.square().sum((0, 1)).view(g.shape[2], x.shape[1], *geometry[0])


def naive_products(x: Tensor, g: Tensor, *geometry: Any) -> Tensor:
    """Individual gradients from unfolded images, [V, N, O, I]; one group."""
    return torch.einsum("vnos,nis->vnoi", g.flatten(3), unfolded(x, *geometry[:4])).unflatten(
        3, (x.shape[1], *geometry[0])
    )


def naive_moments(x: Tensor, g: Tensor, total: bool, squares: bool, norms: bool, *geometry: Any) -> tuple[Tensor, ...]:
    """Individual gradients, and what is asked for of them: everything."""
    p = naive_products(x, g.unsqueeze(0), *geometry)[0]
    return p.sum(0), p.square().sum(0), p.square().flatten(1).sum(1)


def naive_syrk_conv(x: Tensor, out: list[int], *geometry: Any) -> Tensor:
    """The unfolded images' second moment."""
    patches = unfolded(x, *geometry)
    return torch.einsum("nks,nls->kl", patches, patches)


def naive_embedding(index: Tensor, g: Tensor, w: None, rows: int, padding: int) -> Tensor:
    """A table of gradients per column and sample, squared and summed; without weights or padding."""
    table = g.new_zeros(*g.shape[:2], rows, g.shape[3])
    table.scatter_add_(2, index[None, :, :, None].expand(g.shape), g)
    return table.square().sum((0, 1))


KERNELS = {
    "outer_norm": Kernel(LINEAR + CONVOLUTIONS, factors),
    "outer_square_sum": Kernel(LINEAR + CONVOLUTIONS + COLUMNS, lambda m, layer, n: (*factors(m, layer, n), None, False)),
    "outer_square_sum_conv": Kernel(
        (*CONVOLUTIONS, COLUMNS[-1]), lambda m, layer, n: (*images(m, layer, n), None, False, *layer.geometry, 1), naive_conv
    ),
    "outer_batch_conv": Kernel(
        (*CONVOLUTIONS, COLUMNS[-1]), lambda m, layer, n: (*images(m, layer, n), *layer.geometry, 1), naive_products
    ),
    "outer_moments": Kernel(
        LINEAR + CONVOLUTIONS,
        lambda m, layer, n: (m(n, layer.s, layer.i), m(n, layer.s, layer.outputs), True, True, True),
    ),
    "outer_moments_conv": Kernel(
        CONVOLUTIONS, lambda m, layer, n: (*one_column(m, layer, n), True, True, True, *layer.geometry, 1), naive_moments,
        beside="outer_moments",
    ),
    "outer_gram": Kernel(
        LINEAR, lambda m, layer, n: (m(n, layer.s, layer.i), m(layer.columns, n, layer.s, layer.outputs), None, None)
    ),
    "max_pool_columns": Kernel(POOLS, lambda m, layer, n: (*pooled(m, layer, n), *layer.geometry, False)),
    "syrk": Kernel(LINEAR + CONVOLUTIONS, lambda m, layer, n: (m(layer.i, n * layer.s),)),
    "syrk_conv": Kernel(
        CONVOLUTIONS, lambda m, layer, n: (images(m, layer, n)[0], [layer.out] * 2, *layer.geometry), naive_syrk_conv
    ),
    "embedding_square_sum": Kernel(
        EMBEDDINGS,
        lambda m, layer, n: (
            m.index(layer.inputs, n, layer.s), m(layer.columns, n, layer.s, layer.outputs), None, layer.inputs, -1
        ),
        naive_embedding,
    ),
}  # fmt: skip
