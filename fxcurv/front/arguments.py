"""A call's arguments: flat lists of tensors, the structures that hold them, and the sample dimension of each tensor."""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fxcurv.errors import ArgumentError, MixedSamplesError
from fxcurv.ir.private import pytree


@dataclasses.dataclass(frozen=True)
class Rows:
    """Marks an input in which every sample has several rows, next to each other along one dimension.

    Pass it as an entry of `batch_dim=`: `Rows(points)` for an input [rays * points, 3] beside targets [rays, 2].

    Args:
        per_sample: how many rows a sample has.
        dim: the dimension that the rows lie along.

    Raises:
        ArgumentError: if `per_sample` is not a positive int, or `dim` not an int.
    """

    per_sample: int
    dim: int = 0

    def __post_init__(self) -> None:
        if type(self.per_sample) is not int or self.per_sample < 1 or type(self.dim) is not int:
            raise ArgumentError(f"{self}: pass how many rows a sample has (a positive int), and the dimension (an int)")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Stands in a structure for the tensor with this index.

    With `joined`, that dimension of the tensor and the next are flattened into one.
    """

    index: int
    joined: int | None = None

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor."""
        t = tensors[self.index]
        return t if self.joined is None else t.flatten(self.joined, self.joined + 1)


class Packed(Slot):
    """Stands for a packed sequence: its padded rows [N, T, *] have this index, its lengths [N] the next one."""

    def of(self, tensors: Sequence[Tensor]) -> Any:
        """The packed sequence; while a model is captured, a `front.packed.Padded`."""
        rows, lengths = tensors[self.index], tensors[self.index + 1].cpu()
        return pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)


