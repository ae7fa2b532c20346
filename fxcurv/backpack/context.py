"""The context in which `backward()` computes quantities, and the switch that makes extended modules plain ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fxcurv.backpack.extensions.module_extension import BackpropExtension
from fxcurv.errors import ArgumentError
from fxcurv.extensions import Extension
from fxcurv.front.requests import checked

_active: list[backpack] = []  # global, not per thread: autograd runs CUDA's backward in threads of its own
_plain = 0


class backpack:  # noqa: N801
    """`with backpack(DiagGGNMC(), ...): loss.backward()` puts quantities on the parameters.

    Args:
        extensions: instances of the classes in `fxcurv.backpack.extensions`, or of your own subclasses of
            `fxcurv.backpack.extensions.backprop_extension.BackpropExtension`.
        extension_hook: called with the extended loss, then with every submodule of the model that has parameters of its
            own or no children, last first, once its parameters have their quantities. During the call the module has
            `input0`, `input1`, … and, unless it is a loss, `output`, detached. What the hook deletes from parameters is
            freed.
        debug: accepted, without effect.
        retain_graph: accepted, without effect: `backward(retain_graph=True)` alone decides.
        check: "first" (default): the first time that a model's gradient and quantities are computed for a kind of input,
            output and gradient are compared with a plain forward and backward pass of the model, and sums of individual
            quantities with their totals (not for models that draw random numbers). A difference raises `SelfCheckError`.
            None: nothing is compared.

    Raises:
        ExtensionError: for a class instead of an instance, an unknown extension, or one asked for twice.
        ArgumentError: for another `check`.
    """

    def __init__(
        self,
        *extensions: Any,
        extension_hook: Callable[[nn.Module], None] | None = None,
        debug: bool = False,
        retain_graph: bool = False,
        check: str | None = "first",
    ):
        if check not in ("first", None):
            raise ArgumentError(f"check={check!r}: pass 'first' or None")
        own = [e for e in extensions if isinstance(e, BackpropExtension) and not isinstance(e, Extension)]
        self.extensions = checked([e for e in extensions if e not in own], of_drop_in=True)
        self.asked, self.extension_hook, self.check = extensions, extension_hook, check

    def __enter__(self) -> backpack:
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _active.pop()


def current() -> backpack:
    """The innermost context; without one, a backward pass computes the gradient alone."""
    return _active[-1] if _active else backpack()


class CTX:
    """The part of BackPACK's own context that other code asks: which extensions are active."""

    @staticmethod
    def get_active_exts() -> tuple[Any, ...]:
        """The extensions of the innermost context."""
        return current().asked

    @staticmethod
    def is_extension_active(*classes: type) -> bool:
        """Whether an extension of one of these classes is active."""
        return any(isinstance(e, classes) for e in CTX.get_active_exts())

    @staticmethod
    def get_debug() -> bool:
        """False: nothing is printed."""
        return False


@contextlib.contextmanager
def disable() -> Iterator[None]:
    """Make extended modules plain ones: nothing is kept for a backward pass with quantities."""
    global _plain
    _plain += 1
    try:
        yield
    finally:
        _plain -= 1


def is_disabled() -> bool:
    """Whether extended modules are plain ones now."""
    return _plain > 0
