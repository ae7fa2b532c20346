"""Losses whose Hessian in the model's output has a root in closed form.

A loss gets the cotangent `c` of its value, so that its columns account for linear maps after the loss (a factor, a mean
over masked positions). Definitions: H_n = c d^2 l / df^2 = sum_v s_v s_v^T.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcurv.ir import noise
from fxcurv.ir.lengths import said
from fxcurv.ir.placement import MIXED, PARTIAL, REPLICATE, Replicate, Shard, reduction
from fxcurv.rules.base import Rule, register, rewrite
from fxcurv.rules.call import Call

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2


@dataclass(frozen=True)
class Draw:
    """How to sample columns: how many, and from which noise stream."""

    columns: int
    stream: int


class LossRule(Rule):
    """An op that reduces predictions (argument 0) against constant targets to a loss."""

    name = "loss"
    is_loss = True

    def exact(self, call: Call, c: Tensor, few: bool = False) -> Tensor:
        """Columns [V, *prediction.shape] with sum_v s s^T = H_n; as few as possible if `few`."""
        raise NotImplementedError

    def sampled(self, call: Call, c: Tensor, seed: noise.Seed, draw: Draw) -> Tensor:
        """Columns [M, *prediction.shape] with E[sum_m s s^T] = H_n."""
        raise NotImplementedError

    def weight(self, call: Call, c: Tensor) -> Tensor:
        """c omega / Z, the loss's weight at every position; broadcasts to the prediction."""
        raise NotImplementedError

    def empirical(self, call: Call, c: Tensor) -> Tensor:
        """The sampled column with the target as the sample, [1, *prediction.shape], from c [1, *loss.shape]."""
        (g,) = self.transpose(call, (0,), c)
        weight = self.weight(call, c[0])
        return torch.where(weight > 0, g * torch.where(weight > 0, weight, 1).rsqrt(), 0)

    def place(self, sites, args, shape, n):
        z = sites[0]
        beside = [s for s in sites[1:] if s and s.active and s.place != REPLICATE]
        if any(s.place != z.place or s.shape != z.shape for s in beside):
            return MIXED  # a target that depends on parameters and on other samples
        if not isinstance(z.place, Shard):
            return z.place if isinstance(z.place, Replicate) else MIXED
        dropped = self.class_axis(len(z.shape))
        if z.place.dim == dropped:
            return MIXED
        if shape == ():
            return PARTIAL
        return z.place if dropped is None else reduction(z, (dropped,), False, linear=False)


def separate(root: Tensor, place: Shard, classes: int | None, rows: tuple[int, int] | None = None) -> Tensor:
    """Columns that are nonzero at one position per sample each: [V, *z] -> [V * S, *z], for S positions in a sample.

    Args:
        rows: (start, stop), the positions to make columns for; by default all.
    """
    shape = list(root.shape[1:])
    sizes = [
        1 if d == classes else said(place.outer * place.inner) if d == place.dim else s for d, s in enumerate(shape)
    ]
    s = prod(sizes)
    start, stop = rows or (0, s)
    if s == 1:
        return root
    column = torch.arange(s, device=root.device)
    eye = (column[start:stop].unsqueeze(1) == column).to(root.dtype).reshape(stop - start, *sizes)
    if place.outer * place.inner > 1:
        dim = place.dim + 1
        n = shape[place.dim] // said(place.outer * place.inner)
        eye = eye.unflatten(dim, (said(place.outer), 1, said(place.inner)))
        eye = eye.expand(*eye.shape[: dim + 1], n, *eye.shape[dim + 2 :]).flatten(dim, dim + 2)
    return (root.unsqueeze(1) * eye.unsqueeze(0)).flatten(0, 1)


