"""A program as a module without state: what `torch.compile` traces as part of a step, and what is exported."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from fxcurv.errors import ArgumentError
from fxcurv.front.arguments import Arguments, Slot, filled, map_leaves
from fxcurv.ir.private import OpOverload, pytree, schema_of
from fxcurv.ir.program import Program
from fxcurv.operators import Saved
from fxcurv.passes.recycle import functional

# Kinds of Python state that the traced code reads, so that Dynamo guards it.
GUARDED = ("scalar", "tensor", "number")

# Stands for a tensor where a structure has to be a constant.
HOLE = "<tensor>"


class Stateless(nn.Module):
    """A program as a function of tensors: parameters and buffers by name, inputs, targets and seed in; its fields out.

    Attributes:
        gm: the graph, without memory of earlier results.
        writes: buffer name -> index of its new value among those that `gm` returns.
        updates: whether these are written to the model.
        unseen: whether the program depends on Python state for which Dynamo has no guard.
        ticks: a tensor that the check of that state writes to.
    """

    def __init__(self, program: Program, arguments: Arguments):
        super().__init__()
        if program.reads is not None:
            raise ArgumentError(
                f"the model or loss makes a number of the data's values, which every call compares\n  {program.reads.lines[0]}\n"
                "and which neither torch.compile nor an exported program does. Way out: call it outside of the compiled function."
            )
        self.gm = _replace_numel(functional(program))
        self.bound = [(i.kind, i.name, i.index) for i in program.inputs if i.kind != "memory"]
        self.constants = dict(program.constants)
        python = program.python
        scalars = [p for p, how in python.leaves if how == "scalar"]
        self.places = [(p.module, None if p.module is not None else p.root, p.steps) for p in scalars]
        self.unseen = any(how not in GUARDED for _, how in python.leaves)
        self.register_buffer("ticks", torch.zeros((), dtype=torch.long), persistent=False)
        self.tensors = [(name, p.module, p.steps) for name, p in python.sources.items() if p.module is not None]
        position = {node: k for k, node in enumerate(program.output.args[0])}
        self.shared = [_is_given(node) for node in program.output.args[0]]
        self.writes = {name: position[node] for name, node in program.mutations.items()}
        self.updates = program.options.update_buffers
        fields = fields_of(program, position.__getitem__)
        for kept in pytree.tree_leaves(fields, is_leaf=lambda value: isinstance(value, Saved)):
            if isinstance(kept, Saved):
                kept.code.prepare()
        self.order, self.spec = pytree.tree_flatten(fields)
        self.fixed, self.largest = program.fixed, program.largest
        self.tried = bool(program.conditions)  # batch sizes are tried one by one
        self.size = arguments.batch_size
        count = len(arguments.inputs)
        which = next(k for k, d in enumerate(arguments.batch_dims) if d is not None)
        self.samples = which, arguments.batch_dims[which], arguments.rows[which] or 1
        tensors = [*arguments.given(), *arguments.targets]
        dims = [*arguments.batch_dims, *arguments.target_dims()]
        self.count = count
        inner = 0 not in arguments.batch_dims
        come_apart = [*(k is not None for k in arguments.rows), *(d is not None for d in dims[count:])]
        self.split = [
            (d, inner and k >= count) if apart and t.shape[d] != self.size else None
            for k, (t, d, apart) in enumerate(zip(tensors, dims, come_apart, strict=True))
        ]
        self.shapes = [[(k, s) for k, s in enumerate(t.shape) if k != d] for t, d in zip(tensors, dims, strict=True)]

    def accepts(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the program is for tensors of these sizes; called while tracing, this leaves guards."""
        which, dim, rows = self.samples
        n = tensors[which].shape[dim] // rows
        if self.tried:
            n = operator.index(n)  # a guard on this size (`int` leaves it symbolic): the next one is tried by itself
        if self.fixed and n != self.size or not self.fixed and (n < 2 or self.largest is not None and n > self.largest):
            return False
        return all(t.shape[k] == s for t, sizes in zip(tensors, self.shapes, strict=True) for k, s in sizes)

    def forward(self, named: dict[str, Tensor], tensors: Sequence[Tensor], seed: Tensor) -> list[Any]:
        """The values that the graph returns; those that are just arguments, or views of them, are cloned.

        Args:
            named: parameters and buffers, those of the loss under "loss.<name>".
            tensors: inputs, then targets.
        """
        which, dim, rows = self.samples
        n = tensors[which].shape[dim] // rows
        given = [
            t if how is None else t.unflatten(how[0], (-1, n) if how[1] else (n, -1))
            for t, how in zip(tensors, self.split, strict=True)
        ]
        flat = []
        for kind, name, index in self.bound:
            if kind == "seed":
                flat.append(seed)
            elif kind in ("input", "target"):
                flat.append(given[index if kind == "input" else self.count + index])
            elif name in named:
                flat.append(named[name])
            else:
                flat.append(self.constants[name])
        values = self.gm(*flat)
        return [v.clone() if shared else v for v, shared in zip(values, self.shared, strict=True)]

    def read(self, modules: Sequence[nn.Module]) -> tuple[list[Any], dict[str, Tensor]]:
        """(plain values that Python holds, tensors by name); called while tracing, this leaves guards."""
        values = [_follow(modules[k] if k is not None else root, steps) for k, root, steps in self.places]
        return values, {name: _follow(modules[k], steps) for name, k, steps in self.tensors}

    def fields(self, values: Sequence[Any]) -> dict[str, Any]:
        """A result's fields, from what `forward` returned."""
        return pytree.tree_unflatten([values[k] for k in self.order], self.spec)


