"""Kernels of convolutions and pooling, and moments, against plain autograd in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from covering import covering
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxcurv.kernels import blocks as cpu
from fxcurv.kernels import outer_batch_conv, outer_moments, outer_square_sum, outer_square_sum_conv, patches
from fxcurv.kernels.max_pool_columns import max_pool_columns, reference

OPS = torch.ops.fxcurv
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FLAGS = list(itertools.product((True, False), repeat=3))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def t(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@dataclass(frozen=True)
class Convolution:
    """Channels and outputs are those of all groups together."""

    samples: int
    channels: int
    outputs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def geometry(self) -> tuple:
        return list(self.kernel), list(self.stride), list(self.padding), list(self.dilation), self.groups

    @property
    def weight(self) -> tuple[int, ...]:
        return self.outputs, self.channels // self.groups, *self.kernel

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return FORWARD[len(self.size)](x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def factors(self, v: int, dtype=torch.float64, last: bool = False) -> tuple[Tensor, Tensor]:
        """x [N, C, *in] and g [V, N, O, *out], with `last` of both the channels last in memory."""
        x = t(self.samples, self.channels, *self.size)
        out = self.forward(x[:1], t(*self.weight)).shape[2:]
        g = t(v, self.samples, self.outputs, *out)
        if last:
            x, g = x.movedim(1, -1).contiguous().movedim(-1, 1), g.movedim(2, -1).contiguous().movedim(-1, 2)
        return x.to(dtype), g.to(dtype)

    def gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """The definition, [V, N, *weight]: autograd, sample by sample, in float64."""
        x, g = x.double().contiguous(), g.double().contiguous()
        found = g.new_zeros(*g.shape[:2], *self.weight)
        for v, n in itertools.product(range(g.shape[0]), range(g.shape[1])):
            weight = t(*self.weight).requires_grad_()
            (found[v, n],) = torch.autograd.grad(self.forward(x[n : n + 1], weight), weight, g[v, n : n + 1])
        return found


CONVOLUTIONS = {
    "1d": Convolution(3, 2, 3, (9,), (3,), (2,), (1,), (2,)),
    "1d_groups": Convolution(2, 4, 6, (7,), (2,), (1,), (1,), (1,), 2),
    "2d": Convolution(5, 3, 4, (6, 5), (3, 2), (1, 2), (1, 0), (1, 1)),
    "2d_one_channel": Convolution(3, 1, 2, (5, 6), (3, 3), (1, 1), (1, 1), (1, 1)),
    "2d_narrow": Convolution(2, 1, 16, (10, 11), (3, 3), (1, 1), (0, 0), (1, 1)),  # P is computed transposed
    "2d_unread_rows": Convolution(3, 2, 3, (7, 6), (3, 3), (3, 2), (1, 0), (1, 1)),
    "2d_pointwise": Convolution(3, 5, 2, (4, 3), (1, 1), (2, 1), (0, 0), (1, 1)),
    "2d_dilated_groups": Convolution(3, 4, 6, (7, 8), (2, 3), (1, 2), (2, 1), (3, 2), 2),
    "2d_depthwise": Convolution(3, 3, 6, (5, 4), (3, 2), (1, 1), (1, 1), (1, 1), 3),
    "2d_whole_input": Convolution(2, 2, 3, (3, 4), (3, 4), (1, 1), (0, 0), (1, 1)),
    "3d": Convolution(3, 2, 3, (3, 4, 5), (2, 1, 3), (1, 2, 2), (1, 0, 1), (1, 1, 1)),
    "3d_groups": Convolution(2, 4, 2, (3, 4, 3), (2, 2, 2), (1, 1, 1), (0, 1, 0), (1, 1, 2), 2),
}
named = pytest.mark.parametrize("name", CONVOLUTIONS)
LAST = {"first": False, "last": True}
channels = pytest.mark.parametrize("last", LAST.values(), ids=LAST)
# (block, fewest): none; of one entry; of a few rows; of everything
BLOCKS = [(1, 1), (1, 2), (7, 1), (40, 2), (1 << 19, 4)]
blocks = pytest.mark.parametrize("block", BLOCKS, ids=str)


def pairs(**choices):
    """Any two values of two parameters meet in one of the tests."""
    return pytest.mark.parametrize(tuple(choices), covering(*map(list, choices.values())), ids=str)


def close(actual: Tensor, expected: Tensor, factors: torch.dtype, sums: Tensor | None = None) -> None:
    """Equal up to rounding of sums in `wide(factors)` and of the result; `sums`: expected of absolute values."""
    wide = torch.float64 if factors == torch.float64 else torch.float32
    assert actual.shape == expected.shape
    scale = (expected if sums is None else sums).abs().max().item() if expected.numel() else 0.0
    rounding = 32 * torch.finfo(wide).eps
    if actual.dtype != wide:
        rounding += torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=rounding * scale)


def few(monkeypatch, block: int, fewest: int = 1) -> None:
    """Blocks of products of `block` entries, and of patches of `fewest` samples."""
    monkeypatch.setattr(cpu, "BLOCK", block)
    monkeypatch.setattr(cpu, "FEWEST", fewest)


# ---- patches ------------------------------


@pairs(name=CONVOLUTIONS, last=LAST.values(), in_order=[True, False], block=BLOCKS)
def test_patches_times_cotangents_are_gradients(name, last, in_order, block, monkeypatch):
    """In either order of I, which `weight` undoes; a block has the samples that it was asked for."""
    few(monkeypatch, *block)
    conv = CONVOLUTIONS[name]
    x, g = conv.factors(1, last=last)
    *geometry, groups = conv.geometry
    a = patches.Patches(x, g.shape[3:], tuple(geometry), groups, in_order)
    assert a.last == (last and not in_order and x.ndim == 4 and groups == 1 and x.shape[1] > 1)
    grouped, expected = patches.grouped(g, groups)[0], conv.gradients(x, g)[0]
    for n in cpu.spans(len(x), a.most):
        block = a(n)
        assert block.shape == (n.stop - n.start, groups, a.s, a.i)
        assert block.data_ptr() == a.scratch.data_ptr()
        close(a.weight(torch.einsum("nksi,nkso->nkoi", block, grouped[n])), expected[n], x.dtype)


def test_patches_take_a_few_samples_at_a_time():
    """As many as a block has room for; where one is large, some while they fit the limit, else one."""

    def most(n, side):
        x = torch.zeros(n, 8, side, side)
        return patches.Patches(x, (side, side), ((3, 3), (1, 1), (1, 1), (1, 1)), 1, True).most

    assert most(200, 8) == cpu.BLOCK // (72 * 64) == 113
    assert most(3, 8) == 3
    assert most(100, 56) == cpu.FEWEST
    assert most(100, 200) == patches.LARGEST // (72 * 200**2) == 2
    assert most(100, 400) == 1
    assert most(0, 8) == 1


# ---- products ------------------------------


@blocks
@pytest.mark.parametrize("most", [None, 1, 2])
@pytest.mark.parametrize("sizes", [(2, 5, 1, 3, 4, 2), (1, 4, 2, 1, 3, 5), (3, 1, 3, 2, 2, 2)], ids=str)
def test_products_cover_all_once(sizes, most, block, monkeypatch):
    few(monkeypatch, *block)
    block, fewest = block
    v, n, k, s, o, i = sizes
    a, g = t(n, k, s, i), t(v, n, k, s, o)
    asked, found = [], torch.full((v, n, k, o, i), torch.nan, dtype=a.dtype)

    def inputs(samples: slice) -> Tensor:
        asked.append((samples.start, samples.stop))
        return a[samples]

    counted = 0
    for column, ns, os, p in cpu.products(inputs, g, i, most):
        assert found[column, ns, :, os].isnan().all()
        found[column, ns, :, os] = p
        counted += 1
        assert p.numel() <= max(block, k * i) * fewest
    torch.testing.assert_close(found, torch.einsum("nksi,vnkso->vnkoi", a, g))
    assert asked == sorted(set(asked))  # each once
    assert counted > v or block > 7 or n == 1


# ---- moments ------------------------------


def moments(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of gradients [N, ...]."""
    return p.sum(0), p.square().sum(0), p.square().flatten(1).sum(1)


