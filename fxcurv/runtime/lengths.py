"""Sizes beside the batch's that vary from call to call: which these are, and whether a program serves them all.

A second call whose arguments differ from an earlier one's in sizes alone gets a program in which these are symbolic, as under
`torch.compile`; `compile(dynamic_shapes=)` and `torch._dynamo.mark_dynamic` say so before the first call. Such a program is
run at other sizes than its own before it is kept. If something fixes one of them, every size gets its own program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcurv.errors import ArgumentError, FxcurvError
from fxcurv.front.arguments import Arguments
from fxcurv.front.requests import Request
from fxcurv.ir import lengths
from fxcurv.ir.program import Program
from fxcurv.passes.recycle import functional
from fxcurv.runtime.bind import bind, cuda_devices
from fxcurv.runtime.keys import Key

# For every input and target, the dimensions that vary, counted with flattened positions split from the samples.
Varying = tuple[frozenset[int], ...]


def lengths_of(program: Program, arguments: Arguments) -> tuple[int, ...]:
    """The program's lengths in these arguments."""
    return program.lengths_of(arguments.inputs, arguments.split_targets()) if program.batch.lengths else ()


def serves(program: Program, arguments: Arguments, n: int | None = None) -> bool:
    """Whether a program for this kind of arguments serves them, at `n` samples (default: as many as there are)."""
    return program.serves(arguments.batch_size if n is None else n, lengths_of(program, arguments))


# ---- which sizes vary ------------------------------


def without(key: Key, varying: Varying) -> Key:
    """The key without the sizes that vary."""
    found = [
        _without_sizes(described, dims) for described, dims in zip((*key.inputs, *key.targets), varying, strict=True)
    ]
    count = len(key.inputs)
    return key._replace(inputs=tuple(found[:count]), targets=tuple(found[count:]), single=False)


def _without_sizes(described: tuple, varying: frozenset[int]) -> tuple:
    shape, *rest = described
    return tuple(None if _dim(shape, d) in varying else s for d, s in enumerate(shape)), *rest


def _dim(shape: tuple, d: int) -> int:
    """The index that a dimension has in a program, where samples are split from their positions."""
    return d + any(isinstance(s, tuple) and s[1] != 1 for s in shape[: d + 1])


def differing(new: Key, old: Key) -> Varying | None:
    """The sizes in which two kinds of arguments differ; None if they differ in something else."""
    pairs = list(zip((*new.inputs, *new.targets), (*old.inputs, *old.targets), strict=False))
    rest = [(len(key.inputs), len(key.targets), key[2:5], key.hooks) for key in (new, old)]
    if rest[0] != rest[1] or any(len(a[0]) != len(b[0]) or a[1:] != b[1:] for a, b in pairs):
        return None
    found = []
    for (a, *_), (b, *_) in pairs:
        dims = [d for d, (s, t) in enumerate(zip(a, b, strict=True)) if s != t]
        if not all(_comparable(a[d], b[d]) for d in dims):
            return None
        found.append(frozenset(_dim(a, d) for d in dims))
    return tuple(found)


def _comparable(new: Any, old: Any) -> bool:
    """Whether both sizes are k N with k > 1 positions per sample, or neither depends on the batch size N."""
    if isinstance(new, tuple) and isinstance(old, tuple):
        return 1 not in (new[1], old[1])
    return not isinstance(new, tuple) and not isinstance(old, tuple)


def asked(arguments: Arguments, dynamic_shapes: Any) -> Varying:
    """The sizes that the user declares as varying: those of inputs, and of targets that have such a size too.

    Raises:
        ArgumentError: if `dynamic_shapes` does not describe the inputs.
    """
    given = [*arguments.inputs, *arguments.split_targets()]
    own = [*arguments.batch_dims, *arguments.split_dims()]
    marked = [set(getattr(t, "_dynamo_dynamic_indices", ())) for t in (*arguments.inputs, *arguments.targets)]
    for k, dims in enumerate(_declared_dims(arguments, dynamic_shapes)):
        marked[k] |= dims
    count = len(arguments.inputs)
    sizes = {given[k].shape[d] for k in range(count) for d in marked[k] if d != own[k]}
    for k in range(count, len(given)):
        split = given[k].ndim != arguments.targets[k - count].ndim
        marked[k] = set() if split else marked[k]
        marked[k] |= {d for d, s in enumerate(given[k].shape) if s in sizes}
    return tuple(frozenset(d for d in dims if d != at) for dims, at in zip(marked, own, strict=True))


def _declared_dims(arguments: Arguments, shapes: Any) -> list[set[int]]:
    """The dimensions that `dynamic_shapes=` declares, for every input."""
    if shapes is None:
        return []
    positional, named = arguments.input_template
    if isinstance(shapes, Mapping) and (named or not all(isinstance(k, int) for k in shapes)):
        names = list(named)
        unknown = [name for name in shapes if name not in names]
        if unknown:
            raise ArgumentError(f"dynamic_shapes names {unknown}, but the inputs are {names or 'positional'}")
        each = [shapes.get(name) for name in names]
    elif isinstance(shapes, Mapping):
        each = (
            [shapes]
            if len(positional) == 1 and not _nested(shapes)
            else [shapes.get(k) for k in range(len(positional))]
        )
    else:
        each = list(shapes)
    if len(each) != len(arguments.inputs):
        raise ArgumentError(
            f"dynamic_shapes has {len(each)} entries for {len(arguments.inputs)} tensors: pass a dict {{dimension: name}}, or "
            "None, for each input, by keyword or in order"
        )
    return [_dims_of(t, one) for t, one in zip(arguments.inputs, each, strict=True)]


