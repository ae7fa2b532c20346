"""Products with the Jacobians of a module. BackPACK has a class per class of module; here one serves all."""

from __future__ import annotations

from typing import Any

from fxcurv.backpack.core.derivatives.convnd import weight_jac_t_save_memory
from fxcurv.backpack.extensions.module_extension import Derivatives

__all__ = ["Derivatives", "weight_jac_t_save_memory"]


def __getattr__(name: str) -> Any:
    """`LinearDerivatives`, `Conv2DDerivatives`, … are `Derivatives`.

    Raises:
        AttributeError: for any other name.
    """
    if name.endswith("Derivatives"):
        return Derivatives
    raise AttributeError(
        f"{__name__} has no '{name}': there are no formulas per module here, the compiler's rules serve all (docs/extending.md)"
    )
