"""Calls of extended losses on a model's output, and the loss that they add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fxcurv.front.arguments import Slot, map_leaves
from fxcurv.ir.private import base_of, has_hooks, pytree


@dataclass(frozen=True)
class View:
    """How the loss's input is made of the model's output f: a permutation of its axes, or a new shape per sample."""

    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    @staticmethod
    def of(f: Tensor, z: Tensor) -> View | None:
        """How `z` is a view of `f`; None if this class does not know such a view."""
        if z is f or (z.shape == f.shape and z.stride() == f.stride()):
            return View() if z.storage_offset() == f.storage_offset() else None
        if z.numel() != f.numel() or z.storage_offset() != f.storage_offset():
            return None
        if z.is_contiguous() and f.is_contiguous():
            return View(shape=_open_sample_axis(z.shape, f.shape[0]))
        layout = list(zip(f.shape, f.stride(), strict=True))
        wanted = list(zip(z.shape, z.stride(), strict=True))
        if sorted(layout) != sorted(wanted) or len(set(layout)) < len(layout):
            return None
        return View(axes=tuple(layout.index(pair) for pair in wanted))

    def __call__(self, f: Tensor) -> Tensor:
        """The loss's input."""
        if self.axes is not None:
            return f.permute(self.axes)
        return f.reshape(self.shape) if self.shape is not None else f


def _open_sample_axis(shape: torch.Size, n: int) -> tuple[int, ...] | None:
    """`shape` with -1 for its first axis, the sample axis; None if its size is no multiple of `n`."""
    return (-1, *shape[1:]) if shape and shape[0] % n == 0 else None


@dataclass(frozen=True)
class Read:
    """Stands for a leaf of the model's output f in a loss's arguments, or for entries of it.

    entries: [N, K], for each sample which entries of its f are read, in order; None if `view` alone says it.
    """

    leaf: int
    view: View
    entries: Tensor | None = None

    @staticmethod
    def of(found: Any, edge: GradientEdge, z: Tensor) -> Read | None:
        """How `z` is made of f, the output of `found` at `edge`; None unless it holds f's entries, sample by sample."""
        leaf = edge.output_nr
        f, shape = found.leaves[leaf](), found.shapes[leaf]
        view = View.of(f, z) if f is not None and (f is z or base_of(z) is f) else None
        if view is not None:
            return Read(leaf, view)
        entries = _entries(edge, shape, z)
        return None if entries is None else Read(leaf, View(shape=(-1, *z.shape[1:])), entries)

    def out_of(self, f: Tensor) -> Tensor:
        """The loss's input."""
        return self.view(f if self.entries is None else f.flatten(1).gather(1, self.entries))


# autograd's nodes of ops that only move entries
_MOVING = {
    "AliasBackward0", "AsStridedBackward0", "CatBackward0", "CloneBackward0", "DiagonalBackward0", "FlipBackward0",
    "GatherBackward0", "IndexBackward0", "IndexSelectBackward0", "MaskedSelectBackward0", "PermuteBackward0",
    "ReshapeAliasBackward0", "RollBackward0", "SelectBackward0", "SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0",
    "SqueezeBackward0", "SqueezeBackward1", "StackBackward0", "TakeBackward0", "TBackward0", "TransposeBackward0",
    "UnbindBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0",
}  # fmt: skip
_EXACT = 1 << 8  # numbers up to it are exact in every floating dtype


def moved_from(z: Tensor) -> GradientEdge | None:
    """The one edge of autograd's graph that all entries of `z` come from, through ops that only move them, or None."""
    ends: set[tuple[Any, int]] = set()
    seen: set[tuple[Any, int]] = set()
    stack = [(z.grad_fn, z.output_nr)]
    while stack:
        node, number = stack.pop()
        if (node, number) in seen:
            continue
        seen.add((node, number))
        if node is not None and node.name() in _MOVING:
            stack.extend(node.next_functions)
        else:
            ends.add((node, number))
    if len(ends) != 1 or (None, 0) in ends:
        return None  # of several values, or partly of constants
    return GradientEdge(*ends.pop())


def pass_of(edge: GradientEdge | None) -> Any:
    """The pass of an extended model whose output an edge is; None if there is none."""
    return getattr(edge.node, "found", None) if edge is not None else None


