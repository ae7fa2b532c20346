"""What random models are made of: blocks `(shape, k) -> (module, shape)` for features, sequences and images of one sample."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from case_tools import Net
from torch import nn
from torch.autograd import Function

Shape = tuple[int, ...]


class Mixing(Net):
    """A block whose samples meet: no quantity per sample exists of what is before it."""


class Changing(Net):
    """A block that reads numbers of Python; `change` is called between two calls."""

    def __init__(self, run: Callable[..., Any], change: Callable[[Net], None], **held: Any) -> None:
        super().__init__(run, **held)
        self.changed = [change]

    def change(self) -> None:
        """Give the numbers other values."""
        self.changed[0](self)


def one_of(k: int, *options: Any) -> Any:
    return options[k % len(options)]


ACTIVATIONS = [
    nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.LeakyReLU, nn.Hardswish, nn.Mish, nn.PReLU,
    nn.LogSigmoid, nn.Softsign, nn.SELU, nn.Hardtanh, lambda: nn.GELU(approximate="tanh"), lambda: nn.Dropout(0.5),
]  # fmt: skip


def activation(shape, k):
    return ACTIVATIONS[k % len(ACTIVATIONS)](), shape


# ---- blocks on features in the last axis: (shape, k) -> (module, shape) ------------------------------


def linear(shape, k):
    width = 2 + k % 3
    return nn.Linear(shape[-1], width, bias=k % 2 == 0), (*shape[:-1], width)


def norm(shape, k):
    kinds = [nn.LayerNorm, nn.RMSNorm, lambda d: nn.LayerNorm(d, bias=False)]
    return kinds[k % 3](shape[-1]), shape


def twice(shape, k):
    """One layer at two places."""
    return Net(lambda m, x: m.layer(torch.tanh(m.layer(x))), layer=nn.Linear(shape[-1], shape[-1])), shape


def tied(shape, k):
    """A weight and its transpose."""
    weight = nn.Parameter(torch.randn(2 + k % 3, shape[-1]))
    return Net(lambda m, x: torch.sigmoid(x @ m.weight.T) @ m.weight, weight=weight), shape


def gate(shape, k):
    return Net(lambda m, x: x * torch.sigmoid(m.layer(x)), layer=nn.Linear(shape[-1], shape[-1])), shape


def bilinear(shape, k):
    layers = {"a": nn.Linear(shape[-1], 3), "b": nn.Linear(shape[-1], 3, bias=False)}
    return Net(lambda m, x: m.a(x) * m.b(x), **layers), (*shape[:-1], 3)


def branch(shape, k):
    """Concatenation of the input and a branch."""
    layer = nn.Linear(shape[-1], 2)
    return Net(lambda m, x: torch.cat([x, m.layer(x)], -1), layer=layer), (*shape[:-1], shape[-1] + 2)


def residual(shape, k):
    body = nn.Sequential(nn.Linear(shape[-1], 3), activation(shape, k)[0], nn.Linear(3, shape[-1]))
    return Net(lambda m, x: x + m.body(x), body=body), shape


def affine(shape, k):
    """Raw parameters with broadcasting; the scale goes through another op first."""
    scale, shift = nn.Parameter(torch.randn(shape[-1])), nn.Parameter(torch.randn(1))
    return Net(lambda m, x: x * torch.exp(m.scale) - m.shift, scale=scale, shift=shift), shape


def softmax(shape, k):
    return nn.Softmax(-1) if k % 2 else nn.LogSoftmax(-1), shape


def low_rank(shape, k):
    parts = {"w": nn.Parameter(torch.randn(shape[-1], 3)), "a": nn.Parameter(torch.randn(shape[-1], 1))}
    return Net(lambda m, x: x @ (m.w + m.a @ m.b), **parts, b=nn.Parameter(torch.randn(1, 3))), (*shape[:-1], 3)


# ---- blocks that keep the shape, on values of any rank ------------------------------


def index(shape, k):
    """Data movement by index values inside a sample, along the features."""
    d = shape[-1]
    runs = [
        lambda m, x: x.gather(-1, m.index.expand_as(x)),
        lambda m, x: x.index_select(-1, m.index),
        lambda m, x: torch.take_along_dim(x, x.argsort(-1), -1),
        lambda m, x: x[..., m.index],
        lambda m, x: x.index_add(-1, m.index, torch.sin(x), alpha=0.5),
        lambda m, x: torch.zeros_like(x).scatter_add(-1, m.index.expand_as(x), x),
        lambda m, x: x + x.gather(-1, (x > 0).long() * (d - 1)),
        lambda m, x: x.sort(-1, descending=True)[0],
        lambda m, x: x.topk(d - 1, -1)[0].sum(-1, keepdim=True) + x,
        lambda m, x: x.flip(-1).roll(1, -1).cumsum(-1),
        lambda m, x: x.scatter(-1, m.index[:1].expand(*x.shape[:-1], 1), 0.5),
        lambda m, x: x.index_copy(-1, m.order, 2 * x),
        lambda m, x: x + m.table((x[..., 0] > 0).long()),
        lambda m, x: x.scatter_reduce(-1, m.index.expand_as(x), torch.cos(x), "sum"),
        lambda m, x: x.index_put((torch.arange(len(x)),), x.exp()),
        lambda m, x: x[torch.arange(len(x))],
        lambda m, x: x.index_fill(-1, m.index[:1], 0.5),
        lambda m, x: x * F.one_hot(x.argmax(-1), d),
    ]
    held = {"index": torch.randint(d, (d,)), "order": torch.randperm(d), "table": nn.Embedding(2, d)}
    return Net(
        one_of(k, *runs), **(held if k % len(runs) == 12 else {"index": held["index"], "order": held["order"]})
    ), shape


def crossing(shape, k):
    """Samples that meet."""
    rows = lambda x: (torch.arange(len(x)) // 2).reshape(-1, *[1] * len(shape)).expand_as(x)  # noqa: E731
    runs = [
        lambda m, x: x.index_add(0, torch.arange(len(x)) // 2, x),
        lambda m, x: torch.zeros_like(x).scatter_add(0, rows(x), x),
        lambda m, x: x + x.roll(1, 0),
        lambda m, x: x - x.mean(0, keepdim=True),
        lambda m, x: x * torch.cat([x[1:], x[:1]]),
        lambda m, x: x.cumsum(0),
        lambda m, x: x + x.flip(0),
        lambda m, x: x * x.amax(0),
        lambda m, x: x.softmax(0),
        lambda m, x: x + x[torch.arange(len(x)) // 2],
        lambda m, x: x.gather(0, rows(x)),
        lambda m, x: x + x[:1].detach() * x.sum(0),
    ]
    return Mixing(one_of(k, *runs)), shape


def mask(shape, k):
    runs = [
        lambda m, x: x.masked_fill(m.mask, 0.5),
        lambda m, x: x.masked_fill(x > 0.3, -1.0),
        lambda m, x: torch.where(x > 0, x, 0.1 * x.exp()),
        lambda m, x: x * (x > x.mean(-1, keepdim=True)),
        lambda m, x: torch.where(m.mask, torch.zeros(()), x),
        lambda m, x: x.clamp(min=-0.5).nan_to_num(),
        lambda m, x: x.masked_fill(m.mask, -torch.inf).softmax(-1),
        lambda m, x: x.masked_fill((x.flatten(1).sum(1) > 0).reshape(-1, *[1] * len(shape)), 0.0),
        lambda m, x: torch.where(x.isfinite() & ~m.mask, x.square(), x),
        lambda m, x: (x * ~m.mask).sum(-1, keepdim=True) / (~m.mask).sum() + x,
    ]
    chosen = torch.rand(shape[-1]) < 0.5
    chosen[k % shape[-1]] = False
    return Net(one_of(k, *runs), mask=chosen), shape


class Through(Function):
    """Straight-through rounding."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(2 * x) / 2

    @staticmethod
    def backward(ctx, g):
        return g


