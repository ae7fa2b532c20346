"""Extended models that take one another's outputs: `loss(extend(head)(extend(body)(x)), y)`.

Each model has its own pass and gradient. Second-order columns are born at the output of the last model. For an earlier
model, it and all models after it are captured as one, and the forward pass runs once more, from the same inputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fxcurv.backpack.losses import moved_from, pass_of, same_gradients
from fxcurv.backpack.parts import ModelParts, Pass
from fxcurv.errors import LossError
from fxcurv.extensions import Extension
from fxcurv.ir.private import running_backward

# holds no `Chain`, which would keep its first model alive
_chains: weakref.WeakKeyDictionary[nn.Module, dict[Any, ModelParts]] = weakref.WeakKeyDictionary()


class Chain(nn.Module):
    """Models in sequence: each takes the output of the one before."""

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first, *rest = self.models
        out = first(*args, **kwargs)
        for model in rest:
            out = model(out)
        return out


def follow(found: Pass, args: tuple, kwargs: dict) -> None:
    """Note at the pass that made an input of this call that its output goes on into the pass `found`."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    for t in tensors:
        before = pass_of(moved_from(t))
        if before is not None:
            whole = len(args) == 1 and not kwargs and len(before.leaves) == 1 and before.leaves[0]() is t
            before.follows.append(found if whole else None)


def second_order(
    found: Pass, extensions: Sequence[Extension], values: dict[int, Any], grad: dict[str, Tensor], check: bool
) -> dict[str, dict[str, Any]] | None:
    """field -> parameter name -> value, for a model whose output went into others.

    None if it went into no other model, or an extended loss reads it.

    Args:
        grad: gradients of the model's parameters, from its own backward part.

    Raises:
        LossError: where the models cannot be captured as one, or something else reads the output as well.
    """
    if not found.follows or any(call.scale is not None for call in found.calls):
        return None
    passes = [found]
    while passes[-1].follows:
        after = passes[-1].follows
        if len(after) != 1 or after[0] is None:
            raise _chain_error(
                found, "its output goes into several extended models, or into one with other inputs beside it"
            )
        passes.append(after[0])
    last = passes[-1]
    if any(p.forward.random for p in passes) or any(p.template.mutations for p in passes):
        raise _chain_error(found, "one of the models draws random numbers or updates buffers, and would do so again")
    task, calls = last.arrived
    if task != running_backward():
        raise _chain_error(found, "its backward pass did not come by the last of them")
    models = [p.parts.model for p in passes]
    chain = Chain(models)
    parts = _chains.setdefault(models[0], {}).setdefault(tuple(map(id, models[1:])), ModelParts(chain)).of(chain)
    results = _run_as_one(parts, found, tuple(extensions), values, last, calls, check)
    own = {f"models.0.{name}": name for name in found.template.params}
    if not same_gradients([results["grad"][long] for long in own], [grad[name] for name in own.values()]):
        raise _chain_error(found, "its output also reaches the loss by another way")
    prefix = "models.0."
    return {
        e.savefield: {
            name.removeprefix(prefix): v for name, v in results[e.savefield].items() if name.startswith(prefix)
        }
        for e in extensions
    }


def _run_as_one(
    parts: ModelParts, found: Pass, extensions: tuple, values: dict[int, Any], last: Pass, calls: list, check: bool
) -> dict[str, Any]:
    """Results of all models, captured as one, by a pass of their own."""
    arguments = found.with_inputs(found.bound(values))
    whole, flat = parts.begin_with(arguments, found.mode)
    leaves, _, made = parts.run(whole.forward, flat)
    whole.calls = calls
    return parts.backward(whole, extensions, leaves, last.cotangents, made, check)


def _chain_error(found: Pass, why: str) -> LossError:
    return LossError(
        f"{type(found.parts.model).__name__} is an extended model whose output goes into other extended models, and {why}: its "
        "quantities of the second order are not known. Way out: extend one module that calls them, or fxcurv.compile it."
    )