def _entries(edge: GradientEdge, shape: torch.Size, z: Tensor) -> Tensor | None:
    """[N, K]: which entries of a sample's f the tensor `z` holds; None if they do not lie sample by sample."""
    n, per = shape[0], shape[1:].numel()
    if not z.ndim or not z.numel() or not n or len(z) % n:
        return None
    count = torch.arange(z.numel(), device=z.device).reshape(z.shape)
    where = torch.zeros(shape, dtype=torch.long, device=z.device)
    read = torch.ones(shape, dtype=torch.bool, device=z.device)
    for k in range(4):  # digit by digit: a digit is exact
        digit = (count // _EXACT**k % _EXACT + int(k == 0)).to(z.dtype)  # from 1: 0 marks entries that nothing reads
        (found,) = torch.autograd.grad(z, edge, digit, retain_graph=True)
        read = found > 0 if k == 0 else read
        where += (found.long() - int(k == 0)) * _EXACT**k
    places = torch.empty(z.numel(), dtype=torch.long, device=z.device)
    positions = read.flatten().nonzero()[:, 0]
    if len(positions) != z.numel():
        return None
    places[where.flatten()[positions]] = positions
    places = places.reshape(n, -1)
    same = places // per == torch.arange(n, device=z.device)[:, None]
    return places % per if bool(same.all()) else None


@dataclass
class LossCall:
    """A call of an extended loss, and the cotangent that has reached it.

    Attributes:
        args, kwargs: with a `Read` where a leaf of the model's output, or a view of one, was given.
        known: whether every such tensor is one that `Read` knows.
    """

    loss: nn.Module
    args: tuple
    kwargs: dict
    known: bool
    scale: Tensor | None = None

    @staticmethod
    def of(loss: nn.Module, args: tuple, kwargs: dict) -> tuple[Any, LossCall] | None:
        """(the pass that the arguments come from, the call); None if they come from none, or from several."""
        passes: list[Any] = []
        reads: list[Read | None] = []

        def read(t: Tensor) -> Any:
            edge = moved_from(t)
            found = pass_of(edge)
            if found is None:
                return t
            passes.append(found)
            reads.append(Read.of(found, edge, t))
            return reads[-1] if reads[-1] is not None else t

        args, kwargs = map_leaves((args, kwargs), Tensor, read)
        if not passes or any(p is not passes[0] for p in passes):
            return None
        return passes[0], LossCall(loss, args, kwargs, None not in reads)

    def key(self) -> Any:
        """Equal for calls that one program can serve; tensors of the loss are read anew at each call."""
        return tuple(map(_signature, self.loss.modules()))


def _signature(module: nn.Module) -> Any:
    """A module's class and settings if these are plain values and it has no hooks, else the module itself."""
    settings = {k: v for k, v in vars(module).items() if not isinstance(v, dict) and v is not None}
    plain = all(isinstance(v, bool | int | float | str | set) for v in settings.values())
    hooked = has_hooks(module)
    if not plain or hooked:
        return module
    return type(module), tuple((k, v) for k, v in settings.items() if not isinstance(v, set))


class TotalLoss(nn.Module):
    """The sum of extended losses, each times its cotangent."""

    def __init__(self, calls: Sequence[LossCall]):
        super().__init__()
        self.losses = nn.ModuleList(call.loss for call in calls)

    def forward(self, output: Any, scales: list[Tensor], args: list[tuple], kwargs: list[dict]) -> Tensor:
        """The loss; `output` is the model's, in any structure."""
        leaves = tensors_of(output)
        args, kwargs = map_leaves((args, kwargs), Read, lambda read: read.out_of(leaves[read.leaf]))
        calls = zip(self.losses, scales, args, kwargs, strict=True)
        values = [scale * loss(*a, **k) for loss, scale, a, k in calls]
        return sum(values[1:], values[0])


def targets_of(calls: Sequence[LossCall]) -> tuple:
    """The arguments of `TotalLoss` after the output."""
    return [c.scale for c in calls], [c.args for c in calls], [c.kwargs for c in calls]


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a model's output, in order."""
    found: list[Tensor] = []

    def keep(t: Tensor) -> Slot:
        found.append(t)
        return Slot(len(found) - 1)

    map_leaves(output, Tensor, keep)
    return found


def gradients(calls: Sequence[LossCall], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of the losses in the leaves of the model's output, by plain autograd."""
    with torch.enable_grad():
        detached = [t.detach().requires_grad_(t.is_floating_point()) for t in leaves]
        value = TotalLoss(calls)(detached, *targets_of(calls))
        wanted = [t for t in detached if t.requires_grad]
        found = iter(torch.autograd.grad(value, wanted, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in detached]


def same_gradients(found: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> bool:
    """Whether two lists of gradients agree to 1e-3 of the largest entry (NaN is no difference: it shows anyway)."""
    for a, b in zip(found, given, strict=True):
        a, b = (torch.zeros(()) if t is None else t.detach() for t in (a, b))
        scale = b.abs().amax() if b.numel() else b.sum()
        if not bool(((a - b).abs() <= 1e-3 * scale + 1e-12).all() | b.isnan().any()):
            return False
    return True


def leaves_only(values: Any) -> list[Tensor]:
    """The tensors in a pytree."""
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
