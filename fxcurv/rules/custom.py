"""Custom `torch.autograd.Function`s: the forward is one op of the graph, the backward its transpose.

Export would trace through the forward and lose the backward. So during capture, the `forward` of every subclass is
replaced by one op, `fxcurv::custom_function` (not `apply`: a bound `f = Round.apply` would escape a patch). Each of its
nodes then gets a `Custom` as its target:

    forward    y = forward(ctx, x)                     user's Python, on whatever tensors it is called with
    transpose  backward(ctx of forward(x), g)          a graph, made by tracing, in which x, y and g are inputs

The general rule applies, because `torch.func` differentiates calls of a `Custom` by the function's backward, and twice
by the derivative of that backward. Samples are followed op by op through both graphs. A function for which this is not
sound is refused by a `CustomFunctionError`.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.autograd.function import Function, once_differentiable

from fxcurv.errors import CustomFunctionError, FxcurvError
from fxcurv.ir.emit import MATERIALISED, emit, substitute, tracing
from fxcurv.ir.graph import (
    canonical_args,
    dependent,
    has_floats,
    is_continuous,
    is_view,
    layout,
    mutates,
    size_of,
    to_reshape,
)
from fxcurv.ir.origin import locate, origin_of
from fxcurv.ir.private import (
    OpOverload,
    decomposes,
    dispatch_functionalize,
    in_function_transform,
    make_fx,
    no_torch_functions,
    pytree,
    schema_of,
)
from fxcurv.ir.program import Program, is_active
from fxcurv.rules.base import Rule, rule_of
from fxcurv.rules.followed import places, reads_shape
from fxcurv.rules.traits import CUTS, random

aten = torch.ops.aten

WAY_OUT = (
    "Way out: write it as plain PyTorch ops (x + (f(x) - x).detach() for a straight-through estimator), or as a "
    "torch.library.custom_op that rules={op: rule} says the derivative of."
)

KINDS: list[Custom] = []
"""The functions that the running capture has met; their op holds the index."""


@torch.library.custom_op("fxcurv::custom_function", mutates_args=())
def custom_function(xs: list[Tensor], sizes: list[int], kind: int) -> list[Tensor]:
    """A call of a custom function during capture; `kind` is the function's index in `KINDS`."""
    return [y.clone() for y in KINDS[kind].run([*xs, *sizes]).tensors]


@custom_function.register_fake
def _(xs, sizes, kind):
    with no_torch_functions():  # by which export would record that gradients are switched on and off
        ran = KINDS[kind].run([*xs, *sizes])
    KINDS[kind].last = ran
    return [torch.empty_like(y) for y in ran.tensors]


# ---- arguments and outputs of a function ------------------------------