@dataclasses.dataclass
class Arguments:
    """A call's arguments: the tensors among inputs and targets, and the structures that they are in.

    `inputs` and `targets` are flat lists of tensors. `input_template`, ((positional), {keyword}), and
    `target_template`, a tuple, hold a `Slot` in place of each tensor and everything else as it is. Equal templates have
    equal `structure`. An input with several rows per sample (`Rows`) is unflattened, from [N * k] to [N, k].
    """

    inputs: list[Tensor]
    targets: list[Tensor]
    input_template: Any
    target_template: Any
    batch_dims: list[int | None]
    structure: Any = None
    index: int | None = None
    """Where samples are merged: which of the inputs holds the sample number of every entry."""
    edges: tuple[int, ...] = ()
    """Which of the inputs are edges, pairs of entries [2, E]."""
    varying: tuple[frozenset[int], ...] = ()
    """For every input and split target, the dimensions other than the sample dimension that are to be symbolic."""
    rows: tuple[int | None, ...] = ()
    """For every input, the rows per sample if it was unflattened (`Rows`), else None."""

    def given(self) -> list[Tensor]:
        """The inputs in the shapes that the user passed."""
        triples = zip(self.inputs, self.batch_dims, self.rows, strict=True)
        return [t if k is None else Slot(0, d).of([t]) for t, d, k in triples]

    @functools.cached_property
    def batch_size(self) -> int:
        """N, from the inputs that have a batch dimension; of merged samples, from targets or sample numbers."""
        if self.index is not None:
            rows = [len(t) for t in self.targets if t.ndim]
            return rows[0] if rows else int(self.inputs[self.index].max()) + 1
        sizes = {t.shape[d] for t, d in zip(self.inputs, self.batch_dims, strict=True) if d is not None}
        if not sizes:
            raise ArgumentError("no input has a batch: pass batch_dim=, the samples' dimension, for one at least")
        if len(sizes) > 1:
            raise ArgumentError(
                f"the inputs have batch sizes {sorted(sizes)}: pass batch_dim= (a dimension, or one per "
                "input, or per attribute of an input in a dict; None for an input without a batch)"
            )
        return sizes.pop()

    def target_dims(self) -> list[int | None]:
        """The sample dimension of each target; None where there is none.

        Nothing marks it, so it is inferred from the sizes: the inputs' batch dimension is tried first, then the others
        in order, then sizes that are a multiple of N (positions of all samples flattened together).
        """
        return self._target_dims

    @functools.cached_property
    def _target_dims(self) -> list[int | None]:
        if self.index is not None:
            return [None] * len(self.targets)
        n = self.batch_size
        first = list(dict.fromkeys(d for d in self.batch_dims if d is not None))
        out: list[int | None] = []
        for t in self.targets:
            order = list(dict.fromkeys([*(d for d in first if d < t.ndim), *range(t.ndim)]))
            equal = [d for d in order if t.shape[d] == n]
            out.append(next(iter([*equal, *(d for d in order if n and t.shape[d] % n == 0)]), None))
        return out

    def split_targets(self) -> list[Tensor]:
        """The targets as a program takes them: positions of all samples that are flattened together are unflattened.

        So N is a dimension of its own: before the positions if an input has its samples first, else after them.
        """
        n = self.batch_size
        order = (n, -1) if 0 in self.batch_dims else (-1, n)
        pairs = zip(self.targets, self.target_dims(), strict=True)
        return [t if d is None or t.shape[d] == n else t.unflatten(d, order) for t, d in pairs]

    def split_dims(self) -> list[int | None]:
        """The sample dimension of each split target."""
        pairs = zip(self.targets, self.target_dims(), strict=True)
        inner = 0 not in self.batch_dims
        return [d if d is None or t.shape[d] == self.batch_size else d + inner for t, d in pairs]

    def along_samples(self, fn: Callable[[Tensor, int], Tensor]) -> Arguments:
        """These arguments with `fn(tensor, dimension)` in place of each tensor that has samples along `dimension`.

        Positions that are flattened together with the samples are unflattened for `fn`, and flattened again.
        """
        n, inner = self.batch_size, 0 not in self.batch_dims

        def changed(t: Tensor, d: int | None) -> Tensor:
            if d is None:
                return t
            if not n or t.shape[d] == n:
                return fn(t, d)
            return fn(t.unflatten(d, (-1, n) if inner else (n, -1)), d + inner).flatten(d, d + 1)

        inputs = [changed(t, d) for t, d in zip(self.inputs, self.batch_dims, strict=True)]
        targets = [changed(t, d) for t, d in zip(self.targets, self.target_dims(), strict=True)]
        return dataclasses.replace(self, inputs=inputs, targets=targets)

    def join_targets(self, split: Sequence[Tensor]) -> Any:
        """The arguments that the loss gets after the output, from split targets."""
        triples = zip(split, self.targets, self.target_dims(), strict=True)
        joined = [s if d is None or s.ndim == t.ndim else s.flatten(d, d + 1) for s, t, d in triples]
        return filled(self.target_template, joined)


