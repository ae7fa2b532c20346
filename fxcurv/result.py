"""What a call returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fxcurv.errors import ArgumentError, ExtensionError
from fxcurv.extensions import Extension
from fxcurv.extensions.parameters import Named
from fxcurv.ir.private import pytree
from fxcurv.ir.program import Kept


class Result:
    """What a call returns: a registered pytree, detached from the parameters.

    Attributes:
        loss: the loss, 0-dim (none if there is no loss function).
        output: the model's output, in its own structure.
        grad: parameter name -> gradient.
        buffers: buffer name -> new value, if buffers are not updated.
        <savefield>: for every extension, parameter name -> value.
        sizes: under `mesh=`, how many samples each rank has.
    """

    def __init__(
        self,
        fields: dict[str, Any],
        extensions: tuple[Extension, ...],
        model: Named | None,
        memory: Kept | None = None,
    ):
        self._fields, self._extensions, self._model, self._memory = fields, extensions, model, memory
        self._gather: Any = None

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("_fields", {})
        if name in fields:
            return fields[name]
        hint = " (outputs=False keeps no output: run the model for it)" if name == "output" and "loss" in fields else ""
        raise AttributeError(f"the result has no '{name}'{hint}: it has {', '.join(fields)}")

    def __getitem__(self, extension: Extension) -> Any:
        """The field of an extension instance."""
        if extension not in self._extensions:
            raise ExtensionError(f"{extension} was not asked for: the result has {list(self._extensions)}")
        return self._fields[extension.savefield]

    @property
    def extensions(self) -> tuple[Extension, ...]:
        """The extensions that were asked for."""
        return self._extensions

    def __dir__(self):
        return [*super().__dir__(), *self._fields]

    def __repr__(self) -> str:
        return f"Result({', '.join(self._fields)})"

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds values only, without the model and the memory that they came from."""
        return {**self.__dict__, "_model": None, "_memory": None, "_gather": None}

    def spread_over(self, sizes: Sequence[int], gather: Callable[[Any, Any], Any], places: dict[str, Any]) -> None:
        """Note that this is one rank's result, how many samples each rank has (`sizes`), and how to gather fields."""
        self._fields["sizes"] = tuple(sizes)
        known = {**places["results"], **places["extras"], "output": places["output"]}
        self._gather = lambda field: (
            gather(self._fields[field], known[field]) if field in known else self._fields[field]
        )

    def whole(self, field: str) -> Any:
        """A field of the whole batch, under `mesh=`: per-sample values are gathered from all ranks.

        All ranks have to call this.

        Raises:
            ArgumentError: without `mesh=`, and for a copied result.
        """
        if self._gather is None:
            raise ArgumentError("the result is of all of the batch as it is: whole() is for calls under mesh=")
        getattr(self, field)
        return self._gather(field)

    def attach(self, model: nn.Module | None = None, loss: nn.Module | None = None) -> Result:
        """Put the results on the parameters.

        `p.grad` accumulates as `backward()` does: in place, in memory of its own, so that a later `zero_grad`
        or another `attach` does not reach into this result. `p.<savefield>` is this result's own tensor.

        Args:
            model: the module with the parameters (default: the compiled one; a copied or loaded result has none).
            loss: the loss module, if the result has its parameters (default, without `model`: the compiled one).
        """
        holder = self._model if model is None else model
        if holder is None:
            raise ArgumentError("a copied result knows no model: pass one, result.attach(model)")
        named = dict(holder.named_parameters())
        named |= {f"loss.{name}": p for name, p in loss.named_parameters()} if loss is not None else {}
        grads = self._fields.get("grad", {})
        values = {e.savefield: self._fields[e.savefield] for e in self._extensions}
        missing = {name for field in (grads, *values.values()) for name in field} - set(named)
        if missing:
            raise ArgumentError(f"the model has no {sorted(missing)}: attach to the model that was compiled")
        with torch.no_grad():
            for name, gradient in grads.items():
                p = named[name]
                if p.grad is None:
                    p.grad = gradient.clone()
                else:
                    p.grad.add_(gradient)
        for savefield, field in values.items():
            for name, value in field.items():
                setattr(named[name], savefield, value)
        return self


def _flatten_result(result: Result) -> tuple[list[Any], Any]:
    names = list(result._fields)
    return [result._fields[n] for n in names], (tuple(names), result._extensions, result._model)


def _unflatten_result(values: Iterable[Any], context: Any) -> Result:
    names, extensions, model = context
    return Result(dict(zip(names, values, strict=True)), extensions, model)


pytree.register_pytree_node(Result, _flatten_result, _unflatten_result)
