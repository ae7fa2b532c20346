"""The parts of the memory check: what memory_check.py runs, each yielding after every call.

Arguments are those of the kernels' tests: sizes that fill no block, single, empty and one-sample ones, in every layout.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernel_samples import KERNELS, LAYOUTS, arguments
from test_kernels_conv import CONVOLUTIONS, POOLS, pooled
from test_kernels_layers import CONVOLUTIONS as PATCHES
from test_kernels_layers import convolution, laid_out, lookups, t
from torch import Tensor, nn

import fxcurv
from fxcurv.extensions import KFAC, BatchDiagGGNExact, BatchGrad, BatchL2Grad, SqrtGGNExact
from fxcurv.kernels import blocks, outer_batch_conv, outer_square_sum, outer_square_sum_conv, syrk, syrk_conv
from fxcurv.kernels import patches as patches_of

OPS = torch.ops.fxcurv
recycle = importlib.import_module("fxcurv.passes.recycle")  # the package has the pass under this name
BOTH = (True, False)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Blocks of a few numbers, so that small arguments have several, the last of them cut off."""
    small = [
        (blocks, "BLOCK", 7), (blocks, "FEWEST", 1), (patches_of, "LARGEST", 50), (syrk_conv, "BLOCK", 20),
        (syrk, "FEW", 4), (syrk, "STRIP", 3),
    ]  # fmt: skip
    before = [(module, name, getattr(module, name)) for module, name, _ in small]
    for module, name, value in small:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def cast(args: Any, dtype: torch.dtype) -> list[Any]:
    """The arguments with their real tensors in `dtype`."""
    return [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def products() -> Iterator[Any]:
    """The kernels that have samples of their own."""
    for name, kernel in KERNELS.items():
        for k, sizes in enumerate(kernel.sizes):
            layouts = LAYOUTS if k % 3 == 1 else LAYOUTS[:1]
            for layout, dtype in itertools.product(layouts, DTYPES):
                yield getattr(OPS, name)(*arguments(name, sizes, dtype, layout))
        yield getattr(OPS, name)(*arguments(name, kernel.tiled[0], torch.float32))


def factors(n: int, last: bool, dtype: torch.dtype) -> Iterator[tuple]:
    """(x, g, geometry) of every convolution of the tests, with `n` samples."""
    for conv in CONVOLUTIONS.values():
        x, g = conv.factors(2, dtype, last)
        yield x[:n], g[:, :n], conv.geometry


def convolutions() -> Iterator[Any]:
    """Individual gradients, sums of squares, moments; of no sample, one and all."""
    for n, last, dtype in itertools.product((0, 1, 9), BOTH, DTYPES):
        for x, g, geometry in factors(n, last, dtype):
            yield OPS.outer_batch_conv(x, g, *geometry)
            yield OPS.outer_moments_conv(x, g[0], True, True, True, *geometry)
            for per_sample in BOTH:
                w = torch.ones(g.shape[:2], dtype=dtype) if per_sample else None
                yield OPS.outer_square_sum_conv(x, g, w, per_sample, *geometry)


def pools() -> Iterator[Any]:
    """The transpose of max-pooling; images of one channel, with one sample and none, and in both layouts."""
    for name, last, c, v, n, dtype in itertools.product(POOLS, BOTH, (1, 3), (0, 2), (0, 1, 2), DTYPES[:2]):
        g, x, index, window = pooled(name, v, c, last, dtype)
        yield OPS.max_pool_columns(g[:, :n], x[:n], index[:n], *window)


def patches() -> Iterator[Any]:
    """Second moments, of patches and of rows."""
    for name, n, layout, dtype in itertools.product(PATCHES, (0, 1, 3), LAYOUTS, DTYPES[:2]):
        x, *rest = convolution(name, n=n)
        yield OPS.syrk_conv(laid_out(x, layout).to(dtype), *rest)
    for shape, layout in itertools.product([(1, 1), (5, 3), (130, 2), (257, 9), (300, 0), (0, 4)], LAYOUTS):
        yield OPS.syrk(laid_out(t(*shape), layout).float())


def layers() -> Iterator[Any]:
    """Moments and embeddings."""
    for layout, n, dtype in itertools.product(LAYOUTS, (0, 1, 4), DTYPES):
        index, g, w = (laid_out(a, layout) for a in lookups(2, n, 5, 3, 6))
        x = laid_out(t(n, 5, 3), layout)
        calls: list[tuple[Callable, list]] = [
            (OPS.outer_moments, [x, laid_out(t(n, 5, 2), layout), True, True, True]),
            (OPS.embedding_square_sum, [index, g, w, 6, 3]), (OPS.embedding_square_sum, [index, g, None, 6, -1]),
        ]  # fmt: skip
        for op, args in calls:
            yield op(*cast(args, dtype))


def into() -> Iterator[Any]:
    """Results in memory that is given, in the middle of more of it: what lies around stays as it is."""
    for n, last in itertools.product((0, 1, 9), BOTH):
        for x, g, geometry in factors(n, last, torch.float32):
            fn = outer_batch_conv.into
            yield within(
                outer_batch_conv.shape(x, g, geometry[0], geometry[4]),
                lambda out: fn(x, g, *geometry, out=out),  # noqa: B023
            )
            weight = outer_batch_conv.shape(x, g, geometry[0], geometry[4])[2:]
            for per_sample in BOTH:
                run = lambda out: outer_square_sum_conv.into(x, g, None, per_sample, *geometry, out=out)  # noqa: B023,E731
                yield within((len(x), *weight) if per_sample else weight, run)
    sizes = [(2, 3, 4, 5, 3), (1, 1, 1, 1, 1), (2, 0, 3, 2, 2), (2, 2, 0, 3, 2)]
    for (v, n, s, o, i), layout in itertools.product(sizes, LAYOUTS):
        a, g = (laid_out(f, layout).float() for f in (t(n, s, i), t(v, n, s, o)))
        for per_sample in BOTH:
            run = lambda out: outer_square_sum.into(a, g, None, per_sample, out=out)  # noqa: B023,E731
            yield within((n, o, i) if per_sample else (o, i), run)


def within(shape: tuple[int, ...], run: Callable[[Tensor], Any]) -> None:
    """Run on `out` of this shape between two bands of memory; all of it is written, and nothing else."""
    size, band = torch.Size(shape).numel(), 64
    memory = torch.full((size + 2 * band,), torch.nan)
    memory[:band] = memory[band + size :] = -7.0
    run(memory[band : band + size].view(shape))
    assert (memory[:band] == -7).all() and (memory[band + size :] == -7).all()
    assert not memory[band : band + size].isnan().any()


class Small(nn.Module):
    """A strided block between layers that go channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2)
        self.main, self.side = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, 2)
        self.last = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 8, 8] to logits."""
        h = self.pool(torch.relu(self.first(x)))
        return self.last(torch.tanh(self.main(h) + self.side(h)).flatten(1))


def program() -> Iterator[Any]:
    """A compiled model whose results, large or not, go where those of a larger batch were."""
    before, recycle.WORTHWHILE = recycle.WORTHWHILE, 1
    try:
        torch.manual_seed(0)
        model, x, y = Small(), torch.randn(5, 3, 8, 8), torch.randint(3, (5,))
        extensions = [BatchGrad(), BatchL2Grad(), BatchDiagGGNExact(), SqrtGGNExact(), KFAC()]
        compiled = fxcurv.compile(model, nn.CrossEntropyLoss(), extensions)
        result = compiled(x, y)
        assert compiled.lower(x, y).buffers, "no result is recycled"
        for n in (5, 3, 2, 4, 5):
            result = compiled(x[:n], y[:n], out=result)
            whole = {name: p.sum(0) for name, p in result.grad_batch.items()}
            torch.testing.assert_close(whole, dict(result.grad), rtol=1e-4, atol=1e-5)
            yield result
        yield compiled(x[:1], y[:1])
    finally:
        recycle.WORTHWHILE = before


PARTS: dict[str, Callable[[], Iterator[Any]]] = {
    "products": products, "convolutions": convolutions, "patches": patches, "layers": layers, "out=": into,
    "pools": pools, "a program": program,
}  # fmt: skip