def flatten_arguments(inputs: Any, targets: tuple, batch_dim: Any, sample_index: int | str | None = None) -> Arguments:
    """Bring `compiled(inputs, *targets)` into a flat form.

    Args:
        sample_index: the input that says which sample an entry belongs to, in place of `batch_dim`.

    Raises:
        ArgumentError: if the inputs hold no tensor, or batch sizes disagree.
        MixedSamplesError: if an edge connects different samples.
    """
    named = isinstance(inputs, Mapping)
    names = list(inputs) if named else None
    several = isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence)
    values = list(inputs.values() if named else inputs if several else [inputs])
    wanted = _batch_dim_per_input(batch_dim, names, len(values)) if sample_index is None else [None] * len(values)
    tensors, templates, dims, rows = _flatten_inputs(values, wanted, names)
    if not tensors:
        raise ArgumentError("the inputs hold no tensor: pass a tensor, or a tuple or dict of tensors")
    input_template = ((), dict(zip(names, templates, strict=True))) if names else (tuple(templates), {})
    target_tensors: list[Tensor] = []
    target_template = templated(tuple(targets), target_tensors)
    arguments = Arguments(tensors, target_tensors, input_template, target_template, dims, rows=tuple(rows))
    if sample_index is not None:
        found = _named(values, names, sample_index)
        if not isinstance(found, Tensor) or found.ndim != 1 or found.dtype != torch.int64 or not len(found):
            raise ArgumentError(
                f"sample_index={sample_index!r} is no vector of sample numbers (int64) among the inputs: pass the position, the "
                "keyword or the name as an attribute of the input that is"
            )
        edges = _named(values, names, "edge_index")
        slots = {id(t): k for k, t in enumerate(tensors)}
        arguments.index, arguments.edges = slots[id(found)], (slots[id(edges)],) if isinstance(edges, Tensor) else ()
        _check_edges(arguments)
        if arguments.batch_size == 0:
            raise ArgumentError("the batch is empty, and merged samples need one: pass at least one sample")
    arguments.batch_size  # noqa: B018  (raises if there is none)
    if any(t.is_complex() for t in (*tensors, *target_tensors)):
        raise ArgumentError("complex tensors are not supported: split them into real and imaginary parts")
    arguments.structure = _structure(input_template, "inputs"), _structure(target_template, "targets")
    return arguments


def _flatten_inputs(
    values: list[Any], wanted: list[Any], names: list[str] | None
) -> tuple[list[Tensor], list[Any], list[int | None], list[int | None]]:
    """(tensors, template of each input, sample dimension of each tensor, rows per sample of each if several)."""
    tensors: list[Tensor] = []
    templates: list[Any] = []
    dims: list[int | None] = []
    rows: list[int | None] = []

    def joined(slot: Slot) -> Slot:
        return Slot(slot.index, dims[slot.index])

    for k, (value, where) in enumerate(zip(values, wanted, strict=True)):
        before, d, per = len(tensors), where, None
        if isinstance(where, Rows):
            d, per = where.dim, where.per_sample if where.per_sample > 1 else None
        if isinstance(value, PackedSequence):
            d, per = None if where is None else 0, None  # rows are padded with the batch first
        template = templated(value, tensors)
        own = (
            [d] * (len(tensors) - before)
            if not isinstance(d, Mapping)
            else _dims_of_members(value, d, tensors[before:])
        )
        dims += [_normalize_dim(t, at) for t, at in zip(tensors[before:], own, strict=True)]
        rows += [per] * (len(tensors) - before)
        if per is not None:
            name = repr(names[k]) if names else str(k)
            tensors[before:] = [
                _unflatten_rows(t, at, per, name) for t, at in zip(tensors[before:], dims[before:], strict=True)
            ]
            template = map_leaves(template, Slot, joined)
        templates.append(template)
    return tensors, templates, dims, rows


def _dims_of_members(value: Any, wanted: Mapping[str, int | None], tensors: list[Tensor]) -> list[int | None]:
    """The sample dimension of each tensor of a structure, by the name of the attribute or key that holds it."""
    held = {name: value.get(name) if isinstance(value, Mapping) else getattr(value, name, None) for name in wanted}
    missing = [name for name, t in held.items() if not isinstance(t, Tensor)]
    if missing:
        raise ArgumentError(
            f"batch_dim names {missing}, which are no tensors of the {type(value).__name__} that is the input"
        )
    by_tensor = {id(t): wanted[name] for name, t in held.items()}
    return [by_tensor.get(id(t), 0) for t in tensors]


