"""What a program depends on besides its batch size, and which of these made another program necessary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxcurv.front.arguments import Arguments
from fxcurv.front.requests import Subject, tensors_in
from fxcurv.front.side_effects import hooks_of
from fxcurv.ir.program import Program


class Key(NamedTuple):
    """What a program depends on.

    Attributes:
        inputs, targets: (shape, dtype, device) of every tensor, ("n", k) in the shape for k times the batch size.
        structure: of inputs and targets, with all values in them that are no tensors.
        modules: (type, training) of every module.
        tensors: (name, requires_grad, dtype, device, shape) of parameters and buffers.
        single: whether the batch is one sample.
        hooks: those on the modules, and global ones.
        dtype: the default dtype.
    """

    inputs: tuple
    targets: tuple
    structure: Any
    modules: tuple
    tensors: tuple
    single: bool
    hooks: tuple = ()
    dtype: torch.dtype = torch.float32


def key_of(subject: Subject, arguments: Arguments, any_size: bool = False) -> Key:
    """What a program for these arguments depends on; `any_size`: a batch of one sample has no key of its own."""
    n = arguments.batch_size

    def describe(t: Tensor, batch_dim: int | None) -> tuple:
        shape = tuple(("n", s // n if n else 1) if d == batch_dim else s for d, s in enumerate(t.shape))
        return shape, t.dtype, t.device

    inputs = tuple(describe(t, d) for t, d in zip(arguments.inputs, arguments.batch_dims, strict=True))
    targets = tuple(describe(t, d) for t, d in zip(arguments.targets, arguments.target_dims(), strict=True))
    roots = subject.roots()
    flags = tuple((type(m), m.training) for root in roots for m in root.modules())
    tensors = [pair for root in roots for pair in tensors_in(root)]
    state = tuple((name, t.requires_grad, t.dtype, t.device, t.shape) for name, t in tensors)
    single, dtype = n == 1 and not any_size, torch.get_default_dtype()
    return Key(inputs, targets, arguments.structure, flags, state, single, hooks_of(roots), dtype)


def why(key: tuple, programs: Mapping[tuple, Sequence[Program]], n: int, subject: Subject) -> str:
    """Why none of the programs serves: what differs from the nearest one; "" if there is no program yet.

    Args:
        key: (`Key`, autocast, create_graph), as those of `programs`.
        n: the batch size.
    """
    if key in programs:
        return f"batch size {n}, and the program is {'; '.join(map(_limit, programs[key]))}"
    (new, autocast, create_graph), found = key, []
    titles = zip(subject.roots(), ("the model", "the loss"), strict=False)
    names = [f"{title}'s '{name}'" if name else title for m, title in titles for name, _ in m.named_modules()]
    for old, other, differentiable in programs:
        reasons = _differences(new, old, names)
        reasons += [f"autocast is {autocast.dtype or 'off'}"] if autocast != other else []
        reasons += [f"create_graph={create_graph}"] if create_graph != differentiable else []
        found.append(reasons)
    return shortened(min(found, key=len)) if found else ""


def _limit(program: Program) -> str:
    """What keeps a program from other batch sizes."""
    if program.fixed:
        return program.batch_note
    if program.largest is not None:
        return f"within the memory budget up to {program.largest} samples"
    return f"guarded, as captured at {program.batch.size}, against it"


def _differences(new: Key, old: Key, names: Sequence[str]) -> list[str]:
    """Describe in what `new` differs from `old`; `names`: of the modules."""
    out: list[str] = []
    for what, now, before in (("input", new.inputs, old.inputs), ("target", new.targets, old.targets)):
        if len(now) != len(before):
            out.append(f"{len(now)} {what}s instead of {len(before)}")
        pairs = enumerate(zip(now, before, strict=False))
        out += [
            f"{what} {i} is {_describe_tensor(a)} instead of {_describe_tensor(b)}" for i, (a, b) in pairs if a != b
        ]
    if new.structure != old.structure and not out:
        out.append("another structure of inputs and targets, or other values in them")
    out += _module_differences(new.modules, old.modules, names)
    known = {name: rest for name, *rest in old.tensors}
    if [name for name, *_ in new.tensors] != list(known):
        out.append("other parameters or buffers")
    else:
        out += [
            f"'{name}' is {_describe_change(rest, known[name])}" for name, *rest in new.tensors if rest != known[name]
        ]
    if new.single != old.single:
        out.append("a batch of one sample" if new.single else "more than one sample")
    out += ["other hooks on modules"] if new.hooks != old.hooks else []
    out += [f"the default dtype is {new.dtype} instead of {old.dtype}"] if new.dtype != old.dtype else []
    return out


def _describe_tensor(described: tuple) -> str:
    shape, dtype, device = described
    sizes = ", ".join(("n" if s[1] == 1 else f"{s[1]} n") if isinstance(s, tuple) else str(s) for s in shape)
    where = "" if device.type == "cpu" else f" on {device}"
    return f"{str(dtype).removeprefix('torch.')}[{sizes}]{where}"


def _module_differences(now: tuple, before: tuple, names: Sequence[str]) -> list[str]:
    if [kind for kind, _ in now] != [kind for kind, _ in before]:
        return ["other modules"]
    changed = [(name, a[1]) for name, a, b in zip(names, now, before, strict=True) if a[1] != b[1]]
    return [f"{name} is in {'training' if training else 'eval'} mode" for name, training in changed]


def _describe_change(now: Iterable[Any], before: Iterable[Any]) -> str:
    (trained, *values), (was, *others) = now, before
    if values == others:
        return "trained" if trained and not was else "frozen"
    return f"{_describe_tensor((values[2], *values[:2]))} instead of {_describe_tensor((others[2], *others[:2]))}"


def shortened(reasons: Sequence[str], most: int = 3) -> str:
    """One line of the first reasons."""
    more = f", and {len(reasons) - most} more" if len(reasons) > most else ""
    return "; ".join(reasons[:most]) + more