@register(aten.cross_entropy_loss.default)
class CrossEntropy(LossRule):
    """Softmax cross-entropy: class indices or probabilities, weights, ignore_index, label smoothing, extra axes."""

    def class_axis(self, ndim):
        return 1 if ndim > 1 else 0

    def _curvature(self, call: Call, c: Tensor) -> tuple[Tensor, int, Tensor]:
        """(log p, class axis, sqrt(c omega / Z) with the class axis at size 1)."""
        z, target, weight, mode, ignore, smoothing = call.args
        axis = self.class_axis(z.ndim)
        classes = z.shape[axis]
        if weight is None and not target.is_floating_point():
            counted = (target != ignore).to(z.dtype)
            scale = c * counted
            scale = scale / counted.sum().clamp(min=1) if mode == MEAN else scale
            return F.log_softmax(z, axis), axis, scale.sqrt().unsqueeze(axis)
        if target.is_floating_point():
            soft = target * (1 - smoothing) + smoothing / classes
            omega = (soft if weight is None else (soft.movedim(axis, -1) * weight).movedim(-1, axis)).sum(axis)
            total = torch.ones_like(omega).sum()
        else:
            counted = target != ignore
            hard = counted.to(z.dtype)
            hard = hard if weight is None else hard * weight[torch.where(counted, target, 0)]
            omega, total = hard, hard.sum()
            if smoothing and weight is not None:
                omega = (1 - smoothing) * hard + smoothing / classes * weight.sum() * counted
        scale = c * omega
        if mode == MEAN:
            scale = scale * torch.where(total > 0, 1 / total, 0)
        return F.log_softmax(z, axis), axis, scale.sqrt().unsqueeze(axis)

    def weight(self, call: Call, c: Tensor) -> Tensor:
        return self._curvature(call, c)[2].square()

    def exact(self, call: Call, c: Tensor, few: bool = False) -> Tensor:
        logp, axis, scale = self._curvature(call, c)
        if few and logp.shape[axis] > 1:
            return separate(self._reflected_root(logp, axis, scale), call.places[0], axis)
        eye = torch.eye(logp.shape[axis], dtype=logp.dtype, device=logp.device)
        eye = eye.reshape(*[logp.shape[axis] if d in (0, axis + 1) else 1 for d in range(logp.ndim + 1)])
        root = (0.5 * logp).exp().movedim(axis, 0).unsqueeze(axis + 1)
        return separate((eye - logp.exp()) * (root * scale), call.places[0], axis)

    @staticmethod
    def _reflected_root(logp: Tensor, axis: int, scale: Tensor) -> Tensor:
        """The root with C - 1 columns, times `scale`, [C - 1, *z].

        Let q = sqrt(p) and Q = diag q. Then diag p - p p^T = Q (I - q q^T) Q. The reflection that maps e_0 to -q has
        columns u_k = e_k - q_k w / (1 + q_0), w = q + e_0, which for k > 0 complete q to an orthonormal basis. So the
        root's columns are Q u_k = q_k (e_k - r), r = Q w / (1 + q_0).
        """
        q, scale = (t.movedim(axis, -1) for t in ((0.5 * logp).exp(), scale))
        eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        r = q * (q + eye[0]) / (1 + q[..., :1])
        size = (q[..., 1:] * scale).movedim(-1, 0).unsqueeze(-1)
        columns = (eye[1:].reshape(-1, *[1] * (q.ndim - 1), q.shape[-1]) - r) * size
        return columns.movedim(-1, axis + 1)

    def sampled(self, call: Call, c: Tensor, seed: noise.Seed, draw: Draw) -> Tensor:
        logp, axis, scale = self._curvature(call, c)
        p = logp.exp()
        like = p.narrow(axis, 0, 1)
        u = noise.uniform(seed, draw.stream, draw.columns, like, call.places[0])
        # the class is the number of cumulative probabilities below u; the draws of a sample are the last axis
        ends = p.movedim(axis, -1).cumsum(-1).contiguous()
        drawn = torch.searchsorted(ends, u.squeeze(axis + 1).movedim(0, -1).contiguous()).clamp(max=p.shape[axis] - 1)
        if draw.columns == 1:
            return ((p - torch.zeros_like(p).scatter(axis, drawn.movedim(-1, axis), 1.0)) * scale).unsqueeze(0)
        drawn = drawn.movedim(-1, 0).unsqueeze(axis + 1)
        onehot = p.new_zeros(draw.columns, *p.shape).scatter(axis + 1, drawn, 1.0)
        return (p - onehot) * (scale * draw.columns**-0.5)


class Elementwise(LossRule):
    """A loss that acts entry by entry."""

    def normalised(self, call: Call, c: Tensor, mode: int) -> Tensor:
        """c / Z at every entry."""
        z = call.args[0]
        return c / prod(z.shape) if mode == MEAN else c  # Dynamo does not trace sym_numel

    def weight(self, call: Call, c: Tensor) -> Tensor:
        return self.normalised(call, c, call.args[-1])


