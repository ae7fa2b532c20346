"""What `compile` was asked for, checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxcurv.errors import ArgumentError, ExtensionError
from fxcurv.extensions import Extension
from fxcurv.result import Result


def check_trainable(model: nn.Module) -> None:
    """Refuse a model without a parameter that a derivative could be taken of."""
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ArgumentError(f"parameter '{lazy[0]}' is not initialised: run the model once, then compile it")
    complex_ = [name for name, p in model.named_parameters() if p.requires_grad and p.is_complex()]
    if complex_:
        raise ArgumentError(
            f"parameter '{complex_[0]}' is complex, which is not supported: split it into real and imaginary parts, or "
            "freeze it by requires_grad_(False)"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ArgumentError("the model has no trainable parameter: set requires_grad on some")


def checked(extensions: Iterable[Extension]) -> tuple[Extension, ...]:
    """The extensions that were asked for, each once and with a field of its own."""
    alone = isinstance(extensions, Extension | type | str) or not isinstance(extensions, Iterable)
    asked: Iterable[Any] = (extensions,) if alone else extensions
    found: list[Extension] = []
    for e in asked:
        if isinstance(e, type) and issubclass(e, Extension):
            raise ExtensionError(f"{e.__name__} is a class: pass an instance, {e.__name__}()")
        if not isinstance(e, Extension):
            raise ExtensionError(f"{e!r} is no extension: pass instances of the classes in fxcurv.extensions")
        same = [f for f in found if f.savefield == e.savefield]
        if same:
            raise ExtensionError(
                f"{same[0]} and {e} both save to '{e.savefield}': drop one, or give one another savefield="
            )
        _check_savefield(e)
        found.append(e)
    return tuple(found)


def _check_savefield(e: Extension) -> None:
    """A result and a parameter must have room for the field."""
    name = e.savefield
    if not isinstance(name, str) or not name.isidentifier():
        raise ExtensionError(f"{e} saves to {name!r}, which is no name: give it another savefield=")
    if name in ("loss", "output", "buffers", "sample_norms", "ggn", "hessian", *dir(Result)):
        raise ExtensionError(f"{e} saves to '{name}', which every result has: give it another savefield=")
    if hasattr(Tensor, name):
        raise ExtensionError(f"{e} saves to '{name}', which every tensor has: give it another savefield=")