def check_moments(found, p: Tensor, wanted, dtype) -> None:
    for actual, expected, absolute, want in zip(found, moments(p), moments(p.abs()), wanted, strict=True):
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert actual.is_contiguous()
        if want:
            close(actual, expected, dtype, absolute)
        else:
            assert actual.shape == (0,)


@pairs(
    sizes=[(1, 1, 1, 1), (3, 4, 5, 2), (5, 1, 3, 4), (4, 7, 33, 40), (0, 2, 3, 4), (3, 0, 2, 2)],
    wanted=FLAGS,
    dtype=DTYPES,
)
def test_outer_moments(sizes, wanted, dtype):
    n, s, o, i = sizes
    a, g = t(n, s, i).to(dtype), t(n, s, o).to(dtype)
    p = torch.stack([x.double().t() @ y.double() for x, y in zip(g, a, strict=True)]) if n else t(0, o, i)
    check_moments(outer_moments.outer_moments(a, g, *wanted), p, wanted, dtype)


@blocks
@pytest.mark.parametrize("layout", ["contiguous", "reversed", "expanded"])
def test_outer_moments_in_blocks_and_of_any_strides(layout, block, monkeypatch):
    few(monkeypatch, *block)
    a, g = t(5, 4, 3), t(5, 4, 6)
    if layout == "reversed":
        a, g = (x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (a, g))
    if layout == "expanded":
        a, g = (x[:, :1].expand(x.shape) for x in (a, g))
    p = torch.stack([x.t() @ y for x, y in zip(g, a, strict=True)])
    check_moments(outer_moments.outer_moments(a, g, True, True, True), p, (True,) * 3, torch.float64)
    torch.testing.assert_close(outer_moments.reference(a, g, True, True, True), moments(p))


