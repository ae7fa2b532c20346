"""`extend`: modules whose forward pass keeps what a backward pass with quantities needs.

An extended model is one autograd function: its forward runs the program's forward part, its backward the emitted
backward part, for the gradient and all quantities of the active context together. An extended loss runs as it is, and
leaves at the model's output how it was called, so that columns of its Hessian can be made there.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.utils import _pytree as pytree

from fxcurv import cut, passes
from fxcurv.api import Compiled, _doubled, _single
from fxcurv.backpack.columns import LossColumns, View, drawn, kind_of
from fxcurv.backpack.context import current, disable, is_disabled
from fxcurv.capture import Arguments, capture, flatten_arguments
from fxcurv.errors import ArgumentError, ExtensionError, LossError
from fxcurv.program import Program

_parts: weakref.WeakKeyDictionary[nn.Module, ModelParts] = weakref.WeakKeyDictionary()


def extend(module: nn.Module, debug: bool = False, use_converter: bool = False) -> nn.Module:
    """Make a model or a loss one that `backpack` sees; changes `module` and returns it.

    A module without parameters is a loss when its result is a scalar, and does not change else.

    Args:
        module: a model of tensors with the samples first, which returns one tensor, or a loss(output, *targets).
        debug: accepted, without effect.
        use_converter: accepted, without effect: any model that `torch.export` can trace is served.

    Raises:
        ArgumentError: if `module` is no module.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"extend takes an nn.Module, not a {type(module).__name__}: wrap it in one")
    if not isinstance(module, _Extended):
        module.__class__ = _extended_class(type(module))
    return module