@register(aten.mse_loss.default)
class MeanSquaredError(Elementwise):
    """(f - y)^2: H = 2 c / Z, the likelihood N(f, 1/2)."""

    def exact(self, call: Call, c: Tensor, few: bool = False) -> Tensor:
        z, _, mode = call.args
        scale = (2 * self.normalised(call, c, mode)).sqrt()
        return separate((torch.ones_like(z) * scale).unsqueeze(0), call.places[0], None)

    def sampled(self, call: Call, c: Tensor, seed: noise.Seed, draw: Draw) -> Tensor:
        z, _, mode = call.args
        scale = (2 * self.normalised(call, c, mode) / draw.columns).sqrt()
        return noise.normal(seed, draw.stream, draw.columns, z, call.places[0]) * scale


@register(aten.binary_cross_entropy_with_logits.default)
class BinaryCrossEntropy(Elementwise):
    """Binary cross-entropy on logits: H = c omega sigma (1 - sigma) / Z, omega = weight (pos_weight t + 1 - t)."""

    def weight(self, call: Call, c: Tensor) -> Tensor:
        z, target, weight, pos_weight, mode = call.args
        omega = torch.ones_like(z) if pos_weight is None else pos_weight * target + 1 - target
        omega = omega if weight is None else omega * weight
        return self.normalised(call, c, mode) * omega

    def exact(self, call: Call, c: Tensor, few: bool = False) -> Tensor:
        z = call.args[0]
        root = (0.5 * (F.logsigmoid(z) + F.logsigmoid(-z))).exp() * self.weight(call, c).sqrt()
        return separate(root.unsqueeze(0), call.places[0], None)

    def sampled(self, call: Call, c: Tensor, seed: noise.Seed, draw: Draw) -> Tensor:
        z = call.args[0]
        p = torch.sigmoid(z)
        u = noise.uniform(seed, draw.stream, draw.columns, z, call.places[0])
        return (p - (u < p).to(p.dtype)) * self.weight(call, c).sqrt() * draw.columns**-0.5


@rewrite(aten.binary_cross_entropy.default)
def _binary_cross_entropy(p, target, weight=None, mode=MEAN):
    """Binary cross-entropy of probabilities that no sigmoid gave; logarithms are at least -100, as in PyTorch."""
    each = (target - 1) * torch.log1p(-p).clamp(min=-100) - target * p.log().clamp(min=-100)
    return _reduce(each if weight is None else each * weight, mode)


# margin losses: PyTorch's ops have no second derivative


def _reduce(each: Tensor, mode: int) -> Tensor:
    return each.mean() if mode == MEAN else each.sum() if mode == SUM else each


@rewrite(aten.multi_margin_loss.default)
def _multi_margin(x, target, p=1, margin=1, weight=None, mode=MEAN):
    """sum_{j != t} w_t max(0, margin - x_t + x_j)^p / C."""
    rows, target = x.ndim == 2, target.reshape(-1)
    x = x if rows else x.reshape(1, -1)
    index = target.unsqueeze(-1)
    above = torch.relu(margin - x.gather(-1, index) + x)
    above = torch.where(torch.arange(x.shape[-1], device=x.device) == index, 0, above)
    each = (above if p == 1 else above.square()).sum(-1) / x.shape[-1]
    each = each if weight is None else each * weight[target]
    return _reduce(each if rows else each.squeeze(0), mode)


@rewrite(aten.multilabel_margin_loss.default)
def _multilabel_margin(x, target, mode=MEAN):
    """sum_{t, j} max(0, 1 - x_t + x_j) / C over targets t before the first -1 and all j that are no target."""
    x, target = (t if t.ndim else t.reshape(1) for t in (x, target))
    given = (target < 0).to(torch.long).cumsum(-1) == 0
    index = torch.where(given, target, 0)
    classes = torch.arange(x.shape[-1], device=x.device)
    chosen = ((index.unsqueeze(-1) == classes) & given.unsqueeze(-1)).any(-2)
    above = torch.relu(1 - x.gather(-1, index).unsqueeze(-1) + x.unsqueeze(-2))
    counted = given.unsqueeze(-1) & ~chosen.unsqueeze(-2)
    return _reduce(torch.where(counted, above, 0).sum((-2, -1)) / x.shape[-1], mode)
