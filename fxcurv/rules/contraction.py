"""Matrix products: one equation per op gives placement, transposes and factors."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fxcurv.contractions.factors import Arrange, Dense, Explicit, Factor
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Mixed, Partial, Shard, samples_first
from fxcurv.rules.base import Rule, register, rewrite
from fxcurv.rules.call import Call
from fxcurv.rules.pointwise import unbroadcast

aten = torch.ops.aten


class Contraction(Rule):
    """y = sum x z by an einsum equation of two operands, at `positions` of the arguments, plus an optional bias.

    The letter "." stands for any number of leading axes of the first operand and of the output.
    """

    name = "contraction"

    def __init__(self, equation: str, positions: tuple[int, int] = (0, 1), bias: int | None = None):
        inputs, self.out = equation.split("->")
        self.labels = dict(zip(positions, inputs.split(","), strict=True))
        self.bias = bias

    def linear(self, active):
        return len([i for i in active if i in self.labels]) <= 1

    def place(self, sites, args, shape, n):
        if self.bias is not None and sites[self.bias] and isinstance(sites[self.bias].place, Shard):
            return MIXED
        active = [i for i, s in enumerate(sites) if s and s.active]
        if any(isinstance(sites[i].place, Mixed | Partial) for i in active):
            sums = self.linear(active) and not any(isinstance(sites[i].place, Mixed | Shard) for i in active)
            return PARTIAL if sums else MIXED
        found = []
        decisive = [p for p in self.labels if sites[p].active and isinstance(sites[p].place, Shard)]
        for position in decisive or self.labels:
            site, labels = sites[position], self.labels[position]
            if isinstance(site.place, Mixed | Partial):
                return PARTIAL if isinstance(site.place, Partial) and self._others_constant(sites, position) else MIXED
            if isinstance(site.place, Shard):
                found.append((self._label(labels, site.place.dim, len(site.shape)), site.place))
        if len({label for label, _ in found}) > 1 or len({(p.outer, p.inner) for _, p in found}) > 1:
            return MIXED
        if not found:
            return REPLICATE
        label, p = found[0]
        if isinstance(label, str) and label not in self.out:
            return PARTIAL
        dim = label if isinstance(label, int) else self._axis(self.out, label, len(shape))
        return Shard(dim, p.outer, p.inner)

    def _others_constant(self, sites, position):
        return not any(s.active or isinstance(s.place, Shard) for i, s in enumerate(sites) if s and i != position)

    @staticmethod
    def _label(labels, dim, ndim):
        """The label of axis `dim`, or `dim` itself if it is one of the axes of "."."""
        named = labels.replace(".", "")
        dots = ndim - len(named)
        return dim if "." in labels and dim < dots else named[dim - dots]

    @staticmethod
    def _axis(labels, label, ndim):
        named = labels.replace(".", "")
        return ndim - len(named) + named.index(label)

    def _fits(self, call: Call):
        """Whether every operand has the equation's axes; `linear`, for one, also takes a weight [i]."""
        return all(call.args[p].ndim >= len(labels.replace(".", "")) for p, labels in self.labels.items())

    def transpose(self, call: Call, wrt, g):
        if not self._fits(call):
            return super().transpose(call, wrt, g)
        out = []
        for position in wrt:
            if position == self.bias:
                out.append(unbroadcast(g, call.args[position].shape))
                continue
            (other,) = [p for p in self.labels if p != position]
            mine, theirs = self.labels[position], self.labels[other]
            if "." in theirs and "." not in mine:
                pair = ((0, call.args[other]), (1, g))
                x, g_ = (t.reshape(*t.shape[:k], prod(t.shape[k:-1]), t.shape[-1]) for k, t in pair)
                out.append(torch.einsum("vsi,sj->vij" if self.out[-1] == mine[0] else "vsi,sj->vji", g_, x))
            else:
                out.append(self._product(g, call.args[other], self.out, theirs, mine))
        return out

    def _product(self, g, other, out, theirs, mine):
        """The einsum with g, whose first axis is V; as a matmul, with V among the rows, if `mine` has leading axes."""
        if "." in mine:
            weight = other if theirs[0] == out[-1] else other.t()
            rows = g.reshape(prod(g.shape[:-1]), g.shape[-1])  # for a strided g, matmul would repeat the weight
            return torch.mm(rows, weight).reshape(*g.shape[:-1], weight.shape[1])
        return torch.einsum(f"v{out},{theirs}->v{mine}", g, other)

    def factors(self, call: Call, position: int, g) -> Factor:
        if position == self.bias:
            return _bias_factor(call, position, g)
        (other,) = [p for p in self.labels if p != position]
        mine, theirs, out = self.labels[position], self.labels[other], self.out
        x, place = call.args[other], call.places[other]
        if "." in mine or not isinstance(place, Shard) or not self._fits(call):
            return super().factors(call, position, g)
        if self._label(theirs, place.dim, x.ndim) in [*mine]:  # a parameter with a sample axis
            return super().factors(call, position, g)
        # axes of the parameter: shared with both (groups), with the output (o), with the other operand (i)
        named = theirs.replace(".", ""), out.replace(".", "")
        groups = [c for c in mine if c in named[0] and c in named[1]]
        outs = [c for c in mine if c in named[1] and c not in groups]
        ins = [c for c in mine if c in named[0] and c not in groups]
        x = samples_first(x, place)
        g = samples_first(g, call.place, lead=1)
        a = _group_axes(x, theirs, groups, ins, lead=1)
        g = _group_axes(g, out, groups, outs, lead=2)
        shape = tuple(call.args[position].shape)
        size = dict(zip(mine, shape, strict=True))
        order = [*groups, *outs, *ins]
        arrange = Arrange(tuple(size[c] for c in order), tuple(order.index(c) for c in mine), shape)
        return Dense(a, g, arrange)


