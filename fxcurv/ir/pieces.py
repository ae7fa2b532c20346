"""Traced functions that outlive the program they were traced for, and values to trace them on.

A trace takes some milliseconds per op. It depends on the function, its arguments, the kinds of their tensors (sizes as
expressions of the program's symbols), the assumptions about these symbols, and PyTorch's own state. If all of these are
the same, and the trace assumed nothing new, its graph serves another program, and gets values of that one. Only the
compiler's own functions are kept: a user's may read values that change.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from fxcurv.ir.graph import layout
from fxcurv.ir.origin import is_user_file
from fxcurv.ir.private import FakeTensor, OpOverload, pytree
from fxcurv.ir.program import Program

# How many pieces are kept, the latest ones.
KEPT = 4096
_PLAIN = (
    bool,
    int,
    str,
    float,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    slice,
    OpOverload,
)


class _Other(Exception):
    """Raised for a value that cannot be made again in another program."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a trace sees of a tensor: sizes and strides are integers or expressions."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, val: Tensor) -> Kind:
        """The kind of a fake tensor."""
        return cls(*layout(val), val.dtype, val.device)


def blank(program: Program, kind: Kind, copy: int = 0) -> Tensor:
    """A tensor of this kind, the same one at every call; each `copy` has its own."""
    if (kind, copy) not in program.blanks:
        sizes, strides = ([_size(program, s) for s in part] for part in (kind.shape, kind.stride))
        with program.fake_mode:
            made = torch.empty_strided(sizes, strides, dtype=kind.dtype, device=kind.device)
        program.blanks[kind, copy] = made
    return program.blanks[kind, copy]


def like(program: Program, val: Tensor, copy: int) -> Tensor:
    """`blank` of the kind of `val`, any of whose symbolic sizes may be new."""
    for size in (*val.shape, *val.stride()):
        if isinstance(size, SymInt):
            program.blanks.setdefault(size.node.expr, size)
    return blank(program, Kind.of(val), copy)


def _size(program: Program, expr: Any) -> Any:
    """An expression of the program's symbols as a size."""
    if isinstance(expr, int):
        return expr
    if expr.is_Integer:
        return int(expr)
    if expr not in program.blanks:
        program.blanks[expr] = _made(program, expr)
    return program.blanks[expr]


def _made(program: Program, expr: Any) -> Any:
    if expr.is_Symbol:
        vals = (p.meta.get("val") for p in program.graph.find_nodes(op="placeholder"))
        sizes = (
            s for val in vals if isinstance(val, Tensor) for s in (*val.shape, *val.stride()) if isinstance(s, SymInt)
        )
        found = next((s for s in sizes if s.node.expr == expr), None)
        if found is None:
            raise _Other(expr)
        return found
    parts = [_size(program, a) for a in expr.args]
    if expr.is_Add:
        return sum(parts)
    if expr.is_Mul:
        return functools.reduce(lambda a, b: a * b, parts)
    raise _Other(expr)


# ---- what is kept ------------------------------

_KEPT: OrderedDict[Hashable, tuple[fx.Graph, pytree.TreeSpec, dict[fx.Node, Any]]] = OrderedDict()


def forget() -> None:
    """Drop all pieces that are kept, so that everything is traced anew."""
    _KEPT.clear()


def lasting(program: Program, key: Hashable | None, fn: Any, leaves: list[Any]) -> Hashable | None:
    """The key of a piece among those of all programs; None if the piece may depend on anything else."""
    env = program.fake_mode.shape_env
    if key is None or program.batch.lengths or program.rules or not _is_own(fn) or env is None:
        return None
    given = [leaf for leaf in leaves if not isinstance(leaf, fx.Node)]
    if not all(map(_is_plain, given)):
        return None
    assumed = (
        str(sorted(str(g.expr) for g in env.guards)),
        str(sorted((str(k), str(v)) for k, v in env.replacements.items())),
    )
    ranges = str(sorted((str(s), str(r)) for s, r in env.var_to_range.items()))
    return key, repr(given), _bound(fn), assumed, ranges, program.batch.size, state_of_torch()


