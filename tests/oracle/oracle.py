"""Every quantity straight from its definition, in float64, by plain autograd loops.

The whole of the oracle is four objects, for N samples with C outputs each (f: all output leaves that the loss
reads, flattened per sample) and a parameter of shape *P:

    f [N, C]       J [N, C, *P] = df/dtheta       s [N, C] = dL/df       H [N, C, C] = the blocks of d2L/df2

from which each quantity is one line. Nothing here imports the compiler. Second derivatives are loops of
`torch.autograd.grad` over a graph made with `create_graph`: `torch.func.grad` over `jacrev` is wrong through
`layer_norm`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Named = dict[str, Tensor]


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm` by its mathematics."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def multi_margin(
    x: Tensor, t: Tensor, p: int = 1, margin: float = 1.0, weight: Any = None, reduction: str = "mean"
) -> Tensor:
    """`F.multi_margin_loss` class by class."""
    scale = torch.ones(x.shape[1]).to(x) if weight is None else weight
    each = [
        scale[k] * sum((margin - row[k] + row[j]).clamp(min=0) ** p for j in range(len(row)) if j != k) / len(row)
        for row, k in zip(x, t.tolist(), strict=True)
    ]
    return torch.stack(each).sum() / (len(x) if reduction == "mean" else 1)


def multilabel_margin(x: Tensor, t: Tensor) -> Tensor:
    """`F.multilabel_margin_loss` class by class."""
    total = x.sum() * 0
    for row, marks in zip(x, t.tolist(), strict=True):
        chosen = marks[: marks.index(-1)] if -1 in marks else marks
        others = [j for j in range(len(row)) if j not in chosen]
        total = total + sum((1 - row[k] + row[j]).clamp(min=0) for k in chosen for j in others) / len(row)
    return total / len(x)


def bag_of(index: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """`F.embedding_bag` of indices [N, K], or of bags that are not empty, with weights per sample and no other option."""
    if index.ndim == 1:
        bags = index.tensor_split(rest[0][1:].tolist())
        return torch.cat([bag_of(bag.unsqueeze(0), weight, *rest) for bag in bags])
    mode, scale, found = rest[4], rest[6], weight[index]
    found = found if scale is None else found * scale.unsqueeze(-1)
    return found.amax(1) if mode == "max" else getattr(found, mode)(1)


def group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """`F.group_norm` by its mathematics."""
    rows = x.reshape(len(x), groups, -1)
    centred = rows - rows.mean(2, keepdim=True)
    y = (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)
    shape = [-1, *[1] * (x.ndim - 2)]
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


@contextmanager
def plain_mathematics() -> Iterator[None]:
    """Without the kernels whose second derivative is missing (attention, margins, bags) or wrong (weight norm, in v).

    That of group norm is not sound where a part of its gradients is asked for (PyTorch 2.13).
    """
    with (
        sdpa_kernel(SDPBackend.MATH),
        patch.object(torch, "_weight_norm", weight_norm),
        patch.object(sys.modules["torch.nn.utils.weight_norm"], "_weight_norm", weight_norm),
        patch.object(torch.nn.functional, "multi_margin_loss", multi_margin),
        patch.object(torch.nn.functional, "multilabel_margin_loss", multilabel_margin),
        patch.object(torch.nn.functional, "embedding_bag", bag_of),
        patch.object(torch.nn.functional, "group_norm", group_norm),
    ):
        yield


FIRST_ORDER = ("grad", "grad_batch", "batch_l2", "sum_grad_squared", "variance", "grad_clipped")
GGN = ("diag_ggn_exact", "diag_ggn_exact_batch", "sqrt_ggn_exact")
HESSIAN = ("diag_h", "diag_h_batch")


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a structure of tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def rebuild(value: Any, new: Iterator[Tensor]) -> Any:
    """The same structure with its tensors replaced, in the order of `tensors`."""
    if isinstance(value, Tensor):
        return next(new)
    if isinstance(value, Mapping):
        items = {key: rebuild(item, new) for key, item in value.items()}
        return type(value)(**items) if dataclasses.is_dataclass(value) else type(value)(items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[rebuild(item, new) for item in value])
    if isinstance(value, (tuple, list)):
        return type(value)(rebuild(item, new) for item in value)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: rebuild(getattr(value, name), new) for name in names})
    return value


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """`model` on a tensor, a tuple of positional inputs or a dict of keyword inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def derivative(value: Tensor, wrt: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """The gradient of a scalar, with zeros where it does not reach."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(t) for t in wrt)
    grads = torch.autograd.grad(value, wrt, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(wrt, grads, strict=True))


def second_derivative(first: Tensor, wrt: Tensor) -> Tensor:
    """[first.numel(), wrt.numel()]: the derivative of a gradient that was made with `create_graph`."""
    return torch.stack([derivative(entry, [wrt])[0].flatten() for entry in first.flatten()])


class Oracle:
    """All quantities of one model, loss and batch. The model must be deterministic (eval mode).

    `logits(model, inputs) -> f` and `head(f) -> output` say where the model ends if not at its output.
    `kind` ("ce", "mse", "bce" or None) names the loss where its columns are defined by a formula;
    `class_dim` is the dimension of the classes in f, `out_dim` that of the samples in every leaf of f.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        inputs: Any,
        targets: Any = None,
        *,
        kind: str | None = None,
        class_dim: int = 1,
        out_dim: int = 0,
        logits: Callable[..., Any] | None = None,
        head: Callable[..., Any] | None = None,
    ) -> None:
        self.model, self.inputs, self.targets = model, inputs, targets
        self.kind, self.class_dim, self.out_dim = kind, class_dim, out_dim
        self.head = head or (lambda f: f)
        self._loss, self._logits = loss, logits or call
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}

    # ---- the four objects ------------------------------

    def loss_of(self, f: Any) -> Tensor:
        """L as a function of the value at which the model ends."""
        with plain_mathematics():
            output = self.head(f)
            return self._loss(output) if self.targets is None else self._loss(output, self.targets)

    @cached_property
    def end(self) -> Any:
        """The value at which the model ends, with its graph."""
        with plain_mathematics(), torch.enable_grad():
            return self._logits(self.model, self.inputs)

    @cached_property
    def total(self) -> Tensor:
        """L with its graph, from the model's own output."""
        with plain_mathematics(), torch.enable_grad():
            output = call(self.model, self.inputs)
            return self._loss(output) if self.targets is None else self._loss(output, self.targets)

    @cached_property
    def read(self) -> list[int]:
        """Which leaves of `end` the loss reads (and the parameters reach)."""
        leaves = list(tensors(self.end))
        able = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        copies = [leaf.detach().clone().requires_grad_(i in able) for i, leaf in enumerate(leaves)]
        value = self.loss_of(rebuild(self.end, iter(copies)))
        grads = torch.autograd.grad(value, [copies[i] for i in able], allow_unused=True)
        return [i for i, grad in zip(able, grads, strict=True) if grad is not None]

    @cached_property
    def leaves(self) -> list[Tensor]:
        """The leaves of f, samples first."""
        every = list(tensors(self.end))
        return [every[i].movedim(self.out_dim, 0) for i in self.read]

    @cached_property
    def f(self) -> Tensor:
        """[N, C], with its graph; in float64 also where the model returns less, as some do on purpose."""
        return torch.cat([leaf.reshape(len(leaf), -1) for leaf in self.leaves], 1).double()

    def loss_of_flat(self, flat: Tensor) -> Tensor:
        """L as a function of f [N, C] alone."""
        parts = flat.split([leaf[0].numel() for leaf in self.leaves], 1)
        shaped = [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, self.leaves, strict=True)]
        every = [leaf.detach() for leaf in tensors(self.end)]
        for i, part in zip(self.read, shaped, strict=True):
            every[i] = part.movedim(0, self.out_dim)
        return self.loss_of(rebuild(self.end, iter(every)))

    @cached_property
    def jac(self) -> Named:
        """Name -> [N, C, *P]."""
        values, shape = list(self.params.values()), self.f.shape
        rows = [derivative(entry, values) for entry in self.f.flatten()]
        stacked = [torch.stack(column).reshape(*shape, *column[0].shape) for column in zip(*rows, strict=True)]
        return dict(zip(self.params, stacked, strict=True))

    @cached_property
    def _first_and_second(self) -> tuple[Tensor, Tensor]:
        flat = self.f.detach().clone().requires_grad_()
        (first,) = derivative(self.loss_of_flat(flat), [flat], create_graph=True)
        n, c = flat.shape
        second = second_derivative(first, flat).reshape(n, c, n, c)
        return first.detach(), second

    @property
    def s(self) -> Tensor:
        """[N, C]."""
        return self._first_and_second[0]

    @cached_property
    def h(self) -> Tensor:
        """[N, C, C]. A loss that couples samples (loss**2, say) has no such blocks and is an error."""
        second = self._first_and_second[1]
        index = torch.arange(len(second))
        blocks = second[index, :, index]
        rest = second.clone()
        rest[index, :, index] = 0
        if rest.abs().max() > 1e-12 * (1 + second.abs().max()):
            raise ValueError("the loss couples the samples: its Hessian is not block diagonal")
        return (blocks + blocks.mT) / 2

    @property
    def h_of_all(self) -> Tensor:
        """[N, C, N, C], of a loss that couples the samples too."""
        return self._first_and_second[1]

    # ---- first order ------------------------------

    def loss(self) -> Tensor:
        """L."""
        return self.total.detach()

    def grad(self) -> Named:
        """Name -> [*P], of all of L."""
        grads = derivative(self.total, list(self.params.values()))
        return dict(zip(self.params, grads, strict=True))

    def grad_regulariser(self) -> Named:
        """Name -> [*P]: what of `grad` does not pass through f."""
        value = self.loss_of_flat(self.f.detach())
        return dict(zip(self.params, derivative(value, list(self.params.values())), strict=True))

    def grad_batch(self, subsampling: Sequence[int] | None = None) -> Named:
        """Name -> [N, *P]."""
        rows = slice(None) if subsampling is None else list(subsampling)
        return {k: torch.einsum("nc...,nc->n...", j, self.s)[rows] for k, j in self.jac.items()}

    def batch_l2(self) -> Named:
        """Name -> [N]."""
        return {k: g.reshape(len(g), -1).square().sum(1) for k, g in self.grad_batch().items()}

    def sum_grad_squared(self) -> Named:
        """Name -> [*P]."""
        return {k: g.square().sum(0) for k, g in self.grad_batch().items()}

    def variance(self) -> Named:
        """Name -> [*P], of the population."""
        return {k: g.var(0, correction=0) for k, g in self.grad_batch().items()}

    def sample_norms(self) -> Tensor:
        """[N], over all parameters."""
        return sum(self.batch_l2().values()).sqrt()

    def grad_clipped(self, max_norm: float = 0.1, over: str = "all") -> Named:
        """Name -> [*P]."""
        norms = {k: self.sample_norms() if over == "all" else v.sqrt() for k, v in self.batch_l2().items()}
        scale = {k: (max_norm / v).clamp(max=1) for k, v in norms.items()}
        return {k: torch.einsum("n...,n->...", g, scale[k]) for k, g in self.grad_batch().items()}

    def jacobian(self) -> Named:
        """Name -> [N, *f.shape[1:], *P]; [N, C, *P] where f has several leaves."""
        shape = self.leaves[0].shape if len(self.leaves) == 1 else self.f.shape
        return {k: j.reshape(*shape, *j.shape[2:]) for k, j in self.jac.items()}

    # ---- Gauss-Newton ------------------------------

    @property
    def ce_scale(self) -> tuple[Tensor, Tensor, Tensor]:
        """At S positions: p [N, S, K], omega/Z [N, S], and the place [S * K] in f of each (s, k)."""
        logits = self.leaves[0].detach().movedim(self.class_dim, -1)
        p = logits.softmax(-1).reshape(len(logits), -1, logits.shape[-1])
        index = torch.arange(self.f.shape[1]).reshape(self.leaves[0].shape[1:])
        index = index.movedim(self.class_dim - (self.class_dim > 0), -1).flatten()
        diagonal = self.h.diagonal(dim1=1, dim2=2)[:, index].reshape(p.shape)
        return p, diagonal.sum(-1) / (1 - p.square().sum(-1)), index

    @cached_property
    def columns(self) -> Tensor:
        """[V = C, N, C]: s_{v,n} with H_n = sum_v s sT, by the formula or else a symmetric root."""
        if self.kind == "ce":
            p, scale, index = self.ce_scale
            n, positions, classes = p.shape
            same_class, same_position = torch.eye(classes), torch.eye(positions)
            cell = (scale[..., None, None] * p[..., None]).sqrt() * (same_class - p[..., None, :])
            every = torch.einsum("nsvc,st->svntc", cell, same_position.to(cell))
            every = every.reshape(positions * classes, n, positions * classes)
            back = index.argsort()
            return every[back][:, :, back]
        values, vectors = torch.linalg.eigh(self.h)
        if values.min() < -1e-10 * values.abs().max():
            raise ValueError("the loss is not convex in f")
        root = torch.einsum("nik,nk,njk->nij", vectors, values.clamp(min=0).sqrt(), vectors)
        return root.movedim(1, 0)

    def sqrt_ggn_exact(self, subsampling: Sequence[int] | None = None) -> Named:
        """Name -> [C, N, *P]."""
        rows = slice(None) if subsampling is None else list(subsampling)
        return {k: torch.einsum("nc...,vnc->vn...", j, self.columns)[:, rows] for k, j in self.jac.items()}

    def diag_ggn_exact_batch(self) -> Named:
        """Name -> [N, *P]."""
        return {k: torch.einsum("nc...,ncd,nd...->n...", j, self.h, j) for k, j in self.jac.items()}

    def diag_ggn_exact(self) -> Named:
        """Name -> [*P]."""
        return {k: v.sum(0) for k, v in self.diag_ggn_exact_batch().items()}

    def ggn(self) -> Named:
        """Name -> [numel, numel]: the parameter's diagonal block."""
        rows = {k: j.reshape(*j.shape[:2], -1) for k, j in self.jac.items()}
        return {k: torch.einsum("ncp,ncd,ndq->pq", j, self.h, j) for k, j in rows.items()}

    def ggn_matrix(self) -> Tensor:
        """[all, all], over all parameters in their order."""
        j = torch.cat([j.reshape(*j.shape[:2], -1) for j in self.jac.values()], 2)
        return torch.einsum("ncp,ncd,ndq->pq", j, self.h, j)

    # ---- Hessian ------------------------------

    @cached_property
    def _hessian(self) -> Named:
        firsts = derivative(self.total, list(self.params.values()), create_graph=True)
        return {k: second_derivative(g, p) for (k, p), g in zip(self.params.items(), firsts, strict=True)}

    def hessian(self) -> Named:
        """Name -> [numel, numel]: the parameter's diagonal block of the Hessian of all of L."""
        return self._hessian

    def hessian_matrix(self) -> Tensor:
        """[all, all], over all parameters in their order."""
        values = list(self.params.values())
        firsts = derivative(self.total, values, create_graph=True)
        return torch.cat([torch.cat([second_derivative(g, p) for p in values], 1) for g in firsts])

    def diag_h(self) -> Named:
        """Name -> [*P], of all of L."""
        return {k: self._hessian[k].diagonal().reshape(p.shape) for k, p in self.params.items()}

    def diag_h_batch(self) -> Named:
        """Name -> [N, *P]: J_nT H_n J_n plus the Hessian of <s_n, f_n>, by the chain rule. No regulariser."""
        values = list(self.params.values())
        residual: dict[str, list[Tensor]] = {k: [] for k in self.params}
        for f, s in zip(self.f, self.s, strict=True):
            firsts = derivative(f @ s, values, create_graph=True)
            for (k, p), first in zip(self.params.items(), firsts, strict=True):
                entries = [derivative(e, [p])[0].flatten()[i] for i, e in enumerate(first.flatten())]
                residual[k].append(torch.stack(entries).reshape(p.shape))
        return {k: v + torch.stack(residual[k]) for k, v in self.diag_ggn_exact_batch().items()}

    # ---- Monte-Carlo ------------------------------

    def recover(self, sqrt_mc: Named) -> Recovered:
        """The columns behind a `sqrt_ggn_mc` of this batch."""
        return recover_columns(self.jac, sqrt_mc)

    def draws(self, columns: Tensor, atol: float = 1e-6) -> Tensor:
        """What was drawn, from columns [M, N, C]; an error where a column is not of the definition's form.

        "ce": labels [M, N, S], -1 where omega = 0. "bce": [M, N, C] of 0 and 1, -1 where omega = 0.
        "mse": the noise (y - f) / sqrt(1/2), standard normal, [M, N, C].
        """
        m = len(columns)
        diagonal = self.h.diagonal(dim1=1, dim2=2)
        if self.kind == "mse":
            return columns * (m / diagonal).sqrt()
        if self.kind == "ce":
            p, scale, index = self.ce_scale
            shaped = columns[:, :, index].reshape(m, *p.shape)
        elif self.kind == "bce":
            p = self.f.detach().sigmoid()
            scale, shaped = diagonal / (p * (1 - p)), columns
        else:
            raise ValueError("only ce, mse and bce have a known distribution")
        counted = scale > 1e-14
        weight = (scale / m).sqrt()[..., None] if self.kind == "ce" else (scale / m).sqrt()
        drawn = p - shaped / weight
        mask = counted[..., None].expand(p.shape) if self.kind == "ce" else counted
        _close(shaped[:, ~mask], torch.zeros(()), atol, "a column is not zero where nothing is counted")
        _close(drawn[:, mask], drawn[:, mask].round().clamp(0, 1), atol, "a draw is neither 0 nor 1")
        if self.kind == "bce":
            return torch.where(counted, drawn.round(), -1).long()
        _close(drawn[:, counted].sum(-1), torch.ones(()), atol, "a draw is not one-hot")
        return torch.where(counted, drawn.nan_to_num().argmax(-1), -1)

    def expectation_z(self, columns: Tensor) -> float:
        """The largest |sum_v s sT - H| in standard errors, from many columns [M, N, C].

        Below 6 where they are unbiased.
        """
        m = len(columns)
        products = m * torch.einsum("vnc,vnd->vncd", columns, columns)
        error, spread = products.mean(0) - self.h, products.std(0) / m**0.5
        return (error.abs() / (spread + 1e-9 * (1e-12 + self.h.abs().max()))).max().item()


