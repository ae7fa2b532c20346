"""Extensions and hooks per module, for code written for BackPACK: they see a module's inputs, output and cotangents.

Inputs and outputs of modules are values of the forward part. Where a module extension asks for the gradient in a
module's output, or for columns there, the forward pass runs once more under autograd, which takes them down.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv import api
from fxcurv.backpack.context import backpack, disable
from fxcurv.backpack.extensions.carried import Carried
from fxcurv.backpack.extensions.module_extension import FAIL_ERROR, FAIL_WARN, BackpropExtension
from fxcurv.backpack.losses import LossCall, Read, TotalLoss, targets_of
from fxcurv.backpack.parts import Pass
from fxcurv.errors import ExtensionError, LossError
from fxcurv.extensions import Extension, SqrtGGNExact, SqrtGGNMC
from fxcurv.front.arguments import filled, map_leaves
from fxcurv.ir.private import own_parameters


class Values:
    """The inputs and outputs of a model's modules in a pass; of several calls of a module, those of the last.

    Args:
        values: those of the pass, by number.
    """

    def __init__(self, found: Pass, values: dict[int, Any]):
        modules = list(found.parts.model.modules())
        looks = [look for look in found.template.observed if look.where is None]
        self._of = {id(modules[look.module]): _fill(look, values) for look in looks}

    def of(self, module: nn.Module) -> tuple[tuple, Any] | None:
        """(positional inputs, output); None for a module that was not called."""
        return self._of.get(id(module))

    def on(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Set `module.input0`, `.input1`, … and `.output`, detached, as BackPACK does."""
        inputs, output = self.of(module) or ((), None)
        return _set_on_module(module, inputs, output)


