"""Values that a model turns into Python numbers or sizes: `.item()`, `x[mask]`, `nonzero`, `bincount`, `unique`.

A value that depends on inputs, targets, buffers and frozen parameters alone is computed while the model is traced, and
the program holds for this value: the traced graph outputs it, and every call computes it anew and compares
(`Program.reads`). A float that was another at the second call is a detached tensor from then on, where the code can do
with one. A value that depends on trained parameters stays a detached tensor in arithmetic, and is refused
where a size or a branch needs it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcurv.errors import CaptureError
from fxcurv.front.schedules import Number
from fxcurv.ir.graph import mutates
from fxcurv.ir.origin import running_line
from fxcurv.ir.private import (
    disable_proxy_modes_tracing,
    memory_of,
    no_torch_functions,
    node_of,
    proxy_mode,
    pytree,
    schema_of,
    without_fake_mode,
)
from fxcurv.rules.idioms import counts_places
from fxcurv.rules.traits import LIKE_OTHER, LITERALS, OF_SHAPE, random

_NUMBER = (
    "makes a number of Python's of a value that depends on trained parameters, which is not known while tracing. Way out: leave "
    "it a tensor, as in x.abs().max().detach() for float(x.abs().max()), x.clamp(min=0.1) for max(0.1, x.item()), and "
    "torch.where(c, a, b) for a branch; print or keep it outside of the model and the loss (result.loss, result.output)."
)

_SIZE = (
    "makes a tensor whose size depends on values that trained parameters enter. Way out: keep all entries, as in "
    "torch.where(mask, f(x), x) for x[mask] = f(x[mask]), or (loss * mask).sum() / mask.sum() for loss[mask].mean(); where a "
    'router chooses experts, gather the experts of each row (in transformers, experts_implementation="batched_mm").'
)


class Learned(Number):
    """The number that a tensor of trained parameters holds, which a program has as a detached tensor."""

    def error(self) -> Exception:
        return CaptureError(f"op item\n{running_line()}{_NUMBER}")


class Unknown(Exception):
    """Raised for a value that does not follow from data alone."""


# What a value depends on: nothing, data that may differ between calls, or trained parameters and random draws.
_FIXED, _DATA, _UNKNOWN = 0, 1, 2


class Values:
    """Computes what has been traced so far, on the values of the call.

    Attributes:
        read: (tensor of the trace, the number that it holds) for every number that may differ at another call.
        lend: whether `.item()` of data gives a `Number` in place of a float, so that one program serves all values.
    """

    def __init__(self, lend: bool = False) -> None:
        self.lend = lend
        self.read: list[tuple[Tensor, Any]] = []
        self._given: list[tuple[Tensor, Tensor, bool]] = []
        self._nodes: list[fx.Node | None] = []
        self._env: dict[fx.Node, Any] = {}
        self._level: dict[fx.Node, int] = {}
        self._of_call: set[int] = set()
        self._memory: dict[int, int] = {}  # storage -> level: a write changes what all views hold
        self._seen = 0

    def begin(self, given: Iterable[tuple[Tensor, Tensor, bool]], of_call: Iterable[Tensor]) -> None:
        """Begin a trace.

        Args:
            given: (tensor of the trace, its value, whether it is trained) for all that comes in.
            of_call: those of these tensors that are inputs, targets and numbers.
        """
        self.__init__(self.lend)  # type: ignore[misc]
        self._given, self._of_call = list(given), {id(t) for t in of_call}
        mode = proxy_mode()  # now, as `x.to(...)` may return x itself, which then has the node of that call
        self._nodes = [node_of(fake, mode.tracer) if mode is not None else None for fake, _, _ in self._given]

    def sized(self) -> list[Tensor]:
        """The tensors that came in with a symbolic size."""
        return [fake for fake, _, _ in self._given if any(isinstance(size, torch.SymInt) for size in fake.shape)]

    def follows_from_call(self, t: Any) -> bool:
        """Whether a tensor of the trace is made of what another call has other values of.

        That are inputs, targets, trained parameters and random draws; not what an op reads the sizes of alone.
        """
        mode = proxy_mode()
        node = node_of(t, mode.tracer) if mode is not None and isinstance(t, Tensor) else None
        given = zip(self._given, self._nodes, strict=True)
        changing = {n for (fake, _, trained), n in given if trained or id(fake) in self._of_call}
        seen: set[fx.Node] = set()
        stack = [node] if node is not None else []
        while stack:
            node = stack.pop()
            if node in changing or random(node.target):
                return True
            if node not in seen and node.target not in OF_SHAPE:
                seen.add(node)
                stack += _read_by(node)
        return False

    def is_same(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors were computed by the same ops of the same values, without a write in the trace so far."""
        mode = proxy_mode()
        nodes = [node_of(t, mode.tracer) for t in (a, b)] if mode is not None else [None, None]
        if None in nodes or any(mutates(n) for n in mode.tracer.graph.nodes):
            return False
        return _alike(*nodes)

    def number(self, t: Tensor, lend: bool = False) -> Any:
        """The number that a tensor of one entry holds.

        Args:
            lend: whether it may be a `Number` of the tensor.

        Raises:
            Unknown: if it depends on more than data.
        """
        mode = proxy_mode()
        node = node_of(t, mode.tracer) if mode is not None else None
        gpus = sorted({real.device.index for _, real, _ in self._given if real.is_cuda})
        apart = disable_proxy_modes_tracing(), without_fake_mode(), no_torch_functions(), torch.no_grad()
        with contextlib.ExitStack() as stack:
            for context in (*apart, torch.random.fork_rng(gpus)):
                stack.enter_context(context)
            if node is not None:
                self._catch_up(mode.tracer)
            if node not in self._env or self._level_of(node) == _UNKNOWN:
                raise Unknown
            value = self._env[node].item()
        if self._level_of(node) == _DATA:
            if lend and self.lend and type(value) is float:
                return Number(t.detach().double())
            self.read.append((t.detach().clone(), value))
        return value

    def _catch_up(self, tracer: Any) -> None:
        """Run what has been traced since the last time."""
        if not self._seen:
            for (fake, real, trained), own in zip(self._given, self._nodes, strict=True):
                node = own if own is not None else node_of(fake, tracer)
                if node is not None:
                    self._set(node, real.detach().clone(), _UNKNOWN if trained else _DATA)
        for node in list(tracer.graph.nodes)[self._seen :]:
            self._seen += 1
            if node.op == "get_attr":
                literal = bool(node.users) and all(user.target in LITERALS for user in node.users)
                self._set(node, getattr(tracer.root, node.target, None), _FIXED if literal else _DATA)
            elif node.op == "call_function":
                self._run(node)

    def _run(self, node: fx.Node) -> None:
        level = max(map(self._level_of, _read_by(node)), default=_FIXED)
        level = _UNKNOWN if random(node.target) else min(level, _DATA) if node.target in OF_SHAPE else level
        if any(i not in self._env for i in node.all_input_nodes):
            self._level[node] = _UNKNOWN
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._env.get)
        try:
            value = node.target(*args, **kwargs)
        except Exception:  # an op that only a trace can run, such as a derivative
            self._level[node] = _UNKNOWN
            return
        self._set(node, value, level)
        for argument, given in zip(getattr(schema_of(node.target), "arguments", ()), args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._raise_level(given, level)

    def _level_of(self, node: fx.Node) -> int:
        tensors = _tensors(self._env.get(node))
        return max([self._level.get(node, _UNKNOWN), *(self._memory.get(memory_of(t), _FIXED) for t in tensors)])

    def _set(self, node: fx.Node, value: Any, level: int) -> None:
        """Note a value: new memory depends on what the op read, a view on what was written to its memory."""
        new = [t for t in _tensors(value) if memory_of(t) not in self._memory]
        self._env[node], self._level[node] = value, level if new or not _tensors(value) else _FIXED
        self._raise_level(new, level)

    def _raise_level(self, value: Any, level: int) -> None:
        """Note that what lies in the memory of `value` depends on at least this much now."""
        for t in _tensors(value):
            self._memory[memory_of(t)] = max(level, self._memory.get(memory_of(t), _FIXED))


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _read_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values an op reads, not only their shapes or dtypes."""
    return [i for i in node.all_input_nodes if node.target not in LIKE_OTHER or i is node.args[0]]


def _alike(a: Any, b: Any) -> bool:
    """Whether two arguments are equal: nodes that are one, or that call the same op on equal arguments."""
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return a is b or type(a) is type(b) and not isinstance(a, fx.Node) and a == b
    if a.op != "call_function" or a.target is not b.target or random(a.target):
        return False
    leaves = [pytree.tree_flatten((n.args, n.kwargs)) for n in (a, b)]
    return leaves[0][1] == leaves[1][1] and all(map(_alike, leaves[0][0], leaves[1][0]))


# ---- replacements for PyTorch's functions ------------------------------


def read(values: Values, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call `func`, with numbers and sizes computed from the data.

    Raises:
        CaptureError: if they depend on parameters.
    """
    name = _READS.get(func, "")
    try:
        return getattr(_Read(values), name)(func, *args, **kwargs)
    except Unknown:
        x = args[0]
        if name == "item" and x.is_floating_point():
            return Learned(x.detach().double())
        why = _SIZE if name in _SIZES else _NUMBER
        raise CaptureError(
            f"op {func.__name__.strip('_').replace('getitem', 'index')}\n{running_line()}{why}"
        ) from None


def reads(func: Callable, args: tuple) -> bool:
    """Whether a call turns values into numbers or sizes."""
    name = _READS.get(func)
    if name is None or not args or not isinstance(args[0], Tensor):
        return False
    if name == "written" and not _one_each(*args[:3]):
        return False
    if name in ("index", "written"):
        return any(_is_mask(i) for i in (args[1] if isinstance(args[1], tuple) else (args[1],)))
    return True


def _one_each(x: Tensor, index: Any, value: Any) -> bool:
    """Whether a write may have a value for each place where a mask is true, whose count it then needs."""
    if not isinstance(value, Tensor) or not value.ndim:
        return False
    return not _is_mask(index) or counts_places(value.shape, x.ndim - index.ndim)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim > 0


class _Read:
    def __init__(self, values: Values):
        self.values = values

    def item(self, func, x):
        return self.values.number(x, lend=True)

    def cast(self, func, x):
        return {"__bool__": bool, "__float__": float}.get(func.__name__, int)(self.values.number(x))

    def equal(self, func, x, other):
        """Values of trained parameters are known to be equal where they are one value; NaN, which differs from itself, aside."""
        if x.dtype != other.dtype or tuple(x.shape) != tuple(other.shape):
            return False
        return self.values.is_same(x, other) or bool(self.values.number((x == other).all()))

    def listed(self, func, x):
        return [self.listed(func, row) for row in x] if x.ndim else read(self.values, Tensor.item, (x,), {})

    def positions(self, mask: Tensor) -> Tensor:
        """Where a mask is true, [K, mask.ndim]."""
        return torch.ops.aten.nonzero_static(mask, size=self.values.number((mask != 0).sum()))

    def nonzero(self, func, x, as_tuple=False):
        found = self.positions(x)
        return found.unbind(1) if as_tuple else found

    def where(self, func, condition, *rest, **named):
        if rest or named:
            return func(condition, *rest, **named)
        return self.positions(condition).unbind(1)

    def selected(self, func, x, mask):
        shape = torch.broadcast_shapes(x.shape, mask.shape)
        return x.expand(shape)[self.positions(mask.expand(shape)).unbind(1)]

    def index(self, func, x, index):
        return x[self._without_masks(index)]

    def written(self, func, x, index, value):
        x[self._without_masks(index)] = value

    def _without_masks(self, index: Any) -> tuple:
        parts: list[Any] = []
        for i in index if isinstance(index, tuple) else (index,):
            parts += self.positions(i).unbind(1) if _is_mask(i) else [i]
        return tuple(parts)

    def repeated(self, func, *args, **named):
        counts = named["repeats"] if "repeats" in named else args[min(1, len(args) - 1)]
        if not isinstance(counts, Tensor) or named.get("output_size") is not None:
            return func(*args, **named)
        if counts is args[0] or counts.numel() != 1:
            return func(*args, **{**named, "output_size": int(self.values.number(counts.sum()))})
        named.pop("repeats", None)
        return func(args[0], int(self.values.number(counts)), *args[2:], **named)

    def bincount(self, func, x, weights=None, minlength=0):
        size = self.values.number((self._largest(x) + 1).clamp(min=minlength))
        if weights is None:
            weights = torch.ones_like(x, dtype=torch.int64)
        elif weights.dtype != torch.float32:
            weights = weights.double()
        return weights.new_zeros(size).scatter_add(0, x.long(), weights)

    def one_hot(self, func, x, num_classes=-1):
        return func(x, self.values.number(self._largest(x) + 1) if num_classes == -1 else num_classes)

    def split_at(self, func, x, where=None, dim=0, *, tensor_indices_or_sections=None):
        where = tensor_indices_or_sections if where is None else where
        if isinstance(where, Tensor):
            where = [self.values.number(i) for i in where] if where.ndim else self.values.number(where)
        return func(x, where, dim)

    @staticmethod
    def _largest(x: Tensor) -> Tensor:
        """The largest entry of whole numbers from 0; -1 if there are none."""
        return torch.cat([x.flatten(), x.new_full((1,), -1, dtype=torch.int64)]).max()

    def unique(self, func, x, sorted=True, return_inverse=False, return_counts=False, dim=None):  # noqa: A002
        if dim is not None:
            return func(x, sorted, return_inverse, return_counts, dim)
        values, order = x.flatten().sort(stable=True)
        found, ranks, counts = self._runs(values)
        inverse = torch.zeros_like(order).scatter(0, order, ranks).view(x.shape)
        return _asked_for(found, (inverse, return_inverse), (counts, return_counts))

    def unique_consecutive(self, func, x, return_inverse=False, return_counts=False, dim=None):
        if dim is not None:
            return func(x, return_inverse, return_counts, dim)
        found, ranks, counts = self._runs(x.flatten())
        return _asked_for(found, (ranks.view(x.shape), return_inverse), (counts, return_counts))

    def _runs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The value of each run of equal entries, the run that each entry is in, and the runs' lengths."""
        first = torch.cat([torch.ones_like(x[:1], dtype=torch.bool), x[1:] != x[:-1]])
        starts = self.positions(first).squeeze(1)
        ends = torch.cat([starts[1:], torch.full_like(starts[:1], x.shape[0])])
        return x[starts], first.cumsum(0) - 1, ends - starts


def _asked_for(found: Tensor, *more: tuple[Tensor, bool]) -> Any:
    """`found` alone, or a tuple with those of `more` that are asked for."""
    extra = [t for t, asked in more if asked]
    return (found, *extra) if extra else found


_READS: dict[Any, str] = {
    Tensor.tolist: "listed", torch.equal: "equal", Tensor.equal: "equal",
    Tensor.item: "item", Tensor.__bool__: "cast", Tensor.__int__: "cast", Tensor.__index__: "cast", Tensor.__float__: "cast",
    Tensor.nonzero: "nonzero", torch.nonzero: "nonzero", torch.argwhere: "nonzero", Tensor.argwhere: "nonzero",
    torch.where: "where", Tensor.masked_select: "selected", torch.masked_select: "selected",
    Tensor.__getitem__: "index", Tensor.__setitem__: "written",
    Tensor.repeat_interleave: "repeated", torch.repeat_interleave: "repeated",
    Tensor.bincount: "bincount", torch.bincount: "bincount", F.one_hot: "one_hot",
    Tensor.tensor_split: "split_at", torch.tensor_split: "split_at",
    Tensor.unique: "unique", torch.unique: "unique",
    Tensor.unique_consecutive: "unique_consecutive", torch.unique_consecutive: "unique_consecutive",
}  # fmt: skip

_SIZES = {
    "nonzero", "where", "selected", "index", "written", "repeated", "bincount", "one_hot", "split_at", "unique",
    "unique_consecutive",
}  # fmt: skip