def _check_edges(arguments: Arguments) -> None:
    """Refuse edges that connect entries of different samples."""
    for k in arguments.edges:
        samples, ends = arguments.inputs[arguments.index or 0], arguments.inputs[k]
        if ends.numel() and int(ends.max()) >= len(samples):
            raise ArgumentError(
                f"edge_index reaches entry {int(ends.max())}, and sample_index= has the samples of {len(samples)} entries: pass "
                "the vector that has a number for each"
            )
        ends = samples[ends]
        across = (ends[0] != ends[1]).nonzero()
        if len(across):
            at = int(across[0])
            raise MixedSamplesError(
                f"edge {at} of edge_index connects samples {int(ends[0, at])} and {int(ends[1, at])}, so merged samples are not "
                "apart. Way out: no edge between entries of different samples, as torch_geometric's Batch merges them."
            )


def _named(values: list[Any], names: list[str] | None, name: int | str) -> Any:
    """The input at this position or keyword, or an input's attribute of this name; None if there is none."""
    if isinstance(name, int):
        return values[name] if -len(values) <= name < len(values) else None
    if names and name in names:
        return values[names.index(name)]
    return next((found for v in values if _is_plain(v) and (found := getattr(v, name, None)) is not None), None)


def _batch_dim_per_input(batch_dim: Any, names: list[str] | None, count: int) -> list[Any]:
    """`batch_dim=` as one entry per input."""
    if isinstance(batch_dim, Mapping) and names is None and count == 1:
        wanted: list[Any] = [batch_dim]  # of the members of the one input
    elif isinstance(batch_dim, Mapping):
        unknown = [name for name in batch_dim if name not in (names or [])]
        if unknown:
            raise ArgumentError(f"batch_dim names {unknown}, but the inputs are {names or 'positional'}")
        wanted = [batch_dim.get(name, 0) for name in names or []]
    elif isinstance(batch_dim, tuple | list):
        if len(batch_dim) != count:
            raise ArgumentError(f"batch_dim has {len(batch_dim)} entries for {count} inputs: pass one each")
        wanted = list(batch_dim)
    else:
        wanted = [batch_dim] * count
    for d in [d for w in wanted for d in (w.values() if isinstance(w, Mapping) else [w])]:
        if d is not None and type(d) is not int and not isinstance(d, Rows):
            raise ArgumentError(f"batch_dim has {d!r}: use an int, fxcurv.Rows, or None for an input without a batch")
    return wanted