class _Context:
    """Stands in for the `ctx` of a function."""

    def __init__(self, needs: tuple[bool, ...]):
        self.needs_input_grad = needs
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self._constant: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Tensor | None) -> None:
        """Has no effect: nothing runs in forward mode."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self._constant = tensors

    def mark_dirty(self, *tensors: Tensor) -> None:
        raise _Refused("writes to its input in place (mark_dirty), which is not kept")

    def set_materialize_grads(self, value: bool) -> None:
        """Has no effect: gradients are always tensors, zeros where an output is not read."""

    def exchange(self, new: dict[int, Tensor]) -> None:
        """Replace tensors that the function has kept, by their identity."""
        swap = lambda t: new.get(id(t), t) if isinstance(t, Tensor) else t  # noqa: E731
        for name, value in vars(self).items():
            setattr(self, name, pytree.tree_map(swap, value))


class _Refused(Exception):
    """The reason why a function cannot be kept."""


class _Written(_Refused):
    """A function writes to these arguments."""

    def __init__(self, arguments: set[int]):
        super().__init__("writes to its input in place, which is not kept where something else may read it")
        self.arguments = arguments


class _Ran:
    """One run of a forward: its `ctx` afterwards, and its outputs, tensors and others."""

    def __init__(self, ctx: _Context, out: Any):
        self.ctx, self.out = ctx, out
        several = isinstance(out, tuple | list)
        self.leaves = list(out) if several else [out]
        self.several = several
        self.tensors = [t for t in self.leaves if isinstance(t, Tensor)]
        self.constant = [any(t is c for c in ctx._constant) for t in self.tensors]


class Custom:
    """A call of the function `cls`, as the target of a node; takes the tensors and sizes among its arguments.

    Attributes:
        needs: for each argument of `apply`, whether it requires a gradient.
        single: whether the function returns one tensor, not a tuple.
        rule: the general rule, which here knows whether the backward is the same at every input.
        forward, backward: their traced graphs: (x) -> y, and (x, x, y, g) -> gradients of x. The
            function's intermediate values are computed from the first x; the inputs that it saves are the second.
        written: arguments that the forward writes to, and that nothing else reads: it is given copies.
        nonlinear: why the backward is, or may be, not linear in g; "" if it is.
    """

    def __init__(self, cls: type, args: tuple):
        self.cls = cls
        self.__name__ = self.__qualname__ = cls.__name__
        self.__module__ = "fxcurv.custom"
        leaves, self._spec = pytree.tree_flatten(args)
        self._kinds = [_kind_of(leaf) for leaf in leaves]
        self._constants = [None if kind else leaf for leaf, kind in zip(leaves, self._kinds, strict=True)]
        self.needs = tuple(isinstance(a, Tensor) and a.requires_grad for a in args)
        self._tops = [k for k, a in enumerate(args) if isinstance(a, Tensor)]
        first = [sum(isinstance(t, Tensor) for a in args[:k] for t in pytree.tree_leaves(a)) for k in self._tops]
        self.tensor_tops = first
        self.last: _Ran | None = None
        self.single = False
        self.constant: list[bool] = []
        self.rule = CustomRule(self)
        self.forward: fx.GraphModule | None = None
        self.backward: fx.GraphModule | None = None
        self._traced: Any = None
        self._where = ""
        self.written: set[int] = set()
        self.smooth, self.nonlinear = True, ""

    def key(self, vals: Sequence[Any]) -> Any:
        """A key that is equal for calls with equal graphs."""
        kinds = tuple((layout(v), v.dtype, v.device) if isinstance(v, Tensor) else str(v) for v in vals)
        key = (
            self.cls,
            str(self._spec),
            tuple(self._kinds),
            tuple(map(_constant_key, self._constants)),
            self.needs,
            kinds,
        )
        return key

    def no_derivative(self, why: str, way_out: str = "") -> CustomFunctionError:
        """The error for a second derivative that is not known, with the line of a call."""
        return self.refused(why, way_out, self._where)

    def refused(self, why: str, way_out: str = "", where: str = "") -> CustomFunctionError:
        """The error for a function that is not kept, with the reason."""
        out = f"Way out: {way_out}." if way_out else getattr(self.cls, "way_out", WAY_OUT)
        noun = getattr(self.cls, "noun", f"the custom autograd function '{self.cls.__qualname__}'")
        return CustomFunctionError(f"{where}{noun} {why}.\n{out}")

    # -- calls

    def run(self, leaves: Sequence[Any]) -> _Ran:
        """The user's forward on tensors and sizes, tensors first."""
        ctx = _Context(self.needs)
        args = self._arguments([v.clone() if k in self.written else v for k, v in enumerate(leaves)])
        try:
            with torch.no_grad():
                if is_separate(self.cls):
                    out = _original(self.cls, "forward")(*args)
                    _original(self.cls, "setup_context")(ctx, args, out)
                else:
                    out = _original(self.cls, "forward")(ctx, *args)
        except FxcurvError:
            raise
        except _Refused as error:
            raise self.refused(str(error)) from None
        except Exception as error:
            raise self.refused(f"cannot be traced, its forward fails: {_summary(error)}") from error
        return _Ran(ctx, out)

    def _arguments(self, leaves: Sequence[Any]) -> tuple:
        tensors, sizes = (iter([v for v in leaves if isinstance(v, Tensor) is is_]) for is_ in (True, False))
        given = {"tensor": tensors, "size": sizes}
        full = [next(given[k]) if k else o for k, o in zip(self._kinds, self._constants, strict=True)]
        return tuple(pytree.tree_unflatten(full, self._spec))

    def __call__(self, *leaves: Any) -> Any:
        out = _Replay.apply(self, *leaves) if in_function_transform() else tuple(self.run(leaves).tensors)
        return out[0] if self.single else out

    # -- tracing

    def trace(self, program: Program, node: fx.Node) -> None:
        """Trace the graphs at the node's values, unless they are traced."""
        vals = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args]
        key = self.key(vals)
        self._where = f"{locate(node)}\n"
        if key == self._traced:
            return
        out = node.meta["val"]
        ys = [out] if self.single else list(out)
        where, origin = self._where, origin_of(node, "forward")
        forward = lambda *leaves: _as_views(self.run(leaves).tensors, leaves)  # noqa: E731
        with saying(self, where):
            try:
                self.forward = _graph(program, forward, vals, origin)
            except _Written as error:
                if not all(_is_read_once(node.args[k]) for k in error.arguments):
                    raise
                self.written = error.arguments
                self.forward = _graph(program, forward, vals, origin)
            _check(self, where, self.forward)
            if is_active(node) and any(self.needs):
                self.backward = _graph(program, self._backward, [*vals, *vals, *ys, *ys], origin)
                _check(self, where, self.backward)
        self._traced = key
        if self.backward is not None:
            self._learn(program)

    def _backward(self, *flat: Any) -> list[Tensor | None]:
        """The gradients of the tensors among the arguments, from (x, x, y, g)."""
        n = sum(k is not None for k in self._kinds)
        first, second, rest = flat[:n], flat[n : 2 * n], flat[2 * n :]
        ys, gs = rest[: len(rest) // 2], list(rest[len(rest) // 2 :])
        ran = self.run(first)
        new = {id(old): y for old, y in zip(ran.tensors, ys, strict=True)}
        new |= {id(old): x for old, x in zip(first, second, strict=True) if isinstance(old, Tensor)}
        ran.ctx.exchange(new)
        rows = iter(gs)
        given = [next(rows) if isinstance(t, Tensor) else None for t in ran.leaves]
        given = [g if g is None or is_continuous(g) else None for g in given]
        back = _original(self.cls, "backward")
        found = back(ran.ctx, *given)
        found = found if isinstance(found, tuple | list) else (found,)
        tensors, args = [], self._arguments(second)
        for k in self._tops:
            g = found[k] if k < len(found) and self.needs[k] else None
            tensors.append(g if g is None else g.sum_to_size(args[k].shape).to(args[k].dtype))
        return tensors

    def _learn(self, program: Program) -> None:
        """Set properties of the backward: linear in g, the same at every x, differentiable once more."""
        assert self.backward is not None
        given = [n for n in self.backward.graph.nodes if n.op == "placeholder"]
        n = sum(k is not None for k in self._kinds)
        outs = (len(given) - 2 * n) // 2
        reaches = lambda start: _reaches(self.backward.graph, set(start))  # noqa: E731
        self.keeps_inside = reaches(given[:n])
        gs = given[2 * n + outs :]
        behind = dependent(self.backward.graph.nodes, gs)
        self.calls = next(
            (str(n.target) for n in self.backward.graph.nodes if n in behind and is_foreign(n.target)), ""
        )
        self.once = self._why_once()
        self.smooth = bool(self.once) or reaches(given[: 2 * n + outs])
        if not _is_linear(program, self.backward.graph, gs):
            self.nonlinear = self._why_nonlinear(program, gs)

    def _why_nonlinear(self, program: Program, gs: list[fx.Node]) -> str:
        """What is or may be not linear in the backward, which goes into a message; "" if it seems to be linear."""
        assert self.backward is not None
        nodes = self.backward.graph.nodes
        unknown = (n.target for n in nodes if is_foreign(n.target) and not all(map(has_floats, n.all_input_nodes)))
        if (op := next(unknown, None)) is not None:
            return f"calls op {op}, which reads integers: on made-up ones it is not tried whether it is linear"
        return "" if _seems_linear(program, self.backward, gs) else "is not linear in the gradient that it gets"

    def _why_once(self) -> str:
        """Why the backward has no derivative, which goes into a message; "" if it has one."""
        back = _original(self.cls, "backward")
        if hasattr(self.cls, "once"):
            return self.cls.once
        called = f"op {self.calls}" if self.calls else "another custom function" if _calls_another(back) else ""
        if called:
            return (
                f"calls {called} in its backward, whose own derivative a second derivative would take: that is not kept"
            )
        return "has no second derivative, it is marked @once_differentiable" if _is_once(back) else ""


def _as_views(outs: Sequence[Tensor], given: Sequence[Any]) -> list[Tensor]:
    """The outputs; an input that is returned as it is becomes a view, as in PyTorch."""
    return [y.view_as(y) if any(y is x for x in given) else y for y in outs]


class CustomRule(Rule):
    """The general rule, with what is known about one custom function."""

    name = "custom"

    def __init__(self, kind: Custom):
        self._kind = kind

    def places(self, program, node, vals, place_of):
        return places(program, node, vals, place_of)

    @property
    def piecewise_linear(self) -> bool:  # type: ignore[override]
        """Whether the backward is the same at every input, as for a straight-through estimator."""
        return not self._kind.smooth


def _kind_of(leaf: Any) -> str | None:
    return "tensor" if isinstance(leaf, Tensor) else "size" if isinstance(leaf, SymInt) else None


def _constant_key(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else id(value)


def _summary(error: BaseException) -> str:
    line = next((line for line in str(error).strip().splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:300]}"


def is_separate(cls: type) -> bool:
    """Whether the function has `setup_context`, so that its `forward` takes no ctx."""
    return _original(cls, "setup_context") is not Function.setup_context


def is_foreign(op: Any) -> bool:
    """Whether an op is another library's, and does not decompose into PyTorch's."""
    own = ("aten", "prims", "prim", "fxcurv")
    return isinstance(op, OpOverload) and op.namespace not in own and not decomposes(op)


def _is_once(backward: Callable) -> bool:
    """Whether the backward is wrapped by `once_differentiable`."""
    return getattr(backward, "__code__", None) is once_differentiable(lambda ctx: None).__code__


def _calls_another(backward: Callable) -> bool:
    """Whether a backward names another custom function, or its `apply`."""
    code = getattr(backward, "__code__", None)
    cells = []
    for cell in getattr(backward, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty one
            cells.append(cell.cell_contents)
    named = [backward.__globals__.get(name) for name in code.co_names] if code is not None else []
    owners = [value if isinstance(value, type) else getattr(value, "__self__", None) for value in (*named, *cells)]
    return any(isinstance(owner, type) and issubclass(owner, Function) and owner is not Function for owner in owners)


# ---- derivatives of a call, for torch.func ------------------------------


class _Stop(Function):
    """The identity, whose backward raises an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, error):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.error = inputs[1]

    @staticmethod
    def backward(ctx, g):
        raise ctx.error


class _Replay(Function):
    """A call of a `Custom` by its traced graphs, which `torch.func` can differentiate."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kind, *leaves):
        return tuple(kind.forward(*leaves))

    @staticmethod
    def setup_context(ctx, inputs, output):
        kind, *leaves = inputs
        ctx.kind, ctx.sizes = kind, [v for v in leaves if not isinstance(v, Tensor)]
        ctx.mark_non_differentiable(*[y for y, c in zip(output, kind.constant, strict=True) if c])
        ctx.save_for_backward(*[v for v in leaves if isinstance(v, Tensor)], *output)
        ctx.count = len(output)

    @staticmethod
    def backward(ctx, *gs):
        kind = ctx.kind
        saved, ys = list(ctx.saved_tensors[: -ctx.count]), list(ctx.saved_tensors[-ctx.count :])
        gs = tuple(torch.zeros_like(y) if c or g is None else g for y, g, c in zip(ys, gs, kind.constant, strict=True))
        kept = saved
        if kind.keeps_inside and not kind.once:
            error = kind.no_derivative(
                "keeps values of its forward that are neither inputs nor outputs, so PyTorch does not know the derivative of "
                "its backward",
                "return them as outputs, or compute them again in its backward",
            )
            kept = [_stop(t, error) for t in saved]
        try:
            grads = kind.backward(*kept, *ctx.sizes, *saved, *ctx.sizes, *ys, *gs)
        except RuntimeError as error:
            if not kind.calls:
                raise
            raise kind.no_derivative(kind.once) from error
        found = iter(_refuse_second_derivative(kind, grads, [*saved, *ys]) if kind.once else grads)
        tops = {*kind.tensor_tops}
        leaves = [next(found) if k in tops else None for k in range(len(saved))]
        return (None, *leaves, *[None] * len(ctx.sizes))


def _refuse_second_derivative(kind: Custom, grads: Sequence[Tensor | None], saved: list[Tensor]) -> list[Tensor | None]:
    """The gradients, made to depend on all saved values, so that a second derivative raises an error.

    Otherwise, in a backward that detaches these values, the second derivative would silently be zero.
    """
    error = kind.no_derivative(kind.once)
    sums = [torch.real(_stop(t, error).sum()) for t in saved if is_continuous(t)]
    zero = sum(torch.where(torch.ones_like(s, dtype=torch.bool), 0, s) for s in sums)
    return [g if g is None else g + zero.to(g.dtype) for g in grads]  # type: ignore[union-attr]


def _stop(t: Tensor, error: Exception) -> Tensor:
    return _Stop.apply(t, error) if is_continuous(t) else t


# ---- capture ------------------------------


ORIGINALS: dict[tuple[type, str], Callable] = {}


def backwards() -> list[Callable]:
    """The backwards of the functions that the running capture has met; tracing their rules runs them."""
    return [_original(kind.cls, "backward") for kind in KINDS]


def _original(cls: type, name: str) -> Callable:
    """A method of the class as its author wrote it, even while it is patched; `backward` may be named `vjp`."""
    found = ORIGINALS.get((cls, name)) or getattr(cls, name)
    return _original(cls, "vjp") if name == "backward" and found is Function.backward else found


def functions_as_targets(graph: fx.Graph) -> None:
    """Make the `Custom` of each node of `fxcurv::custom_function` its target; equal calls share one."""
    same: dict[Any, Custom] = {}
    for node in [n for n in graph.nodes if n.target is torch.ops.fxcurv.custom_function.default]:
        xs, sizes, number = node.args
        kind, leaves = KINDS[number], [*xs, *sizes]
        vals = [a.meta["val"] if isinstance(a, fx.Node) else a for a in leaves]
        kind = same.setdefault(kind.key(vals), kind)
        node.target, node.args = kind, tuple(leaves)
        node.meta["origin"] = {**node.meta.get("origin", {}), "op": kind.cls.__qualname__}
        if kind.single:
            for user in list(node.users):
                user.replace_all_uses_with(node)
                graph.erase_node(user)
            node.meta["val"] = node.meta["val"][0]
        else:
            node.meta["val"] = tuple(node.meta["val"])


# ---- the graphs of a function ------------------------------


@contextlib.contextmanager
def saying(kind: Custom, where: str) -> Iterator[None]:
    """Add the function's name and the user's line to errors while the function is traced."""
    try:
        yield
    except _Refused as error:
        raise kind.refused(str(error), where=where) from None
    except CustomFunctionError as error:
        raise CustomFunctionError(f"{where}{error}") from error
    except FxcurvError:
        raise
    except Exception as error:
        raise kind.refused(f"cannot be traced: {_summary(error)}", where=where) from error


def _graph(program: Program, fn: Callable, vals: list[Any], origin: dict[str, Any]) -> fx.GraphModule:
    """`fn` as a graph of functional ops, on fake values."""
    with tracing(program, origin):
        fresh = [_empty_like(v) for v in vals]
        listed = lambda *args: list(fn(*args))  # noqa: E731
        gm = make_fx(listed, MATERIALISED)(*fresh)
        writes = [n for n in gm.graph.nodes if mutates(n)]
        given = [n for n in gm.graph.nodes if n.op == "placeholder"]
        if found := {given.index(root) for n in writes if (root := _root(n)).op == "placeholder"}:
            raise _Written(found)
        if writes:
            gm = make_fx(dispatch_functionalize(listed), MATERIALISED)(*fresh)
    for node in gm.graph.nodes:
        if node.target is aten.sym_size.int:
            node.target = size_of  # works under vmap
        to_reshape(node)  # as columns have other strides
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _is_read_once(value: Any) -> bool:
    """Whether a value is an op's own result, and one node reads it: nobody sees what that node writes to it."""
    return isinstance(value, fx.Node) and value.op == "call_function" and len(value.users) == 1 and not is_view(value)


def _root(node: fx.Node) -> fx.Node:
    """The tensor that a write goes to, behind views."""
    source = node.args[0]
    while source.op == "call_function" and (mutates(source) or any(r.alias_info for r in _returns(source))):
        source = source.args[0]
    return source


def _returns(node: fx.Node) -> Sequence[Any]:
    schema = schema_of(node.target)
    return schema.returns if schema is not None else ()


def _empty_like(val: Any) -> Any:
    return (
        torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)
        if isinstance(val, Tensor)
        else val
    )


def _check(kind: Custom, where: str, gm: fx.GraphModule) -> None:
    """Refuse graphs with random numbers, or with tensors that are no arguments."""
    for node in gm.graph.nodes:
        if random(node.target):
            raise kind.refused(
                f"draws random numbers (op {node.target}), which its backward would draw again", where=where
            )
        fresh = all(u.target is aten.lift_fresh_copy.default for u in node.users)
        if node.op == "get_attr" and not fresh:
            raise kind.refused(
                "reads a tensor that is none of its arguments", "pass the tensor to apply as an argument", where=where
            )


def _active_outputs(graph: fx.Graph, start: set[fx.Node]) -> set[fx.Node]:
    """The values that depend differentiably on `start`."""
    found = {n for n in start if has_floats(n)}
    for node in graph.nodes:
        differentiable = (
            node.op == "call_function" and node.target not in CUTS - {aten.detach.default} and has_floats(node)
        )
        if differentiable and any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _reaches(graph: fx.Graph, start: set[fx.Node]) -> bool:
    """Whether an output depends differentiably on `start`."""
    found = _active_outputs(graph, start)
    return any(n in found for n in graph.output_node().all_input_nodes)


def _is_linear(program: Program, graph: fx.Graph, gs: list[fx.Node]) -> bool:
    """Whether each op below `gs` is known to be linear in the arguments that depend on them."""
    found = set(gs)
    for node in graph.nodes:
        if node.op != "call_function" or not any(i in found for i in node.all_input_nodes):
            continue
        found.add(node)
        if node.target is operator.getitem or reads_shape(node):
            continue
        leaves = pytree.tree_leaves(canonical_args(node))
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node) and leaf in found]
        if not rule_of(node.target, program.rules).linear(positions):
            return False
    return True


