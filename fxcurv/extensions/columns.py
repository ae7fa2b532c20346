"""Inner products of the columns of P with each other and with vectors, and weighted sums of them, from factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.contractions.contract import Spec, combine
from fxcurv.contractions.factors import Conv, Dense, Factor, Gather
from fxcurv.contractions.sizes import dims
from fxcurv.extensions.base import Param
from fxcurv.ir.crossings import Rows, Untraced
from fxcurv.ir.emit import call, declare, first_sample, samples
from fxcurv.ir.placement import PARTIAL, REPLICATE, Placement, Shard
from fxcurv.ir.precision import HALF, widened
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Decision
from fxcurv.ir.ranks import across
from fxcurv.ir.traced import sum_of
from fxcurv.kernels.outer_gram import costs, outer_dots, outer_gram
from fxcurv.quantity import Group
from fxcurv.walks.uses import Use, select_group

FACTORS, BLOCKS, WHOLE = "products of factors", "blocks of P", "materialise"


def pair(param: Param, left: Sequence[Group], right: Sequence[Group]) -> fx.Node:
    """<P[v, n], P[w, m]> for the columns v of `left` and w of `right`, [V, N, W, M].

    P is not formed for matrix products; it is formed for embeddings, and for parameters that are used in several ways.
    Across ranks n is a sample of this rank, and m one of all ranks, which send their factors (or P).
    """
    if across(param.program.options.ranks):
        return _pair_across_ranks(param, left, right)
    return param.emit(_tiled, [[_block(param, one, other) for other in right] for one in left])


def dots(param: Param, group: Group, vectors: fx.Node) -> fx.Node | None:
    """<P[v, n], vectors[q]>, [V, N, Q]; None where P has no factors."""
    found = dense(param, group)
    if found is None:
        return None
    alone = _sizes(found).s == 1
    record(param, FACTORS if alone else BLOCKS)
    if not alone and not param.program.options.create_graph:
        a, g, v = param.emit(_arguments_of_dots, found, vectors)
        value = param.emit(outer_dots, a, g, v)
        declare(value, Shard(1), [a, g])
        return value
    return param.emit(_dots, found, vectors)


def paired(param: Param, place: Placement | list[Placement], fn: Callable, *args: Any) -> fx.Node:
    """`fn` of nodes from `pair`, or lists of them, then of other arguments; across ranks its placement is `place`."""
    if not across(param.program.options.ranks):
        return param.emit(fn, *args)
    nodes = [a for a in args if isinstance(a, fx.Node | list)]
    value = call(param.program, Untraced(fn, tuple(args[len(nodes) :])), *nodes, origin=param.origin())
    declare(value, place, nodes)
    return value


def rows_of_all(param: Param, t: fx.Node, dim: int) -> fx.Node:
    """`t` with the samples of all ranks along a dimension, where it has this rank's."""
    program = param.program
    target = Rows(dim, program.options.ranks)
    value = call(program, target, t, samples(program), first_sample(program), origin=param.origin())
    declare(value, REPLICATE, [t])
    return value


def _pair_across_ranks(param: Param, left: Sequence[Group], right: Sequence[Group]) -> fx.Node:
    groups = list(dict.fromkeys([*left, *right]))
    factors = [dense(param, g) for g in groups]
    if all(f is not None and f.arrange == factors[0].arrange for f in factors):
        record(param, FACTORS if all(_sizes(f).s == 1 for f in factors) else BLOCKS)
        own = {g: param.emit(_without_groups, [f]) for g, f in zip(groups, factors, strict=True)}
        for (a, g), f in zip(own.values(), factors, strict=True):
            declare(a, Shard(0), [f.a])
            declare(g, Shard(1), [f.g])
    else:
        record(param, WHOLE)
        own = {g: [param.contract(power=1, groups=[g], precise=True)] for g in groups}
    every = {g: [rows_of_all(param, t, k if len(own[g]) > 1 else 1) for k, t in enumerate(own[g])] for g in right}
    pairs = [own[g] for g in left], [every[g] for g in right]
    return paired(param, Shard(1), _all_pairs, *pairs, bool(param.program.options.create_graph))


