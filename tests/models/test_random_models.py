"""Random architectures against the oracle: chains of blocks that branch, share, gate and reshape.

A recipe is a list of numbers. Read from the left, each pair chooses one of the blocks that fit the current shape and a
size for it, so that hypothesis can shrink a failure to the shortest chain that shows it.
"""

from __future__ import annotations

from math import prod

import pytest
import torch
import torch.nn.functional as F
from case_tools import Net
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from oracle import Oracle
from torch import nn

import fxcurv
from fxcurv.extensions import BatchGrad, BatchL2Grad, DiagGGNExact

# A failure prints its recipe; to shrink or to explain it would compile hundreds of models.
FAST = settings(
    max_examples=4, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
MANY = settings(FAST, max_examples=60, derandomize=False)
EXTENSIONS = [BatchGrad(), BatchL2Grad(), DiagGGNExact()]

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


FEATURES = [linear, activation, norm, twice, tied, gate, bilinear, branch, residual, affine, softmax, low_rank]

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


SEQUENCES = [*FEATURES, attention, mixing, convolution1d, positions, merged, recurrent, pooled]

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
    conv_transposed, patches, flat,
]  # fmt: skip

BLOCKS = {1: FEATURES, 2: SEQUENCES, 3: IMAGES}

# ---- losses: (outputs, k) -> (loss, targets) ------------------------------


def classes(f, k):
    y = torch.randint(f.shape[1], (f.shape[0], *f.shape[2:]))
    options = [{}, {"reduction": "sum"}, {"label_smoothing": 0.2}, {"weight": torch.rand(f.shape[1]).to(f)}]
    return (lambda out, y: F.cross_entropy(out, y, **options[k % 4])), y


def squares(f, k):
    return (lambda out, y: F.mse_loss(out, y, reduction=("mean", "sum")[k % 2])), torch.randn_like(f)


def binary(f, k):
    return (lambda out, y: 0.5 * F.binary_cross_entropy_with_logits(out, y)), torch.rand_like(f).round()


def huber(f, k):
    return F.smooth_l1_loss, torch.randn_like(f)


def log_cosh(f, k):
    return (lambda out, y: torch.log(torch.cosh(out - y)).flatten(1).sum(1).mean()), torch.randn_like(f)


def negative_log_likelihood(f, k):
    return (lambda out, y: F.nll_loss(torch.log_softmax(out, 1), y)), torch.randint(
        f.shape[1], (f.shape[0], *f.shape[2:])
    )


LOSSES = [classes, squares, binary, huber, log_cosh, negative_log_likelihood]

NUMBERS = st.integers(0, 99)
RECIPES = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=5)


def assemble(shape, recipe):
    """The chain of a recipe, ending in a layer with few outputs."""
    blocks = []
    for choice, k in recipe:
        options = BLOCKS[len(shape)]
        block, shape = options[choice % len(options)](shape, k)
        blocks.append(block)
    if len(shape) == 3 or prod(shape) > 12:
        blocks.append(nn.Flatten())
        shape = (prod(shape),)
    return nn.Sequential(*blocks, nn.Linear(shape[-1], 2)).double().eval()


def check(shape, recipe, loss, n, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = assemble(shape, recipe)
        x = torch.randn(n, *shape, dtype=torch.float64)
        with torch.no_grad():
            f = model(x)
        note(f"{model}\ninput {tuple(x.shape)}, output {tuple(f.shape)}, loss {loss}")
        make, k = loss
        criterion, y = make(f, k)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        result = fxcurv.compile(model, criterion, EXTENSIONS, debug=True)(x, y)
        oracle = Oracle(model, criterion, x, y)
        torch.testing.assert_close(result.loss, oracle.loss())
        for field in ("grad", "grad_batch", "batch_l2", "diag_ggn_exact"):
            actual, expected = getattr(result, field), getattr(oracle, field)()
            assert set(actual) == set(expected)
            for name, value in expected.items():
                message = f"{field} of {name}: "
                torch.testing.assert_close(
                    actual[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, told=message: told + m
                )
    finally:
        torch.set_default_dtype(default)


def cases(shapes):
    losses = st.tuples(st.sampled_from(LOSSES), NUMBERS)
    return given(shapes, RECIPES, losses, st.integers(1, 3), st.integers(0, 9))


VECTORS = st.tuples(st.integers(2, 4))
SEQUENCE_SHAPES = st.tuples(st.integers(2, 3), st.integers(2, 3))
IMAGE_SHAPES = st.tuples(st.integers(1, 2), st.integers(2, 5), st.integers(2, 5))


@FAST
@cases(VECTORS)
def test_vectors(shape, recipe, loss, n, seed):
    check(shape, recipe, loss, n, seed)


@FAST
@cases(SEQUENCE_SHAPES)
def test_sequences(shape, recipe, loss, n, seed):
    check(shape, recipe, loss, n, seed)


@FAST
@cases(IMAGE_SHAPES)
def test_images(shape, recipe, loss, n, seed):
    check(shape, recipe, loss, n, seed)


@pytest.mark.slow
@MANY
@cases(st.one_of(VECTORS, SEQUENCE_SHAPES, IMAGE_SHAPES))
def test_many(shape, recipe, loss, n, seed):
    check(shape, recipe, loss, n, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BLOCKS)
def test_every_block_alone(kind):
    """Each block with several sizes, between layers, in turn with the losses."""
    shape = {1: (3,), 2: (3, 3), 3: (2, 4, 3)}[kind]
    for choice in range(len(BLOCKS[kind])):
        for k in range(5):
            check(shape, [(0, 1), (choice, k)], (LOSSES[(choice + k) % len(LOSSES)], k), 2 + k % 2, k)
