"""Repeat a call of the same kind as an earlier one: a few comparisons in C show that all that was checked then still holds.

What a program depends on is spread over many objects (`runtime/keys.py`, `front/python_state.py`). `Again` keeps them
as flat lists, with what the placeholders were bound to. If nothing but the values of tensors has changed, the graph
runs at once. Anything less plain (other sizes, nested inputs, autocast, `create_graph`, another backend) goes the long
way, `call`, which also says what is wrong with a call that fails.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, fx, nn

from fxcurv.front.arguments import Slot, filled
from fxcurv.front.requests import Request, tensors_in
from fxcurv.front.side_effects import HOOKS, global_hooks
from fxcurv.ir.private import hooks_of_tensor, pytree
from fxcurv.ir.program import Program
from fxcurv.result import Result
from fxcurv.rules.traits import borrows
from fxcurv.runtime.bind import bind, seed_tensor
from fxcurv.runtime.direct import direct
from fxcurv.runtime.lengths import lengths_of
from fxcurv.runtime.programs import Ready

A = TypeVar("A", bound="Again")

# How many kinds of calls are recognised, the latest ones: enough for training and evaluation at two sizes each.
KINDS = 4

_state_of_module = operator.attrgetter("training", "_parameters", "_buffers", "_modules", *HOOKS)
_state_of_tensor = operator.attrgetter("requires_grad", "shape", "dtype", "device")
_kind_of_argument = operator.attrgetter("__class__", "shape", "dtype", "device")


class Again:
    """A call that can be repeated with other values. `Again.of` makes one, if the call is plain enough."""

    def __init__(self, ready: Ready, request: Request, inputs: Any, targets: tuple):
        subject, program = request.subject, ready.program
        self.ready, self.holder, self.device = ready, subject.holder, subject.device()
        self.lengths, self.dtype = lengths_of(program, request.arguments), torch.get_default_dtype()
        self.n, self.names = request.arguments.batch_size, tuple(inputs) if type(inputs) is dict else None
        self.described = [_kind_of_argument(t) for t in (*_values(inputs), *targets)]
        self.modules = subject.modules()
        self.owners = list(map(_state_of_module, self.modules))
        self.dicts = [d for _, *dicts in self.owners for d in dicts]
        self.members = list(_members(self.dicts))  # kept alive, so that no id is given twice
        self.ids = list(map(id, self.members))
        self.tensors = [t for t in self.members if isinstance(t, Tensor)]
        self.states = list(map(_state_of_tensor, self.tensors))
        self.run = direct(program.gm)
        self._bind(program, request)
        self._unpack = unpacked(program)

    @classmethod
    def of(cls, ready: Ready, request: Request, inputs: Any, targets: tuple) -> Self | None:
        """For a call that was checked and has returned; None if the next of its kind may need more than the graph."""
        program, options = ready.program, ready.program.options
        unchecked = not ready.checked or ready.selfcheck is not None and not ready.verified
        asked = unchecked or options.debug or options.check == "always"
        values = program.reads is not None or options.sample_index is not None  # compared at every call
        python = bool(program.python.numbers or program.python.effects or program.observed)
        if (
            asked
            or values
            or python
            or request.create_graph
            or program.mutations
            or program.borrowing
            or request.mode.dtype
        ):
            return None
        if not all(type(t) is Tensor for t in (*_values(inputs), *targets)):
            return None
        return cls(ready, request, inputs, targets)

    def call(self, inputs: Any, targets: tuple, seed: int | Tensor | None, generator: Any) -> Result | None:
        """The result; None if this call is another than the recorded one, or fails."""
        if not self.holds(inputs, targets):
            return None
        flat, memory = self.bound(inputs, targets, seed, generator), self.memory()
        try:
            with torch.no_grad():
                values = self.run(*flat, *memory)
        except (RuntimeError, IndexError):
            return None  # the long way names the op
        return self.result(values, flat, memory)

    def bound(self, inputs: Any, targets: tuple, seed: int | Tensor | None, generator: Any) -> list[Any]:
        """The graph's arguments, without memory."""
        flat, arguments = self.flat.copy(), (*_values(inputs), *targets)
        for position, index, split in self.given:
            flat[position] = arguments[index] if split is None else arguments[index].unflatten(*split)
        for position, path in self.places:
            flat[position] = path.get(self.modules)
        for position in self.seeds:
            flat[position] = seed_tensor(seed, generator, self.device)
        return flat

    def memory(self) -> list[Tensor]:
        """Memory for large results."""
        return self.ready.pool.take(self.n, self.lengths)

    def result(self, values: tuple, flat: list[Any], memory: list[Tensor]) -> Result:
        """The result, from what the graph returned for these arguments."""
        fields = self._unpack(values, flat)
        return Result(fields, self.ready.program.extensions, self.holder, self.ready.pool.kept(fields, memory))

    def holds(self, inputs: Any, targets: tuple) -> bool:
        """Whether nothing has changed but values of tensors."""
        try:
            return self._same(inputs, (*_values(inputs), *targets))
        except (AttributeError, RuntimeError):
            return False  # an argument is no tensor; another thread is compiling the modules

    def _same(self, inputs: Any, arguments: tuple) -> bool:
        return (
            list(map(_kind_of_argument, arguments)) == self.described
            and (tuple(inputs) if type(inputs) is dict else None) == self.names
            and list(map(_state_of_module, self.modules)) == self.owners
            and list(map(id, _members(self.dicts))) == self.ids
            and list(map(_state_of_tensor, self.tensors)) == self.states
            and not any(map(hooks_of_tensor, self.tensors))
            and self.ready.program.python.holds(self.modules)
            and not any(global_hooks())
            and not torch.is_autocast_enabled(self.device.type)
            and not torch.is_inference_mode_enabled()
            and torch.get_default_dtype() is self.dtype
        )

    def _bind(self, program: Program, request: Request) -> None:
        """Set `flat`, the graph's arguments, and the positions of those that change: data, tensors in Python, seeds."""
        arguments, sources = request.arguments, program.python.sources
        pairs = zip(
            [*arguments.given(), *arguments.targets], [*arguments.inputs, *arguments.split_targets()], strict=True
        )
        splits = [_find_split(given, split) for given, split in pairs]
        self.flat = bind(program, request.subject, arguments, 0, None)
        of_loss = dict(tensors_in(request.subject.loss)) if isinstance(request.subject.loss, nn.Module) else {}
        self.given, self.places, self.seeds = [], [], []
        for position, what in enumerate(program.inputs[: len(self.flat)]):
            if what.kind == "seed":
                self.seeds.append(position)
            elif what.kind == "constant" and what.name in sources and what.name.removeprefix("loss.") not in of_loss:
                self.places.append((position, sources[what.name]))
            elif what.kind in ("input", "target"):
                index = what.index + (len(arguments.inputs) if what.kind == "target" else 0)
                self.given.append((position, index, splits[index]))
                self.flat[position] = None  # this call's batch is not held


