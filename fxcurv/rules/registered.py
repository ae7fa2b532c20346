"""Ops of other libraries, with the derivative that was registered for them (`torch.library.register_autograd`, or in C++).

`torch.func` differentiates no such op. So each call becomes a `Custom`, as a custom autograd function does: the op is its
forward, what was registered its backward. One in C++, or for an op of a `Library`, has no name: PyTorch's autograd runs it, once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from fxcurv.errors import UnsupportedOpError
from fxcurv.ir.emit import tracing
from fxcurv.ir.graph import canonical_args, has_floats, invoke, is_continuous
from fxcurv.ir.origin import locate, origin_of
from fxcurv.ir.private import OpOverload, has_autograd, pytree, registered_functions, schema_of
from fxcurv.ir.program import Program
from fxcurv.rules.base import FALLBACK, REWRITES, rule_of
from fxcurv.rules.custom import Custom, is_foreign, saying

WAY_OUT = (
    "Way out: pass rules={op: rule}, register its derivative by torch.library.register_autograd, or write it in other PyTorch "
    "ops."
)


def refuse_without_derivative(node: fx.Node, program: Program) -> None:
    """Refuse an op that is differentiated and has no derivative: `torch.func` would take zero for it, silently.

    Raises:
        UnsupportedOpError: naming the op.
    """
    if (
        _is_general(node.target, program)
        and not isinstance(node.target, Custom)
        and not _is_differentiable(node.target)
    ):
        raise UnsupportedOpError(
            f"{locate(node)}\nhas no rule, and its library registered no derivative for it.\n{WAY_OUT}"
        )


def registered_as_functions(program: Program, nodes: Iterable[fx.Node]) -> None:
    """Make a `Custom` the target of every call of an op with a registered derivative, and without a rule, among `nodes`."""
    for node in list(nodes):
        if _is_general(node.target, program) and _is_differentiable(node.target) and has_floats(node):
            _as_function(program, node)


def backwards(graphs: Iterable[fx.Graph]) -> list[Callable]:
    """The registered functions of the ops in captured graphs: what they read of Python counts, as a model's reads do."""
    targets = dict.fromkeys(node.target for graph in graphs for node in graph.nodes if is_foreign(node.target))
    return [f for op in targets for f in registered_functions(op) or () if f is not None]


def _is_general(op: Any, program: Program) -> bool:
    return is_foreign(op) and op not in REWRITES and rule_of(op, program.rules) is FALLBACK


def _is_differentiable(op: OpOverload) -> bool:
    known = registered_functions(op)
    return has_autograd(op) if known is None else known[0] is not None


def _as_function(program: Program, node: fx.Node) -> None:
    args: list[int | None] = []
    leaves: list[Any] = []
    for a in canonical_args(node):
        listed = isinstance(a, list | tuple) and any(isinstance(_value(leaf), Tensor) for leaf in a)
        args.append(len(a) if listed else None)
        leaves += a if listed else [a]
    vals = [pytree.tree_map(_value, leaf) for leaf in leaves]
    if any(isinstance(v, torch.SymFloat | torch.SymBool) for v in pytree.tree_leaves(vals)):
        return
    with tracing(program, origin_of(node, "forward")):
        vals = [v.detach().requires_grad_(is_continuous(v)) if isinstance(v, Tensor) else v for v in vals]
        kind = Custom(_function(node.target, tuple(args)), tuple(vals))
        given = [v for v in pytree.tree_leaves(leaves) if isinstance(v, fx.Node)]
        given.sort(key=lambda v: not isinstance(v.meta["val"], Tensor))  # tensors first; sorting keeps the order
        with saying(kind, f"{locate(node)}\n"):
            ran = kind.run([_value(v) for v in given])
    kind.single, kind.constant = not ran.several, ran.constant
    node.target, node.args, node.kwargs = kind, tuple(given), {}
    node.meta["val"] = node.meta["val"] if kind.single else tuple(node.meta["val"])
    node.meta["origin"] = {**origin_of(node, "forward"), "op": kind.cls.__qualname__}


def _value(leaf: Any) -> Any:
    return leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf


@functools.lru_cache(maxsize=256)
def _function(op: OpOverload, lists: tuple[int | None, ...]) -> type:
    """A function of an op's leaves, with its backward; `lists`: for each argument the length of its list of tensors."""
    back = _by_name(op, lists) if registered_functions(op) is not None else _by_autograd(op, lists)
    forward = lambda *leaves: invoke(op, _nested(lists, leaves))  # noqa: E731
    members = {
        "forward": forward,
        **back,
        "__module__": __name__,
        "noun": f"op {op}",
        "way_out": WAY_OUT,
        "is_op": True,
    }
    return type(str(op), (), {name: staticmethod(m) if callable(m) else m for name, m in members.items()})


def _by_name(op: OpOverload, lists: tuple[int | None, ...]) -> dict[str, Callable]:
    """`setup_context` and `backward` by the functions that were registered in Python."""
    schema = schema_of(op)
    positional = sum(not a.kwarg_only for a in schema.arguments)
    returns_list = len(schema.returns) == 1 and isinstance(schema.returns[0].type, torch.ListType)

    def setup_context(ctx, inputs, output):
        _, setup = registered_functions(op) or (None, None)
        args = _nested(lists, inputs)
        ctx.needs_input_grad = tuple(_nested(lists, ctx.needs_input_grad)[:positional])
        keywords = {a.name: v for a, v in zip(schema.arguments[positional:], args[positional:], strict=True)}
        more = {"keyword_only_inputs": keywords} if keywords else {}
        if setup is not None:
            setup(ctx=ctx, inputs=tuple(args[:positional]), output=output, **more)

    def backward(ctx, *gs):
        functions: Any = registered_functions(op)
        found = functions[0](ctx, *([list(gs)] if returns_list else gs))
        found = found if isinstance(found, tuple) else (found,)
        leaves = []
        for k, g in zip(lists, found, strict=False):
            leaves += [g] if k is None else [None] * k if g is None else list(g)
        return tuple(leaves)

    return {"setup_context": setup_context, "backward": backward}


def _by_autograd(op: OpOverload, lists: tuple[int | None, ...]) -> dict[str, Any]:
    """`setup_context` and `backward` by PyTorch's autograd, which runs the op once more and then its backward."""

    def setup_context(ctx, inputs, output):
        ctx.inputs = inputs

    @once_differentiable
    def backward(ctx, *gs):
        xs = [x.detach().requires_grad_(is_continuous(x)) if isinstance(x, Tensor) else x for x in ctx.inputs]
        with torch.enable_grad():
            out = invoke(op, _nested(lists, xs))
        ys = out if isinstance(out, tuple | list) else [out]
        pairs = [(y, g) for y, g in zip(ys, gs, strict=True) if g is not None and y.requires_grad]
        wrt = [x for x in xs if isinstance(x, Tensor) and x.requires_grad]
        outs, cotangents = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outs, wrt, cotangents, allow_unused=True))
        return tuple([next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in xs])

    once = "has a derivative that PyTorch knows by no name, so the derivative of that is not known"
    return {"setup_context": setup_context, "backward": backward, "once": once}


def _nested(lists: tuple[int | None, ...], leaves: Sequence[Any]) -> list[Any]:
    """The op's arguments from its leaves."""
    it = iter(leaves)
    return [next(it) if k is None else [next(it) for _ in range(k)] for k in lists]