def _unflatten_rows(t: Tensor, d: int | None, per: int, name: str) -> Tensor:
    """`t` with the rows of a sample unflattened into a dimension of their own."""
    at = d or 0
    if t.shape[at] % per:
        raise ArgumentError(
            f"input {name} has {t.shape[at]} rows along dimension {at}, and batch_dim= says {per} per sample, which "
            f"{t.shape[at]} is no multiple of: pass Rows(k) with the k of this input, and whole samples"
        )
    return t.unflatten(at, (t.shape[at] // per, per))


def _normalize_dim(t: Tensor, d: int | None) -> int | None:
    if d is None:
        return None
    if t.ndim == 0:
        raise ArgumentError("an input has no dimensions, so no batch: pass batch_dim= with None for it")
    if not -t.ndim <= d < t.ndim:
        raise ArgumentError(f"batch_dim {d} is out of range for an input of shape {tuple(t.shape)}")
    return d % t.ndim


def templated(value: Any, tensors: list[Tensor]) -> Any:
    """`value` with a `Slot` for each tensor, appended to `tensors`; of a packed sequence, its rows and lengths."""

    def keep(t: Tensor | PackedSequence) -> Slot:
        if isinstance(t, PackedSequence):
            tensors.extend(pad_packed_sequence(t, batch_first=True))
            return Packed(len(tensors) - 2)
        tensors.append(t)
        return Slot(len(tensors) - 1)

    return map_leaves(value, (Tensor, PackedSequence), keep)


def filled(template: Any, tensors: Sequence[Tensor]) -> Any:
    """The structure that `template` was made from, with these tensors in its slots."""
    return map_leaves(template, Slot, lambda slot: slot.of(tensors))


def map_leaves(
    value: Any, kind: type | tuple[type, ...], fn: Callable[[Any], Any], memo: dict[int, Any] | None = None
) -> Any:
    """A structure of pytrees, dataclasses and plain objects, with `fn` applied to every `kind` in it."""
    memo = {} if memo is None else memo
    if isinstance(value, kind):
        return fn(value)
    leaves, spec = pytree.tree_flatten(value, is_leaf=_is_packed)
    if not _is_leaf(value, leaves):
        return pytree.tree_unflatten([map_leaves(leaf, kind, fn, memo) for leaf in leaves], spec)
    if id(value) in memo:
        return memo[id(value)]
    if not _holds(value, kind, set()):
        return value
    new = memo[id(value)] = copy.copy(value)
    for name, member in vars(value).items():
        object.__setattr__(new, name, map_leaves(member, kind, fn, memo))
    return new


def objects_in(value: Any) -> list[Any]:
    """The plain objects of a structure, whose members are values of the call."""
    found: dict[int, Any] = {}
    stack = [value]
    while stack:
        value = stack.pop()
        leaves = _leaves(value)
        if not _is_leaf(value, leaves):
            stack += leaves
        elif _is_plain(value) and id(value) not in found:
            found[id(value)] = value
            stack += vars(value).values()
    return list(found.values())


# Values without members of the call.
_WHOLE = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, PackedSequence, Enum)


def _is_packed(value: Any) -> bool:
    """Whether this is a packed sequence: a leaf, though a tuple, as a captured model may not read its members."""
    return isinstance(value, PackedSequence)


def _leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(value, is_leaf=_is_packed)


def _is_leaf(value: Any, leaves: list[Any]) -> bool:
    return len(leaves) == 1 and leaves[0] is value


def _is_plain(value: Any) -> bool:
    """Whether a leaf is an object whose members may be tensors.

    Nothing callable is, except PyTorch Geometric's data, which have `stores`. While tracing, a tensor and a size lead to all
    that PyTorch knows of the trace.
    """
    if isinstance(value, _WHOLE):
        return False
    called = callable(value) and (isinstance(value, type) or not hasattr(value, "stores"))
    return hasattr(value, "__dict__") and not called


def _holds(value: Any, kind: type | tuple[type, ...], seen: set[int]) -> bool:
    """Whether a structure, which may contain itself, holds a `kind`."""
    if isinstance(value, kind) or id(value) in seen:
        return isinstance(value, kind)
    seen.add(id(value))
    leaves = _leaves(value)
    if not _is_leaf(value, leaves):
        return any(_holds(leaf, kind, seen) for leaf in leaves)
    return _is_plain(value) and any(_holds(member, kind, seen) for member in vars(value).values())


def _structure(template: Any, what: str, outer: tuple[int, ...] = ()) -> Any:
    """A hashable description of a template; equal ones may share a program."""
    if isinstance(template, Slot):
        return "packed" if isinstance(template, Packed) else "tensor"
    leaves, spec = pytree.tree_flatten(template)
    if not _is_leaf(template, leaves):
        return str(spec), tuple(_structure(leaf, what, outer) for leaf in leaves)
    if id(template) in outer:
        return "itself"
    if isinstance(template, weakref.ref):
        return "reference"  # to an object that holds this one
    if _is_plain(template):
        outer = (*outer, id(template))
        return type(template), tuple((k, _structure(v, what, outer)) for k, v in vars(template).items())
    try:
        hash(template)
    except TypeError:
        raise ArgumentError(f"the {what} hold a {type(template).__name__}: pass tensors") from None
    return type(template), template


def described(tensors: Sequence[Tensor]) -> str:
    """Dtypes and shapes, for messages."""

    def size(s: int | torch.SymInt) -> str:
        hint = s.node.hint if isinstance(s, torch.SymInt) else s
        return str(s if hint is None else hint)

    found = [f"{str(t.dtype).removeprefix('torch.')}[{', '.join(map(size, t.shape))}]" for t in tensors]
    return ", ".join(found) or "none"