def _follow(value: Any, steps: Sequence[tuple[str, Any]]) -> Any:
    for kind, name in steps:
        value = getattr(value, name, None) if kind == "attr" else value[name]
    return value


def fields_of(program: Program, of: Callable[[fx.Node], Any]) -> dict[str, Any]:
    """A result's fields, with `of(node)` in place of each tensor."""
    at = lambda n: of(n) if isinstance(n, fx.Node) else n  # noqa: E731
    fields: dict[str, Any] = {} if program.loss is None else {"loss": at(program.loss)}
    fields["output"] = filled(program.output_template, [at(n) for n in program.output_leaves])
    held: list[Slot] = []
    map_leaves(program.output_template, Slot, held.append)
    if sum(type(leaf) in (int, fx.Node) for leaf in pytree.tree_leaves(fields["output"])) < len(held):
        raise ArgumentError(
            "inside torch.compile, a model returns tensors, or tuples, lists and dicts of them, not tensors within a "
            f"{type(program.output_template).__name__}"
        )
    for field, nodes in (*program.results.items(), *program.extras.items()):
        fields[field] = pytree.tree_map(at, nodes)
    return fields


def _is_given(node: fx.Node) -> bool:
    """Whether a value is an argument of the graph, or a view of one."""
    while node.op == "call_function" and isinstance(node.target, OpOverload):
        returns = schema_of(node.target).returns
        if len(returns) != 1 or returns[0].alias_info is None or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return node.op in ("placeholder", "get_attr")


def refuse_packed(inputs: Any) -> None:
    """Refuse inputs that are packed sequences, whose padding is no part of a stateless program."""
    values = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple | list) else ()
    if isinstance(inputs, PackedSequence) or any(isinstance(value, PackedSequence) for value in values):
        raise ArgumentError(
            "a packed sequence is no argument of torch.compile or of an exported program: pass the padded tensor and the "
            "lengths, and call pack_padded_sequence in the model"
        )


def named_tensors(model: nn.Module, loss: Any) -> dict[str, Tensor]:
    """Parameters and buffers as `Stateless` takes them: those of a loss that is a module under "loss.<name>"."""
    loss_tensors: dict[str, Tensor] = {}
    if isinstance(loss, nn.Module):
        tensors = (*loss.named_parameters(), *loss.named_buffers(remove_duplicate=False))
        loss_tensors = {f"loss.{name}": t for name, t in tensors}
    return {**dict(model.named_parameters()), **dict(model.named_buffers(remove_duplicate=False)), **loss_tensors}


def parted(structure: Any) -> tuple[Any, list[Tensor]]:
    """(the structure with holes for tensors, the tensors)."""
    leaves, spec = pytree.tree_flatten(structure)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return pytree.tree_unflatten([HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec), tensors


def _replace_numel(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace a value's number of entries by the product of its sizes: Dynamo does not trace `sym_numel`."""
    found = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_numel.default)
    for node in found:
        x: Any = node.args[0]
        with gm.graph.inserting_before(node):
            sizes = [
                s if isinstance(s, int) else gm.graph.call_function(torch.ops.aten.sym_size.int, (x, d))
                for d, s in enumerate(x.meta["val"].shape)
            ]
            count: Any = functools.reduce(lambda a, b: gm.graph.call_function(operator.mul, (a, b)), sizes)
            node.replace_all_uses_with(count)
        gm.graph.erase_node(node)
    if found:
        gm.recompile()
    return gm
