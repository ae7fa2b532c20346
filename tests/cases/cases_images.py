"""Cases by layer: convolutions, pooling, normalization, and networks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from case_tools import (
    CONVS,
    Net,
    Parts,
    add,
    case,
    classify,
    labels,
    mlp,
    regress,
    stack,
)
from torch import Tensor, nn

# ---- convolution and pooling ------------------------------

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 6)),
    "conv1d_same_dilated": (lambda: nn.Conv1d(2, 3, 3, padding="same", dilation=2), (2, 6)),
    "conv1d_same_even_kernel": (lambda: nn.Conv1d(2, 3, 2, padding="same"), (2, 5)),
    "conv1d_groups_stride": (lambda: nn.Conv1d(4, 2, 3, groups=2, stride=2, padding=1), (4, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 5)),
    "conv2d_stride_padding": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 5, 4)),
    "conv2d_same": (lambda: nn.Conv2d(2, 2, 3, padding="same"), (2, 4, 3)),
    "conv2d_valid_nobias": (lambda: nn.Conv2d(2, 3, 2, padding="valid", bias=False), (2, 4, 4)),
    "conv2d_dilation": (lambda: nn.Conv2d(1, 2, 2, dilation=(2, 1)), (1, 5, 4)),
    "conv2d_groups": (lambda: nn.Conv2d(4, 4, 2, groups=2), (4, 3, 3)),
    "conv2d_depthwise": (lambda: nn.Conv2d(3, 6, 2, groups=3), (3, 3, 3)),
    "conv2d_circular": (lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (1, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), (1, 3, 4, 3)),
    "conv3d_groups_padding": (
        lambda: nn.Conv3d(2, 2, 2, groups=2, padding=(1, 0, 1), stride=2),
        (2, 2, 3, 2),
    ),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 3)),
    "conv_transpose1d_nobias": (lambda: nn.ConvTranspose1d(2, 2, 2, bias=False), (2, 4)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(2, 3, 2), (2, 3, 3)),
    "conv_transpose2d_groups": (
        lambda: nn.ConvTranspose2d(4, 2, (2, 3), stride=2, groups=2, dilation=(2, 1)),
        (4, 2, 2),
    ),
    "conv_transpose2d_stride": (
        lambda: nn.ConvTranspose2d(2, 2, 3, stride=(2, 1), padding=(1, 2), output_padding=(1, 0)),
        (2, 2, 3),
    ),
    "conv_transpose3d": (
        lambda: nn.ConvTranspose3d(2, 1, 2, stride=(2, 1, 2), padding=(1, 0, 0)),
        (2, 2, 2, 2),
    ),
}
POOLS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "max_pool1d": (lambda: nn.MaxPool1d(3, 2, padding=1), 1),
    "max_pool2d": (lambda: nn.MaxPool2d(2), 2),
    "max_pool2d_ceil_dilated": (lambda: nn.MaxPool2d(2, stride=(2, 1), dilation=(1, 2), ceil_mode=True), 2),
    "max_pool3d": (lambda: nn.MaxPool3d(2), 3),
    "avg_pool1d": (lambda: nn.AvgPool1d(2, padding=1), 1),
    "avg_pool2d": (lambda: nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False), 2),
    "avg_pool3d": (lambda: nn.AvgPool3d(2), 3),
    "adaptive_avg_pool1d": (lambda: nn.AdaptiveAvgPool1d(3), 1),
    "adaptive_avg_pool2d": (lambda: nn.AdaptiveAvgPool2d((2, 1)), 2),
    "adaptive_avg_pool2d_global": (lambda: nn.AdaptiveAvgPool2d(1), 2),
    "adaptive_max_pool2d": (lambda: nn.AdaptiveMaxPool2d(2), 2),
    "upsample_nearest": (lambda: nn.Upsample(scale_factor=2), 2),
    "upsample_bilinear": (lambda: nn.Upsample(size=(3, 5), mode="bilinear"), 2),
}
for _name, (_conv, _shape) in CONVOLUTIONS.items():
    add(_name, lambda conv=_conv, shape=_shape: stack(conv(), shape=shape), kind="ce")
for _name, (_pool, _dim) in POOLS.items():
    add(
        _name,
        lambda pool=_pool, d=_dim: stack(CONVS[d](1, 2, 2), pool(), shape=(1, *[6, 5, 4][:d])),
        kind="ce",
    )
add(
    "cnn_two_layers",
    lambda: stack(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2), shape=(1, 6, 6)),
    kind="ce",
)
add(
    "cnn_single_sample",
    lambda: classify(
        nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)),
        1,
        5,
        5,
        n=1,
    ),
    kind="ce",
)
add(
    "dense_prediction",
    lambda: (
        nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 1)),
        nn.CrossEntropyLoss(),
        torch.randn(3, 1, 2, 3),
        labels(3, 2, 3),
    ),
    kind="ce",
)


@case(kind="ce")
def residual_net() -> Parts:
    """Two residual blocks, one with a projection, in-place ReLU as torchvision has it."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x), inplace=True)
        x = F.relu(x + m.inner(F.relu(m.first(x))), inplace=True)
        x = m.project(x) + m.down(x)
        return m.head(x.mean((2, 3)))

    return classify(
        Net(
            run,
            stem=nn.Conv2d(1, 2, 3, padding=1, bias=False),
            first=nn.Conv2d(2, 2, 2, padding="same"),
            inner=nn.Conv2d(2, 2, 1),
            project=nn.Conv2d(2, 3, 1, stride=2, bias=False),
            down=nn.Conv2d(2, 3, 3, stride=2, padding=1),
            head=nn.Linear(3, 3),
        ),
        1,
        4,
        4,
        n=3,
    )


