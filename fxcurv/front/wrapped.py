"""The module that is exported: the model, its marked output leaves, and the loss on them."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from fxcurv.errors import ArgumentError, CaptureError, FxcurvError, LossError
from fxcurv.front.arguments import Arguments, described, filled, map_leaves, objects_in, templated
from fxcurv.front.numbers import Values
from fxcurv.front.packed import refuse_output
from fxcurv.front.reads import Reads
from fxcurv.front.schedules import Number
from fxcurv.ir.origin import is_user_file, line_of, line_of_function, source_line
from fxcurv.ir.private import GuardOnDataDependentSymNode, own_buffers


@torch.library.custom_op("fxcurv::head", mutates_args=())
def head(x: Tensor) -> Tensor:
    """Marks a leaf of the model's output; removed by `normalize`."""
    return x.clone()


@head.register_fake
def _(x):
    return torch.empty_like(x)


# so that a derivative that the loss takes in the output passes the mark
head.register_autograd(lambda ctx, g: g)


class _Record:
    """What a trace leaves behind besides its graph (not in a pytree: export restores those)."""

    template: Any = None
    leaves: int = 0
    fixed_by: Any = None
    held: Sequence[tuple[nn.Module, str, Any]] = ()
    marks: dict[int, tuple[Tensor, Tensor]]
    notes: dict[str, None]
    look: Callable[[Callable[[Any], bool], dict[int, set[str]]], bool] = staticmethod(lambda follows, kept: False)


class Captured(nn.Module):
    """What is exported: the model, its marked output leaves, and the loss on them."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable | None,
        arguments: Arguments,
        split: str | None,
        reads: Reads,
        observers: Any,
        lend: bool,
    ):
        super().__init__()
        self.reads = reads
        self.observers = observers  # of `front.observers`
        self.model = model
        self.loss = loss
        self.arguments = arguments
        self.split = split
        self.record = _Record()
        self.values = Values(lend)
        self.own = dict([*self.named_parameters(), *self.named_buffers()])

    def forward(self, inputs, targets, numbers):
        try:
            args, kwargs = filled(self.arguments.input_template, inputs)  # copies plain objects, for this trace alone
            self.reads.born(objects_in((args, kwargs)))
            self.values.begin(self._incoming_tensors(inputs, targets, numbers), [*inputs, *targets, *numbers])
            self.observers.begin()
            self.record.held = [(m, name, t) for m in self.model.modules() for name, t in own_buffers(m).items()]
            try:
                with self.reads.numbers(numbers), self.reads:
                    out = self._run(args, kwargs, targets)
                refused = self.record.look(self.values.follows_from_call, self.observers.attributes())
            finally:
                self.reads.left.restore()
            if not refused:
                self.reads.left.check()
            return out
        except FxcurvError as error:
            self.reads.left.check(error)
            raise
        except Exception as error:  # here, since export prints the graph so far for an error that reaches it
            self.reads.left.check(error)
            raise not_traced(error, self) from error

    def _incoming_tensors(self, inputs, targets, numbers) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """(tensor of the trace, its value, whether it is trained) of all that comes in."""
        own = [*self.named_parameters(), *self.named_buffers()]
        yield from ((t, self.own[name], self.own[name].requires_grad) for name, t in own)
        device = next(self.model.parameters()).device
        real = [*self.arguments.inputs, *self.arguments.split_targets(), *self.reads.tensors(device)]
        yield from ((t, value, False) for t, value in zip([*inputs, *targets, *numbers], real, strict=True))

    def _run(self, args, kwargs, targets):
        marked: list[Tensor] = []
        self.record.marks, self.record.notes = {}, {}

        def mark(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            marked.append(head(t))
            self.record.marks[id(marked[-1])] = marked[-1], t
            return marked[-1]

        with self._split_at(self.split, mark) if self.split else contextlib.nullcontext():
            output = self.model(*args, **kwargs)
        map_leaves(output, Number, Number.refuse)
        map_leaves(output, PackedSequence, refuse_output)
        output = output if self.split else map_leaves(output, Tensor, mark)
        leaves: list[Tensor] = []
        self.record.template = templated(output, leaves)
        self.record.leaves = len(leaves)
        loss = None
        if self.loss is not None:
            loss = _check_scalar(
                self._loss_of(self.loss, output, self.arguments.join_targets(targets)), line_of_function(self.loss)
            )
        self.observers.set_in_trace([*self.reads.tensors_written(), *self._rebound_buffers()])
        return loss, leaves, marked, [t for t, _ in self.values.read], self.observers.tensors()

    def _rebound_buffers(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Say `self.mean = ...` of a buffer as a write to it; yield (module, name, tensor) where the shape is another."""
        for module, name, old in self.record.held:
            new = own_buffers(module).get(name)
            if new is old or not isinstance(new, Tensor):
                continue
            own_buffers(module)[name] = old
            alike = old is not None and (new.dtype, new.device, new.ndim) == (old.dtype, old.device, old.ndim)
            if alike and all(type(a) is type(b) and a == b for a, b in zip(new.shape, old.shape, strict=True)):
                with torch.no_grad():
                    old.copy_(new)
            else:
                yield module, name, new

    def _loss_of(self, loss: Callable, output: Any, targets: tuple) -> Any:
        try:
            return loss(output, *targets)
        except (FxcurvError, GuardOnDataDependentSymNode):
            raise
        except Exception as error:
            tensors: list[Tensor] = []
            templated(output, tensors)
            raise ArgumentError(
                f"the loss fails on the model's output, {described(tensors)}, and the targets, "
                f"{described(self.arguments.targets)}:\n"
                f"{where_raised(error, self)}{type(error).__name__}: {reason(error)}\n"
                "Way out: targets of the number, shape and dtype that the loss expects (indices: int64)."
            ) from error

    @contextlib.contextmanager
    def _split_at(self, path: str, mark: Callable):
        try:
            module = self.model.get_submodule(path)
        except AttributeError as error:
            raise ArgumentError(f"split='{path}' is no submodule of the model: {error}") from None
        handle = module.register_forward_hook(lambda _module, _args, output: map_leaves(output, Tensor, mark))
        try:
            yield
        finally:
            handle.remove()


