"""Tangent and residual of one op, from its transpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import FxcurvError, UnsupportedOpError
from fxcurv.ir.emit import emit
from fxcurv.ir.graph import replaced
from fxcurv.ir.origin import locate, origin_of
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Program
from fxcurv.ir.traced import sum_of
from fxcurv.rules.base import FAILURES, FALLBACK, Rule, failure, rule_of
from fxcurv.rules.call import Call, call_of


@dataclass(frozen=True)
class Formula:
    """An op computed by its rule's formula."""

    rule: Rule
    op: Callable

    def __call__(self, *args: Any) -> Any:
        return self.rule.formula(self.op, args)


# ---- derivatives of one op, from its transpose ------------------------------


def outputs(rule: Rule, y: Any) -> list[int]:
    """Which outputs of an op with several carry derivatives."""
    if type(rule).transpose is not Rule.transpose:
        return [0]
    return [k for k, t in enumerate(y) if isinstance(t, Tensor) and t.is_floating_point()]


def _pull_back(rule: Rule, call: Call, wrt: tuple[int, ...], g: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The transpose, with cotangents in the dtype of their values, which the op may have promoted."""
    g, leaves = tuple(g), pytree.tree_leaves(call.args)
    back = rule.transpose(call, wrt, g if isinstance(call.y, tuple) else g[0])
    return tuple(b.to(leaves[i].dtype) for i, b in zip(wrt, back, strict=True))


def _ys(rule: Rule, call: Call) -> list[Tensor]:
    return [call.y[k] for k in outputs(rule, call.y)] if isinstance(call.y, tuple) else [call.y]


def transposed(rule: Rule, call: Call, wrt: tuple[int, ...], g: list[Tensor]) -> tuple[Tensor, ...]:
    """J^T g, [1, *arg] for the arguments `wrt`."""
    return _pull_back(rule, call, wrt, g)


def tangent(rule: Rule, call: Call, wrt: tuple[int, ...], ts: list[Tensor]) -> tuple[Tensor, ...]:
    """J t, [*y]: the transpose's transpose."""
    zeros = [torch.zeros_like(y).unsqueeze(0) for y in _ys(rule, call)]
    _, back = torch.func.vjp(lambda *g: _pull_back(rule, call, wrt, g), *zeros)
    return tuple(t.squeeze(0) for t in back(tuple(t.unsqueeze(0) for t in ts)))


def tangent_of_product(rule: Rule, call: Call, wrt: tuple[int, ...], ts: list[Tensor]) -> tuple[Tensor, ...]:
    """J t, [*y], of x z + b: the same op on a tangent."""
    terms = []
    for i, t in zip(wrt, ts, strict=True):
        if i < 2:
            args = replaced(list(call.args), (i,), [t])
            args[2:3] = [None] if len(args) > 2 else []
            terms.append(call.op(*args))
        else:
            terms += tangent(rule, call, (i,), [t])
    return (sum_of(terms),)


def residual(rule: Rule, call: Call, wrt: tuple[int, ...], g: list[Tensor], ts: list[Tensor]):
    """R t in two parts: [1, *arg] for the arguments `wrt`, and [1, *y], to be sent on by the op's transpose.

    R is symmetric, so R t is the derivative of <J(x)^T g, t>; y, which the transpose may read, is one more argument.
    """
    leaves, spec = pytree.tree_flatten(call.args)
    ys = _ys(rule, call)

    def pull(xs, ys):
        args = pytree.tree_unflatten(replaced(leaves, wrt, xs), spec)
        return _pull_back(rule, dataclasses.replace(call, args=args, y=_replace_outputs(call, rule, ys)), wrt, g)

    _, back = torch.func.vjp(pull, [leaves[i] for i in wrt], ys)
    direct, at_y = back(tuple(t.unsqueeze(0) for t in ts))
    return [t.unsqueeze(0) for t in direct], [t.unsqueeze(0) for t in at_y]


def _replace_outputs(call: Call, rule: Rule, ys: list[Tensor]) -> Any:
    if not isinstance(call.y, tuple):
        return ys[0]
    new = dict(zip(outputs(rule, call.y), ys, strict=True))
    return tuple(new.get(k, t) for k, t in enumerate(call.y))


def op_of(program: Program, node: fx.Node) -> tuple[Rule, Call]:
    """The rule and the call at `node`, in a form that can be differentiated again."""
    rule, call = rule_of(node.target, program.rules), call_of(program, node)
    if type(rule).formula is not Rule.formula:
        return FALLBACK, dataclasses.replace(call, op=Formula(rule, node.target))
    return rule, call


def emitted(program: Program, node: fx.Node, fn: Callable, *args: Any) -> Any:
    """Emit a derivative of the op at `node`."""
    try:
        return emit(program, fn, *args, origin=origin_of(node, "extract"))
    except FxcurvError:
        raise  # some are ValueErrors, which the next clause would catch
    except (*FAILURES, TypeError) as error:
        raise no_second_derivative(node, error) from error


def no_second_derivative(node: fx.Node, error: Exception) -> UnsupportedOpError:
    """The error to raise where the derivative of an op's derivative cannot be traced."""
    return UnsupportedOpError(
        f"{locate(node)}\nhas no second derivative: {failure(error)}\n"
        "Way out: pass rules={op: rule} with a transpose made of differentiable ops, or write the op in other PyTorch ops."
    )
