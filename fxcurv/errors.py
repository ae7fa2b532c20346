"""One class per thing a user can do about it. Every message names the place and the way out."""

from __future__ import annotations

import os
import re

import torch
from torch import fx

from fxcurv._torch import OpOverload


class FxcurvError(Exception):
    """Base of all errors raised by fxcurv."""


class ArgumentError(FxcurvError, ValueError):
    """An argument of `compile` or of a call is wrong: change the call."""


class ExtensionError(FxcurvError, ValueError):
    """An extension is unknown, ill-configured or asked for twice: change the list of extensions."""


class CaptureError(FxcurvError):
    """`torch.export` cannot trace the model or the loss: change the model where the message points."""


class CustomFunctionError(CaptureError):
    """A custom `autograd.Function`, whose backward `torch.export` would drop silently."""


class LossError(FxcurvError, ValueError):
    """The loss does not have what the quantity needs (scalar, differentiable, convex, a sum over samples)."""


class MixedSamplesError(FxcurvError):
    """An op mixes samples, so quantities per sample do not exist behind it."""


class UnsupportedOpError(FxcurvError):
    """An op has no rule and the general fallback cannot serve it: pass `rules={op: MyRule()}`."""


class FieldError(FxcurvError):
    """A field would not be of all that the gradient beside it is of: change the backward pass."""


class SelfCheckError(FxcurvError):
    """A program's numbers are not those of plain PyTorch, or do not add up (`compile(check="first")`): please report it."""


class InternalError(FxcurvError):
    """An invariant of the compiler does not hold: please report it."""


# Frames of these packages are never the user's line.
_INSIDE = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (torch.__file__, __file__))


def is_user_file(path: str) -> bool:
    """Whether a frame of this file is the user's own code."""
    return not path.startswith((*_INSIDE, "<eval_with_key>", "<frozen", "<string>"))


def is_ours(path: str) -> bool:
    """Whether a frame of this file is the compiler's."""
    return path.startswith(_INSIDE[1])


def locate(node: fx.Node) -> str:
    """Where a node of a captured graph comes from: op, module path and the user's source line."""
    meta = node.meta
    origin = meta.get("origin", {})
    op = origin.get("op") or (node.target if node.op == "call_function" else node.name)
    op = op if isinstance(op, str | OpOverload) else getattr(op, "__name__", op)
    module = origin.get("module") or module_path(node)
    line = source_line(meta.get("stack_trace") or origin.get("stack_trace") or "")
    where = f" in module '{module}'" if module else " in the loss" if origin.get("in_loss") or in_loss(node) else ""
    return f"op {op}{where}" + (f"\n  {line}" if line else "")


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost user module that emitted `node` ("" for the model itself)."""
    paths = [path for path in _stack(node) if path.startswith("model.")]
    return paths[-1].removeprefix("model.") if paths else ""


def _stack(node: fx.Node) -> list[str]:
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def in_loss(node: fx.Node) -> bool:
    """What is captured calls the model and the loss, so what is outside the model is the loss."""
    stack = _stack(node)
    return bool(stack) and not any(path.split(".")[0] == "model" for path in stack)


def source_line(trace: str) -> str:
    """The last frame of `trace` that is the user's own, as 'File "x.py", line 3, in forward: code'."""
    lines = trace.strip().splitlines()
    found = ""
    for header, code in zip(lines, [*lines[1:], ""], strict=False):
        frame = re.match(r'\s*File "(.+?)", line \d+', header)
        if frame and is_user_file(frame[1]):
            found = f"{header.strip()}: {code.strip()}"
    return found
