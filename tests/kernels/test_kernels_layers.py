"""Kernels for one kind of layer, against their definitions and, those, against autograd."""

from __future__ import annotations

import importlib
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxcurv.kernels import blocks as cpu
from fxcurv.kernels import embedding_square_sum as embedding
from fxcurv.kernels import syrk, syrk_conv

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "reversed", "expanded", "every other"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def t(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def laid_out(x, layout):
    """The same values with other strides; "expanded" repeats what is first on the last axis."""
    if x is None or layout == "contiguous":
        return x
    if layout == "reversed":
        order = list(reversed(range(x.ndim)))
        return x.permute(order).contiguous().permute(order)
    if layout == "expanded":
        return x[..., :1].expand(x.shape)
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan if x.is_floating_point() else -7)
    wide[..., ::2] = x
    return wide[..., ::2]


def doubled(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def check(op, reference, args, dtype=torch.float64):
    """The op in `dtype` against the definition in float64 on the values that `dtype` holds: rounded in float32, then once."""
    args = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    actual, expected = op(*args), reference(*doubled(args))
    exact = actual.dtype in (torch.float64, torch.float32)
    rounding = 16 * torch.finfo(actual.dtype).eps if exact else 0.51 * torch.finfo(actual.dtype).eps
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=rounding * _largest(expected))
    return actual


def _largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def opcheck(op, *args):
    torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def flops(op, *args):
    with FlopCounterMode(display=False) as counter:
        op(*args)
    return counter.get_total_flops()


# ---- second moments ------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 70), (130, 2), (257, 9), (300, 0), (0, 4)])
def test_syrk(shape, dtype):
    x = t(*shape)
    torch.testing.assert_close(syrk.reference(x), x @ x.t())
    actual = check(syrk.syrk, syrk.reference, [x], dtype)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_syrk_of_any_strides(layout):
    check(syrk.syrk, syrk.reference, [laid_out(t(260, 7), layout)])


