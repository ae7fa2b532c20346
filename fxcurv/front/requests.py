"""What `compile` is asked for, checked, and what a call needs a program for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxcurv.errors import ArgumentError, ExtensionError
from fxcurv.extensions import Extension
from fxcurv.extensions.parameters import Named
from fxcurv.front.arguments import Arguments
from fxcurv.front.reads import all_modules
from fxcurv.result import Result


class Autocast(NamedTuple):
    """The state of `torch.autocast`; no dtype when it is off."""

    device_type: str
    dtype: torch.dtype | None


class Subject:
    """What is compiled: a model, and the loss of its output (a module or a function; None for the output alone).

    (No dataclass: Dynamo would take a frozen one apart, and guard all that the model holds.)

    Args:
        loss_params: derivatives are also taken in the parameters of the loss, a module, as "loss.<name>".
        watched: programs also return the inputs and outputs of every module.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor] | None, loss_params: bool = False, watched: bool = False
    ):
        self.model, self.loss, self.loss_params, self.watched = model, loss, loss_params, watched

    def named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of all that derivatives may be taken in, as `nn.Module.named_parameters` gives them."""
        yield from self.model.named_parameters(remove_duplicate=remove_duplicate)
        if self.loss_params and isinstance(self.loss, nn.Module):
            held = {id(p) for p in self.model.parameters()} if remove_duplicate else set()
            named = self.loss.named_parameters(remove_duplicate=remove_duplicate)
            yield from ((f"loss.{name}", p) for name, p in named if id(p) not in held)

    @property
    def holder(self) -> Any:
        """The object whose parameters results are put on."""
        return self if self.loss_params else self.model

    def roots(self) -> list[nn.Module]:
        """The model, and the loss if it is a module."""
        return [self.model, *([self.loss] if isinstance(self.loss, nn.Module) else [])]

    def modules(self) -> list[nn.Module]:
        """All modules of the roots, in order."""
        return all_modules(self.model, self.loss)

    def left_out(self) -> tuple[str, ...]:
        """Names of trainable parameters of a loss module in which no derivative is taken."""
        own = {id(p) for _, p in self.named_parameters()}
        named = self.loss.named_parameters() if isinstance(self.loss, nn.Module) else ()
        return tuple(name for name, p in named if p.requires_grad and id(p) not in own)

    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.model.parameters()).device

    def autocast(self) -> Autocast:
        """The caller's autocast: traced into the program as casts, so off when the program runs."""
        kind = self.device().type
        return Autocast(kind, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)


@dataclass(frozen=True)
class Request:
    """What a call needs a program for: arguments of this kind, under the caller's autocast."""

    subject: Subject
    arguments: Arguments
    mode: Autocast
    create_graph: bool = False
    sharded: tuple[Any, ...] = ()
    """Buckets of parameters of which this process holds a shard (`ir.shards.Bucket`)."""
    lend: bool = False
    """Whether floats that `.item()` reads from data are tensors of the program (`front.numbers`)."""

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Leave the caller's modes: programs are made and run outside of them.

        So results are normal tensors, which `attach` and an optimizer can use, also under `inference_mode`.
        """
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.mode.device_type, enabled=False):
            yield

    @contextlib.contextmanager
    def as_called(self) -> Iterator[None]:
        """Enter the caller's autocast, under which the model is traced."""
        with torch.autocast(self.mode.device_type, self.mode.dtype, enabled=self.mode.dtype is not None):
            yield


def tensors_in(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """(name, tensor) of a module's parameters and buffers."""
    yield from module.named_parameters()
    yield from module.named_buffers(remove_duplicate=False)


def check_loss_params(subject: Subject) -> None:
    """Refuse a loss whose parameters cannot be named."""
    if not subject.loss_params:
        return
    if not isinstance(subject.loss, nn.Module):
        raise ArgumentError("loss_params=True, and the loss is no module: pass an nn.Module that holds its parameters")
    held = dict(subject.model.named_parameters(remove_duplicate=False))
    for name, p in subject.loss.named_parameters(remove_duplicate=False):
        if held.get(f"loss.{name}", p) is not p:
            raise ArgumentError(
                f"loss_params=True, and the model has a parameter 'loss.{name}' of its own: give its submodule another name"
            )


def check_trainable(model: Named) -> None:
    """Refuse a model without a parameter that a derivative could be taken in."""
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ArgumentError(f"parameter '{lazy[0]}' is not initialised: run the model once, then compile it")
    complex_ = [name for name, p in model.named_parameters() if p.requires_grad and p.is_complex()]
    if complex_:
        raise ArgumentError(
            f"parameter '{complex_[0]}' is complex, which is not supported: split it into real and imaginary parts, or "
            "freeze it by requires_grad_(False)"
        )
    if not any(p.requires_grad for _, p in model.named_parameters()):
        raise ArgumentError("the model has no trainable parameter: set requires_grad on some")


def checked(extensions: Iterable[Extension], of_drop_in: bool = False) -> tuple[Extension, ...]:
    """The extensions that were asked for; refuses two of one field. `of_drop_in`: they may have module extensions."""
    alone = isinstance(extensions, Extension | type | str) or not isinstance(extensions, Iterable)
    asked: Iterable[Any] = (extensions,) if alone else extensions
    found: list[Extension] = []
    for e in asked:
        if isinstance(e, type) and issubclass(e, Extension):
            raise ExtensionError(f"{e.__name__} is a class: pass an instance, {e.__name__}()")
        if not isinstance(e, Extension):
            raise ExtensionError(f"{e!r} is no extension: pass instances of the classes in fxcurv.extensions")
        if not of_drop_in and vars(e).get("module_extensions"):
            raise ExtensionError(
                f"{e} has module extensions, which the drop-in alone asks: use fxcurv.backpack, or another"
            )
        same = [f for f in found if f.savefield == e.savefield]
        if same:
            raise ExtensionError(
                f"{same[0]} and {e} both save to '{e.savefield}': drop one, or give one another savefield="
            )
        _check_savefield(e)
        found.append(e)
    return tuple(found)


def _check_savefield(e: Extension) -> None:
    """Refuse a field that every result or every tensor has already."""
    name = e.savefield
    if not isinstance(name, str) or not name.isidentifier():
        raise ExtensionError(f"{e} saves to {name!r}, which is no name: give it another savefield=")
    if name in ("loss", "output", "buffers", "sample_norms", "ggn", "hessian", *dir(Result)):
        raise ExtensionError(f"{e} saves to '{name}', which every result has: give it another savefield=")
    if hasattr(Tensor, name):
        raise ExtensionError(f"{e} saves to '{name}', which every tensor has: give it another savefield=")