@pairs(name=CONVOLUTIONS, last=LAST.values(), wanted=FLAGS, dtype=DTYPES)
def test_outer_moments_conv(name, last, wanted, dtype):
    conv = CONVOLUTIONS[name]
    x, g = conv.factors(1, dtype, last)
    found = outer_moments.outer_moments_conv(x, g[0], *wanted, *conv.geometry)
    check_moments(found, conv.gradients(x, g)[0], wanted, dtype)


@pairs(name=CONVOLUTIONS, last=LAST.values(), block=BLOCKS)
def test_outer_moments_conv_in_blocks(name, last, block, monkeypatch):
    few(monkeypatch, *block)
    conv = CONVOLUTIONS[name]
    x, g = conv.factors(1, last=last)
    found = outer_moments.outer_moments_conv(x, g[0], True, True, True, *conv.geometry)
    check_moments(found, conv.gradients(x, g)[0], (True,) * 3, torch.float64)


def test_outer_moments_conv_where_one_factor_has_its_channels_last():
    conv = CONVOLUTIONS["2d"]
    (x, g), (y, h) = conv.factors(1), conv.factors(1, last=True)
    for a, b in ((x, h), (y, g)):
        found = outer_moments.outer_moments_conv(a, b[0], True, True, True, *conv.geometry)
        check_moments(found, conv.gradients(a, b)[0], (True,) * 3, torch.float64)


@named
def test_definitions_of_convolutions_are_autograds(name):
    conv = CONVOLUTIONS[name]
    x, g = conv.factors(2)
    p, w = conv.gradients(x, g), t(2, conv.samples)
    torch.testing.assert_close(outer_batch_conv.reference(x, g, *conv.geometry), p)
    torch.testing.assert_close(outer_moments.reference_conv(x, g[0], True, True, True, *conv.geometry), moments(p[0]))
    squares = torch.einsum("vn,vn...->n...", w, p.square())
    torch.testing.assert_close(outer_square_sum_conv.reference(x, g, w, True, *conv.geometry), squares)


# ---- products of each sample ------------------------------


@pairs(name=CONVOLUTIONS, last=LAST.values(), v=[1, 3], fewest=[1, 4], dtype=DTYPES)
def test_outer_batch_conv(name, last, v, fewest, dtype, monkeypatch):
    few(monkeypatch, 1, fewest)
    conv = CONVOLUTIONS[name]
    x, g = conv.factors(v, dtype, last)
    found = outer_batch_conv.outer_batch_conv(x, g, *conv.geometry)
    assert found.dtype == dtype and found.is_contiguous()
    expected = conv.gradients(x, g)
    close(found, expected, dtype, conv.gradients(x.abs(), g.abs()))


