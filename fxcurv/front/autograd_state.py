"""What a forward pass tells autograd beside the ops that it runs: replaced while a model is captured, or refused.

A trace sees ops alone. It would lose a hook on a node of autograd's graph, what `saved_tensors_hooks` do to saved
values, and values that `.data =` replaces: these are refused. `inference_mode` leaves no mark in a trace, so it is
entered as `no_grad`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcurv.errors import CaptureError
from fxcurv.front.side_effects import is_pytorchs, name_of
from fxcurv.ir.origin import is_user_file, running_line
from fxcurv.ir.private import original, patched

_SAVED = "torch.autograd.graph.saved_tensors_hooks.__enter__"


@contextlib.contextmanager
def no_autograd_state() -> Iterator[None]:
    """Refuse, while a model is captured, what a trace would lose; enter `inference_mode` as `no_grad`.

    Raises:
        CaptureError: inside the context, where the model does such a thing.
    """
    thread, enter = threading.get_ident(), original(_SAVED)

    def by_the_user() -> bool:
        return threading.get_ident() == thread and is_user_file(sys._getframe(2).f_code.co_filename)

    def push(hooks: Any) -> None:
        if threading.get_ident() == thread and not is_pytorchs(hooks.pack_hook):
            raise CaptureError(
                f"the forward pass saves tensors by the hook '{name_of(hooks.pack_hook)}' (saved_tensors_hooks), which no "
                f"program runs\n{running_line()}Way out: drop it while fxcurv runs; say what it changes as a "
                "torch.autograd.Function."
            )
        enter(hooks)

    def node(tensor: Tensor) -> Any:
        found = _grad_fn.__get__(tensor)
        return _Node(found) if found is not None and by_the_user() else found

    def replace(tensor: Tensor, new: Tensor) -> None:
        if by_the_user():
            raise CaptureError(
                f"the forward pass replaces the values of a tensor by .data =, which a trace does not see\n{running_line()}"
                "Way out: x + (f(x) - x).detach(), which has the values of f(x) and the derivative of x."
            )
        _data.__set__(tensor, new)

    def cut(tensor: Tensor) -> Tensor:
        if tensor.requires_grad and by_the_user():
            raise CaptureError(
                f"detach_() in the forward pass, which a trace does not see\n{running_line()}Way out: x = x.detach()."
            )
        return _detach(tensor)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patched("torch.Tensor.detach_", cut))
        stack.enter_context(patched("torch.detach_", cut))
        stack.enter_context(patched(_SAVED, push))
        stack.enter_context(patched("torch.Tensor.grad_fn", property(node)))
        stack.enter_context(patched("torch.Tensor.data", property(lambda tensor: _data.__get__(tensor), replace)))
        stack.enter_context(patched("torch.inference_mode.__enter__", _enter_no_grad))
        stack.enter_context(patched("torch.inference_mode.__exit__", _exit_no_grad))
        yield


_grad_fn, _data = original("torch.Tensor.grad_fn"), original("torch.Tensor.data")
_detach = original("torch.Tensor.detach_")


class _Node:
    """A node of autograd's graph that can be read, but takes no hooks."""

    def __init__(self, node: Any):
        self._node = node

    def __getattr__(self, name: str) -> Any:
        if name in ("register_hook", "register_prehook"):
            raise CaptureError(
                f"the forward pass puts a hook on a node of autograd's graph (grad_fn.{name}), which no program runs\n"
                f"{running_line()}Way out: say what it does to the gradient as a torch.autograd.Function, or drop it."
            )
        return getattr(self._node, name)


def _enter_no_grad(mode: Any) -> None:
    mode._before = torch.is_grad_enabled()
    torch.set_grad_enabled(not mode.mode)


def _exit_no_grad(mode: Any, *error: Any) -> None:
    torch.set_grad_enabled(mode._before)