@pytest.mark.parametrize("k", [255, 256, 300, 512, 5000])
def test_strips_partition_the_rows(k):
    strips = syrk.strips(k)
    assert [row for rows in strips for row in range(rows.start, rows.stop)] == list(range(k))
    assert len(strips) <= 16 and (len(strips) == 1) == (k < syrk.FEW)
    assert all(rows.stop - rows.start >= min(k, syrk.STRIP) // 2 for rows in strips)


CONVOLUTIONS = {
    "1d": (2, (9,), (3,), (2,), (1,), (2,)),
    "2d": (3, (6, 5), (3, 2), (1, 2), (1, 0), (1, 1)),
    "2d_unread_rows": (2, (7, 6), (3, 3), (3, 2), (1, 0), (1, 1)),
    "2d_pointwise": (5, (4, 3), (1, 1), (1, 1), (0, 0), (1, 1)),
    "2d_strided_pointwise": (5, (4, 5), (1, 1), (2, 3), (0, 0), (1, 1)),
    "2d_whole_input": (2, (3, 4), (3, 4), (1, 1), (0, 0), (1, 1)),
    "2d_dilated": (2, (7, 8), (2, 3), (1, 1), (2, 1), (3, 2)),
    "3d": (2, (3, 4, 5), (2, 1, 3), (1, 2, 2), (1, 0, 1), (1, 1, 1)),
}
FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolution(name, n=3):
    """(x, out_shape, kernel, stride, padding, dilation)."""
    channels, size, kernel, stride, padding, dilation = CONVOLUTIONS[name]
    x = t(n, channels, *size)
    y = FORWARD[len(size)](x, t(1, channels, *kernel), None, stride, padding, dilation)
    return [x, tuple(y.shape[2:]), kernel, stride, padding, dilation]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_syrk_conv_is_the_sum_over_weight_gradients(name):
    """d y[n, 0, s] / d weight is the patch that position s reads."""
    x, out, kernel, stride, padding, dilation = convolution(name, n=2)
    weight = t(1, x.shape[1], *kernel)

    def output(weight):
        return FORWARD[len(kernel)](x, weight, None, stride, padding, dilation)

    u = torch.autograd.functional.jacobian(output, weight).reshape(2 * prod(out), -1)
    torch.testing.assert_close(syrk_conv.reference(x, out, kernel, stride, padding, dilation), u.t() @ u)


@pytest.mark.parametrize("block", [1, 150, 1 << 19])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_syrk_conv(name, block, monkeypatch):
    monkeypatch.setattr(syrk_conv, "BLOCK", block)
    check(syrk_conv.syrk_conv, syrk_conv.reference, convolution(name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_syrk_conv_of_any_dtype_and_strides(dtype, layout):
    args = convolution("2d")
    args[0] = laid_out(args[0].to(dtype), layout)
    check(syrk_conv.syrk_conv, syrk_conv.reference, args, dtype)


def test_syrk_conv_in_strips():
    x = t(2, 70, 4, 3)
    check(syrk_conv.syrk_conv, syrk_conv.reference, [x, (3, 2), (2, 2), (1, 1), (0, 0), (1, 1)])


def test_syrk_conv_holds_one_block_of_patches():
    x = torch.randn(64, 8, 8, 8)
    sizes = [u.shape[1] for u in syrk_conv.patches(x, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1))]
    assert sum(sizes) == 64 * 64 and len(sizes) == 1
    x = torch.randn(40, 32, 16, 16)
    blocks = list(syrk_conv.patches(x, (16, 16), (3, 3), (1, 1), (1, 1), (1, 1)))
    assert sum(u.shape[1] for u in blocks) == 40 * 256 and max(u.numel() for u in blocks) <= syrk_conv.BLOCK
    assert len({u.data_ptr() for u in blocks}) == 1


def test_syrk_of_nothing():
    assert syrk_conv.syrk_conv(t(0, 2, 4), (3,), (2,), (1,), (0,), (1,)).equal(t(4, 4).zero_())


def test_syrk_as_operators():
    ops = torch.ops.fxcurv
    for dtype in DTYPES:
        opcheck(ops.syrk, t(5, 3).to(dtype))
        opcheck(ops.syrk_conv, convolution("2d")[0].to(dtype), *convolution("2d")[1:])
    opcheck(ops.syrk, t(3, 260).t())
    assert flops(syrk.syrk, t(5, 3)) == sum(2 * (k + 1) * 3 for k in range(5))
    args = convolution("2d")
    k, m = 3 * 6, 3 * prod(args[1])
    assert flops(syrk_conv.syrk_conv, *args) == sum(2 * (row + 1) * m for row in range(k))


# ---- squares of an embedding's rows ------------------------------

# V, N, S, D, rows
EMBEDDINGS = [
    (1, 1, 1, 1, 1), (2, 3, 5, 4, 3), (1, 4, 7, 2, 2), (3, 2, 6, 1, 50), (2, 0, 3, 2, 4), (2, 3, 0, 2, 4), (0, 2, 3, 2, 4),
]  # fmt: skip


def lookups(v, n, s, d, rows):
    return torch.randint(rows, (n, s)), t(v, n, s, d), t(v, n)


@pytest.mark.parametrize("padding", [-1, 0, 2])
def test_embedding_squares_are_those_of_autograd(padding):
    (index, g, w), rows = lookups(2, 3, 6, 2, 4), 4
    total = torch.zeros(rows, 2, dtype=torch.float64)
    table = t(rows, 2).requires_grad_()
    for v in range(2):
        for n in range(3):
            y = F.embedding(index[n], table, padding_idx=padding if padding >= 0 else None)
            total += w[v, n] * torch.autograd.grad(y, table, g[v, n])[0] ** 2
    torch.testing.assert_close(embedding.reference(index, g, w, rows, padding), total)


@pytest.mark.parametrize("padding", [-1, 1])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EMBEDDINGS)
def test_embedding_square_sum(shape, dtype, weighted, padding):
    index, g, w = lookups(*shape)
    check(
        embedding.embedding_square_sum,
        embedding.reference,
        [index, g, w if weighted else None, shape[4], padding],
        dtype,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embedding_square_sum_of_any_strides(layout):
    index, g, w = (laid_out(x, layout) for x in lookups(3, 4, 5, 3, 6))
    check(embedding.embedding_square_sum, embedding.reference, [index, g, w, 6, 3])
    check(embedding.embedding_square_sum, embedding.reference, [index.int(), g, w, 6, 3])


def test_embedding_square_sum_in_several_blocks(monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK", 31)
    index, g, w = lookups(2, 7, 5, 3, 6)
    check(embedding.embedding_square_sum, embedding.reference, [index, g, w, 6, -1])


def test_embedding_square_sum_of_padding_alone():
    index, g, w = torch.full((2, 3), 1), t(2, 2, 3, 4), t(2, 2)
    assert not embedding.embedding_square_sum(index, g, w, 5, 1).any()


def test_embedding_square_sum_as_operator():
    op = torch.ops.fxcurv.embedding_square_sum
    index, g, w = lookups(2, 3, 5, 4, 6)
    for dtype in DTYPES:
        opcheck(op, index, g.to(dtype), w.to(dtype), 6, -1)
    opcheck(op, index.t().contiguous().t(), laid_out(g, "reversed"), None, 6, 2)
    assert flops(op, index, g, w, 6, -1) == 3 * 2 * 3 * 5 * 4


# ---- sizes of real layers ------------------------------


def table(*sizes, padding, weighted=True):
    """Arguments of `embedding_square_sum`."""
    index, g, w = lookups(*sizes)
    return [index, g, w if weighted else None, sizes[-1], padding]


USUAL = {
    "syrk": [lambda: [t(300, 500)]],
    "syrk_conv": [
        lambda: [t(4, 64, 16, 16), (16, 16), (3, 3), (1, 1), (1, 1), (1, 1)],
        lambda: [t(4, 16, 8, 8, 8), (8, 8, 8), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)],
        lambda: [t(4, 64, 100), (100,), (1,), (1,), (0,), (1,)],
        lambda: [t(2, 3, 56, 56), (28, 28), (7, 7), (2, 2), (3, 3), (1, 1)],
    ],
    "embedding_square_sum": [lambda: table(10, 8, 64, 128, 1000, padding=0)],
}


def cases(arguments):
    """(name of an op, number of its case)."""
    return [(name, k) for name, each in arguments.items() for k in range(len(each))]


def reference(name):
    """The definition of an op."""
    return importlib.import_module(f"fxcurv.kernels.{name}").reference


@pytest.mark.parametrize(("name", "case"), cases(USUAL))
def test_usual_sizes(name, case):
    check(getattr(torch.ops.fxcurv, name), reference(name), USUAL[name][case](), torch.float32)