@named
@channels
def test_outer_batch_conv_into_memory(name, last):
    conv = CONVOLUTIONS[name]
    x, g = conv.factors(2, last=last)
    out = torch.full((2, conv.samples, *conv.weight), torch.nan, dtype=x.dtype)
    assert outer_batch_conv.into(x, g, *conv.geometry, out=out) is out
    torch.testing.assert_close(out, conv.gradients(x, g))


# ---- squares in memory that the caller has ------------------------------


@pairs(name=CONVOLUTIONS, last=LAST.values(), per_sample=[True, False], weighted=[True, False], v=[1, 2], dtype=DTYPES)
def test_outer_square_sum_conv_into_memory(name, last, per_sample, weighted, v, dtype):
    """In the weight's order, over what was there before; bfloat16 in float32."""
    conv = CONVOLUTIONS[name]
    w = t(v, conv.samples) if weighted else None
    x, g = conv.factors(v, dtype, last)
    each = conv.gradients(x, g).square()
    expected = each.sum(0) if w is None else torch.einsum("vn,vn...->n...", w.to(dtype).double(), each)
    expected, bound = (expected, each.sum(0)) if per_sample else (expected.sum(0), each.sum((0, 1)))
    out = torch.full(expected.shape, torch.nan, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weights = None if w is None else w.to(dtype)
    assert outer_square_sum_conv.into(x, g, weights, per_sample, *conv.geometry, out=out) is out
    close(out, expected, dtype, 4 * bound)


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    "sizes", [(2, 5, 3, 4, 6), (1, 3, 1, 2, 2), (0, 3, 2, 4, 5), (2, 3, 0, 4, 5), (2, 0, 3, 4, 5)], ids=str
)
def test_outer_square_sum_into_memory(sizes, per_sample, weighted):
    v, n, s, o, i = sizes
    a, g, w = t(n, s, i), t(v, n, s, o), t(v, n) if weighted else None
    p = torch.einsum("vnso,nsi->vnoi", g, a).square()
    p = p if w is None else p * w[:, :, None, None]
    expected = p.sum(0) if per_sample else p.sum((0, 1))
    out = torch.full_like(expected, torch.nan)
    assert outer_square_sum.into(a, g, w, per_sample, out=out) is out
    torch.testing.assert_close(out, expected)


# ---- the transpose of pooling ------------------------------

# side, kernel, stride, padding, dilation, ceil
POOLS = {
    "plain": ((6, 8), (2, 2), (2, 2), (0, 0), (1, 1), False),
    "overlapping": ((7, 6), (3, 3), (2, 2), (1, 1), (1, 1), False),
    "ceil": ((6, 7), (3, 2), (2, 2), (0, 0), (1, 1), True),
    "ceil_padded": ((5, 6), (3, 3), (2, 3), (1, 1), (1, 1), True),
    "dilated": ((7, 8), (2, 3), (1, 2), (0, 1), (2, 2), False),
    "one_dimension": ((1, 9), (1, 3), (1, 2), (0, 1), (1, 1), False),
    "to_one": ((3, 4), (3, 4), (3, 4), (0, 0), (1, 1), False),
}
pools = pytest.mark.parametrize("name", POOLS)


def pooled(name, v, channels=3, last=False, dtype=torch.float64):
    """(g, x, index, the rest of the op's arguments)."""
    size, *rest, ceil = POOLS[name]
    x = t(2, channels, *size).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    index = F.max_pool2d(x, *rest, ceil_mode=ceil, return_indices=True)[1]
    return t(v, *index.shape).to(dtype), x, index, (*map(list, rest), ceil)


@pairs(name=POOLS, last=LAST.values(), v=[1, 2, 3], c=[1, 3], dtype=DTYPES)
def test_max_pool_columns(name, last, v, c, dtype):
    """Autograd's, column by column, laid out as the images are."""
    g, x, index, window = pooled(name, v, c, last, dtype)
    kernel, stride, padding, dilation, ceil = window
    found = max_pool_columns(g, x, index, *window)
    images = x.double().contiguous().requires_grad_()
    y = F.max_pool2d(images, kernel, stride, padding, dilation, ceil)
    each = [torch.autograd.grad(y, images, column.double(), retain_graph=True)[0] for column in g]
    # in half precision the library adds in that
    eps = torch.finfo(dtype).eps
    expected = torch.stack(each)
    torch.testing.assert_close(found.double(), expected, rtol=8 * eps, atol=8 * eps * g.abs().max().item())
    torch.testing.assert_close(reference(g, x, index, *window).double(), expected, rtol=8 * eps, atol=8 * eps * 4)
    assert found.dtype == dtype
    assert all(part.stride() == x.stride() or c == 1 for part in found)


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0)], ids=["columns", "samples"])
def test_max_pool_columns_of_nothing(sizes):
    v, n = sizes
    x, g = t(n, 3, 4, 4), t(v, n, 3, 2, 2)
    index = torch.zeros(n, 3, 2, 2, dtype=torch.long)
    assert max_pool_columns(g, x, index, [2, 2], [2, 2], [0, 0], [1, 1], False).shape == (v, n, 3, 4, 4)