def combined(param: Param, groups: Sequence[Group], weights: fx.Node) -> fx.Node:
    """sum_{v,n} weights[k, v, n] P[v, n], [K, *P]; the columns v are those of all groups in order."""
    parts, start = [], 0
    for group in groups:
        stop = start + param.columns(group)
        own = param.no_wider(param.emit(_some, weights, start, stop))
        found = dense(param, group)
        if found is not None:
            part = param.emit(_combined, found, own)
            declare(part, PARTIAL, [own])
            parts.append(part)
        else:
            count = int(weights.meta["val"].shape[0])
            rows = [param.emit(_row, own, k) for k in range(count)]
            each = [param.contract(power=1, reduce="vn", weights=w, groups=[group], precise=True) for w in rows]
            parts.append(param.emit(_stacked, each))
        start = stop
    return param.emit(sum_of, parts)


def dense(param: Param, group: Group) -> Any:
    """The factors of a parameter that is used only in matrix products, or convolutions, of one kind; else None."""
    uses = uses_of(param, group)
    if not _alike([u.factor for u in uses]) or any(u.path for u in uses):
        return None
    factors = [select_group(param.program, u, group, param.origin()) for u in uses]
    if factors[0].g.meta["val"].dtype in HALF:
        factors = [param.emit(widened, f) for f in factors]
    return factors[0] if len(factors) == 1 and isinstance(factors[0], Dense) else param.emit(_as_dense, factors)


def lookups(param: Param, group: Group) -> Gather | None:
    """The factor of a table whose only use is one look-up of rows; else None."""
    uses = uses_of(param, group)
    if len(uses) != 1 or uses[0].path or not isinstance(uses[0].factor, Gather):
        return None
    found = select_group(param.program, uses[0], group, param.origin())
    return found if isinstance(found, Gather) else None


def uses_of(param: Param, group: Group) -> list[Use]:
    """The uses where a parameter meets the columns of a group."""
    return [u for u in param.program.walked.uses[param.name] if group in u.groups]


def record(param: Param, algorithm: str) -> None:
    """Enter the algorithm into the report."""
    field = param.origin()["savefield"]
    found = Decision(param.name, param.label, "", algorithm, 0, 0, 0.0, (), field, "extract")
    if found not in param.program.decisions:
        param.program.decisions.append(found)


def _block(param: Param, left: Group, right: Group) -> fx.Node:
    f, h = dense(param, left), dense(param, right)
    if f is None or h is None or f.arrange != h.arrange:
        record(param, WHOLE)
        p, q = (param.contract(power=1, groups=[g], precise=True) for g in (left, right))
        return param.emit(_inner, p, q)
    d, e = _sizes(f), _sizes(h)
    by_rows, by_positions = costs((d.v, d.n, d.s), (e.v, e.n, e.s), d.o, d.i, left == right)
    record(param, FACTORS if by_positions < by_rows else BLOCKS)
    if d.s == e.s == 1 or param.program.options.create_graph:
        return param.emit(_of_factors if by_positions < by_rows else _of_rows, f, h)
    given = param.emit(_without_groups, [f] if left == right else [f, h])
    return param.emit(outer_gram, *given)


def _alike(factors: list[Any]) -> bool:
    """Whether several uses are one product over the positions of all."""
    if not factors or _sizes(factors[0]).k != 1:
        return False
    first = factors[0]
    if all(isinstance(f, Dense) for f in factors):
        return all(f.arrange == first.arrange for f in factors)
    kind = lambda f: (f.weight_shape, f.transposed, f.groups)  # noqa: E731
    return all(isinstance(f, Conv) and kind(f) == kind(first) for f in factors)