def inputs_of_loss(call: LossCall, leaves: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Set `input0`, `input1`, … of an extended loss."""
    inputs = map_leaves(call.args, Read, lambda read: read.out_of(leaves[read.leaf]))
    return _set_on_module(call.loss, inputs, None)


@contextlib.contextmanager
def _set_on_module(module: nn.Module, inputs: Sequence[Any], output: Any) -> Iterator[None]:
    held = {f"input{k}": t for k, t in enumerate(inputs)} | ({"output": output} if output is not None else {})
    before = {name: vars(module)[name] for name in held if name in vars(module)}
    held = {name: t.detach() if isinstance(t, Tensor) else t for name, t in held.items()}
    vars(module).update(held)  # not by `setattr`: nn.Module would register an input that is a parameter
    try:
        yield
    finally:
        for name in held:
            vars(module).pop(name, None)
        vars(module).update(before)


def _fill(look: Any, values: dict[int, Any]) -> Any:
    return filled(look.template, [_value(n, values) for n in look.nodes])


def _value(node: fx.Node, values: dict[int, Any]) -> Any:
    return values[node.meta["key"]]


def own_modules(model: nn.Module) -> list[nn.Module]:
    """The modules with parameters of their own or without children, last first."""
    own = [m for m in model.modules() if own_parameters(m) or next(m.children(), None) is None]
    return own[::-1]


# ---- module extensions ------------------------------


class Backward:
    """Runs the module extensions of one backward pass, on a second forward pass under autograd.

    Args:
        leaves: of the second pass' output, with a graph; `values`: those of that pass, by number.
        gs: the cotangents that arrived.
        calls: the calls of extended losses that the backward pass came by.
    """

    def __init__(
        self,
        found: Pass,
        leaves: list[Tensor],
        values: dict[int, Any],
        gs: Sequence[Tensor | None],
        calls: list[LossCall],
    ):
        self.found, self.leaves, self.gs, self.calls = found, leaves, gs, calls
        self.values = Values(found, values)
        self.columns: dict[Any, Tensor] = {}

    def run(self, module: nn.Module, extensions: Sequence[Any]) -> None:
        """Put on the module's parameters what its module extensions return.

        Raises:
            ExtensionError: for a module with trainable parameters and without an extension.
        """
        known = self.values.of(module)
        trained = [name for name, p in own_parameters(module).items() if p is not None and p.requires_grad]
        if known is None:
            return
        inputs, output = known
        for extension in extensions:
            of_module = vars(extension)["module_extensions"].get(plain_class(module))
            if of_module is None or isinstance(of_module, Carried):
                if trained and isinstance(extension, BackpropExtension) and not isinstance(extension, Extension):
                    _report_missing(extension, module, of_module)
                continue
            g_out = (self._take_down(self.gs, [output])[0],)
            g_inp = tuple(self._take_down(self.gs, [t for t in inputs if isinstance(t, Tensor)]))
            backproped = self._columns(extension, output)
            for name in (n for n in of_module.params if n in trained):
                value = getattr(of_module, name)(extension, module, g_inp, g_out, backproped)
                setattr(own_parameters(module)[name], extension.savefield, value)

    def _take_down(self, gs: Sequence[Tensor | None], to: list[Tensor]) -> list[Tensor | None]:
        pairs = [(f, g) for f, g in zip(self.leaves, gs, strict=True) if g is not None and f.requires_grad]
        wanted = [t for t in to if t.requires_grad]
        found: Iterator[Any] = iter(())
        if wanted and pairs:
            outputs, cotangents = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True, allow_unused=True))
        return [next(found, None) if t.requires_grad else None for t in to]

    def _columns(self, extension: Any, output: Tensor) -> Tensor | None:
        """Columns [V, N, *output] at a module's output, of the samples that count; None if the extension reads none."""
        asked = _columns_asked_for(extension)
        if asked is None:
            return None
        if asked not in self.columns:
            self.columns[asked] = self._columns_at_output(asked)
        leaf, columns = self._leaf(), self.columns[asked]
        gs = [[s if k == leaf else None for k in range(len(self.leaves))] for s in columns]
        stack = [t if (t := self._take_down(g, [output])[0]) is not None else torch.zeros_like(output) for g in gs]
        out, samples = torch.stack(stack), extension.get_subsampling()
        return out if samples is None else out[:, list(samples)]

    def _leaf(self) -> int:
        """The index of the output's leaf that the losses read."""
        reads: set[int] = set()
        for call in self.calls:
            map_leaves((call.args, call.kwargs), Read, lambda read: reads.add(read.leaf))
        if len(reads) != 1 or not all(c.known for c in self.calls):
            raise LossError(
                "a module extension of the second order needs one tensor of the output, read by extended losses alone. "
                "Way out: loss = extend(lossfunc)(extend(model)(x), y)."
            )
        return next(iter(reads))

    def _columns_at_output(self, asked: SqrtGGNExact | SqrtGGNMC) -> Tensor:
        """Columns [V, N, *f] at the output: those of a parameter that is added to f."""
        leaf = self._leaf()
        first = lambda read: replace(read, leaf=0)  # noqa: E731
        calls = [
            replace(c, args=map_leaves(c.args, Read, first), kwargs=map_leaves(c.kwargs, Read, first))
            for c in self.calls
        ]
        f, made = self.leaves[leaf].detach(), self.found.forward.roots
        losses = [c.loss for c in calls]
        key = tuple(map(id, losses)), tuple(c.key() for c in calls), asked, f.shape[1:], f.dtype
        if key not in made:
            made[key] = losses, api.compile(_Shifted(f), TotalLoss(calls), [asked])
        with disable():
            result = made[key][1](f, *targets_of(calls))
        return result[asked]["shift"]


class _Shifted(nn.Module):
    """f plus a parameter of zeros: the Jacobian in it is the identity for every sample."""

    def __init__(self, f: Tensor):
        super().__init__()
        self.shift = nn.Parameter(f.new_zeros(f.shape[1:]))

    def forward(self, f: Tensor) -> Tensor:
        return f + self.shift


def plain_class(module: nn.Module) -> type:
    """A module's own class, extended or not."""
    cls: Any = type(module)
    return cls.plain if hasattr(cls, "plain") else cls


def _columns_asked_for(extension: Any) -> SqrtGGNExact | SqrtGGNMC | None:
    """The columns that an extension's module extensions read, as an extension; None if they read none."""
    if isinstance(extension, Extension):
        needs = extension.requires
        if needs.of_gradients:
            return None
        if hasattr(needs, "mc"):
            draws = needs.mc
            return SqrtGGNMC(mc_samples=draws) if draws else SqrtGGNExact()
        raise ExtensionError(
            f"{extension} has module extensions ({_names(extension)}), and hands down no columns of a root that they could read. "
            "Way out: an extension of the Gauss-Newton, or one of your own (SecondOrderBackpropExtension)."
        )
    if not extension.expects_backpropagation_quantities():
        return None
    strategy: Callable[[], str] = getattr(extension, "get_loss_hessian_strategy", lambda: "exact")
    if strategy() == "exact":
        return SqrtGGNExact()
    if strategy() == "sampling":
        return SqrtGGNMC(mc_samples=extension.get_num_mc_samples())
    raise ExtensionError(
        f"{type(extension).__name__}: the loss Hessian by {strategy()!r}, not by 'exact' or 'sampling'"
    )


def _names(extension: Any) -> str:
    return ", ".join(cls.__name__ for cls in vars(extension)["module_extensions"])


def _report_missing(extension: Any, module: nn.Module, carried: Carried | None) -> None:
    """Raise, warn or stay silent, by `fail_mode`: a module with trainable parameters has no module extension."""
    if carried is not None:
        carried.refuse(extension, module)
    name = plain_class(module).__name__
    text = f"{type(extension).__name__} has no module extension for {name}, which has trainable parameters"
    if extension.fail_mode == FAIL_ERROR:
        raise ExtensionError(f"{text}. Way out: set_module_extension({name}, ...), or fail_mode='SILENT'")
    if extension.fail_mode == FAIL_WARN:
        warnings.warn(text, stacklevel=2)


def customs(context: backpack) -> list[Any]:
    """The extensions of a context that have module extensions."""
    return [e for e in context.asked if vars(e).get("module_extensions")]