@functools.cache
def _extended_class(cls: type) -> type:
    return type(cls.__name__, (_Extended, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


class _Extended:
    """Put before a module's class: the same module with another forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = super().forward
        if is_disabled():
            return plain(*args, **kwargs)
        if isinstance(self, _Loss) or next(self.parameters(), None) is None:
            return _loss_call(self, plain(*args, **kwargs), args, kwargs)
        trainable = any(p.requires_grad for p in self.parameters())
        if not torch.is_grad_enabled() or not trainable:
            return plain(*args, **kwargs)
        if self not in _parts:
            _parts[self] = ModelParts(self)
        return _parts[self].run(args, kwargs)

    def __reduce_ex__(self, protocol: int) -> Any:
        """Copies and pickles are made of the module's own class, and extended again."""
        cls = type(self).__mro__[2]
        return _restored, (cls, self.__dict__)


def _restored(cls: type, state: dict[str, Any]) -> nn.Module:
    module = cls.__new__(cls)
    module.__dict__.update(state)
    return extend(module)


@dataclass
class LossCall:
    """A call of an extended loss on (a view of) the model's output, and the cotangent that has reached it."""

    loss: nn.Module
    view: View | None
    args: tuple
    kwargs: dict
    scale: Tensor | None = None

    def key(self) -> Any:
        return id(self.loss), self.view


@dataclass
class Pass:
    """One forward pass of an extended model, as the backward pass finds it."""

    parts: ModelParts
    template: Program
    calls: list[LossCall] = field(default_factory=list)


def _loss_call(loss: nn.Module, value: Any, args: tuple, kwargs: dict) -> Any:
    z, args, kwargs = _prediction(args, kwargs)
    f = z if hasattr(z, "_fxcurv_pass") else getattr(z, "_base", None)
    found: Pass | None = getattr(f, "_fxcurv_pass", None)
    if found is None or not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        return value
    call = LossCall(loss, View.of(f, z), args, kwargs)
    found.calls.append(call)

    def reached(scale: Tensor) -> None:
        call.scale = scale.detach().reshape(())

    value.register_hook(reached)
    return value


def _prediction(args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
    """The loss's first argument, and the others."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("input", None), (), rest


class ModelParts(Compiled):
    """The emitted parts of an extended model, by kind of input."""

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)  # the model's entry in `_parts` must not keep it alive
        super().__init__(None, None, (), 0, None, {}, True, False)
        self._forwards: dict[int, cut.Part] = {}
        self._backwards: dict[Any, cut.Backward] = {}
        self._losses: dict[Any, LossColumns] = {}
        self._verified: set[Any] = set()

    @property
    def model(self) -> nn.Module:
        """The extended model, which is alive while one of its forward passes is."""
        return self._model()

    @model.setter
    def model(self, _: None) -> None:
        """`Compiled` would hold it."""

    def run(self, args: tuple, kwargs: dict) -> Tensor:
        """The model's output."""
        arguments = flatten_arguments(self._inputs(args, kwargs), (), 0)
        if any(t.requires_grad for t in arguments.inputs):
            raise ArgumentError(
                "an input of the extended model requires grad, and its gradient is not computed. Way out: detach it, extend the "
                "whole model instead of a part, or run it under backpack's disable()."
            )
        mode = self._autocast()
        with torch.no_grad(), disable(), torch.autocast(mode.device_type, enabled=False):
            template = self._program(arguments, mode)
            flat = self._bind(template, arguments, None, None)
        if len(template.output_leaves) != 1 or len(template.heads) != 1:
            raise ArgumentError(
                f"the extended model returns {len(template.output_leaves)} tensors: return one, or use fxcurv.compile"
            )
        trained = [dict(self.model.named_parameters())[name] for name in template.params]
        found = Pass(self, template)
        f = _Cut.apply(found, flat, *trained)
        f._fxcurv_pass = found
        return f

    def _inputs(self, args: tuple, kwargs: dict) -> Any:
        if not kwargs:
            return args
        if not args:
            return kwargs
        return dict(inspect.signature(type(self.model).__mro__[2].forward).bind(self.model, *args, **kwargs).arguments)

    def _lower(self, arguments: Arguments, mode: Any, create_graph: bool) -> Program:
        """The analysed program, numbered; its forward part is emitted at once."""
        single = arguments.batch_size == 1
        program = self._analyse(_doubled(arguments) if single else arguments, mode)
        if single:
            program = self._analyse(arguments, mode) if program.fixed else _single(program)
        self._forwards[id(program)] = cut.forward_part(program)
        return program

    def _analyse(self, arguments: Arguments, mode: Any) -> Program:
        with torch.autocast(mode.device_type, mode.dtype, enabled=mode.dtype is not None):
            program = capture(self.model, None, arguments)
        program.state["batch_dims"] = arguments.batch_dims
        return passes.run(program, passes.ANALYSIS)

    def forward_part(self, template: Program, flat: list[Any]) -> tuple[Tensor, dict[int, Any]]:
        """(f, every value by key); writes new values of buffers to the model."""
        placeholders = [n.meta["key"] for n in template.graph.nodes if n.op == "placeholder"]
        flat = [t.clone() if b.name in template.mutations and b.kind == "buffer" else t
                for t, b in zip(flat, template.inputs, strict=True)]  # fmt: skip
        part = self._forwards[id(template)]
        f, mutations, values = part.gm(*flat)
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        for name, value in zip(template.mutations, mutations, strict=True):
            buffers[name].copy_(value)
        return f, {**dict(zip(placeholders, flat, strict=True)), **dict(zip(part.keys, values, strict=True))}

    def backward_part(self, found: Pass, f: Tensor, g: Tensor, values: dict[int, Any]) -> dict[str, Any]:
        """field -> parameter name -> value, for the extensions of the active context."""
        extensions = current().extensions
        kinds = tuple(dict.fromkeys(k for k in map(kind_of, extensions) if k is not None))
        columns = self._columns(found, f, g, kinds, extensions) if kinds else []
        counts = tuple(c.shape[0] for c in columns)
        key = id(found.template), extensions, counts
        if key not in self._backwards:
            with disable():
                self._backwards[key] = cut.backward_part(found.template, extensions, kinds, counts)
        backward = self._backwards[key]
        given = {"g": g, "seed": torch.zeros((), dtype=torch.long, device=g.device)}
        given.update({f"columns_{k}": c for k, c in enumerate(columns)})
        inputs = [values[k] for k in backward.part.keys] + [given[name] for name in backward.given]
        return _owned(cut.results_of(backward, backward.part.gm(*inputs)), inputs)

    def _columns(self, found: Pass, f: Tensor, g: Tensor, kinds: tuple, extensions: tuple) -> list[Tensor]:
        second = tuple(e for e in extensions if kind_of(e) is not None)
        calls = [c for c in found.calls if c.scale is not None]
        if not calls or any(c.view is None for c in calls):
            raise LossError(
                f"{second[0]} needs the loss's Hessian at the model's output, and no extended loss read it (a reshape or a "
                "permutation of it at most). Way out: loss = extend(lossfunc)(extend(model)(x), y), or fxcurv.compile."
            )
        parts, total = [], 0
        for call in calls:
            key = call.key(), kinds, second
            if key not in self._losses:
                self._losses[key] = LossColumns(call.loss, call.view, kinds, second)
            with disable():
                gradient, columns = self._losses[key](f, call.scale, call.args, call.kwargs, drawn(f.device))
            parts.append(columns)
            total = total + gradient
        seen = tuple(c.key() for c in calls), kinds, second
        if seen not in self._verified:
            _check_whole(total, g, second)
            self._verified.add(seen)
        return [torch.cat(several) if len(several) > 1 else several[0] for several in zip(*parts, strict=True)]


def _check_whole(gradient: Tensor, g: Tensor, extensions: tuple) -> None:
    """What reaches f is the gradient of the extended losses, so that their Hessian is all of it."""
    scale = g.abs().amax() if g.numel() else g.sum()
    if not bool(((gradient - g).abs() <= 1e-3 * scale + 1e-12).all() | g.isnan().any()):
        raise LossError(
            f"{extensions[0]}: the model's output also reaches the loss by another way than the extended loss module, "
            "whose Hessian is not all. Way out: put everything that reads the output into one loss module, and extend it."
        )


def _owned(results: dict[str, Any], inputs: list[Any]) -> dict[str, Any]:
    """Results in memory of their own: autograd and optimizers write to gradients in place."""
    taken = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)}
    out: dict[str, Any] = {}

    def own(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in taken else value

    for name, values in sorted(results.items(), key=lambda item: item[0] == "grad"):
        out[name] = pytree.tree_map(own, values)
        if name != "grad":
            leaves = [t for t in pytree.tree_leaves(out[name]) if isinstance(t, Tensor)]
            taken |= {t.untyped_storage().data_ptr() for t in leaves}
    return out


class _Cut(torch.autograd.Function):
    """The extended model: forward part, then backward part."""

    @staticmethod
    def forward(ctx: Any, found: Pass, flat: list[Any], *params: Tensor) -> Tensor:
        f, values = found.parts.forward_part(found.template, flat)
        f = f.clone() if f._is_view() or any(f is t for t in flat) else f
        leaves, ctx.spec = pytree.tree_flatten(values)
        ctx.others = [None if isinstance(t, Tensor) else t for t in leaves]
        ctx.where = [isinstance(t, Tensor) for t in leaves]
        ctx.save_for_backward(f, *(t for t in leaves if isinstance(t, Tensor)))
        ctx.found = found
        return f

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ExtensionError(
                "backward(create_graph=True) through an extended model. Way out: fxcurv.compile(model, loss, extensions)(x, y, "
                "create_graph=True), whose quantities can be differentiated, or disable() for plain autograd."
            )
        f, *tensors = ctx.saved_tensors
        rest = iter(tensors)
        leaves = [next(rest) if is_tensor else other for is_tensor, other in zip(ctx.where, ctx.others, strict=True)]
        found: Pass = ctx.found
        values = pytree.tree_unflatten(leaves, ctx.spec)
        with torch.autocast(g.device.type, enabled=False):
            results = found.parts.backward_part(found, f.detach(), g, values)
        for call in found.calls:
            call.scale = None
        _attach(found.parts.model, results)
        gradients = results["grad"]
        return None, None, *(gradients[name] for name in found.template.params)


def _attach(model: nn.Module, results: dict[str, Any]) -> None:
    context = current()
    params = dict(model.named_parameters())
    for extension in context.extensions:
        for name, value in results[extension.savefield].items():
            setattr(params[name], extension.savefield, value)
    if context.extension_hook is not None:
        for module in reversed(list(model.modules())):
            if next(module.children(), None) is None:
                context.extension_hook(module)
