"""Capture model and loss as a `Program`: `torch.export` gives a functional graph of ATen ops with a symbolic batch.

What export would silently lose is kept or refused: the leaves that the loss reads are marked, outputs of
`no_grad` regions are detached, custom autograd functions keep their backward (`custom_functions.py`).
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from fxcurv.errors import CaptureError, FxcurvError
from fxcurv.front.arguments import Arguments
from fxcurv.front.autograd_state import no_autograd_state
from fxcurv.front.custom_functions import kept_functions
from fxcurv.front.guards import Followed, fixed_sizes, numbered_reductions, quiet, said_otherwise, user_frames
from fxcurv.front.lift import detach_no_grad_regions, lift
from fxcurv.front.observers import Observers, Where
from fxcurv.front.packed import padded_sequences
from fxcurv.front.plain import erase_detached, is_plain
from fxcurv.front.python_state import Path
from fxcurv.front.reads import Reads
from fxcurv.front.requests import Subject
from fxcurv.front.side_effects import no_side_effects
from fxcurv.front.transforms import traced_transforms
from fxcurv.front.wrapped import Captured, not_traced
from fxcurv.ir.emit import in_order
from fxcurv.ir.private import UnsupportedOperatorException
from fxcurv.ir.program import Program
from fxcurv.rules.registered import backwards as backwards_of_ops


def capture(
    subject: Subject, arguments: Arguments, split: str | None = None, numbers: Sequence[Path] = (), lend: bool = False
) -> Program:
    """Trace model and loss into a functional graph.

    Args:
        numbers: places of the floats that become inputs of the graph.
        lend: whether `.item()` of data is a tensor in the graph, not a number that the graph is for.

    Raises:
        CaptureError: if `torch.export` cannot trace them; carries its reason and what usually helps.
        LossError: if the loss is not a scalar tensor.
    """
    known, initialised = set[Where](), False
    while True:
        observers = Observers([nm for root in subject.roots() for nm in root.named_modules()], subject.watched, known)
        try:
            program = _capture_once(subject, arguments, split, numbers, observers, lend)
        except FxcurvError as error:
            # what the first pass of a model sets and all read (a configuration, transformers' hooks) is set by now
            first = getattr(error, "changed", False) and not initialised
            initialised |= first
            if not observers.found and not first:
                raise
        else:
            if not observers.found:
                return program
        known |= observers.found


def _capture_once(
    subject: Subject, arguments: Arguments, split: str | None, numbers: Sequence[Path], observers: Observers, lend: bool
) -> Program:
    model, loss = subject.model, subject.loss
    reads = Reads(model, loss, numbers)
    wrapped = Captured(model, loss, arguments, split, reads, observers, lend)
    with quiet():
        try:
            with (
                numbered_reductions(), fixed_sizes(wrapped), no_side_effects(subject.roots()) as wrapped.record.look,
                observers.in_place(), no_autograd_state(),
            ):  # fmt: skip
                exported = _export(wrapped, arguments)
                detach_no_grad_regions(exported)
                erase_detached(exported)
                if not is_plain(exported):
                    exported = exported.run_decompositions({})
        except FxcurvError:
            raise
        except Exception as error:
            raise not_traced(error, wrapped) from error
        reads.later(backwards_of_ops(m.graph for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)))
        reads.check()
        program = lift(subject, wrapped, exported, arguments)
        program.notes = [*wrapped.record.notes]
        program.python = reads.state(program.constants, [*wrapped.parameters(), *wrapped.buffers()])
        return program


def _export(wrapped: Captured, arguments: Arguments) -> ExportedProgram:
    numbers = wrapped.reads.tensors(next(wrapped.model.parameters()).device)
    dims = arguments.batch_dims, arguments.split_dims(), [None] * len(numbers)
    varying = iter(arguments.varying)
    shapes = tuple([_symbolic_dims(d, next(varying, frozenset())) for d in part] for part in dims)

    # Export gets tensors of its own: autograd cannot save tensors made under inference_mode, and warns when asked for
    # the gradient of a tensor that is no leaf; export marks dynamic dimensions on its inputs, and removes the user's
    # marks.
    def fresh() -> tuple:
        # an unflattened target is a view, and export would assume that the memory behind it never gets smaller
        pairs = zip(arguments.split_targets(), arguments.targets, strict=True)
        given = (arguments.inputs, [t if t.ndim == whole.ndim else t.clone() for t, whole in pairs])
        alone = lambda t: t.clone() if t.is_inference() else t.detach().requires_grad_(t.requires_grad and t.is_leaf)  # noqa: E731
        return *([alone(t) for t in tensors] for tensors in given), numbers

    try:
        return _run_export(wrapped, fresh(), shapes)
    except CaptureError as error:
        if not isinstance(error.__cause__, UnsupportedOperatorException):
            raise
        # PyTorch knows this op's sizes only by running it, which takes numbers
        trace = "".join(traceback.format_tb(error.__cause__.__traceback__))
        wrapped.record.fixed_by = {"op": str(error.__cause__.func), "module": "", "stack_trace": trace}
        return _run_export(wrapped, fresh(), None)


def _symbolic_dims(samples: int | None, varying: frozenset[int]) -> dict[int, Any] | None:
    """The dimensions of an argument that are symbolic."""
    dims = varying if samples is None else {samples, *varying}
    return dict.fromkeys(sorted(dims), Dim.AUTO) or None


def _run_export(wrapped: Captured, args: tuple, shapes: Any) -> ExportedProgram:
    was_training = [(m, m.training) for m in wrapped.model.modules()]
    wrapped.training = wrapped.model.training
    try:
        seen_through = (
            kept_functions(), said_otherwise(), padded_sequences(), traced_transforms(wrapped), user_frames(), Followed(wrapped),
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            for context in (torch.enable_grad(), in_order(), *seen_through):
                stack.enter_context(context)
            return torch.export.export(wrapped, args, dynamic_shapes=shapes, strict=False)
    finally:
        for module, training in was_training:
            module.training = training