class Reverse(Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -ctx.scale * g, None


class Scaled(Function):
    """Keeps its output."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return 3 * g * (1 - y * y)


class Clip(Function):
    """Clips the gradient: its backward is not linear, so columns do not exist behind it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.02, 0.02)


def custom(shape, k):
    """A custom autograd function, called by its class or by a method that the module keeps."""
    functions = one_of(k // 2, (Through,), (Reverse, 0.5), (Scaled,), (Clip,))
    if k % 2:
        return Net(lambda m, x: m.kept(x, *functions[1:]), kept=functions[0].apply), shape
    return Net(lambda m, x: functions[0].apply(x, *functions[1:])), shape


def state(shape, k):
    """A number that Python holds."""
    scale = 2.0

    def closure(m, x):
        return x * scale

    def rescale(m):
        nonlocal scale
        scale = -0.5

    kinds = [
        (lambda m, x: x * m.scale, lambda m: setattr(m, "scale", 0.5), {"scale": 2.0}),
        (closure, rescale, {}),
        (lambda m, x: F.leaky_relu(x, m.slope), lambda m: setattr(m, "slope", 0.3), {"slope": 0.1}),
        (lambda m, x: torch.tanh(x) if m.flag else x, lambda m: setattr(m, "flag", False), {"flag": True}),
        (lambda m, x: x + m.held["by"][0], lambda m: m.held.update(by=[1.5]), {"held": {"by": [0.5]}}),
        (lambda m, x: x.clamp(-m.bound, m.bound), lambda m: setattr(m, "bound", 0.5), {"bound": 1}),
        (lambda m, x: x / m.temperature, lambda m: setattr(m, "temperature", m.temperature / 2), {"temperature": 3.0}),
    ]
    run, change, held = one_of(k, *kinds)
    return Changing(run, change, **held), shape


def shifted(m, x):
    y = x.clone()
    y[..., 1:] = 2 * x[..., :-1]
    return y


def last(m, x):
    y = 1 * x
    y[..., -1] = 0.5 * x[..., 0]
    return y


def by_mask(m, x):
    y = torch.tanh(x).clone()
    y[y < 0] = 0.1
    return y


def adding(m, x):
    y = torch.zeros_like(x)
    for t in range(3):
        y.add_(torch.sin(x * (t + 1)))
    return y


def columnwise(m, x):
    y = x.new_zeros(x.shape)
    for j in range(x.shape[-1]):
        y[..., j] = x[..., j] * x[..., j - 1]
    return y


def stepped(m, x):
    y = x.clone()
    y[..., ::2] *= -1
    y[..., -2:].mul_(2)
    return y


def chained(m, x):
    y = m.layer(x)
    y += x
    return y.relu_() * x


def copied(m, x):
    y = x.clone()
    y[..., :1].copy_(x[..., -1:])
    return y.sigmoid_()


def filled(m, x):
    return x.clone().masked_fill_(x > 0, -0.5).clamp_(-1, 1)


def inner(m, x):
    y = x.clone()
    y[:, 0] = y[:, 0] * 2
    y[:, -1:] += x[:, -1:].square()
    return y


def viewed(m, x):
    y = x.clone()
    flat = y.flatten(1)
    flat[:, 0] = 1.0
    flat[:, 1:] += flat[:, :1]
    return torch.sin(y)


def added_at(m, x):
    y = torch.cos(x)
    y.index_add_(-1, torch.zeros(x.shape[-1], dtype=torch.long), x)
    return y


def put(m, x):
    y = x.clone()
    y[..., [0, -1]] = x[..., [-1, 0]].exp()
    return y


def inplace(shape, k):
    run = one_of(
        k, shifted, last, by_mask, adding, columnwise, stepped, chained, copied, filled, inner, viewed, added_at, put
    )
    return Net(run, **({"layer": nn.Linear(shape[-1], shape[-1])} if run is chained else {})), shape


def squeezed(shape, k):
    """`squeeze` leaves out the samples where there is one."""
    runs = [
        lambda m, x: torch.tanh(x.unsqueeze(1).squeeze()).reshape(x.shape),
        lambda m, x: x * torch.sigmoid(m.gate(x).squeeze()).reshape(*x.shape[:-1], 1),
        lambda m, x: x + m.gate(x).squeeze(-1).unsqueeze(-1),
    ]
    return Net(one_of(k, *runs), **({"gate": nn.Linear(shape[-1], 1)} if k % 3 else {})), shape


def shared(shape, k):
    """Two layers with one weight."""
    a, b = nn.Linear(shape[-1], shape[-1]), nn.Linear(shape[-1], shape[-1])
    b.weight = a.weight
    return nn.Sequential(a, ACTIVATIONS[k % len(ACTIVATIONS)](), b), shape


ANYWHERE = [index, mask, custom, state, inplace, squeezed, shared]
FEATURES = [
    linear, activation, norm, twice, tied, gate, bilinear, branch, residual, affine, softmax, low_rank, *ANYWHERE, crossing,
]  # fmt: skip

# ---- blocks on sequences (t, d) ------------------------------


def attention(shape, k):
    def run(m, x):
        q, key, value = m.project(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, key, value, is_causal=k % 2 == 0)

    return Net(run, project=nn.Linear(shape[1], 6)), (shape[0], 2)


def mixing(shape, k):
    """A layer along the sequence."""
    layer = nn.Linear(shape[0], 2 + k % 2)
    return Net(lambda m, x: m.layer(x.transpose(1, 2)).transpose(1, 2), layer=layer), (2 + k % 2, shape[1])


def convolution1d(shape, k):
    cut = k % 2 if shape[0] > 1 else 0
    return Net(lambda m, x: m.layer(x.mT).mT, layer=nn.Conv1d(shape[1], 3, 1 + cut)), (shape[0] - cut, 3)


def positions(shape, k):
    """Learned positions, cut to the length."""
    table = nn.Parameter(torch.randn(shape[0] + 1, shape[1]))
    return Net(lambda m, x: x + m.table[: x.shape[1]], table=table), shape


def merged(shape, k):
    """A layer on all positions of all samples in one axis."""
    layer = nn.Linear(shape[1], 3)
    return Net(lambda m, x: m.layer(x.reshape(-1, x.shape[-1])).reshape(-1, *shape[:1], 3), layer=layer), (shape[0], 3)


def recurrent(shape, k):
    kinds = [nn.RNN, nn.GRU, nn.LSTM]
    layer = kinds[k % 3](shape[1], 2, batch_first=True)
    return Net(lambda m, x: m.layer(x)[0], layer=layer), (shape[0], 2)


def pooled(shape, k):
    reductions = [
        lambda x: x.mean(1),
        lambda x: x.sum(1),
        lambda x: x.amax(1),
        lambda x: x[:, -1],
        lambda x: x.flatten(1),
    ]
    width = prod(shape) if k % 5 == 4 else shape[1]
    return Net(lambda m, x: reductions[k % 5](x)), (width,)


def masked_attention(shape, k):
    """Boolean masks, among them rows that attend to nothing."""
    t = shape[0]
    held = torch.ones(t, t, dtype=torch.bool).tril()
    held[k % t] = False
    masks = [
        lambda m, x: m.mask,
        lambda m, x: (x[..., 0] > 0)[:, None, :].expand(-1, t, t),
        lambda m, x: torch.zeros(t, t).masked_fill(~m.mask, -torch.inf),
        lambda m, x: m.mask & (x[..., 0] > 0)[:, :, None],
    ]
    choose = one_of(k, *masks)

    def run(m, x):
        q, key, value = m.project(x).chunk(3, -1)
        kept = choose(m, x)
        if k % 3 == 0:  # heads
            q, key, value = (z.unflatten(-1, (2, 1)).transpose(1, 2) for z in (q, key, value))
            kept = kept if kept.ndim == 2 else kept[:, None]
        out = F.scaled_dot_product_attention(q, key, value, attn_mask=kept)
        return out.transpose(1, 2).flatten(2) if k % 3 == 0 else out

    return Net(run, project=nn.Linear(shape[1], 6), mask=held), (t, 2)


def along(shape, k):
    """Indices, masks and writes along the sequence."""
    t = shape[0]

    def written(m, x):
        out = torch.empty_like(x)
        h = torch.zeros_like(x[:, 0])
        for s in range(t):
            h = torch.tanh(h + x[:, s])
            out[:, s] = h
        return out

    def padded(m, x):
        y = torch.zeros_like(x)
        y[:, 1:] = x[:, :-1]
        return y

    runs = [
        written,
        padded,
        lambda m, x: x[:, m.index],
        lambda m, x: x.gather(1, m.index[None, :, None].expand_as(x)),
        lambda m, x: x.index_add(1, m.index, torch.sin(x)),
        lambda m, x: torch.take_along_dim(x, x.sum(-1).argsort(-1)[:, :, None], 1),
        lambda m, x: x + x[torch.arange(len(x)), (x[..., 0] > 0).sum(1) % t][:, None],
        lambda m, x: torch.zeros_like(x).scatter_add(1, (x > 0).long(), x),
        lambda m, x: torch.stack([row for row in x.unbind(1)][::-1], 1),
    ]
    return Net(one_of(k, *runs), index=torch.randint(t, (t,))), shape


SEQUENCES = [
    *FEATURES, attention, mixing, convolution1d, positions, merged, recurrent, pooled, masked_attention, along,
]  # fmt: skip

# ---- blocks on images (c, h, w) ------------------------------


def convolved(layer, shape):
    with torch.no_grad():
        return layer, tuple(layer(torch.zeros(1, *shape)).shape[1:])


def conv(shape, k):
    c, h, w = shape
    groups = c if k % 4 == 3 else 1
    kernel = (min(1 + k % 3, h), min(1 + (k // 3) % 3, w))
    options = {"stride": 1 + k % 2, "padding": k % 2, "groups": groups, "bias": k % 5 > 0}
    return convolved(nn.Conv2d(c, 2 * groups, kernel, **options), shape)


def conv_transposed(shape, k):
    return convolved(nn.ConvTranspose2d(shape[0], 2, 2, stride=1 + k % 2, output_padding=0), shape)


def pool(shape, k):
    _, h, w = shape
    size = (min(2, h), min(2, w))
    kinds = [lambda: nn.MaxPool2d(size), lambda: nn.AvgPool2d(size), lambda: nn.AdaptiveAvgPool2d((1, min(2, w))),
             lambda: nn.AdaptiveMaxPool2d(1)]  # fmt: skip
    return convolved(kinds[k % 4](), shape)


def image_norm(shape, k):
    kinds = [nn.BatchNorm2d, lambda c: nn.GroupNorm(1, c), lambda c: nn.GroupNorm(c, c), nn.BatchNorm2d]
    layer = kinds[k % 4](shape[0]).eval()
    if isinstance(layer, nn.BatchNorm2d):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 1.5)
    # one element per group has no spread
    return (layer, shape) if prod(shape[1:]) > 1 or isinstance(layer, nn.BatchNorm2d) else (nn.Identity(), shape)


def image_residual(shape, k):
    body = nn.Sequential(nn.Conv2d(shape[0], shape[0], 3, padding="same"), activation(shape, k)[0])
    return Net(lambda m, x: x + m.body(x), body=body), shape


def squeeze_excite(shape, k):
    layer = nn.Linear(shape[0], shape[0])
    return Net(lambda m, x: x * torch.sigmoid(m.layer(x.mean((2, 3))))[:, :, None, None], layer=layer), shape


def image_branch(shape, k):
    layer = nn.Conv2d(shape[0], 1, 1)
    return Net(lambda m, x: torch.cat([m.layer(x), x], 1), layer=layer), (shape[0] + 1, *shape[1:])


def resize(shape, k):
    kinds = [
        lambda: nn.ZeroPad2d((0, 1, 1, 0)),
        lambda: nn.Upsample(scale_factor=2),
        lambda: nn.ZeroPad2d((1, 0, 0, 0)),
    ]
    return convolved(kinds[k % 3](), shape) if prod(shape) < 60 else (nn.Identity(), shape)


def channels_last(shape, k):
    """A layer on the channels, as transformers for images have it."""
    layer = nn.Linear(shape[0], 2)
    return Net(lambda m, x: m.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), layer=layer), (2, *shape[1:])


def patches(shape, k):
    """To a sequence."""
    return Net(lambda m, x: x.flatten(2).transpose(1, 2)), (prod(shape[1:]), shape[0])


def flat(shape, k):
    return nn.Flatten(), (prod(shape),)


IMAGES = [
    conv, activation, pool, image_norm, image_residual, squeeze_excite, image_branch, resize, channels_last,
    conv_transposed, patches, flat, index, mask, custom, state, inplace, squeezed, crossing,
]  # fmt: skip

BLOCKS = {1: FEATURES, 2: SEQUENCES, 3: IMAGES}