@pools
@channels
def test_max_pool_columns_is_differentiable(name, last):
    """In the columns, once and again; the op is linear in them."""
    g, x, index, window = pooled(name, 2, 2, last)
    call = lambda g: max_pool_columns(g, x, index, *window)  # noqa: E731
    g.requires_grad_()
    assert torch.autograd.gradcheck(call, g)
    assert torch.autograd.gradgradcheck(call, g)


@channels
@pytest.mark.parametrize("dim", [0, 1, 4])
def test_max_pool_columns_of_more_columns(last, dim):
    """vmap adds columns."""
    g, x, index, window = pooled("overlapping", 6, 3, last)
    stack = g.unflatten(0, (3, 2))
    call = lambda g: max_pool_columns(g, x, index, *window)  # noqa: E731
    found = torch.vmap(call, in_dims=dim)(stack.movedim(0, dim))
    torch.testing.assert_close(found, call(g).unflatten(0, (3, 2)))
    assert found[0, 0].stride() == x.stride()
    with pytest.raises(RuntimeError, match="over columns only"):
        torch.vmap(lambda x: max_pool_columns(g, x, index, *window))(x.unsqueeze(0))


# ---- as operators ------------------------------


def opcheck(op, *args) -> None:
    torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


@named
@channels
def test_convolutions_as_operators(name, last):
    conv = CONVOLUTIONS[name]
    for dtype in DTYPES:
        x, g = conv.factors(2, dtype, last)
        opcheck(OPS.outer_batch_conv, x, g, *conv.geometry)
        opcheck(OPS.outer_moments_conv, x, g[0], True, True, True, *conv.geometry)
    for wanted in FLAGS:
        opcheck(OPS.outer_moments_conv, x, g[0], *wanted, *conv.geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_as_operators(dtype):
    for wanted in FLAGS:
        opcheck(OPS.outer_moments, t(3, 4, 5).to(dtype), t(3, 4, 2).to(dtype), *wanted)


# opcheck of PyTorch 2.14 looks at `.grad` of copies, and hides the warning by a filter that "error" comes before
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@channels
def test_pooling_as_operator(last):
    for dtype in DTYPES:
        g, x, index, window = pooled("overlapping", 2, last=last, dtype=dtype)
        opcheck(OPS.max_pool_columns, g, x, index, *window)
    g, x, index, window = pooled("overlapping", 2, last=last)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.max_pool_columns.default, (g.requires_grad_(), x, index, *window), test_utils=tests)


def flops(op, *args) -> int:
    with FlopCounterMode(display=False) as counter:
        op(*args)
    return counter.get_total_flops()


def test_flops():
    """Two for each term of each sum of products; one for each value that pooling sends."""
    assert flops(OPS.outer_moments, t(3, 5, 2), t(3, 5, 7), True, True, True) == 2 * (3 * 5) * (7 * 2)
    conv = CONVOLUTIONS["2d_dilated_groups"]  # 8 x 3 positions of 2 channels and 6 taps for each of 6 outputs
    x, g = conv.factors(2)
    assert g.shape[3:] == (8, 3)
    assert flops(OPS.outer_moments_conv, x, g[0], True, False, True, *conv.geometry) == 2 * 3 * (24 * 12 * 6)
    assert flops(OPS.outer_batch_conv, x, g, *conv.geometry) == 2 * 2 * 3 * (24 * 12 * 6)
    g, x, index, window = pooled("plain", 2)
    assert flops(OPS.max_pool_columns, g, x, index, *window) == 2 * 2 * 3 * (3 * 4)
