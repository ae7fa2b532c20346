"""Equal models share programs: a captured graph that equals an earlier one, node by node, is not compiled again.

All that the pipeline reads is compared: the captured graph with sizes, strides, dtypes, devices and provenance of every
value, what its placeholders are bound to, what was requested, the compiler's passes and tables (users may add to them),
and the state of PyTorch that decides between kernels. Every model is still captured, because capture depends on Python
values that belong to the model, and checked at its first call. A program with something that cannot be compared
completely (a custom function or op, a constant in the graph, a user's rule or extension, a hook, numbers made of the data) is
not shared.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections import deque
from collections.abc import Hashable
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from fxcurv import passes
from fxcurv.contractions.candidates import CANDIDATES
from fxcurv.ir.graph import layout
from fxcurv.ir.pieces import state_of_torch
from fxcurv.ir.private import OpOverload, pytree
from fxcurv.ir.program import Program
from fxcurv.quantity import KINDS
from fxcurv.rules.base import RULES
from fxcurv.rules.custom import is_foreign
from fxcurv.rules.fused import FUSED
from fxcurv.rules.idioms import IDIOMS
from fxcurv.rules.shorter import SHORT
from fxcurv.walks.columns.births import BIRTHS

# Metadata that may differ between two traces of the same ops, and is not compared (values are, by `_value_key`).
UNREAD = {"val", "tensor_meta", "desc", "from_node", "torch_fn", "original_aten", "seq_nr", "eager_input_vals"}
PLAIN = (bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
FUNCTIONS = {"_operator", "math"}
# Programs that are kept after their owners are gone: the folds of a cross-validation make one model at a time.
KEPT = 8


class _Unknown(Exception):
    """The program has something that cannot be compared."""


@dataclasses.dataclass(eq=False)
class Finished:
    """A finished program, without anything of the model that it was captured from.

    program: as the pipeline left it; `probe`, `selfcheck`: as they were before any call.
    """

    program: Program
    probe: Any
    selfcheck: Any

    @classmethod
    def of(cls, program: Program, probe: Any, selfcheck: Any) -> Finished:
        """Strip a program of what belongs to its model."""
        return cls(
            dataclasses.replace(program, python=None, constants={}, output_template=None, served={}), probe, selfcheck
        )

    def adopted(self, captured: Program) -> tuple[Program, Any, Any]:
        """(program, probe, self-check) for another model, whose captured program is `captured`."""
        program = dataclasses.replace(
            self.program, python=captured.python, constants=captured.constants, output_template=captured.output_template,
            timings=dict(captured.timings), served={},
        )  # fmt: skip
        return program, self.probe, copy.copy(self.selfcheck)


_FINISHED: weakref.WeakValueDictionary[Hashable, Finished] = weakref.WeakValueDictionary()
_LATEST: deque[Finished] = deque(maxlen=KEPT)


def find(key: Hashable | None) -> Finished | None:
    """The finished program under this key, if there is one."""
    return _FINISHED.get(key) if key is not None else None


def keep(key: Hashable | None, finished: Finished) -> Finished:
    """Let `find` return it while its owners live, and a little longer."""
    if key is not None:
        _FINISHED[key] = finished
        _LATEST.append(finished)
    return finished


def forget() -> None:
    """Share none of the programs that are finished so far."""
    _FINISHED.clear()
    _LATEST.clear()


def graph_key(program: Program, *also: Hashable) -> Hashable | None:
    """A key of all that the finished program depends on; None if something cannot be compared."""
    options = program.options
    own = program.reads is not None or program.observed or program.python.numbers or program.python.effects
    if own or options.rules or options.ranks or not all(map(is_own, program.extensions)):
        return None
    try:
        key = (_nodes_key(program), _fields(program), state_of_torch(), compiler(), also)
        hash(key)
    except (_Unknown, TypeError):
        return None
    return key


def is_own(extension: Any) -> bool:
    """Whether an extension is fxcurv's own and its fields are immutable, so that they decide what it computes."""
    own = type(extension).__module__.startswith("fxcurv.")
    values = pytree.tree_leaves([getattr(extension, f.name) for f in dataclasses.fields(extension)])
    return own and all(isinstance(v, (*PLAIN, float)) for v in values)


# ---- the captured program ------------------------------


def _nodes_key(program: Program) -> tuple:
    index = {node: k for k, node in enumerate(program.graph.nodes)}
    return tuple(
        (*_call_key(node, index), _value_key(node.meta.get("val")), _origin_key(node)) for node in program.graph.nodes
    )


