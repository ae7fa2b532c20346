"""Placements of ops without a placement rule, by trial: redraw some samples' values and see which outputs change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.ir.graph import ancestors, canonical_args, invoke, is_continuous, is_tensor
from fxcurv.ir.placement import MIXED, PARTIAL, Mixed, Partial, Placement, Shard, halves, samples_first
from fxcurv.ir.private import OpOverload, pytree, schema_of
from fxcurv.ir.program import Program
from fxcurv.rules.sites import numeric_args
from fxcurv.rules.traits import random

aten = torch.ops.aten

SMALL = (3, 4)


class Uninformative(Exception):
    """The op fails, gives no numbers or does not vary at the values tried, so the trial shows nothing."""


class OneSize(Exception):
    """The placement holds only for the batch size of the capture."""


@dataclass(frozen=True)
class Found:
    """The placement of every output, None for one that depends on no input; `alone`: see `Call`."""

    places: list[Placement | None]
    alone: bool = True


def try_op(program: Program, node: fx.Node, count: int) -> Found:
    """The placements of an op's `count` outputs.

    Raises:
        Uninformative: if no values were found at which the op shows its placements.
        OneSize: if the placements hold only for the batch size of the capture.
    """
    places = [a.meta["place"] for a in pytree.tree_leaves(canonical_args(node)) if is_tensor(a)]
    active = [a.meta["place"] for a in node.all_input_nodes if a.meta.get("active")]
    summed = any(isinstance(p, Partial) for p in active)
    if any(isinstance(p, Mixed) for p in active) or (summed and any(isinstance(p, Shard) for p in places)):
        return Found([MIXED] * count)
    _check_indices(program, node)
    routed = _try_known_indices(program, node, count, summed)
    if routed is not None:
        return routed
    reason = ""
    # small sizes are quick; the batch's own is needed where another size must equal it
    sizes = [SMALL, (program.batch.size,)] if program.batch.symbols else [(program.batch.size,)]
    for several, domain in product(sizes, DOMAINS):
        found = []
        for n in several:
            try:
                found.append(_at_size(program, node, n, domain, summed))
            except Uninformative as error:
                reason = reason or str(error)
        if found:
            together = [_common_place(p) for p in zip(*(f.places for f in found), strict=True)]
            _check_sizes(program, node, together)
            return Found(together, all(f.alone for f in found))
    raise Uninformative(reason)


def _at_size(program: Program, node: fx.Node, n: int, domain: Domain, summed: bool, exact: bool = False) -> Found:
    first = Trial(program, node, n, domain, 0, exact)
    trials = [first, *(Trial(program, node, n, domain, seed, exact) for seed in range(1, 4 if first.highs else 2))]
    places = _places_of_sums(trials) if summed else _places_by_samples(trials, program, node)
    return Found(places, first.serves_alone(places))


# ---- indices that are functions of the batch size ------------------------------


def _try_known_indices(program: Program, node: fx.Node, count: int, summed: bool) -> Found | None:
    """The placements of an op whose indices are functions of the batch size, if they keep samples apart; else None.

    They are found at several batch sizes, and checked at any other before the program serves it. (Not with ranks:
    those with parts of different sizes have to agree on a program.)
    """
    per_sample = any(e.per_sample for e in program.extensions) and not program.options.ranks
    if not program.batch.symbols or program.batch.lengths or summed or not per_sample or not _varying(program, node):
        return None
    alone = _copy_node(program, node)
    here = SimpleNamespace(batch=program.batch)
    sizes = dict.fromkeys((*SMALL, program.batch.size))
    found = [_slices_at_size(here, alone, n) for n in sizes if n > 1]
    places = found[0].places if found[0] is not None else []
    if not places or len(places) != count or any(f is None or f.places != places for f in found):
        return None
    program.conditions.append(lambda n: n < 2 or n in sizes or _has_places(here, alone, n, places))
    return Found(places, all(f is not None and f.alone for f in found))


def _has_places(program: Any, node: fx.Node, n: int, places: list[Placement | None]) -> bool:
    found = _slices_at_size(program, node, n)
    return found is not None and found.places == places


def _slices_at_size(program: Any, node: fx.Node, n: int) -> Found | None:
    """The placements at batch size `n` with the indices of that size, if all outputs have a slice per sample."""
    try:
        found = _at_size(program, node, n, DOMAINS[0], summed=False, exact=True)
    except (Uninformative, OneSize, RuntimeError, IndexError, ValueError):
        return None
    return found if all(isinstance(p, Shard) for p in found.places) else None


def _varying(program: Program, node: fx.Node) -> bool:
    """Whether an index among the arguments is known at every batch size and depends on it."""
    leaves = [a for a in pytree.tree_leaves(canonical_args(node)) if _is_index(a)]
    return any(not _alike(program, a) and known(program, a, program.batch.size) is not None for a in leaves)


def _copy_node(program: Program, node: fx.Node) -> fx.Node:
    """A copy of the node, and of the nodes that its known indices are computed by, in a graph of their own."""
    graph, env = fx.Graph(), {}

    def copied(n: fx.Node) -> fx.Node:
        if n not in env:
            inside = n is node or (_is_index(n) and known(program, n, program.batch.size) is not None)
            env[n] = graph.node_copy(n, copied) if inside else graph.placeholder(n.name)
            env[n].meta = dict(n.meta)
        return env[n]

    return copied(node)


def _common_place(places: Sequence[Placement | None]) -> Placement | None:
    """The placement that holds at all the batch sizes at which these were found."""
    if all(p == places[0] for p in places):
        return places[0]
    return PARTIAL if all(isinstance(p, Shard | Partial) for p in places) else MIXED


def _check_sizes(program: Program, node: fx.Node, places: Sequence[Placement | None]) -> None:
    """Ask for a fixed batch size, where indices are known, if samples may meet by indices that depend on it."""
    varying = _varying(program, node)
    apart = all(isinstance(p, Shard) for p in places)
    if varying and not apart and program.batch.symbols and any(e.per_sample for e in program.extensions):
        raise OneSize


# Ops that raise an error for an index out of range, so that any may be tried. Others may read or write anywhere.
_CHECKED = {
    "embedding", "embedding_bag", "gather", "index", "index_add", "index_copy", "index_fill", "index_put", "index_reduce",
    "index_select", "max_unpool2d", "max_unpool3d", "multi_margin_loss", "multilabel_margin_loss", "put", "scatter",
    "scatter_add", "scatter_reduce", "take", "nll_loss", "nll_loss2d", "nll_loss_nd", "cross_entropy_loss",
}  # fmt: skip


def _check_indices(program: Program, node: fx.Node) -> None:
    """Refuse to try random integers on an op that may not check them."""
    name = str(node.target).removeprefix("aten.").split(".")[0].strip("_").removesuffix("_forward")
    if name in _CHECKED:
        return
    names, args = _names(node), pytree.tree_leaves(canonical_args(node))
    for leaf, name in zip(args, names, strict=False):
        if not _is_index(leaf) or leaf.meta["val"].dtype is torch.bool or "pivots" in name:
            continue
        if known(program, leaf, program.batch.size) is None or (program.batch.symbols and not _alike(program, leaf)):
            raise Uninformative(f"its argument '{name}' is of integers, and it is not known to check them")


def _names(node: fx.Node) -> list[str]:
    """The schema's name for each flattened argument."""
    arguments = getattr(schema_of(node.target), "arguments", ())
    return [a.name for a, v in zip(arguments, canonical_args(node), strict=False) for _ in pytree.tree_leaves(v)]