def latest(new: A, others: Sequence[A]) -> list[A]:
    """The kinds of calls to recognise from now on."""
    return [new, *(again for again in others if again.ready is not new.ready)][:KINDS]


def _values(inputs: Any) -> tuple:
    """The tensors of plain inputs; for others (None,), which equals no recorded call."""
    kind = type(inputs)
    if kind is Tensor:
        return (inputs,)
    if kind is tuple or kind is list:
        return tuple(inputs)
    return tuple(inputs.values()) if kind is dict else (None,)


def _members(dicts: Iterable[dict]) -> Iterable[Any]:
    return chain.from_iterable(map(dict.values, dicts))


def _find_split(given: Tensor, split: Tensor) -> tuple[int, tuple[int, ...]] | None:
    """(dimension, sizes) by which `Arguments` splits a value; None if it does not."""
    if given.ndim == split.ndim:
        return None
    d = next((k for k, (a, b) in enumerate(zip(given.shape, split.shape, strict=False)) if a != b), given.ndim - 1)
    return d, tuple(split.shape[d : d + 2])


# ---- what the graph returns ------------------------------


def unpacked(program: Program) -> Callable[[tuple, list[Any]], dict[str, Any]]:
    """A function from the graph's values to a result's fields: `Program.unpack`, by positions found once.

    It clones a value that lies in an argument's memory; only values that may, by their ops' schemas, are looked at.
    """
    returned = {node: k for k, node in enumerate(program.output.args[0])}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    lenders = set(placeholders[: len(placeholders) - len(program.buffers)])
    lent = [k for node, k in returned.items() if borrows(node, lenders)]
    leaves = [returned[n] for n in program.output_leaves]
    template, single = program.output_template, isinstance(program.output_template, Slot)
    fields = {**program.results, **program.extras}
    flat = {f: {k: returned[n] for k, n in v.items()} for f, v in fields.items() if _is_flat(v)}
    loss = returned.get(program.loss)

    def unpack(values: tuple, flat_inputs: list[Any]) -> dict[str, Any]:
        if lent:
            values = _clone_shared(values, lent, flat_inputs)
        out: dict[str, Any] = {} if loss is None else {"loss": values[loss]}
        out["output"] = values[leaves[0]] if single else filled(template, [values[k] for k in leaves])
        for field, nodes in fields.items():
            where = flat.get(field)
            out[field] = (
                {name: values[k] for name, k in where.items()}
                if where is not None
                else pytree.tree_map(lambda n: values[returned[n]], nodes)
            )
        return out

    return unpack


def _is_flat(nodes: Any) -> bool:
    return isinstance(nodes, dict) and all(isinstance(n, fx.Node) for n in nodes.values())


def _clone_shared(values: tuple, lent: list[int], flat: list[Any]) -> tuple:
    given = {t.untyped_storage().data_ptr() for t in flat if isinstance(t, Tensor)}
    shared = {k for k in lent if isinstance(values[k], Tensor) and values[k].untyped_storage().data_ptr() in given}
    return tuple(v.clone() if k in shared else v for k, v in enumerate(values))
