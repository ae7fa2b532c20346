"""The class `Rule`, which is also the fallback for ops without a rule of their own, and the registry of rules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcurv.contractions.factors import Explicit, Factor
from fxcurv.ir.graph import invoke, is_continuous, replaced
from fxcurv.ir.lengths import said
from fxcurv.ir.placement import Placement, Shard, Site, samples_first
from fxcurv.ir.private import GuardOnDataDependentSymNode, OpOverload, pytree
from fxcurv.rules.call import Call


class Rule:
    """How a cotangent passes an op, where its samples are, and the factors of P for its parameters.

    The base class is the general fallback, exact for every differentiable op: `vmap(vjp(op))`. A hand-written rule is
    an optimisation of it. Positions index the flattened arguments.
    """

    name = "fallback"
    index_map = False
    """Whether the op only moves elements, so that squares and sums over columns commute with its transpose."""

    piecewise_linear = False
    """Whether the op has no curvature where it is differentiable."""

    elementwise = False
    """Whether each entry of the output depends only on the entries of the (broadcast) arguments at the same place."""

    in_order = False
    """Whether the output has the entries of argument 0, in the same row-major order."""

    shifts = False
    """Whether the op adds something to argument 0, so that its derivative in argument 0 is one, up to broadcasting."""

    picks = False
    """Whether the outputs are (entries of argument 0, the index of each in its last axes, flattened)."""

    is_loss = False
    """Whether the op is a loss whose Hessian has a root in closed form (`LossRule`)."""

    d2: Callable | None = None
    """Second derivative of an elementwise op in argument 0, `d2(x, y, *constants)`; None if it is zero or unknown."""

    def linear(self, active: Sequence[int]) -> bool:
        """Whether the op is linear in the arguments at the positions `active` jointly."""
        return False

    def place(self, sites: Sequence[Site | None], args: tuple, shape: tuple[int, ...], n: int) -> Placement | None:
        """The output's placement, for `shape` and `args` at N = `n`; None if unknown: then the op is tried."""
        return None

    def places(self, program: Any, node: Any, vals: list[Any], place_of: Callable) -> list[Placement] | None:
        """All outputs' placements, for an op whose own graph is followed op by op; None for ops that have `place`."""
        return None

    def mixed_axes(self, args: tuple) -> int | None:
        """k, if the op acts on each slice over the last k axes of argument 0 by itself; None if no such k is known."""
        return 0 if self.elementwise else None

    def class_axis(self, ndim: int) -> int | None:
        """The class axis of a loss; None if every entry is a prediction of its own."""
        return None

    def restrided(self, view: Tensor, args: tuple, shape: tuple[Any, ...]) -> Tensor | None:
        """The op applied to `view` by changing strides alone; None if the op does more than that.

        Raises:
            RuntimeError: if the strides of this view do not allow it.
        """
        return None

    def formula(self, op: Callable, args: Sequence[Any]) -> Any:
        """The op's outputs, in a form that PyTorch differentiates twice correctly (default: the op itself)."""
        return floats(invoke(op, args))

    def transpose(self, call: Call, wrt: tuple[int, ...], g: Any) -> Sequence[Tensor]:
        """Cotangents [V, *arg] of the arguments `wrt` from those of the output, [V, *y] (a tuple for several).

        That of an output that is not read may be None (`traits.APART`).
        """
        leaves, spec = pytree.tree_flatten(call.args)
        g = g if isinstance(g, tuple) else (g,)

        def op(*xs):
            return _read(floats(invoke(call.op, pytree.tree_unflatten(replaced(leaves, wrt, xs), spec))), g)

        _, pull = torch.func.vjp(op, *(leaves[i] for i in wrt))
        given = _read(g, g)
        if given[0].shape[0] == 1:
            return [t.unsqueeze(0) for t in pull(tuple(t.squeeze(0) for t in given))]
        return torch.vmap(pull)(given)

    def factors(self, call: Call, position: int, g: Any) -> Factor:
        """P of the argument at `position` in factored form; by default from the op's derivative, sample by sample."""
        leaves, spec = pytree.tree_flatten(call.args)
        sharded = [i for i, p in enumerate(call.places) if isinstance(p, Shard) and isinstance(leaves[i], Tensor)]
        slices = [samples_first(leaves[i], call.places[i]) for i in sharded]
        fixed = [said(s) if s is not None else leaf for s, leaf in zip(call.sizes, leaves, strict=True)]
        g = g if isinstance(g, tuple) else (g,)
        g = _samples_first(call, g, lead=1)

        def one(g_n, *slices_n):
            def op(h):
                values = replaced(fixed, (*sharded, position), (*slices_n, h))
                return _read(floats(invoke(call.op, pytree.tree_unflatten(values, spec))), g)

            _, pull = torch.func.vjp(op, leaves[position])
            return torch.vmap(pull)(g_n)[0]

        alone = replaced(fixed, sharded, [s[0] for s in slices])
        if serves_alone(call, alone, [None if t is None else t[0, 0] for t in g]):
            with contextlib.suppress(*FAILURES):  # some ops fail on a single sample only in their backward
                p = torch.vmap(one, in_dims=(1, *[0] * len(slices)))(_read(g, g), *slices)
                return Explicit(p.movedim(0, 1))  # not by out_dims: vmap then expands a constant result wrongly
        return Explicit(_factor_by_one_hot(call, position, g))