def _call_key(node: fx.Node, index: dict[fx.Node, int]) -> tuple:
    target: Any = node.target
    known = (
        isinstance(target, str)
        if node.op in ("placeholder", "output")
        else node.op == "call_function" and _is_known_op(target)
    )
    if not known:
        raise _Unknown(node)
    return node.op, node.name, target, _hashable(node.args, index), _hashable(node.kwargs, index)


def _is_known_op(target: Any) -> bool:
    """Whether an op is the same for all models: PyTorch's, or the mark at the model's output.

    Another library's is not: its derivative is Python, which may read what has changed.
    """
    if isinstance(target, OpOverload):
        own = target.namespace != "fxcurv" or target is torch.ops.fxcurv.head.default
        return own and not is_foreign(target)
    return getattr(target, "__module__", None) in FUNCTIONS


def _hashable(value: Any, index: dict[fx.Node, int]) -> Hashable:
    if isinstance(value, fx.Node):
        return ("node", index[value])
    if isinstance(value, float | complex):
        return (type(value), repr(value))  # -0.0 differs from 0.0, and NaN equals itself
    if isinstance(value, PLAIN):
        return (type(value), value)
    if isinstance(value, slice):
        return ("slice", _hashable((value.start, value.stop, value.step), index))
    if isinstance(value, list | tuple):
        return (isinstance(value, list), tuple(_hashable(v, index) for v in value))
    if isinstance(value, dict):
        return ("dict", tuple((k, _hashable(v, index)) for k, v in value.items()))
    raise _Unknown(value)


def _value_key(val: Any) -> Hashable:
    if isinstance(val, Tensor):
        plain = type(val).__name__, val.dtype, val.device, val.layout, val.requires_grad, val.storage_offset()
        return (*plain, str(layout(val)), str([s.node.hint if isinstance(s, SymInt) else s for s in val.shape]))
    if isinstance(val, SymInt):
        return ("size", str(val.node.expr), val.node.hint)
    if isinstance(val, list | tuple):
        return tuple(map(_value_key, val))
    if isinstance(val, PLAIN):
        return val
    raise _Unknown(val)


def _origin_key(node: fx.Node) -> Hashable:
    """A node's provenance, for messages and reports, and all other metadata on it."""
    modules = tuple((path, str(kind)) for path, kind in (node.meta.get("nn_module_stack") or {}).values())
    rest = {k: str(v) for k, v in node.meta.items() if k not in UNREAD and k != "nn_module_stack"}
    return modules, tuple(sorted(rest.items()))


def _fields(program: Program) -> Hashable:
    index = {node: k for k, node in enumerate(program.graph.nodes)}
    batch, shapes = program.batch, program.fake_mode.shape_env
    options = [getattr(program.options, f.name) for f in dataclasses.fields(program.options) if f.name != "rules"]
    leaves = pytree.tree_leaves((program.results, program.extras, program.spread.ops))
    if leaves or program.checks or program.decisions or program.walked.uses:
        raise _Unknown("a program that passes have worked on")
    return (
        tuple(program.inputs),
        (
            str(sorted(map(str, batch.symbols))),
            str(batch.lengths),
            batch.size,
            batch.whole,
            program.fixed,
            str(program.fixed_by),
        ),
        tuple(sorted(str(g.expr) for g in shapes.guards)),
        str(sorted((str(old), str(new)) for old, new in shapes.replacements.items())),
        tuple((name, index[node]) for name, node in program.params.items()),
        tuple((name, tuple(shape)) for name, shape in program.shapes.items()),
        tuple(index[n] for n in program.output_leaves),
        tuple(index[n] for n in program.heads),
        index[program.loss] if program.loss is not None else None,
        tuple((name, index[node]) for name, node in program.mutations.items()),
        tuple(sorted((name, _value_key(t)) for name, t in program.constants.items())),
        program.extensions,
        tuple((e, tuple(names)) for e, names in program.covers.items()),
        tuple(program.borrowing),
        tuple(program.notes),
        (program.analysis.left_out, program.analysis.mixing, program.analysis.ends, program.analysis.hidden),
        tuple(options),
        program.machine,
    )


TABLES: list[dict] = [RULES, KINDS, BIRTHS, FUSED, IDIOMS, SHORT]


def compiler() -> Hashable:
    """The passes, and the tables that a user can add to: rules, candidates, kinds of columns."""
    known = [(name, id(value)) for table in TABLES for name, value in table.items()]
    return (
        tuple(passes.ANALYSIS),
        tuple(passes.PIPELINE),
        tuple(passes.SPREAD),
        tuple(map(id, CANDIDATES)),
        tuple(known),
    )