def _is_index(leaf: Any) -> bool:
    return is_tensor(leaf) and not is_continuous(leaf.meta["val"])


# ---- values that depend on no input ------------------------------

_ARANGE = {aten.arange.default: 0, aten.arange.start: 1, aten.arange.start_step: 1}

_SHAPED = {
    aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.expand.default,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.clone.default, aten.alias.default, aten.contiguous.default,
    aten._to_copy.default, aten.to.dtype,
}  # fmt: skip

_AFFINE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar}


class _Unknown(Exception):
    """The value depends on an input, a buffer or chance."""


def known(program: Program, node: fx.Node, n: int) -> Tensor | None:
    """The value of a node at batch size `n`, if it is computed from numbers and sizes alone; else None."""

    def value(node: fx.Node) -> Any:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt | int):
            return program.batch.evaluate(val, n)
        op = node.target
        if not isinstance(op, OpOverload) or random(op):
            raise _Unknown
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        return op(*args, **kwargs)

    try:
        return value(node).cpu()
    except _Unknown:
        return None


def _alike(program: Program, node: fx.Node) -> bool:
    """Whether a known value is independent of the batch size, or affine in the position with coefficients that are."""
    return _affine(node) or not any(_varies(program, n.meta.get("val")) for n in ancestors([node]))