def _sizes(factor: Factor) -> Any:
    return dims(pytree.tree_map(lambda n: n.meta["val"] if isinstance(n, fx.Node) else n, factor))


# traced ------------------------------------------------------------------------------------------------------------


def _as_dense(factors: list[Any]) -> Factor:
    (found,) = combine(Spec(1, ""), [f.dense() for f in factors])
    return found


def _without_groups(factors: list[Dense]) -> list[Tensor]:
    return [t for f in factors for t in (f.a.squeeze(2), f.g.squeeze(3))]


def _all_pairs(left: list[list[Tensor]], right: list[list[Tensor]], smooth: bool) -> Tensor:
    """All inner products of P; `smooth`: by ops that autograd follows."""
    return _tiled([[_one_pair(p, q, smooth) for q in right] for p in left])


def _one_pair(p: list[Tensor], q: list[Tensor], smooth: bool) -> Tensor:
    if len(p) == 1:
        return _inner(p[0], q[0])
    if not smooth:
        return outer_gram(*p, *q)
    return _inner(*(torch.einsum("vnso,nsi->vnoi", g, a) for a, g in (p, q)))


def _arguments_of_dots(f: Dense, vectors: Tensor) -> list[Tensor]:
    return [*_without_groups([f]), core(f, vectors)]


def core(f: Dense, vectors: Tensor) -> Tensor:
    """Vectors [Q, *P] in the layout of the products, [Q, O, I]."""
    count, (sizes, order) = vectors.shape[0], (f.arrange.sizes, f.arrange.order)
    back = [1 + order.index(d) for d in range(len(order))]
    t = vectors.to(f.a.dtype).reshape(count, *[sizes[d] for d in order]).permute(0, *back)
    return t.reshape(count, f.g.shape[4], f.a.shape[3])


def _dots(f: Dense, vectors: Tensor) -> Tensor:
    a, g = _without_groups([f])
    return torch.einsum("qoi,nsi,vnso->vnq", core(f, vectors), a, g)


def _of_factors(f: Dense, h: Dense) -> Tensor:
    (a, g), (b, k) = _without_groups([f]), _without_groups([h])
    if a.shape[1] == b.shape[1] == 1:
        (v, n), (w, m) = g.shape[:2], k.shape[:2]
        outputs = g.reshape(v * n, g.shape[3]) @ k.reshape(w * m, k.shape[3]).t()
        return outputs.reshape(v, n, w, m) * (a.squeeze(1) @ b.squeeze(1).t()).unsqueeze(1)
    inputs = torch.einsum("nsi,mti->nsmt", a, b)
    return torch.einsum("vnso,wmto,nsmt->vnwm", g, k, inputs)


def _of_rows(f: Dense, h: Dense) -> Tensor:
    (a, g), (b, k) = _without_groups([f]), _without_groups([h])
    return _inner(torch.einsum("vnso,nsi->vnoi", g, a), torch.einsum("vnso,nsi->vnoi", k, b))


def _inner(p: Tensor, q: Tensor) -> Tensor:
    (v, n), (w, m), size = p.shape[:2], q.shape[:2], prod(p.shape[2:])
    return (p.reshape(v * n, size) @ q.reshape(w * m, size).t()).reshape(v, n, w, m)


def _tiled(blocks: list[list[Tensor]]) -> Tensor:
    rows = [row[0] if len(row) == 1 else torch.cat(row, 2) for row in blocks]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _some(weights: Tensor, start: int, stop: int) -> Tensor:
    return weights[:, start:stop]


def _row(weights: Tensor, k: int) -> Tensor:
    return weights[k]


def _combined(f: Dense, weights: Tensor) -> Tensor:
    a, g = _without_groups([f])
    columns = torch.einsum("kvn,vnso->knso", weights, g)
    return f.arrange(torch.einsum("knso,nsi->koi", columns, a).unsqueeze(1))


def _stacked(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts)