def _nested(shapes: Mapping) -> bool:
    return any(isinstance(one, Mapping | list | tuple) for one in shapes.values())


def _dims_of(t: Tensor, one: Any) -> set[int]:
    pairs = one.items() if isinstance(one, Mapping) else enumerate(one or ())
    found = {d for d, name in pairs if name is not None and not isinstance(name, int)}
    if any(not isinstance(d, int) or not -t.ndim <= d < t.ndim for d in found):
        raise ArgumentError(
            f"dynamic_shapes has dimensions {sorted(found, key=str)} for an input of {t.ndim} dimensions"
        )
    return {d % t.ndim for d in found}


def union(some: Iterable[Varying]) -> Varying:
    """The dimensions that are in any of them."""
    return tuple(frozenset().union(*dims) for dims in zip(*some, strict=True))


# ---- arguments to capture, and to try ------------------------------


def to_capture(request: Request, varying: Varying) -> Request:
    """The request with these sizes symbolic, and with a number of samples that equals none of them."""
    arguments = request.arguments
    given = [*arguments.inputs, *arguments.split_targets()]
    taken = {t.shape[d] for t, dims in zip(given, varying, strict=True) for d in dims}
    n = max(arguments.batch_size, 2)
    n = next(k for k in range(n, n + len(taken) + 1) if k not in taken)  # else tracing may take the two for one size
    if n != arguments.batch_size:
        arguments = arguments.along_samples(lambda t, d: _repeat(t, d, n))
    return dataclasses.replace(request, arguments=dataclasses.replace(arguments, varying=varying))


def _repeat(t: Tensor, d: int, size: int) -> Tensor:
    """`size` slices of `t`: its own, repeated or cut off."""
    return t.index_select(d, torch.arange(size, device=t.device) % t.shape[d])


def at_other_lengths(program: Program, request: Request) -> Request | None:
    """The request at other lengths that the program serves; None if none is found."""
    arguments, now = request.arguments, program.batch.sizes
    n = arguments.batch_size
    steps = [s for k in range(6) for s in (-(1 << k), 1 << k)]
    tried = [tuple(size + s for size in now) for s in steps] + [tuple(2 * size for size in now)]
    other = next((sizes for sizes in tried if min(sizes) > 1 and program.serves(n, sizes)), None)
    if other is None:
        return None
    placeholders = program.graph.find_nodes(op="placeholder")
    vals = {(i.kind, i.index): p.meta["val"] for p, i in zip(placeholders, program.inputs, strict=False)}

    def resized(kind: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        out = []
        for k, t in enumerate(tensors):
            for d, size in enumerate(program.batch.shape(vals[kind, k], n, other)):
                t = t if t.shape[d] == size else _repeat(t, d, size)
            out.append(t)
        return out

    inputs, split = resized("input", arguments.inputs), resized("target", arguments.split_targets())
    pairs = zip(split, arguments.targets, arguments.target_dims(), strict=True)
    targets = [s if d is None or s.ndim == t.ndim else s.flatten(d, d + 1) for s, t, d in pairs]
    return dataclasses.replace(request, arguments=dataclasses.replace(arguments, inputs=inputs, targets=targets))


# ---- whether a program serves all ------------------------------


def not_served(ready: Any, request: Request) -> str:
    """Run and check a program with symbolic lengths at other lengths: why it does not serve them, "" if it does."""
    program: Program = ready.program
    if program.fixed or not program.batch.lengths or program.fixed_lengths:
        return program.fixing()
    if len(program.batch.lengths) > lengths.MOST:
        return f"{len(program.batch.lengths)} sizes vary by themselves, and {lengths.MOST} may"
    other = at_other_lengths(program, request)
    if other is None:
        return f"the assumptions of {program.fixing()}" if program.fixed_by else "what the model assumes of it"
    sizes = lengths_of(program, other.arguments)
    try:
        with other.apart(), lengths.at(sizes):
            flat = bind(program, other.subject, other.arguments, 0, None)
            check = ready.selfcheck.begin(program, other, flat) if ready.selfcheck is not None else None
            with torch.no_grad(), torch.random.fork_rng(cuda_devices(flat)):
                values = Shaped(program, other.arguments.batch_size, sizes).run(*flat)
            if check is not None:
                note = ready.selfcheck.note
                check.finish(values)
                ready.selfcheck.note = note  # the report is about the first call
    except (FxcurvError, RuntimeError, ValueError, IndexError) as error:
        return f"a run at another length: {str(error).strip().splitlines()[-1]}"
    return ""


class Shaped(fx.Interpreter):
    """Runs a graph at other sizes; a value of another shape than its node says is an error."""

    def __init__(self, program: Any, n: int, sizes: tuple[int, ...] = ()):
        super().__init__(functional(program))
        self._batch, self._n, self._sizes = program.batch, n, sizes

    def run_node(self, n: fx.Node) -> Any:
        value, known = super().run_node(n), n.meta.get("val")
        if isinstance(value, Tensor) and isinstance(known, Tensor):
            shape = self._batch.shape(known, self._n, self._sizes or None)
            if tuple(value.shape) != shape:
                raise ValueError(f"{n} is of shape {tuple(value.shape)}")
        return value
