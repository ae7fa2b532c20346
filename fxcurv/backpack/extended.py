"""`extend`: modules whose forward pass keeps what a backward pass with quantities needs.

An extended model is one autograd function: its forward runs the program's forward part, its backward the emitted
backward part, for the gradient and all quantities of the active context together. An extended loss runs as it is, and
notes its call at the pass of the model whose output it reads: backward parts that need its Hessian are made of both.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor, fx, nn

from fxcurv.backpack import chained, custom, ledger, no_samples
from fxcurv.backpack.context import backpack, current, is_disabled
from fxcurv.backpack.losses import LossCall, leaves_only, tensors_of
from fxcurv.backpack.parts import ModelParts, Pass
from fxcurv.errors import ArgumentError
from fxcurv.front.arguments import filled
from fxcurv.front.observers import run_observers
from fxcurv.ir.private import (
    FakeTensor,
    FunctionalTensor,
    Loss,
    after_backward,
    in_function_transform,
    is_view,
    pytree,
    running_backward,
)

_parts: weakref.WeakKeyDictionary[nn.Module, ModelParts] = weakref.WeakKeyDictionary()


def extend(module: nn.Module, debug: bool = False, use_converter: bool = False) -> nn.Module:
    """Let `backpack` see a model or a loss; changes `module` and returns it.

    A module without parameters counts as a loss when its result is a scalar; otherwise it behaves as before.

    Args:
        module: a model of tensors with the samples first, or a loss(output, *targets).
        debug: accepted, without effect.
        use_converter: accepted, without effect: any model that `torch.export` can trace is served.

    Raises:
        ArgumentError: if `module` is no module.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"extend takes an nn.Module, not a {type(module).__name__}: wrap it in one")
    if not isinstance(module, _Extended):
        plain: Any = type(module)
        module.__class__ = _extended_class(plain)
    if not isinstance(module, Loss):
        ledger.watch(module)
    return module


def memory_cleanup(module: nn.Module) -> None:
    """Does nothing: a forward pass keeps its values in the graph of its output, and nothing on `module`."""


@functools.cache
def _extended_class(cls: Any) -> type:
    """The extended class of `cls`; its forward keeps the signature of `cls.forward`, which other code may inspect."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, functools.partial(cls.forward, self), args, kwargs)

    own = {"__module__": cls.__module__, "__doc__": cls.__doc__, "plain": cls, "forward": forward}
    return type(cls.__name__, (_Extended, cls), own)


def _forward(module: nn.Module, plain: Callable, args: tuple, kwargs: dict) -> Any:
    """The forward pass of an extended module; `plain` is its own."""
    if is_disabled() or in_function_transform() or _is_symbolic((args, kwargs)):
        return plain(*args, **kwargs)
    if isinstance(module, Loss) or next(module.parameters(), None) is None:
        return _noted(module, plain(*args, **kwargs), args, kwargs)
    trainable = any(p.requires_grad for p in module.parameters())
    if not torch.is_grad_enabled() or not trainable:
        return plain(*args, **kwargs)
    if module not in _parts:
        _parts[module] = ModelParts(module)
    parts = _parts[module]
    arguments, mode = parts.arguments(args, kwargs)
    if not arguments.batch_size:
        return no_samples.run_plain(parts, plain, args, kwargs, arguments, mode)
    return _run(parts, args, kwargs, *parts.begin_with(arguments, mode))


class _Extended(nn.Module):
    """Base class of extended modules, before the module's own class: only `forward` differs."""

    plain: type[nn.Module]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Copies and pickles are made of the module's own class, and extended again."""
        return _restored, (type(self).plain, self.__dict__)


def _is_symbolic(arguments: Any) -> bool:
    """Whether a call is part of a trace: of `fx.symbolic_trace`, or of a model around this one that is captured."""
    return any(isinstance(leaf, fx.Proxy | FakeTensor | FunctionalTensor) for leaf in pytree.tree_leaves(arguments))


def _restored(cls: Any, state: dict[str, Any]) -> nn.Module:
    module = cls.__new__(cls)
    module.__dict__.update(state)
    return extend(module)


def _noted(loss: nn.Module, value: Any, args: tuple, kwargs: dict) -> Any:
    """Note a call of `loss` at the pass whose output it reads."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        return value
    noted = LossCall.of(loss, args, kwargs)
    if noted is not None:
        found, call = noted
        found.calls.append(call)

        def reached(scale: Tensor) -> None:
            call.scale = scale.reshape(())

        value.register_hook(reached)
    return value


def _run(parts: ModelParts, args: tuple, kwargs: dict, found: Pass, flat: list[Any]) -> Any:
    """The model's output; its pass is noted at every tensor in it."""
    chained.follow(found, args, kwargs)
    model, template = parts.model, found.template
    ledger.watch(model)
    trained = [dict(model.named_parameters())[name] for name in template.params]
    given = [t for t in tensors_of((args, kwargs)) if t.requires_grad]
    leaves = _Cut.apply(found, flat, len(trained), *trained, *given)
    found.leaves, found.shapes = list(map(weakref.ref, leaves)), [t.shape for t in leaves]
    return filled(template.output_template, leaves)