def _held_twice(model: nn.Module) -> list[str]:
    """The names of a module in training mode, with buffers of its own, that the model holds under several."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module.training and own_buffers(module):
            names.setdefault(module, []).append(name)
    return next((found for found in names.values() if len(found) > 1), [])


def _check_scalar(loss: Any, where: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise LossError(
            f"the loss is a {type(loss).__name__}, not a tensor\n{where}Way out: return a scalar, without .item()."
        )
    if loss.numel() != 1:
        raise LossError(
            f"the loss is {described([loss])}, not a scalar\n{where}Way out: reduce it by .sum() or .mean()."
        )
    if not loss.is_floating_point():
        raise LossError(
            f"the loss is {loss.dtype}, so not differentiable\n{where}Way out: return a floating-point scalar."
        )
    return loss if loss.ndim == 0 else loss.reshape(())


def not_traced(error: Exception, wrapped: Captured) -> CaptureError:
    """The error for a failed trace, which says where it failed and what helps."""
    where = where_raised(error, wrapped)
    if "is mutated in the forward method" in str(error):
        return CaptureError(
            f"the model or loss writes to a tensor that is no buffer of it, as batch norm in training mode does\n{where}"
            "Way out: eval() of a module that a list, tuple or closure holds, or make it a part of the model (self.part = part)."
        )
    twice = _held_twice(wrapped.model) if isinstance(error, AssertionError) else []
    if twice:
        return CaptureError(
            f"'{twice[0]}' and '{twice[1]}' are one module, in training mode and with buffers, which torch.export cannot trace "
            "under two names. Way out: make it one part of the model, which forward calls twice; or eval() of it."
        )
    return CaptureError(
        f"torch.export cannot trace the model or its loss:\n"
        f"{where}{type(error).__name__}: {reason(error)}\n"
        "What usually helps: inputs of the shapes and dtypes that the model expects, no branch on a value and no size that "
        "depends on one (use torch.where, and (x * mask).sum() for x[mask].sum()), no .item() or numpy in forward, outputs made "
        "of tensors. The full reason is in the exception's __cause__."
    )


def reason(error: Exception) -> str:
    """The first line of an error's message."""
    return next((line for line in str(error).strip().splitlines() if line.strip()), "")[:400]


def where_raised(error: Exception, wrapped: Captured) -> str:
    """The innermost module and the user's line that an exception passed through."""
    names = {id(m): name for name, m in wrapped.named_modules() if name}
    module = line = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        this = frame.f_locals.get("self")
        if isinstance(this, nn.Module) and id(this) in names:
            name = names[id(this)].removeprefix("model").removeprefix(".")
            path = f"module '{name}'" if name else "the model"
            module = f"  in {path} ({type(this).__name__})\n"
        node = frame.f_locals.get("n")  # of an `fx.Interpreter`, past the user's own code
        if isinstance(node, fx.Node) and node.meta.get("stack_trace"):
            line = f"  {source_line(node.meta['stack_trace'])}\n"
        if is_user_file(frame.f_code.co_filename):
            line = line_of(frame.f_code.co_filename, number, frame.f_code.co_name)
    return module + line