def unet(up: nn.Module) -> Parts:
    """One level down and up, the skip concatenated, a map as the output."""

    def run(m: Any, x: Tensor) -> Tensor:
        skip = torch.tanh(m.enter(x))
        low = torch.tanh(m.low(F.max_pool2d(skip, 2)))
        return m.leave(torch.cat([skip, m.up(low)], 1))

    return regress(
        Net(
            run,
            enter=nn.Conv2d(1, 2, 3, padding=1),
            low=nn.Conv2d(2, 2, 1),
            up=up,
            leave=nn.Conv2d(4, 1, 3, padding=1),
        ),
        1,
        4,
        4,
    )


add("unet_upsample", lambda: unet(nn.Upsample(scale_factor=2)), kind="mse")
add("unet_transposed", lambda: unet(nn.ConvTranspose2d(2, 2, 2, stride=2)), kind="mse")


@case(kind="ce")
def squeeze_excite() -> Parts:
    """A channel gate: global pooling, two layers, a product of activations."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x)
        gate = torch.sigmoid(m.gate(F.silu(m.squeeze(x.mean((2, 3))))))
        return m.head((x * gate[:, :, None, None]).flatten(1))

    return classify(
        Net(run, conv=nn.Conv2d(1, 3, 2), squeeze=nn.Linear(3, 2), gate=nn.Linear(2, 3), head=nn.Linear(12, 2)),
        1,
        3,
        3,
        n=3,
        classes=2,
    )


# ---- normalization ------------------------------


def trained(norm: nn.Module) -> nn.Module:
    """The norm in eval mode with statistics, scale and shift that are not the trivial ones."""
    with torch.no_grad():
        for name, t in [*norm.named_parameters(), *norm.named_buffers()]:
            if t.is_floating_point():
                t.copy_(torch.rand_like(t) + 0.5 if "var" in name or "weight" in name else torch.randn_like(t))
    return norm.eval()


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch_norm1d": (lambda: nn.BatchNorm1d(3), (2, 4)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(3), (2, 3, 3)),
    "batch_norm2d_plain": (lambda: nn.BatchNorm2d(3, affine=False), (2, 3, 3)),
    "batch_norm3d": (lambda: nn.BatchNorm3d(3), (2, 2, 3, 2)),
    "group_norm": (lambda: nn.GroupNorm(1, 3), (2, 3, 3)),
    "group_norm_channels": (lambda: nn.GroupNorm(3, 3), (2, 3, 3)),
    "instance_norm1d": (lambda: nn.InstanceNorm1d(3, affine=True), (2, 5)),
    "instance_norm2d": (lambda: nn.InstanceNorm2d(3), (2, 3, 3)),
    "instance_norm2d_running": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (2, 3, 3),
    ),
    "layer_norm_image": (lambda: nn.LayerNorm((3, 2, 2)), (2, 3, 3)),
    "local_response_norm": (lambda: nn.LocalResponseNorm(2, alpha=0.5), (2, 3, 3)),
}
for _name, (_norm, _shape) in NORMS.items():
    add(
        _name,
        lambda norm=_norm, s=_shape: stack(CONVS[len(s) - 1](2, 3, 2), trained(norm()), shape=s),
        kind="ce",
    )
for _name, _vector_norm in {
    "batch_norm_vectors": lambda: nn.BatchNorm1d(5),
    "layer_norm": lambda: nn.LayerNorm(5),
    "layer_norm_nobias": lambda: nn.LayerNorm(5, bias=False),
    "rms_norm": lambda: nn.RMSNorm(5, eps=1e-5),
}.items():
    add(_name, lambda norm=_vector_norm: classify(mlp(trained(norm())), 4), kind="ce")