def _varies(program: Program, val: Any) -> bool:
    """Whether a number or a tensor's shape changes with the batch size."""
    several = (SMALL[0], SMALL[1], program.batch.size)
    if isinstance(val, Tensor):
        return len({program.batch.shape(val, n) for n in several}) > 1
    return isinstance(val, torch.SymInt) and len({program.batch.evaluate(val, n) for n in several}) > 1


def _affine(node: fx.Node) -> bool:
    if node.target in _ARANGE:
        at = _ARANGE[node.target]
        bounds = [*node.args[:at], *node.args[at + 1 :]]  # without the end
        return all(isinstance(b, int) for b in bounds)
    if node.target in _SHAPED:
        return _affine(node.args[0])  # type: ignore[arg-type]
    if node.target in _AFFINE:
        terms = [a for a in node.args if isinstance(a, fx.Node)]
        return len(terms) == 1 and is_tensor(terms[0]) and _affine(terms[0])
    return False


# ---- random values ------------------------------


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _positive(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Positive numbers; square matrices are positive definite, also if read as triangular."""
    x = torch.rand(shape, dtype=torch.float64, generator=generator)
    square = len(shape) > 1 and shape[-1] == shape[-2]
    return 0.1 * x / shape[-1] + torch.eye(shape[-1], dtype=x.dtype) if square else 0.1 + 0.8 * x


@dataclass(frozen=True)
class Domain:
    """How values are drawn: floats by `floats(shape, generator)`; integers are `integer`, or any if that is None."""

    floats: Callable[[tuple[int, ...], torch.Generator], Tensor]
    integer: int | None = None

    def numbers(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Floats, or complex numbers of them."""
        x = self.floats(shape, generator)
        return (torch.complex(x, self.floats(shape, generator)) if dtype.is_complex else x).to(dtype)


DOMAINS = (Domain(_normal), Domain(_positive), Domain(_positive, 1), Domain(_positive, 0))


def _as_real(t: Tensor) -> Tensor:
    """Integers, or complex numbers, as floats that differ where they do."""
    return t.real.double() + 0.3 * t.imag.double() if t.is_complex() else t.double()


class Trial:
    """An op on random values in a batch of `n`; if `exact`, indices that are known at `n` have their true values."""

    def __init__(self, program: Program, node: fx.Node, n: int, domain: Domain, seed: int, exact: bool = False):
        self.program, self.node, self.n, self.domain, self.seed = program, node, n, domain, seed
        self.exact = exact or not program.batch.symbols
        self.leaves, self.spec = pytree.tree_flatten(numeric_args(program, node, n))
        self.active = [i for i, a in enumerate(self.leaves) if is_tensor(a) and a.meta["active"]]
        self.sharded = {
            i: a.meta["place"] for i, a in enumerate(self.leaves) if is_tensor(a) and isinstance(a.meta["place"], Shard)
        }
        generator = torch.Generator().manual_seed(seed)
        self.values = [self._draw(leaf, generator) for leaf in self.leaves]
        self.highs = {i: 2 for i, v in enumerate(self.values) if isinstance(v, Tensor) and v.dtype is torch.bool}
        if domain.integer is None:
            self._draw_integers(generator)

    def _draw(self, leaf: Any, generator: torch.Generator) -> Any:
        if not is_tensor(leaf):
            return leaf
        val = leaf.meta["val"]
        shape = self.program.batch.shape(val, self.n)
        if is_continuous(val):
            return self.domain.numbers(shape, val.dtype, generator).requires_grad_(leaf.meta["active"])
        if self.domain.integer is not None:
            return torch.full(shape, self.domain.integer, dtype=val.dtype)
        return torch.randint(0, 2, shape, generator=generator).to(val.dtype)

    def _draw_integers(self, generator: torch.Generator) -> None:
        """Replace integers by their values, if known, or by random ones from the largest range that the op accepts."""
        integers = {i: v for i, v in enumerate(self.values) if isinstance(v, Tensor) and not is_continuous(v)}
        fixed = {i: known(self.program, self.leaves[i], self.n) for i in integers} if self.exact else {}
        for i in integers:
            if i not in fixed and _alike(self.program, self.leaves[i]):
                fixed[i] = known(self.program, self.leaves[i], self.n)
        pivots = [i for i, name in enumerate(_names(self.node)) if "pivots" in name]  # LAPACK does not check them
        fixed |= {i: torch.ones_like(integers[i]) for i in pivots if i in integers}
        fixed = {i: v for i, v in fixed.items() if v is not None}
        self.values = [fixed.get(i, v) for i, v in enumerate(self.values)]
        free = {i: v for i, v in integers.items() if i not in fixed and v.dtype is not torch.bool}
        still = [torch.zeros_like(v) if i in free else v for i, v in enumerate(self.values)]
        self.highs = {i: high for i, high in self.highs.items() if i not in fixed}
        for i, v in free.items():
            self.highs[i] = high = next((c for c in self._ends(v) if self._accepts(still, i, c - 1)), 1)
            self.values[i] = torch.randint(0, high, v.shape, generator=generator).to(v.dtype)

    def _ends(self, v: Tensor) -> list[int]:
        """Candidates for the end of an index's range, largest first: sizes of dimensions and of whole arguments."""
        tensors = [t for t in self.values if isinstance(t, Tensor)]
        ends = {2, self.n, *(t.numel() for t in tensors), *(size for t in tensors for size in t.shape)}
        return sorted((e for e in ends if 0 < e <= torch.iinfo(v.dtype).max), reverse=True)

    def _accepts(self, values: list[Any], i: int, number: int) -> bool:
        try:
            self._outputs([torch.full_like(v, number) if j == i else v for j, v in enumerate(values)])
        except Exception:  # ops may raise anything for arguments that they do not accept
            return False
        return True

    def run(self, samples: Sequence[int], shifts: Sequence[int] = ()) -> list[Tensor]:
        """The outputs after redrawing the slices of `samples`, or adding `shifts` to what depends on parameters."""
        moving = {i: p for i, p in self.sharded.items() if i in self.active} or self.sharded
        drawn = torch.Generator().manual_seed(self.seed + 100)  # the same values, whichever samples are redrawn
        new = list(self.values)
        for i, place in moving.items() if samples else ():
            new[i] = self._redraw(i, place, samples, drawn)
        for shift in shifts:
            generator = torch.Generator().manual_seed(self.seed + 200 + shift)
            for i in self.active:
                x = self.values[i]
                new[i] = new[i] + self.domain.numbers(tuple(x.shape), x.dtype, generator)
        try:
            out = self._outputs(new)
        except Exception as error:
            raise Uninformative(str(error)) from error
        val = self.node.meta["val"]
        if len(out) != (len(val) if isinstance(val, tuple | list) else 1):
            raise Uninformative("at another batch size it gives another number of outputs")
        tensors = [o for o in out if isinstance(o, Tensor) and o.numel()]
        if any(o.isnan().all() or (self.domain is DOMAINS[0] and o.isnan().any()) for o in tensors):
            raise Uninformative("it gives no numbers")
        with torch.enable_grad():
            return [o.nan_to_num() if isinstance(o, Tensor) else o for o in out]

    def _redraw(self, i: int, place: Shard, samples: Sequence[int], generator: torch.Generator) -> Tensor:
        value = self.values[i]
        if is_continuous(value):
            other = self.domain.numbers(tuple(value.shape), value.dtype, generator)
        else:
            high = self.highs.get(i, 2)
            step = torch.randint(1, max(high, 2), value.shape, generator=generator)
            other = ((value.long() + step) % max(high, 1)).to(value.dtype)
        chosen = torch.isin(
            _slots(value.shape[place.dim], place.inner, self.n), torch.tensor(samples, dtype=torch.long)
        )
        chosen = chosen.view(-1, *[1] * (value.ndim - place.dim - 1))
        return torch.where(chosen, other, value)

    def serves_alone(self, places: Sequence[Placement | None]) -> bool:
        """Whether the op on one sample's slices gives that sample's slices of the outputs."""
        single = pytree.tree_leaves(numeric_args(self.program, self.node, 1))
        values = [v if isinstance(v, Tensor) else s for v, s in zip(self.values, single, strict=True)]
        try:
            whole = self._outputs(self.values)
            pairs = [(k, samples_first(whole[k], p)) for k, p in enumerate(places) if isinstance(p, Shard)]
            owns = [{i: samples_first(self.values[i], p)[n] for i, p in self.sharded.items()} for n in range(self.n)]
            outs = [self._outputs([own.get(i, v) for i, v in enumerate(values)]) for own in owns]
        except Exception:  # ops may raise anything for arguments that they do not accept
            return False
        for n, out in enumerate(outs):
            if any(o.shape != y.shape or not torch.allclose(o, y, 1e-5, equal_nan=True) for o, y in
                   ((out[k], y[n]) for k, y in pairs)):  # fmt: skip
                return False
        return True

    def _outputs(self, values: list[Any]) -> list[Any]:
        with torch.enable_grad():
            out = invoke(self.node.target, pytree.tree_unflatten(values, self.spec))
            out = list(out) if isinstance(out, tuple | list) else [out]
            return [o if not isinstance(o, Tensor) or o.is_floating_point() else _as_real(o) for o in out]


# ---- placements from what moved ------------------------------


def _places_by_samples(trials: list[Trial], program: Program, node: fx.Node) -> list[Placement | None]:
    """The placements of a function of samples, by redrawing halves of them."""
    n, val = trials[0].n, node.meta["val"]
    vals = list(val) if isinstance(val, tuple | list) else [val]
    sets = [half for pair in halves(n) for half in pair]
    bases = [t.run(()) for t in trials]
    outs = [[t.run(half) for half in sets] for t in trials]
    every = [t.run(range(n)) for t in trials]
    found: list[Placement | None] = []
    for k, v in enumerate(vals):
        if not isinstance(v, Tensor):
            found.append(None)
            continue
        # for each half, the entries that moved in any trial
        moved = [
            torch.stack([o[j][k] != b[k] for o, b in zip(outs, bases, strict=True)]).any(0) for j in range(len(sets))
        ]
        if not any(bool(m.any()) for m in moved):
            if not bases[0][k].numel():
                found.append(PARTIAL)  # what a mask leaves of no sample is the sum over samples of nothing
                continue
            if bases[0][k].requires_grad:  # false for an op that reads only shapes
                raise Uninformative("its output is the same wherever it was tried")
            found.append(None)
            continue
        additive = all(
            torch.allclose(e[k], o[j][k] + o[j + 1][k] - b[k], rtol=1e-6, atol=1e-8)
            for o, b, e in zip(outs, bases, every, strict=True)
            for j in range(0, len(sets), 2)
        )
        found.append(_shard_of(program, moved, sets, n, v) or (PARTIAL if additive else MIXED))
    return found


def _places_of_sums(trials: list[Trial]) -> list[Placement | None]:
    """The placements of a function of sums over samples: `Partial` if it is affine, in parameters too."""
    found: list[Placement | None] = []
    outs = [[t.run((), shifts) for shifts in ((), (0,), (1,), (0, 1))] for t in trials]
    for k, first in enumerate(outs[0][0]):
        if not isinstance(first, Tensor):
            found.append(None)
            continue
        if not first.requires_grad:
            found.append(MIXED if any(bool((o[k] != ab[k]).any()) for o, *_, ab in outs) else None)
            continue
        affine = all(torch.allclose(ab[k] + o[k], a[k] + b[k], rtol=1e-6, atol=1e-8) for o, a, b, ab in outs)
        found.append(PARTIAL if affine else MIXED)
    return found


def _shard_of(program: Program, moved: list[Tensor], sets: list[tuple[int, ...]], n: int, val: Tensor) -> Shard | None:
    """The `Shard` by which each sample has a slice that moves with this sample only, or None."""
    shape = tuple(moved[0].shape)
    for dim, (outer, inner) in product(range(len(shape)), _splits_of(shape, n)):
        if outer * n * inner != shape[dim]:
            continue
        one_size = outer * program.batch.stand_in * inner != program.batch.shape(val)[dim]
        if one_size and n != program.batch.size:
            continue
        slots = _slots(shape[dim], inner, n).view(-1, *[1] * (len(shape) - dim - 1))
        own = [torch.isin(slots, torch.tensor(half, dtype=torch.long)) for half in sets]
        if all(not bool((m & ~mine).any()) for m, mine in zip(moved, own, strict=True)):
            if one_size:
                raise OneSize
            return Shard(dim, outer, inner)
    return None


def _slots(size: int, inner: int, n: int) -> Tensor:
    """The sample that each entry along a dimension belongs to."""
    return torch.arange(size).div(inner, rounding_mode="floor") % n


def _splits_of(shape: Sequence[int], n: int) -> list[tuple[int, int]]:
    sizes = {s // n for s in shape if s and s % n == 0}
    pairs = {(o, s // o) for s in sizes for o in range(1, s + 1) if s % o == 0}
    return sorted(pairs, key=lambda p: (p[0] * p[1], p[0]))
