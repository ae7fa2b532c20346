"""One module for all modules below BackPACK's `extensions.firstorder`, `.secondorder` and `.curvmatprod`.

Their extensions are those of `fxcurv.backpack.extensions`. Their module extensions, a class per module and quantity,
backpropagate through a module, which the compiler does itself: here each of those names is a `Carried`.
"""

from __future__ import annotations

import sys
from typing import Any

from fxcurv.backpack import extensions
from fxcurv.backpack.extensions import module_extension
from fxcurv.backpack.extensions.module_extension import ModuleExtension
from fxcurv.errors import ExtensionError

__path__: list[str] = []  # makes this a package, so that its submodules can be imported


class Carried(ModuleExtension):
    """Stands for a module extension of BackPACK's own. It serves modules without parameters: the compiler passes them.

    Raises:
        ExtensionError: in a backward pass, for a module with trainable parameters.
    """

    params = ()

    def refuse(self, extension: Any, module: Any) -> None:
        """Say that BackPACK's formula for this module is not here."""
        raise ExtensionError(
            f"{extension.savefield} of {type(module).__name__} would be BackPACK's own {type(self).__name__}, which the drop-in "
            "does not have. Way out: the extension that it is of, or a ModuleExtension of yours for this class."
        )


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    for place in (extensions, module_extension):
        if hasattr(place, name):
            return getattr(place, name)
    if name.islower():
        return sys.modules[__name__]
    return type(name, (Carried,), {"__module__": __name__})