@dataclasses.dataclass(frozen=True)
class Recovered:
    """Columns [M, N, C] with JT s = P, the relative residual, and whether J has full rank: s is unique."""

    columns: Tensor
    residual: float
    unique: bool


def recover_columns(jac: Named, sqrt_mc: Named) -> Recovered:
    """Solve P[v, n] = J_nT s_{v,n} for s by least squares over all parameters together.

    jac: name -> [N, *f.shape[1:], *P]; sqrt_mc: name -> [M, N, *P].
    """
    n = next(iter(jac.values())).shape[0]
    j = torch.cat([jac[k].reshape(n, -1, max(p[0, 0].numel(), 1)) for k, p in sqrt_mc.items()], 2)
    right = torch.cat([p.reshape(*p.shape[:2], -1) for p in sqrt_mc.values()], 2)
    columns, unique = [], True
    for sample in range(n):
        matrix, wanted = j[sample].mT, right[:, sample].mT
        solution = torch.linalg.lstsq(matrix, wanted, driver="gelsd", rcond=1e-10)
        columns.append(solution.solution.mT)
        unique &= int(solution.rank) == matrix.shape[1]
    found = torch.stack(columns, 1)
    error = torch.einsum("ncp,vnc->vnp", j, found) - right
    return Recovered(found, (error.abs().max() / right.abs().max().clamp(min=1e-300)).item(), unique)


def _close(left: Tensor, right: Tensor, atol: float, message: str) -> None:
    if left.numel() and not (left - right).abs().max() <= atol:
        raise AssertionError(f"{message}: off by {(left - right).abs().max():.3g}")
