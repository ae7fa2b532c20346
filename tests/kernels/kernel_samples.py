"""Arguments for each kernel, in shapes and layouts that are awkward for blocks and tiles; no kernel is imported here."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

LAYOUTS = ["contiguous", "reversed", "steps", "expanded"]

# The default tiles were chosen so that nothing spills under this release of Triton. Others spill a few registers (3.8 eight of
# float32's outer_norm on compute capability 8.0, 3.9 two of syrk_conv), which a launch finds out by timing configurations.
TUNED_WITH = "3.7."


@dataclass(frozen=True)
class Kernel:
    """Arguments of an op.

    Attributes:
        make: (random, *sizes) -> the arguments; random(*shape) is a tensor.
        sizes: small ones, odd, single and empty.
        tiled: of more than one tile in each direction.
    """

    make: Callable[..., tuple]
    sizes: list[tuple]
    tiled: list[tuple]


def _outer_norm(random, v, n, s, o, i):
    return random(n, s, i), random(v, n, s, o)


def _outer_square_sum(random, v, n, s, o, i, weighted, per_sample):
    return random(n, s, i), random(v, n, s, o), random(v, n) if weighted else None, per_sample


def _outer_square_sum_conv(random, v, n, c, o, size, kernel, stride, padding, dilation, groups, weighted, per_sample):
    geometry = list(zip(size, kernel, stride, padding, dilation, strict=True))
    out = [(d + 2 * p - di * (k - 1) - 1) // st + 1 for d, k, st, p, di in geometry]
    x, g, w = random(n, c, *size), random(v, n, o, *out), random(v, n) if weighted else None
    return x, g, w, per_sample, list(kernel), list(stride), list(padding), list(dilation), groups


def _each(sizes, *choices):
    """Each of `sizes` with each combination of the choices appended."""
    return [(*size, *choice) for size in sizes for choice in itertools.product(*choices)]


PRODUCTS = [(1, 1, 1, 1, 1), (2, 3, 5, 7, 3), (3, 2, 1, 4, 9), (1, 4, 2, 8, 1), (2, 2, 3, 40, 33)]
EMPTY = [(2, 0, 3, 2, 2), (0, 2, 3, 2, 2), (2, 2, 0, 3, 2)]

KERNELS = {
    # those with a few positions of many features are cheaper by Gram matrices: of one, two and four blocks
    "outer_norm": Kernel(
        _outer_norm,
        PRODUCTS + EMPTY,
        [(2, 2, 70, 70, 67), (2, 2, 30, 100, 90), (2, 1, 70, 200, 301), (1, 1, 200, 600, 500)],
    ),
    "outer_square_sum": Kernel(
        _outer_square_sum,
        _each(PRODUCTS + EMPTY, (True, False), (True, False)),
        [(2, 6, 37, 70, 67, True, False), (2, 1, 70, 66, 130, False, True)],
    ),
    # (v, n, channels, outputs, size, kernel, stride, padding, dilation, groups, weighted, per_sample)
    "outer_square_sum_conv": Kernel(
        _outer_square_sum_conv,
        [
            (1, 1, 1, 1, (1,), (1,), (1,), (0,), (1,), 1, False, False),
            (2, 3, 2, 3, (7,), (3,), (2,), (2,), (1,), 1, True, False),
            (2, 3, 4, 6, (5, 4), (3, 2), (1, 2), (1, 0), (1, 1), 2, True, True),
            (3, 2, 3, 3, (6, 7), (2, 3), (2, 1), (0, 3), (2, 2), 3, False, False),
            (1, 5, 3, 2, (4, 5), (1, 1), (1, 1), (0, 0), (1, 1), 1, True, False),
            (2, 2, 2, 2, (3, 4, 5), (2, 1, 3), (1, 2, 1), (1, 0, 2), (1, 1, 2), 2, True, True),
            (0, 2, 2, 3, (5,), (3,), (1,), (1,), (1,), 1, True, False),
            (2, 0, 2, 3, (5,), (3,), (1,), (1,), (1,), 1, False, True),
        ],
        [
            (2, 6, 8, 70, (6, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1, True, False),
            (1, 2, 6, 132, (3, 4, 5), (3, 2, 3), (1, 1, 2), (1, 0, 1), (1, 2, 1), 2, False, True),
        ],
    ),
}
SMALL = [(name, sizes) for name, kernel in KERNELS.items() for sizes in kernel.sizes]
TILED = [(name, sizes) for name, kernel in KERNELS.items() for sizes in kernel.tiled]


def arguments(name: str, sizes: tuple, dtype=torch.float64, layout="contiguous", device="cpu") -> tuple:
    """The arguments of `name` at `sizes`, random numbers of one seed."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return laid_out(values.to(device, dtype), layout)

    return KERNELS[name].make(random, *sizes)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """`t` in another layout; "expanded" repeats its first slice along the first axis."""
    axes = tuple(reversed(range(t.ndim)))
    if layout == "reversed":
        return t.permute(axes).contiguous().permute(axes)
    if layout == "steps":
        wide = t.new_full([2 * size + 1 for size in t.shape], torch.nan)
        view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
        return view.copy_(t)
    return t[:1].expand(t.shape) if layout == "expanded" and len(t) else t


def check(name: str, run: Callable, args: tuple, factor_eps: float = 0.0) -> None:
    """`run(*args)` beside the reference in float64, within rounding of the same sums of absolute values.

    `factor_eps` is the relative error to which factors are rounded besides.
    """
    reference = importlib.import_module(f"fxcurv.kernels.{name}").reference
    exact = pytree.tree_map(lambda t: t.double() if isinstance(t, Tensor) else t, args)
    actual, expected = run(*args), reference(*exact)
    bound = reference(*pytree.tree_map(lambda t: t.abs() if isinstance(t, Tensor) else t, exact))
    given = args[0].dtype
    summed = torch.float32 if given in (torch.float16, torch.bfloat16) else given
    assert actual.shape == expected.shape
    assert actual.dtype == summed
    error = (actual.double() - expected).abs()
    allowed = (16 * torch.finfo(summed).eps + 4 * factor_eps) * bound + torch.finfo(actual.dtype).eps * expected.abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.3g} times the rounding"
