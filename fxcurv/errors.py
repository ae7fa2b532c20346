"""One class per thing a user can do about it. Every message names the place and the way out."""

from __future__ import annotations


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


class InternalError(FxcurvError):
    """An invariant of the compiler does not hold: please report it."""


def locate(node) -> str:
    """Where a node of a captured graph comes from: op, module path and the user's source line."""
    meta = node.meta
    origin = meta.get("origin", {})
    op = origin.get("op") or getattr(node.target, "__name__", str(node.target))
    module = origin.get("module") or module_path(node)
    line = source_line(meta.get("stack_trace") or origin.get("stack_trace") or "")
    return f"op {op}" + (f" in module '{module}'" if module else "") + (f"\n  {line}" if line else "")


def module_path(node) -> str:
    """The dotted path of the innermost user module that emitted `node` ("" for the model itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path.startswith("model.")]
    return paths[-1].removeprefix("model.") if paths else ""


def source_line(trace: str) -> str:
    """The last frame of `trace` outside torch and fxcurv, as 'File "x.py", line 3: code'."""
    lines = trace.strip().splitlines()
    found = ""
    for header, code in zip(lines, [*lines[1:], ""], strict=True):
        inside = any(part in header for part in ("/torch/", "torch/nn", "/fxcurv/", "<eval_with_key>", "torch/fx"))
        if header.strip().startswith("File") and not inside:
            found = f"{header.strip()}: {code.strip()}"
    return found