def state_of_torch() -> Hashable:
    """What the choice of ops and kernels depends on, besides the program."""
    cuda, mkldnn = torch.backends.cuda, torch.backends.mkldnn
    return (
        torch.get_default_dtype(), str(torch.get_default_device()), torch.are_deterministic_algorithms_enabled(),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        (mkldnn.is_available(), mkldnn.enabled),
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
    )  # fmt: skip


def _bound(fn: Any) -> str:
    """What a partial binds, as text: 1 and 1.0 and True differ there."""
    return repr((fn.args, fn.keywords)) if isinstance(fn, functools.partial) else ""


def _is_own(fn: Any) -> bool:
    """Whether a function is the compiler's or PyTorch's, and so is all that it binds."""
    if isinstance(fn, functools.partial):
        return _is_own(fn.func) and all(map(_is_plain, (*fn.args, *fn.keywords.values())))
    if isinstance(fn, types.MethodType):
        return _is_ours(fn.__func__) and _is_ours(type(fn.__self__))
    return fn.namespace in ("aten", "prims", "fxcurv") if isinstance(fn, OpOverload) else _is_ours(fn)


def _is_ours(value: Any) -> bool:
    if isinstance(value, types.FunctionType) and is_user_file(value.__code__.co_filename):
        return False  # even if `functools.wraps` gives it another module
    return (getattr(value, "__module__", None) or "").split(".")[0] in ("fxcurv", "torch", "_operator")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list | frozenset):
        return all(map(_is_plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        frozen = type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]
        return (
            frozen
            and _is_ours(type(value))
            and all(_is_plain(getattr(value, f.name)) for f in dataclasses.fields(value))
        )
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return _is_own(value)
    holds_nothing = getattr(value, "__dict__", None) == {}  # a rule, say
    return isinstance(value, _PLAIN) or _is_ours(type(value)) and holds_nothing


def assumptions(program: Program) -> tuple[int, int]:
    """How many assumptions are made about the symbols."""
    env = program.fake_mode.shape_env
    return (len(env.guards), len(env.replacements)) if env is not None else (0, 0)


def keep(key: Hashable, graph: fx.Graph, spec: pytree.TreeSpec) -> None:
    """Keep a piece for other programs, if its values can be made there."""
    try:
        kinds = {node: _describe(node.meta.get("val")) for node in graph.nodes if node.op == "call_function"}
    except _Other:
        return
    if all(node.op in ("placeholder", "call_function", "output") for node in graph.nodes):
        copy = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        copy.output(copy.graph_copy(graph, env))
        for node in copy.nodes:
            node.meta = {}
        _KEPT[key] = copy, spec, {env[node]: kind for node, kind in kinds.items()}
        if len(_KEPT) > KEPT:
            _KEPT.popitem(last=False)


def kept(program: Program, key: Hashable) -> tuple[fx.Graph, pytree.TreeSpec] | None:
    """A piece that was traced for another program, with values of this one."""
    found = _KEPT.pop(key, None)
    if found is None:
        return None
    _KEPT[key] = found  # the latest now
    graph, spec, kinds = found
    copy = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    out = copy.graph_copy(graph, env)
    copy.output(out)
    try:
        for node, kind in kinds.items():
            env[node].meta["val"] = _value(program, kind)
    except _Other:
        return None
    return copy, spec


def _describe(val: Any) -> Any:
    if isinstance(val, list | tuple):
        return type(val), [_describe(v) for v in val]
    if isinstance(val, SymInt):
        return val.node.expr
    if type(val) is FakeTensor and val.layout is torch.strided and not val.is_conj() and not val.is_neg():
        return Kind.of(val)
    if val is None or isinstance(val, bool | int | float):
        return ("value", val)
    raise _Other(val)


def _value(program: Program, kind: Any) -> Any:
    if isinstance(kind, Kind):
        return blank(program, kind)
    if isinstance(kind, tuple):
        return kind[1] if kind[0] == "value" else kind[0]([_value(program, k) for k in kind[1]])
    return _size(program, kind)