class _Cut(torch.autograd.Function):
    """The extended model: forward part, then backward part.

    The forward pass runs again under autograd for derivatives that the emitted parts do not give: for `create_graph`,
    for the gradient of an input that requires one, and for module extensions.
    """

    @staticmethod
    def forward(ctx: Any, found: Pass, flat: list[Any], trained: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        parts, template = found.parts, found.template
        bound = zip(flat, template.inputs, strict=True)
        # buffers as they were before this pass
        kept = [t.clone() if b.kind == "buffer" and b.name in template.mutations else t for t, b in bound]
        leaves, mutations, values = parts.run(found.forward, kept)
        run_observers(template.observed, list(parts.model.modules()), lambda node: values[node.meta["key"]])
        buffers = dict(parts.model.named_buffers(remove_duplicate=False))
        for name, value in mutations.items():
            buffers[name].copy_(value)
        leaves = [f.clone() if is_view(f) or any(f is t for t in flat) else f for f in leaves]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(f for f in leaves if not f.is_floating_point()))
        flattened, ctx.spec = pytree.tree_flatten((leaves, kept, values))
        ctx.others = [None if isinstance(t, Tensor) else t for t in flattened]
        ctx.where = [isinstance(t, Tensor) for t in flattened]
        ctx.save_for_backward(*tensors, *leaves_only(flattened))
        ctx.found, ctx.trained, ctx.count = found, trained, len(tensors)
        return tuple(leaves)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.found.context or contextlib.nullcontext():  # left again, whatever is raised
            return _run_backward(ctx, gs)


def _run_backward(ctx: Any, gs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradient, and on the parameters what the context asks for."""
    found: Pass = ctx.found
    saved = ctx.saved_tensors
    given, rest = saved[ctx.trained : ctx.count], iter(saved[ctx.count :])
    flattened = [next(rest) if there else other for there, other in zip(ctx.where, ctx.others, strict=True)]
    leaves, flat, values = pytree.tree_unflatten(flattened, ctx.spec)
    create_graph = torch.is_grad_enabled()
    twice = running_backward() in found.twice
    context = backpack() if twice else current()
    check = context.check is not None and not twice and not create_graph
    customs = custom.customs(context)
    with torch.autocast(found.mode.device_type, enabled=False):
        if create_graph or given or customs:
            again, differentiable = found.parts.again(found, flat, ledger.alias)
        of_inputs = _input_gradients(again, given, gs, create_graph) if given else []
        saved_values, values = values, differentiable if create_graph else values
        detached = [f.detach() for f in leaves]
        results = _results(found, context, detached, gs, values, check)
    if create_graph:
        _mark(found, results)
    if twice:
        held = dict(found.parts.model.named_parameters())
        ledger.unaccounted(*(held[name] for name in found.template.params))
    _attach(found, context, results)
    calls = [call for call in found.calls if call.scale is not None]
    run = custom.Backward(found, again, differentiable, gs, calls).run if customs else None
    _run_per_module(found, context, calls, detached, custom.Values(found, saved_values), customs, run)
    _arrive(found, gs)
    return None, None, None, *(results["grad"][name] for name in found.template.params), *of_inputs


def _results(
    found: Pass, context: backpack, leaves: list[Tensor], gs: Sequence[Any], values: dict[int, Any], check: bool
) -> dict[str, Any]:
    """field -> parameter name -> value, of one model or, at the second order, of several in a chain."""
    second = [e for e in context.extensions if not e.requires.first_order]
    if not second or not found.follows:
        return found.parts.backward(found, context.extensions, leaves, gs, values, check)
    first = tuple(e for e in context.extensions if e not in second)
    results = found.parts.backward(found, first, leaves, gs, values, check)
    of_chain = chained.second_order(found, second, values, results["grad"], check)
    if of_chain is None:
        return found.parts.backward(found, context.extensions, leaves, gs, values, check)
    return {**results, **of_chain}


def _arrive(found: Pass, gs: Sequence[Any]) -> None:
    """Note at the pass what reached it, for models before it, and clear its calls of losses: each counts once."""
    if found.calls:
        reached = [replace(call) for call in found.calls if call.scale is not None]
        found.arrived, found.cotangents = (running_backward(), reached), gs
        after_backward(
            found.forget
        )  # with create_graph=True cotangents lead back to the pass, so neither would ever die
    for call in found.calls:
        call.scale = None


def _input_gradients(leaves: list[Tensor], given: list[Tensor], gs: tuple, create_graph: bool) -> list[Tensor | None]:
    """Gradients of inputs that require one."""
    pairs = [(f, g) for f, g in zip(leaves, gs, strict=True) if g is not None]
    outputs, cotangents = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, given, cotangents, create_graph=create_graph, allow_unused=True))


def _mark(found: Pass, results: dict[str, Any]) -> None:
    """Note backward passes from a result: they reach the model again, and then compute no quantities."""

    def note(_: Tensor) -> None:
        found.twice.add(running_backward())

    for tensor in leaves_only(results):
        if tensor.requires_grad and not tensor.is_leaf:
            tensor.register_hook(note)


def _attach(found: Pass, context: backpack, results: dict[str, Any]) -> None:
    """Put fields on parameters, which alone hold them from then on."""
    ledger.write(found, found.parts.model, dict(found.parts.model.named_parameters()), results, context)
    for extension in context.extensions:
        del results[extension.savefield]


def _run_per_module(
    found: Pass,
    context: backpack,
    calls: list[LossCall],
    leaves: list[Tensor],
    seen: custom.Values,
    customs: list[Any],
    run: Any,
) -> None:
    """Run module extensions and the extension hook for every module."""
    hook = context.extension_hook
    if hook is not None:
        for call in calls:
            with custom.inputs_of_loss(call, leaves):
                hook(call.loss)
    if hook is None and run is None:
        return
    for module in custom.own_modules(found.parts.model):
        with seen.on(module):
            if run is not None:
                run(module, customs)
            if hook is not None:
                hook(module)
