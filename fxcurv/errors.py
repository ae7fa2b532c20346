"""One class per thing a user can do about it. Every message names the place and the way out."""

from __future__ import annotations


class FxcurvError(Exception):
    """Base of all errors raised by fxcurv."""


class ArgumentError(FxcurvError, ValueError):
    """An argument of `compile` or of a call is wrong: change the call."""


class NonFiniteError(ArgumentError):
    """A batch gives NaN or infinity where a step would enter them into weights: skip the batch."""


class ExtensionError(FxcurvError, ValueError):
    """An extension is unknown, ill-configured or asked for twice: change the list of extensions."""


class CaptureError(FxcurvError):
    """`torch.export` cannot trace the model or the loss: change the model where the message points."""


class CustomFunctionError(CaptureError):
    """A custom `autograd.Function`, whose backward `torch.export` would drop silently."""


class LossError(FxcurvError, ValueError):
    """The loss lacks a property that the quantity needs (scalar, differentiable, convex, a sum over samples)."""


class MixedSamplesError(FxcurvError):
    """An op mixes samples, so quantities per sample do not exist for the parameters before it."""


class UnsupportedOpError(FxcurvError):
    """An op has no rule and the general fallback cannot serve it: pass `rules={op: MyRule()}`."""


class FieldError(FxcurvError):
    """A field would cover less than the gradient beside it: change the backward pass."""


class SelfCheckError(FxcurvError):
    """A program's numbers are not those of plain PyTorch, or do not add up (`compile(check="first")`): please report it."""


class InternalError(FxcurvError):
    """An invariant of the compiler does not hold: please report it."""


class RankError(FxcurvError):
    """Another rank of the mesh failed, or ranks do not agree: the message says which rank, and why."""
