"""Products of individual gradients with a matrix R of random signs, a few rows of which exist at a time.

    outer_project    P[n] = sum_s g[n, s, :] a[n, s, :]^T     a [N, S, I], g [N, S, O] -> P R, [N, dim]
    rows_project     P[n, r] = sum of g[n, s] with index[n, s] = r      index [N, S], g [N, S, D] -> P R, [N, dim]

R has a row per entry of the parameter (see `ir.noise.signs`), +1 or -1 over sqrt(dim). Results are in float32 for half
precision. P exists for a few outputs of all samples at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxcurv.ir.noise import signs
from fxcurv.ir.precision import wide
from fxcurv.kernels import blocks as cpu

# Elements of R at a time, on other devices than a CPU.
LARGE = 1 << 24


def step(like: Tensor, dim: int) -> int:
    """How many rows of R are made at a time."""
    return max(1, (cpu.BLOCK if like.device.type == "cpu" else LARGE) // dim)


def project(rows: Tensor, dim: int, key: int) -> Tensor:
    """Vectors [K, P] times R, [K, dim], in plain PyTorch, so that autograd applies."""
    rows = rows.to(wide(rows.dtype))
    parts = [
        rows[:, some] @ signs(torch.arange(some.start, some.stop, device=rows.device), dim, key, rows.dtype)
        for some in cpu.spans(rows.shape[1], step(rows, dim))
    ]
    return sum(parts[1:], parts[0]) * dim**-0.5 if parts else rows.new_zeros(len(rows), dim)


@torch.library.custom_op("fxcurv::outer_project", mutates_args=())
def outer_project(a: Tensor, g: Tensor, sizes: list[int], order: list[int], dim: int, key: int) -> Tensor:
    """See the module; [O, I] has the axes `sizes`, flattened; the parameter has them in the order `order`."""
    (n, s, i), o = a.shape, g.shape[2]
    out = g.new_zeros(n, dim, dtype=wide(g.dtype))
    entries = _entries(sizes, order, o, i, g.device)
    for rows in cpu.spans(o, max(1, step(g, dim) // max(1, i))):
        left = g[..., rows].to(out.dtype).mT
        p = torch.bmm(left, a.to(out.dtype)) if s != 1 else left * a.to(out.dtype)
        flat, at = p.flatten(1), entries[rows].flatten()
        for some in cpu.spans(flat.shape[1], step(g, dim)):  # several parts if one row is long
            out.addmm_(flat[:, some], signs(at[some], dim, key, out.dtype))
    return out.mul_(dim**-0.5)


def _entries(sizes: list[int], order: list[int], o: int, i: int, device: torch.device) -> Tensor:
    """The number [O, I] that each entry of P has in the parameter."""
    numbers = torch.arange(o * i, device=device).reshape([sizes[d] for d in order])
    return numbers.permute([order.index(d) for d in range(len(order))]).reshape(o, i)


@outer_project.register_fake
def _(a, g, sizes, order, dim, key):
    return g.new_empty(g.shape[0], dim, dtype=wide(g.dtype))


@register_flop_formula(torch.ops.fxcurv.outer_project)
def _(a, g, sizes, order, dim, *rest, out_shape=None, **kwargs):
    n, s, i = a
    return 2 * n * g[2] * i * (dim + s)


@torch.library.custom_op("fxcurv::rows_project", mutates_args=())
def rows_project(index: Tensor, g: Tensor, padding: int, dim: int, key: int) -> Tensor:
    """See the module; positions with index `padding` do not count."""
    n, s, d = g.shape
    out = g.new_zeros(n, dim, dtype=wide(g.dtype))
    numbers, flat = index.flatten(), g.flatten(0, 1)
    samples = torch.arange(n, device=g.device).repeat_interleave(s)
    for some in cpu.spans(n * s, max(1, step(g, dim) // max(1, d))):
        at = numbers[some].unsqueeze(1) * d + torch.arange(d, device=g.device)
        r = signs(at.flatten(), dim, key, out.dtype).view(-1, d, dim)
        rows = flat[some].to(out.dtype) * (numbers[some] != padding).unsqueeze(1)
        out.index_add_(0, samples[some], torch.bmm(rows.unsqueeze(1), r).squeeze(1))
    return out.mul_(dim**-0.5)


@rows_project.register_fake
def _(index, g, padding, dim, key):
    return g.new_empty(g.shape[0], dim, dtype=wide(g.dtype))


@register_flop_formula(torch.ops.fxcurv.rows_project)
def _(index, g, padding, dim, *rest, out_shape=None, **kwargs):
    n, s, d = g
    return 2 * n * s * d * dim
