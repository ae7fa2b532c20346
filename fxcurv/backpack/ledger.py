"""Records what a backward pass puts on parameters, so that no field covers less than the gradient beside it.

A backward pass may reach an extended model twice, go around it (a submodule that was called alone), or through
derivatives of an earlier backward pass (a gradient penalty). `p.grad` adds all of this up, a field would not: that is
an error.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxcurv.backpack.context import backpack, current
from fxcurv.errors import ExtensionError, FieldError
from fxcurv.extensions import Extension
from fxcurv.extensions.parameters import chosen
from fxcurv.ir.private import running_backward

KEPT = 8  # how many backward passes are kept: checkpointing starts some inside others


@dataclass
class _Record:
    """One backward pass.

    Attributes:
        fields: (id of a parameter, field) -> weak reference to the pass of a model that wrote it.
        reached: ids of the parameters of extended models' passes.
        foreign: ids of parameters with a gradient that no field covers.
    """

    fields: dict[tuple[int, str], Any] = field(default_factory=dict)
    reached: set[int] = field(default_factory=set)
    foreign: set[int] = field(default_factory=set)


_records: dict[int, _Record] = {}
_watched = WeakTensorKeyDictionary()


def _record() -> _Record:
    task = running_backward()
    if task not in _records:
        for old in sorted(_records)[: 1 - KEPT or None]:
            del _records[old]
        _records[task] = _Record()
    return _records[task]


def write(
    found: Any, model: nn.Module, params: dict[str, nn.Parameter], results: dict[str, dict], context: backpack
) -> None:
    """Put the fields of one pass of `model` on its parameters.

    Raises:
        FieldError: if another pass has put them there in the same backward pass.
    """
    record = _record()
    for e in context.extensions:
        for name in results[e.savefield]:
            known = record.fields.get((id(params[name]), e.savefield))
            if known is not None and known() is not found:
                _drop(params.values(), context.extensions)
                raise FieldError(
                    f"{type(model).__name__} ran forward more than once before this backward pass, which reaches parameter "
                    f"'{name}' through all of it: its gradient would be of all passes, and {e.savefield} of one.\nWay out: one "
                    "forward pass of all samples (torch.cat), a backward() for each, or fxcurv.compile of a module that calls it."
                )
    for e in context.extensions:
        for name, value in results[e.savefield].items():
            setattr(params[name], e.savefield, value)
            record.fields[id(params[name]), e.savefield] = weakref.ref(found)
    record.reached |= {id(params[name]) for name in found.template.params}


def unaccounted(*params: Tensor) -> None:
    """Note that this backward pass gives parameters a gradient that no field covers."""
    _record().foreign |= {id(p) for p in params}


def alias(p: Tensor) -> Tensor:
    """A view of a parameter for derivatives of a backward pass: a gradient through it is noted as unaccounted."""
    if not p.requires_grad:
        return p
    other, held = p.view_as(p), weakref.ref(p)
    other.register_hook(lambda _: unaccounted(held()))
    return other


def watch(model: nn.Module) -> None:
    """Check after every backward pass that parameters with a gradient also got the fields that were asked for."""
    for name, p in model.named_parameters():
        if p not in _watched and p.requires_grad and p.is_leaf:
            _watched[p] = p.register_post_accumulate_grad_hook(_checker(weakref.ref(model), name))


def _checker(model: Any, name: str) -> Any:
    def check(p: Tensor) -> None:
        context = current()
        if not context.extensions:
            return
        record = _record()
        if id(p) not in record.reached or id(p) in record.foreign:
            missing = [e for e in context.extensions if _is_asked_for(e, model(), name)]
            if missing:
                _drop([p], missing)
                raise FieldError(
                    f"parameter '{name}' got a gradient in this pass, and {', '.join(map(str, missing))} is not of all of "
                    "it: some of it came through derivatives of an earlier backward pass (a gradient penalty), or past the "
                    "extended model (a submodule called alone, a forward pass under disable(), a loss of the parameters "
                    "alone).\nWay out: fxcurv.compile of a model and loss that compute all of it; or this part in a backward() "
                    "of its own, outside of the context."
                )

    return check


def _is_asked_for(extension: Extension, model: nn.Module | None, name: str) -> bool:
    if extension.params is None or model is None:
        return True
    return name in chosen(extension.params, model, ExtensionError, type(extension).__name__)


def _drop(params: Any, extensions: Any) -> None:
    for p in params:
        for e in extensions:
            p.__dict__.pop(e.savefield, None)