def _bias_factor(call: Call, position: int, g):
    p = samples_first(g, call.place, lead=1)
    return Explicit(unbroadcast(p, call.args[position].shape, lead=2))


def _group_axes(t, labels, groups, features, lead):
    """[*lead, *labels] -> [*lead, S, K, F]: shared positions, groups and features, each as one axis."""
    named = labels.replace(".", "")
    dots = t.ndim - lead - len(named)
    axis = {c: lead + dots + k for k, c in enumerate(named)}
    shared = [*range(lead, lead + dots), *(axis[c] for c in named if c not in groups and c not in features)]
    order = [*shared, *(axis[c] for c in groups), *(axis[c] for c in features)]
    sizes = [
        prod(t.shape[d] for d in dims) for dims in (shared, [axis[c] for c in groups], [axis[c] for c in features])
    ]
    return t.permute(*range(lead), *order).reshape(*t.shape[:lead], *sizes)


register(aten.linear.default, rule=Contraction(".i,oi->.o", bias=2))
register(aten.mm.default, rule=Contraction("ik,kj->ij"))
register(aten.bmm.default, rule=Contraction("bik,bkj->bij"))
register(aten.mv.default, rule=Contraction("ik,k->i"))


def _same_batch(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a linear system with the batch axes of both: PyTorch's derivative under `vmap` is wrong where it joins them."""
    if b.ndim == 1 or b.shape == a.shape[:-1]:  # b is a vector for each A
        return a, b
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])


@rewrite(aten.linalg_solve.default)
def _solve(a, b, left=True):
    return torch.linalg.solve(*_same_batch(a, b), left=left)


@rewrite(aten.linalg_solve_ex.default)
def _solve_ex(a, b, left=True, check_errors=False):
    found = torch.linalg.solve_ex(*_same_batch(a, b), left=left, check_errors=check_errors).result
    return found, torch.linalg.lu_factor_ex(a).info  # one for each matrix that is given


class _Exp(torch.autograd.Function):
    """exp(A), with `_exp_along` for its derivatives, however often it is differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a):
        return torch.linalg.matrix_exp(a)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return _exp_along(ctx.saved_tensors[0].mT, g)

    @staticmethod
    def jvp(ctx, tangent):
        return _exp_along(ctx.saved_tensors[0], tangent)


def _exp_along(a: Tensor, b: Tensor) -> Tensor:
    """The derivative of exp at A [..., n, n] in the direction B [..., n, n]: a block of the exponential of [[A, B], [0, A]].

    The exponential is found by squaring: the larger B, the more squarings, each of which loses a bit. So B gets the size of one.
    """
    size = b.detach().abs().amax((-2, -1), keepdim=True)
    size = torch.where(size > 0, size, 1)
    a = a.expand(b.shape)
    both = torch.cat([torch.cat([a, b / size], -1), torch.cat([torch.zeros_like(a), a], -1)], -2)
    n = a.shape[-1]
    return _Exp.apply(both)[..., :n, n:] * size


@register(aten.linalg_matrix_exp.default)
class MatrixExponential(Rule):
    """exp(A) of square matrices A [..., n, n]; PyTorch's derivative loses digits where cotangents are large."""

    name = "matrix exponential"

    def formula(self, op, args):
        return (_Exp.apply(args[0]),)

    def transpose(self, call: Call, wrt, g):
        return [_exp_along(call.args[0].mT, g)]


@rewrite(aten.addmm.default)
def _addmm(bias, a, b, beta=1, alpha=1):
    y = aten.mm.default(a, b)
    y = y if alpha == 1 else y * alpha
    return y + (bias if beta == 1 else bias * beta)


@rewrite(aten.baddbmm.default)
def _baddbmm(bias, a, b, beta=1, alpha=1):
    y = aten.bmm.default(a, b)
    y = y if alpha == 1 else y * alpha
    return y + (bias if beta == 1 else bias * beta)
