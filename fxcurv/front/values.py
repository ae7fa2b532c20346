"""`params=` of a call: tensors in place of the module's own parameters."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxcurv.errors import ArgumentError
from fxcurv.extensions.parameters import Named


def given_values(model: Named, params: Any) -> tuple[dict[str, Tensor], int | None]:
    """(tensors by the names of `named_parameters()`, E if some are stacks [E, *P] of several models' values).

    Raises:
        ArgumentError: for a name, shape, dtype or device that no parameter has, or stacks of different lengths.
    """
    if not isinstance(params, Mapping):
        raise ArgumentError(f"params= is a {type(params).__name__}: pass a dict from parameter names to tensors")
    canonical = {id(p): name for name, p in model.named_parameters()}
    held = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    stacks: dict[str, int] = {}
    for name, value in params.items():
        if name not in held:
            close = difflib.get_close_matches(str(name), held, 3) or list(held)
            raise ArgumentError(f"params= has '{name}', which is no parameter: the model has {', '.join(close)}")
        p = held[name]
        if not isinstance(value, Tensor):
            raise ArgumentError(f"params['{name}'] is a {type(value).__name__}: pass a tensor")
        stacked = value.ndim == p.ndim + 1
        if tuple(value.shape)[stacked:] != tuple(p.shape):
            shape = ", ".join(map(str, p.shape))
            raise ArgumentError(f"params['{name}'] is {list(value.shape)}: pass [{shape}], or a stack [E, {shape}]")
        if value.dtype != p.dtype or value.device != p.device:
            raise ArgumentError(
                f"params['{name}'] is {value.dtype} on {value.device}, and the parameter {p.dtype} on {p.device}: convert it"
            )
        if canonical[id(p)] in found:
            raise ArgumentError(f"params= has '{name}' and another name of the same parameter: pass one")
        found[canonical[id(p)]] = value
        stacks |= {name: len(value)} if stacked else {}
    if len(set(stacks.values())) > 1 or 0 in stacks.values():
        raise ArgumentError(f"params= has stacks of {stacks}: pass stacks of one length, at least 1")
    return found, next(iter(stacks.values()), None)


def member(model: Named, values: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """The values of one model of a stack; those that are not stacked are shared."""
    held = dict(model.named_parameters())
    return {name: t[index] if t.ndim > held[name].ndim else t for name, t in values.items()}
