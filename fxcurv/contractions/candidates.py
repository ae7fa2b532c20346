"""Candidates: the ways to compute a `contract` node, each with the cost that `select` compares.

All compute what `contract` computes. A candidate is a class that registers itself (`@candidate`). V columns, N samples,
S shared positions, K groups, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxcurv.contractions.contract import Spec, combine, reduce_p
from fxcurv.contractions.factors import Conv, Dense, Explicit, Factor, Gather, is_one, summed, weighted
from fxcurv.contractions.sizes import Dims, dims
from fxcurv.cost import Cost
from fxcurv.ir.placement import Shard
from fxcurv.kernels.embedding_square_sum import embedding_square_sum
from fxcurv.kernels.outer_batch_conv import outer_batch_conv
from fxcurv.kernels.outer_moments import outer_moments, outer_moments_conv
from fxcurv.kernels.outer_norm import outer_norm
from fxcurv.kernels.outer_square_sum import outer_square_sum
from fxcurv.kernels.outer_square_sum_conv import outer_square_sum_conv


class Candidate:
    """A way to compute a contraction.

    Attributes:
        name: of the way, in reports.
        differentiable: whether autograd can differentiate it again.
        by_positions: whether it reads columns in one sum over shared positions, whose terms may come in parts.
    """

    name: ClassVar[str]
    differentiable: ClassVar[bool] = True
    by_positions: ClassVar[bool] = False

    def applies(self, spec: Spec, factors: list[Any]) -> bool:
        """Whether it can compute this contraction; factors hold fake tensors."""
        raise NotImplementedError

    def run(self, spec: Spec, factors: list[Any], weights: Any) -> Tensor:
        """The result, in plain PyTorch."""
        raise NotImplementedError

    def cost(self, spec: Spec, factors: list[Any]) -> Cost:
        """What it takes."""
        raise NotImplementedError


CANDIDATES: list[Candidate] = []


def candidate(cls: type[Candidate]) -> type[Candidate]:
    """Class decorator: register a candidate. Of two candidates with equal costs the first is taken."""
    CANDIDATES.append(cls())
    return cls


def implicit(factor: Factor) -> bool:
    """Whether this is a convolution that kernels unfold a few samples at a time."""
    plain = isinstance(factor, Conv) and not factor.transposed and factor.place == Shard(0)
    return plain and any(size > 1 for size in (*factor.kernel, *factor.stride))  # type: ignore[attr-defined]


def geometry(f: Conv) -> tuple:
    """The arguments of a kernel that unfolds."""
    return list(f.kernel), list(f.stride), list(f.padding), list(f.dilation), f.groups


def _block_cost(factor: Factor) -> Cost:
    """What unfolding costs a blocked kernel: a pass in the cache, or a full unfolding."""
    d = dims(factor)
    return Cost(0, 2 * IN_CACHE * d.item * d.unfold, 0, d.n) if implicit(factor) else _unfold_cost(d)


# Time of a pass over a cached block, as a fraction of a pass over memory.
IN_CACHE = 0.6

# Longest vector whose norm is still precise: it is added up without a tree, in as many sums as a vector register has lanes.
LONGEST = 1 << 13


def _unfold_cost(d: Dims) -> Cost:
    moved = d.item * d.unfold
    return Cost(0, 2 * moved, moved, 2 if moved else 0)


def _total(factors: list[Factor], one: Callable[[Dims], Cost]) -> Cost:
    total = Cost(0, 0, 0, 0)
    for f in factors:
        total = total + one(dims(f)) + _unfold_cost(dims(f))
    return total


# P itself -----------------------------------------------------------------------------------------------


@candidate
class Materialise(Candidate):
    """Make P, and reduce it."""

    name = "materialise"
    by_positions = True

    def applies(self, spec, factors):
        return True

    def run(self, spec, factors, weights):
        factors = combine(spec, factors)
        p = sum((f.materialise() for f in factors[1:]), factors[0].materialise())
        return reduce_p(spec, p, weights)

    def cost(self, spec, factors):
        def one(d: Dims) -> Cost:
            p = d.item * d.v * d.n * d.p
            passes = (3 if spec.power == 2 else 1) if spec.reduce else 0
            fresh = 0 if isinstance(factors[0], Explicit) else p
            return Cost(d.flops, d.inputs + p * (1 + passes), fresh + (p if passes > 1 else 0), 3)

        return _total(factors, one)


@candidate
class Direct(Candidate):
    """Sums of P itself need no P."""

    name = "direct"
    by_positions = True

    def applies(self, spec, factors):
        return spec.power == 1 and set(spec.reduce) == set("vn") and spec.samples is None

    def run(self, spec, factors, weights):
        parts = [f.summed(weights) for f in factors]
        return sum(parts[1:], parts[0])

    def cost(self, spec, factors):
        total = Cost(0, 0, 0, 0)
        for f in factors:
            d = dims(f)
            flops = 2 * d.n * d.s * d.p if isinstance(f, Dense | Conv) else d.v * d.n * d.s * d.o
            total = total + Cost(flops, d.inputs + d.item * d.p, d.item * d.p, 2)
        return total


# one product of dense factors ---------------------------------------------------------------------------


def _one_dense(spec, factors) -> bool:
    return len(factors) == 1 and isinstance(factors[0], Dense | Conv) and spec.samples is None and spec.power == 2


def _no_sharing(spec, factors):
    return _one_dense(spec, factors) and dims(factors[0]).s == 1 and "v" in spec.reduce


@candidate
class Squared(Candidate):
    """Without weight sharing the square of a product is the product of squares."""

    name = "squared factors"

    def applies(self, spec, factors):
        return _no_sharing(spec, factors)

    def run(self, spec, factors, weights):
        f = factors[0].lean()
        a, g = f.a.squeeze(1), f.g.squeeze(2)
        if g.shape[2] == 1:  # without groups, in the shape that a bias of the same layer has
            a, g = a.squeeze(1), g.squeeze(2)
        if weights is None and is_one(g.shape[0]):
            a, g = a.square(), g.squeeze(0).square()
        else:
            a, g = a.square(), summed(weighted(g.square(), weights), 0)
        if a.ndim == 2 and "n" in spec.reduce and "p" not in spec.reduce:
            return f.arrange(torch.mm(g.t(), a).unsqueeze(0))
        if "p" in spec.reduce:
            each = a.sum(-1) * g.sum(-1)
            each = each if each.ndim == 1 else each.sum(1)
            return each.sum() if "n" in spec.reduce else each
        if a.ndim == 2:
            a, g = a.unsqueeze(1), g.unsqueeze(1)
        if "n" not in spec.reduce:
            return f.arrange(g.unsqueeze(-1) * a.unsqueeze(-2))
        return f.arrange(torch.einsum("nko,nki->koi", g, a))

    def cost(self, spec, factors):
        d = dims(factors[0])
        out = d.item * d.p * (1 if "n" in spec.reduce else d.n)
        out = d.item * d.n if "p" in spec.reduce else out
        flops = 2 * d.n * d.p if "p" not in spec.reduce else 0
        return Cost(flops, 3 * d.inputs + out, d.inputs + out, 5)


@candidate
class NormsOfFactors(Candidate):
    """Without shared positions, the norm of a product is the product of norms; the norm of P itself takes one pass.

    A norm is as precise as a sum of squares while its vectors are not too long (`LONGEST`), and writes no squares.
    Its square's second derivative at zero is not that of a sum of squares.
    """

    name = "norms of factors"
    differentiable = False

    def applies(self, spec, factors):
        if spec.power != 2 or spec.reduce not in ("vp", "p") or spec.samples is not None or len(factors) > 1:
            return False
        f, d = factors[0], dims(factors[0])
        if isinstance(f, Explicit):
            return f.g.ndim > 2 and d.p <= LONGEST
        return isinstance(f, Dense | Conv) and d.s == 1 and max(d.o, d.i) <= LONGEST

    def run(self, spec, factors, weights):
        f = factors[0]
        if isinstance(f, Explicit):
            vectors = [f.g.flatten(2)]
        else:
            f = f.lean()
            vectors = [f.g.squeeze(2), f.a.squeeze(1)]  # [V, N, K, O], [N, K, I]
            if is_one(f.g.shape[3]):
                vectors = [t.squeeze(-2) for t in vectors]
        alone = "v" in spec.reduce and weights is None and is_one(f.g.shape[0])
        vectors[0] = vectors[0].squeeze(0) if alone else vectors[0]
        squares = [torch.linalg.vector_norm(t, dim=-1).square() for t in vectors]
        each = squares[0] if len(squares) == 1 else squares[0] * squares[1]
        each = each if each.ndim == (1 if alone else 2) else each.sum(-1)  # groups
        return each if alone else summed(weighted(each, weights), 0) if "v" in spec.reduce else weighted(each, weights)

    def cost(self, spec, factors):
        d, factored = dims(factors[0]), not isinstance(factors[0], Explicit)
        return Cost(0, d.inputs, 0, 5 if factored else 2)


def _is_norm(spec, factors):
    return _one_dense(spec, factors) and spec.reduce in ("vp", "p")


@candidate
class Gram(Candidate):
    """Norms from inner products of positions (the ghost norm; Goodfellow 2015, Li et al. 2022)."""

    name = "Gram"

    def applies(self, spec, factors):
        return _is_norm(spec, factors) and not _no_sharing(spec, factors)

    def run(self, spec, factors, weights):
        f = factors[0].lean()
        a, g = f.a.transpose(1, 2), f.g.transpose(2, 3)
        aa = torch.matmul(a, a.mT)
        each = (torch.matmul(g, g.mT) * aa).sum((-3, -2, -1))
        each = weighted(each, weights)
        return each.sum(0) if "v" in spec.reduce else each

    def cost(self, spec, factors):
        d = dims(factors[0])
        grams = d.item * d.n * d.k * d.s * d.s * (1 + d.v)
        flops = 2 * d.n * d.k * d.s * d.s * (d.i + d.v * d.o)
        return _unfold_cost(d) + Cost(flops, d.inputs + 3 * grams, 2 * grams, 5)


# blocked kernels: products of a few samples at a time, in the cache -------------------------------------


def _blockable(spec, factors):
    return _one_dense(spec, factors) and (dims(factors[0]).k == 1 or implicit(factors[0]))


@candidate
class BlockedSquares(Candidate):
    """Squares of products in the cache."""

    name = "blocked squares"
    differentiable = False

    def applies(self, spec, factors):
        return _blockable(spec, factors) and spec.reduce in ("vn", "v")

    def run(self, spec, factors, weights):
        f, per_sample = factors[0], "n" not in spec.reduce
        # kept per sample, products are written in the order of the parameter
        f = f if implicit(f) else f.dense() if per_sample else f.lean()
        w = None if weights is None else weights.expand(f.g.shape[:2])
        if implicit(f):
            return outer_square_sum_conv(f.a, f.g, w, per_sample, *geometry(f))
        out = outer_square_sum(f.a.squeeze(2), f.g.squeeze(3), w, "n" not in spec.reduce)
        return f.arrange(out.unsqueeze(-3))

    def cost(self, spec, factors):
        d = dims(factors[0])
        out = d.item * d.p * (1 if "n" in spec.reduce else d.n)
        cached = d.item * d.v * d.n * d.p
        dispatches = d.n * (2 + d.v)
        return _block_cost(factors[0]) + Cost(d.flops, d.inputs + out + IN_CACHE * cached, out, dispatches)


@candidate
class BlockedNorms(Candidate):
    """Norms of products in the cache."""

    name = "blocked norms"
    differentiable = False

    def applies(self, spec, factors):
        if not _is_norm(spec, factors):
            return False
        d = dims(factors[0])
        return d.k == 1 or implicit(factors[0]) and d.v == 1

    def run(self, spec, factors, weights):
        f = factors[0]
        if implicit(f) and dims(f).v == 1:
            each = outer_moments_conv(f.a, f.g.squeeze(0), False, False, True, *geometry(f))[2].unsqueeze(0)
        else:
            f = f.lean()
            each = outer_norm(f.a.squeeze(2), f.g.squeeze(3))
        each = weighted(each, weights)
        return each.sum(0) if "v" in spec.reduce else each

    def cost(self, spec, factors):
        d = dims(factors[0])
        return _block_cost(factors[0]) + Cost(d.flops, d.inputs + 0.4 * d.item * d.v * d.n * d.p, 0, d.n * 4)


@candidate
class BlockedProducts(Candidate):
    """The products of a convolution, its input unfolded a few samples at a time."""

    name = "blocked products"
    differentiable = False

    def applies(self, spec, factors):
        kept = spec.power == 1 and spec.samples is None and len(factors) == 1 and implicit(factors[0])
        return kept and (spec.reduce == "" or spec.reduce == "v" and dims(factors[0]).v == 1)

    def run(self, spec, factors, weights):
        f = factors[0]
        p = weighted(outer_batch_conv(f.a, f.g, *geometry(f)), weights)
        return p.squeeze(0) if "v" in spec.reduce else p

    def cost(self, spec, factors):
        d = dims(factors[0])
        p = d.item * d.v * d.n * d.p
        return _block_cost(factors[0]) + Cost(d.flops, d.inputs + p, p, d.n)


# embeddings ---------------------------------------------------------------------------------------------


def _squares_of_rows(spec, factors):
    one = len(factors) == 1 and isinstance(factors[0], Gather) and spec.power == 2 and spec.samples is None
    return one and "v" in spec.reduce


@candidate
class OccurringRows(Candidate):
    """Only rows that occur count: (1 / occurrences) (sum of their g)^2 at every position."""

    name = "occurring rows"

    def applies(self, spec, factors):
        return _squares_of_rows(spec, factors)

    def run(self, spec, factors, weights):
        f = factors[0]
        h, share = f.per_row()
        squares = (weighted(h.square(), weights).sum(0)) * share.unsqueeze(-1)
        if "p" in spec.reduce:
            return squares.sum((0, 1, 2) if "n" in spec.reduce else (1, 2))
        if "n" in spec.reduce:
            out = squares.new_zeros(f.rows, squares.shape[2])
            return out.index_add(0, f.index.flatten(), squares.flatten(0, 1))
        return Gather(f.index, squares.unsqueeze(0), f.rows, -1).materialise()[0]

    def cost(self, spec, factors):
        d = dims(factors[0])
        out = d.item * d.p * (1 if "n" in spec.reduce else d.n)
        out = 0 if "p" in spec.reduce else out
        return Cost(2 * d.v * d.n * d.s * d.s * d.o, d.item * d.n * d.s * (3 * d.v * d.o + d.s) + out, out, 6)


@candidate
class Pairs(Candidate):
    """By sorted pairs of sample and row, with no matrix of positions by positions."""

    name = "pairs of sample and row"
    differentiable = False

    def applies(self, spec, factors):
        return _squares_of_rows(spec, factors) and spec.reduce == "vn"

    def run(self, spec, factors, weights):
        f = factors[0]
        w = None if weights is None else weights.expand(f.g.shape[:2])
        return embedding_square_sum(f.index, f.g, w, f.rows, f.padding)

    def cost(self, spec, factors):
        d = dims(factors[0])
        out = d.item * d.p
        return Cost(4 * d.v * d.n * d.s * d.o, 4 * d.inputs + out, out, 30 + 2 * d.v)


# a table that is the weight of a product as well (a tied head): P = E + H --------------------------------


def _kinds(factors: list[Any]) -> tuple[list[Dense], list[Gather]]:
    """The uses in products, and those in lookups."""
    return [f for f in factors if isinstance(f, Dense)], [f for f in factors if isinstance(f, Gather)]


def _is_tied(factors: list[Any]) -> bool:
    """Whether the parameter is a table [rows, features] that is used in products and lookups, and nowhere else."""
    products, lookups = _kinds(factors)
    if not products or not lookups or len(products) + len(lookups) < len(factors):
        return False
    first, rows = products[0].arrange, lookups[0].rows
    in_order = first.order == tuple(range(len(first.order))) and first.shape == (rows, dims(lookups[0]).o)
    plain = in_order and dims(products[0]).k == 1 and dims(products[0]).o == rows
    return plain and all(f.arrange == first for f in products) and all(f.rows == rows for f in lookups)


def _merge_by_kind(factors: list[Any]) -> tuple[Dense, Gather]:
    """(H, E), one use each."""
    products, lookups = _kinds(factors)
    (h, *more), (e, *others) = products, lookups
    if more:
        h = Dense(torch.cat([f.a for f in products], 1), torch.cat([f.g for f in products], 2), h.arrange)
    if others:  # positions of a padding index have no gradient, whatever stands there
        e = Gather(torch.cat([f.index for f in lookups], 1), torch.cat([f.masked() for f in lookups], 2), e.rows, -1)
    return h, e


@candidate
class Tied(Candidate):
    """(E + H)^2 = E^2 + H^2 + 2 E H. E H needs H only in the rows of E: h_s[x_t] a_s, for all pairs s, t."""

    name = "products and lookups apart"
    differentiable = False
    parts: ClassVar[dict[str, tuple[Candidate, Candidate]]] = {
        "vn": (BlockedSquares(), Pairs()), "vp": (BlockedNorms(), OccurringRows()),
    }  # fmt: skip

    def applies(self, spec, factors):
        known = spec.power == 2 and spec.samples is None and spec.reduce in self.parts
        return known and _is_tied(factors)

    def run(self, spec, factors, weights):
        h, e = _merge_by_kind(factors)
        squares = [c.run(spec, [f], weights) for c, f in zip(self.parts[spec.reduce], (h, e), strict=True)]
        return squares[0] + squares[1] + 2 * self._cross_term(spec, h, e, weights)

    @staticmethod
    def _cross_term(spec, h: Dense, e: Gather, weights: Any) -> Tensor:
        v, n, s = h.g.shape[:3]
        at = e.index.long().unsqueeze(1).expand(n, s, -1).expand(v, n, s, -1)
        there = h.g.squeeze(3).gather(3, at).mT  # h_s[x_t], [V, N, T, S]
        g = weighted(e.masked(), weights)
        if "p" in spec.reduce:
            return (torch.matmul(g, h.a.squeeze(2).mT) * there).sum((0, 2, 3))
        rows = (torch.matmul(there, h.a.squeeze(2)) * g).sum(0)
        return rows.new_zeros(e.rows, rows.shape[2]).index_add(0, e.index.flatten(), rows.flatten(0, 1))

    def cost(self, spec, factors):
        total = Cost(0, 0, 0, 0)
        kinds: tuple[list[Any], list[Any]] = _kinds(factors)
        for c, same in zip(self.parts[spec.reduce], kinds, strict=True):
            for f in same:
                total = total + c.cost(spec, [f])
        s, t = (sum(dims(f).s for f in same) for same in kinds)
        d = dims(kinds[1][0])
        pairs = d.v * d.n * s * t
        return total + Cost(2 * pairs * d.o, d.item * (3 * pairs + 3 * d.v * d.n * t * d.o), 2 * d.item * pairs, 8)


# reductions of one column's P that share its products ---------------------------------------------------


class Together:
    """Several reductions of one P by one op: like a candidate, but for a list of specs."""

    kinds = ((1, "vn"), (2, "vn"), (2, "vp"))

    def applies(self, specs: list[Spec], factors: list[Any]) -> bool:
        """Whether one op gives the reductions `specs` of these factors, without weights."""
        known = all((s.power, s.reduce) in self.kinds and s.samples is None for s in specs)
        one = len(factors) == 1 and isinstance(factors[0], Dense | Conv)
        if not known or not one or len(specs) < 2:
            return False
        d = dims(factors[0])
        return d.v == 1 and d.s > 1 and (d.k == 1 or implicit(factors[0]))

    def run(self, specs: list[Spec], factors: list[Any]) -> list[Tensor]:
        """The reductions `specs`, in order."""
        f = factors[0]
        wanted = [any((s.power, s.reduce) == kind for s in specs) for kind in self.kinds]
        if implicit(f):
            total, squares, norms = outer_moments_conv(f.a, f.g.squeeze(0), *wanted, *geometry(f))
        else:
            f = f.lean()
            found = outer_moments(f.a.squeeze(2), f.g.squeeze(3).squeeze(0), *wanted)
            total, squares = (
                f.arrange(t.unsqueeze(-3)) if want else t for t, want in zip(found[:2], wanted, strict=False)
            )
            norms = found[2]
        results = dict(zip(self.kinds, (total.to(f.g.dtype), squares, norms), strict=True))
        return [results[s.power, s.reduce] for s in specs]

    def cost(self, specs: list[Spec], factors: list[Any]) -> Cost:
        """Products once, and a pass over them in the cache for each kind."""
        d, kinds = dims(factors[0]), len({(s.power, s.reduce) for s in specs})
        out = d.item * d.p * 2
        cached = kinds * IN_CACHE * d.item * d.n * d.p
        return _block_cost(factors[0]) + Cost(d.flops, d.inputs + out + cached, out, d.n * (1 + kinds))


TOGETHER = Together()