def _read(outputs: Sequence[Any], g: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Those of the outputs that have a cotangent."""
    return tuple(y for y, cotangent in zip(outputs, g, strict=True) if cotangent is not None)


def _samples_first(call: Call, ys: Sequence[Any], lead: int = 0) -> tuple[Any, ...]:
    """The op's outputs (behind `lead` axes) as [*lead, N, *slice]; an output without samples is expanded, None is kept."""
    places = (call.outs or (call.place,) * len(ys))[: len(ys)]
    pairs = list(zip(ys, places, strict=True))
    found = [y if y is None or not isinstance(p, Shard) else samples_first(y, p, lead) for y, p in pairs]
    n = next(
        y.shape[lead] if y is not None else samples_first(of_all, p).shape[0]
        for y, of_all, p in zip(found, floats(call.y), places, strict=False)
        if isinstance(p, Shard)
    )
    return tuple(
        y if y is None or isinstance(p, Shard) else y.unsqueeze(lead).expand(*y.shape[:lead], n, *y.shape[lead:])
        for y, p in zip(found, places, strict=True)
    )


def serves_alone(call: Call, leaves: Sequence[Any], like: Sequence[Tensor | None]) -> bool:
    """Whether the op runs on one sample's slices, `leaves`, and gives outputs of the shapes of `like`, where it is not None.

    It does not if another argument has an axis, or an index, that refers to the sample axis.
    """
    if not call.alone:
        return False
    spec = pytree.tree_structure(call.args)
    try:
        out = floats(invoke(call.op, pytree.tree_unflatten(leaves, spec)))
    except FAILURES:
        return False
    return len(out) == len(like) and all(t is None or t.shape == o.shape for o, t in zip(out, like, strict=True))


def _factor_by_one_hot(call: Call, position: int, g: tuple[Any, ...]) -> Tensor:
    """P [V, N, *P] from cotangents `g` [V, N, *y]: the batch's transpose, of one sample's cotangents at a time."""
    leaves, spec = pytree.tree_flatten(call.args)

    def op(h):
        out = floats(invoke(call.op, pytree.tree_unflatten(replaced(leaves, [position], [h]), spec)))
        return _read(_samples_first(call, out), g)

    _, pull = torch.func.vjp(op, leaves[position])
    given = _read(g, g)

    def one(sample):
        return torch.vmap(pull)(tuple(t * sample.view(-1, *[1] * (t.ndim - 2)) for t in given))[0]

    samples = torch.eye(given[0].shape[1], dtype=given[0].dtype, device=given[0].device)
    return torch.vmap(one)(samples).movedim(0, 1)


def floats(out: Any) -> tuple[Tensor, ...]:
    """The differentiable tensors among an op's outputs."""
    return tuple(t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and is_continuous(t))


class Refused(RuntimeError):
    """Raised by a rule for what it is not defined for; the message says why, and the way out."""


FAILURES = (RuntimeError, ValueError, IndexError)
"""The exceptions that ops raise for arguments that they do not accept."""


def failure(error: Exception) -> str:
    """Why a derivative cannot be traced, in a few words."""
    if isinstance(error, GuardOnDataDependentSymNode):
        return "PyTorch's derivative of it branches on values of the data, which no trace follows"
    return f"{type(error).__name__}: {str(error)[:300]}"


FALLBACK = Rule()

RULES: dict[Callable, Rule] = {}

AGAIN: dict[Callable, Rule] = {}
"""Rules in plain ops, to replace registered rules whose kernels are not differentiable in all that they read."""

REWRITES: dict[Callable, Callable] = {}

# Op that reduces over samples internally -> a function that does so by explicit sums, for samples on several ranks.
SUMS: dict[Callable, Callable] = {}


def register(*ops: Callable, rule: Rule | None = None):
    """Register a rule for ops: `register(op, rule=Pointwise(...))`, or as a decorator of a Rule class.

    Raises:
        ValueError: if an op has a rule already (override locally by `compile(rules={op: rule})`).
    """

    def add(target):
        for op in ops:
            if op in RULES:
                raise ValueError(f"{op} has a rule already: pass compile(rules={{op: rule}}) to override it")
            RULES[op] = target() if isinstance(target, type) else target
        return target

    return add(rule) if rule is not None else add


def rewrite(*ops: Callable):
    """Register a function of the same arguments as an op that computes the op by other ops (an equation)."""

    def add(fn):
        for op in ops:
            if op in REWRITES:
                raise ValueError(f"{op} has a rewrite already")
            REWRITES[op] = fn
        return fn

    return add


def is_op(target: Any) -> bool:
    """Whether a node's target is an op of PyTorch, or a function that has its own rule."""
    return isinstance(target, OpOverload) or hasattr(target, "rule")


def rule_of(op: Callable, local: dict[Callable, Rule]) -> Rule:
    """The first of: the user's rule for the op, the registered one, a custom function's own, the fallback."""
    own: Rule = getattr(op, "rule", FALLBACK)
    return local.get(op) or RULES.get(op) or own
