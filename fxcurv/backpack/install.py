"""`install`: from then on `import backpack` imports the drop-in, also in packages that are built on BackPACK.

The modules are those of `fxcurv.backpack` under a second name, not copies. BackPACK spreads some names over more files:
`PLACES` says which file has them here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HERE = __package__
PLACES = {
    "extensions.firstorder": "extensions.carried",
    "extensions.secondorder": "extensions.carried",
    "extensions.curvmatprod": "extensions.carried",
    "extensions.curvature": "extensions",
    "extensions.mat_to_mat_jac_base": "extensions.module_extension",
    "core.derivatives": "core.derivatives",
}


class _Alias(Loader):
    """Makes no module: a name of BackPACK's becomes another name of a module of the drop-in."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(_place(module.__name__))


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not _is_backpacks(fullname):
            return None
        place = _place(fullname)
        if importlib.util.find_spec(place) is None:
            raise ModuleNotFoundError(
                f"{fullname} is BackPACK's own, and the drop-in that fxcurv.backpack.install() put in its place has no {place}\n"
                "Way out: an extension or a rule of your own (docs/from-backpack.md), or uninstall() and BackPACK itself.",
                name=fullname,
            )
        return ModuleSpec(fullname, _Alias(), is_package=True)


def _is_backpacks(name: str) -> bool:
    return name == "backpack" or name.startswith("backpack.")


def _place(name: str) -> str:
    """The module of the drop-in that has the names of BackPACK's module `name`."""
    _, _, inner = name.partition(".")
    for prefix, place in PLACES.items():
        if inner == prefix or inner.startswith(prefix + "."):
            return f"{HERE}.{place}"
    return f"{HERE}.{inner}" if inner else HERE


_finder = _Finder()


def install() -> None:
    """Let `import backpack` and all of its submodules be the drop-in, in this process, until `uninstall()`.

    Call it before anything imports BackPACK (`import cockpit`, `import vivit`). Called again it does nothing.

    Raises:
        ImportError: if BackPACK itself is imported already: what was imported from it would stay.
    """
    if _finder in sys.meta_path:
        return
    held = [name for name in sys.modules if _is_backpacks(name)]
    if held:
        where = getattr(sys.modules[held[0]], "__file__", None)
        raise ImportError(
            f"BackPACK itself is imported already ({where}), and what was imported from it would stay. Way out: call "
            "fxcurv.backpack.install() first of all, before anything that imports it.",
            name="backpack",
        )
    sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """Let `import backpack` be BackPACK again. What was imported under its name stays as it is."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
        for name in [name for name in sys.modules if _is_backpacks(name)]:
            del sys.modules[name]