def _seems_linear(program: Program, gm: fx.GraphModule, gs: list[fx.Node]) -> bool:
    """Whether the graph looks linear in `gs` at random numbers of several scales: a clip shows at large ones only."""
    n = program.batch.size
    generator = torch.Generator().manual_seed(0)
    given = [p for p in gm.graph.nodes if p.op == "placeholder"]

    def drawn(node: fx.Node, scale: float) -> Any:
        val = node.meta["val"]
        if not isinstance(val, Tensor):
            return program.batch.evaluate(val, n)
        shape = program.batch.shape(val, n)
        if is_continuous(val):
            wide = torch.complex128 if val.is_complex() else torch.float64
            x = torch.randn(shape, dtype=wide, generator=generator)
            return (x * scale).to(val.dtype).to(val.device)
        return torch.randint(0, 2, shape, generator=generator).to(val.dtype).to(val.device)

    try:
        fixed = {p: drawn(p, 1.0) for p in given}
        run = lambda new: [t for t in gm(*[new.get(p, fixed[p]) for p in given]) if t is not None]  # noqa: E731
        for scale in (1.0, 1e-6, 1e-3, 1e3, 1e6):
            one, two = ({p: drawn(p, s) for p in gs} for s in (scale, 1.0))
            both = {p: one[p] - 2 * two[p] for p in gs}
            for a, b, c in zip(run(one), run(two), run(both), strict=True):
                size = max(a.abs().max().item(), b.abs().max().item()) if a.numel() else 0.0
                if not torch.allclose(c, a - 2 * b, rtol=1e-4, atol=1e-5 * size + 1e-30):
                    return False
    except Exception:  # ops may raise anything at random numbers: then linearity is not known
        return False
    return True


# ---- after the walk ------------------------------


def inline(program: Program) -> None:
    """Replace the remaining calls by the ops of their forward.

    Raises:
        CustomFunctionError: with `create_graph`, because results would be differentiated through those ops.
    """
    for node in [n for n in program.graph.nodes if isinstance(n.target, Custom)]:
        if program.options.create_graph and is_active(node) and not getattr(node.target.cls, "is_op", False):
            raise node.target.refused(
                "has a backward of its own, which create_graph=True would lose",
                "drop create_graph",
                f"{locate(node)}\n",
            )
        new = emit(program, node.target, *node.args, origin=origin_of(node, "forward"), before=node)
        substitute(program, node, new)
